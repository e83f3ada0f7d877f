"""PrefixCache: which block holds the keys and values of which tokens. Pure: no torch."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from hashlib import blake2b

from .block_pool import BlockPool
from .sequence import Sequence
from .swap import SwapSpace, no_swap

HASH_BYTES = 16


class PrefixCache:
    """Finds blocks by their contents, so that tokens which somebody computed before are not computed again.

    What a block holds depends on its tokens and on everything before them. So its name is a hash of the
    previous block's name and its own tokens; the first block's parent is the request's ``cache_root``. Who
    has another root shares nothing. Names are made once per block and sequence.

    Blocks are named when they are full and computed, and never written again. They may be held or free; a
    free one is found until it is handed out anew by ``allocate``. Two sequences that computed the same at
    the same time keep a block each: the first has the name.

    Free blocks are kept by what they are worth: without a name nothing, with one little, and the more the
    more waiting sequences begin with it (``want``, ``unwant``). Contents that waiting sequences want and that
    must make way all the same go to the swap space if that pays, and come back from there.

    Invariant: a name belongs to one block and a block has one name; a name in the swap space is wanted, and
    belongs to no block.
    """

    def __init__(
        self, pool: BlockPool, block_size: int, *, enabled: bool = True, swap: SwapSpace | None = None
    ) -> None:
        self._pool, self._block_size, self._enabled = pool, block_size, enabled
        self.swap = swap or no_swap()
        self._block: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}
        self._wanted: Counter[bytes] = Counter()
        self._wants: dict[Sequence, int] = {}
        """So many blocks were counted for each that waits: a token that is coming may turn out to be the end,
        and then ``_usable`` says less."""
        self.queries = 0
        """Tokens of sequences that started …"""
        self.hits = 0
        """… and those of them that were found. Since the start; recomputation after a preemption apart."""

    # ---- what waiting sequences begin with

    def want(self, seq: Sequence) -> None:
        """``seq`` begins to wait. Its first blocks are rated last, and so handed out last among equals."""
        self._name_blocks(seq)
        self._wants[seq] = self._usable(seq)
        for name in reversed(seq.hashes[: self._wants[seq]]):
            self._wanted[name] += 1
            self._rate(name)

    def unwant(self, seq: Sequence) -> None:
        """It waits no longer."""
        for name in reversed(seq.hashes[: self._wants.pop(seq)]):
            self._wanted[name] -= 1
            if not self._wanted[name]:
                del self._wanted[name]
                self.swap.drop(name)
            self._rate(name)

    def trail(self, seq: Sequence) -> list[bytes]:
        """Names of its 1st, 2nd, 4th, 8th … block, the last first: beginnings that others may have too."""
        usable = self._usable(seq)
        return [seq.hashes[2**power - 1] for power in reversed(range(usable.bit_length()))]

    # ---- what running sequences take and give

    def find(self, seq: Sequence) -> list[int | None]:
        """Blocks with what comes next in ``seq``, from the block it stands in on; None: in the swap space.

        Never its last token: somebody has to ask the model what follows that one.
        """
        found: list[int | None] = []
        for name in seq.hashes[seq.computed // self._block_size : self._usable(seq)]:
            block = self._block.get(name)
            if block is None and name not in self.swap:
                break
            found.append(block)
        return found

    def next_name(self, seq: Sequence) -> bytes | None:
        """Name of the block that ``seq`` would compute next, if it could have it from somebody else."""
        index = seq.computed // self._block_size
        return seq.hashes[index] if index < self._usable(seq) else None

    def attach(self, seq: Sequence) -> None:
        """Let ``seq`` hold all that ``find`` finds; a block half done for the same tokens is given back.

        What is in the swap space comes back as far as there are free blocks.
        """
        found = self.find(seq)
        if not found:
            return
        have, before = seq.computed // self._block_size, seq.computed
        self._pool.share(block for block in found if block is not None)
        blocks = self._bring_back(found, seq.hashes[have : have + len(found)])
        if not blocks:
            return
        self._pool.release(seq.block_table[have:])
        seq.block_table[have:] = blocks
        seq.computed = (have + len(blocks)) * self._block_size
        if not seq.preempted:
            self.hits += seq.computed - before
            seq.cached_tokens += max(0, min(seq.computed, seq.prompt_len) - before)

    def started(self, seq: Sequence) -> None:
        """``seq`` ceases to wait and runs, for the first time or again."""
        self.attach(seq)  # before nobody wants what is in the swap space for it
        self.unwant(seq)
        if self._enabled and not seq.preempted:
            self.queries += len(seq.tokens)

    def publish(self, seq: Sequence, before: int) -> None:
        """Blocks of ``seq`` became full when it was computed from ``before`` to where it is: name them, as
        far as their tokens are known."""
        size = self._block_size
        first, end = before // size, min(seq.computed, len(seq.tokens)) // size
        if not self._enabled or first >= end:
            return
        self._name_blocks(seq)
        for index in range(first, end):
            if seq.hashes[index] not in self._block:
                self._remember(seq.hashes[index], seq.block_table[index])

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks from the pool, all or none, to be written anew."""
        blocks = self._pool.allocate(count)
        for block in blocks or ():
            name = self._name.pop(block, None)
            if name is not None:
                del self._block[name]
                if name in self._wanted:
                    self.swap.save(name, block)
        return blocks

    def forget(self, blocks: Iterable[int]) -> None:
        """What is in these is no good."""
        for block in blocks:
            name = self._name.pop(block, None)
            if name is not None:
                del self._block[name]
                self._pool.rate(block, 0)

    def check(self, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the invariant holds, and named blocks are where their names say."""
        self.swap.check()
        assert len(self._block) == len(self._name), "two blocks have one name, or two names one block"
        assert all(self._block[name] == block for block, name in self._name.items())
        assert not self.swap.names() & self._block.keys(), "in the cache and swapped out"
        assert self._wants.keys() == set(waiting), "who waits, and who wants blocks"
        counted = (name for seq, count in self._wants.items() for name in seq.hashes[:count])
        assert self._wanted == Counter(counted), (
            "somebody's wants are not on record, or somebody's who is gone"
        )
        assert self.swap.names() <= self._wanted.keys(), "swapped out for nobody"
        for seq in running:
            for index, block in enumerate(seq.block_table):
                full = (index + 1) * self._block_size <= seq.computed
                named = self._name.get(block)
                assert full or self._pool.refs(block) == 1, f"{seq.id} shares a block that is not full"
                assert full or named is None, f"{seq.id} will write to a block that others may find"
                assert named in (None, *seq.hashes[index : index + 1]), f"{seq.id} holds another's tokens"

    def _name_blocks(self, seq: Sequence) -> None:
        """Name the full blocks of ``seq.tokens`` that have no name in ``seq.hashes`` yet. O(new tokens)."""
        if not self._enabled:
            return
        size, names, tokens = self._block_size, seq.hashes, seq.tokens
        for start in range(len(names) * size, len(tokens) - size + 1, size):
            parent = names[-1] if names else _digest(seq.request.cache_root)
            names.append(_digest(parent + array("I", tokens[start : start + size]).tobytes()))

    def _bring_back(self, found: list[int | None], names: list[bytes]) -> list[int]:
        """Replace each None by a block that its contents were loaded into. Stops where no block is free."""
        blocks: list[int] = []
        for index, block in enumerate(found):
            if block is None:
                fresh = self.allocate(1)
                if fresh is None or names[index] not in self.swap:  # the allocation may have pushed it out
                    self._pool.release(fresh or ())
                    self._pool.release(block for block in found[index:] if block is not None)
                    break
                block = fresh[0]
                self.swap.load(names[index], block)
                self._remember(names[index], block)
            blocks.append(block)
        return blocks

    def _remember(self, name: bytes, block: int) -> None:
        self._block[name], self._name[block] = block, name
        self.swap.drop(name)
        self._rate(name)

    def _rate(self, name: bytes) -> None:
        block = self._block.get(name)
        if block is not None:
            self._pool.rate(block, 1 + self._wanted[name])

    def _usable(self, seq: Sequence) -> int:
        if seq.wants_its_prompt_fed:
            return 0
        return min(len(seq.hashes), (seq.length - 1) // self._block_size)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()
