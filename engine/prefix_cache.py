"""PrefixCache: which block holds the keys and values of which tokens. Pure: no torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b

from .block_pool import BlockPool
from .sequence import Sequence

HASH_BYTES = 16


class PrefixCache:
    """Finds blocks by their contents, so that tokens which somebody computed before are not computed again.

    What a block holds depends on its tokens and on everything before them. So its name is a hash of the
    previous block's name and its own tokens; the first block's parent is the request's ``cache_root``. Who
    has another root shares nothing. Names are made once per block and sequence.

    Blocks are named when they are full and computed, and never written again. They may be held or free; a
    free one is found until the pool hands it out anew, and whoever takes it calls ``forget``. Two sequences
    that computed the same at the same time keep a block each: the first has the name.

    Invariant: a name belongs to one block and a block has one name.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool = True) -> None:
        self._pool, self._block_size, self._enabled = pool, block_size, enabled
        self._block: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}
        self.queries = 0
        """Tokens of sequences that started …"""
        self.hits = 0
        """… and those of them that were found. Since the start; recomputation after a preemption apart."""

    def name_blocks(self, seq: Sequence) -> None:
        """Name the full blocks of ``seq.tokens`` that have no name in ``seq.hashes`` yet. O(new tokens)."""
        if not self._enabled:
            return
        size, names, tokens = self._block_size, seq.hashes, seq.tokens
        for start in range(len(names) * size, len(tokens) - size + 1, size):
            parent = names[-1] if names else _digest(seq.request.cache_root)
            names.append(_digest(parent + array("I", tokens[start : start + size]).tobytes()))

    def find(self, seq: Sequence) -> list[int]:
        """Blocks with what comes next in ``seq``, from the block it stands in on.

        Never its last token: somebody has to ask the model what follows that one.
        """
        found: list[int] = []
        for name in seq.hashes[seq.computed // self._block_size : self._usable(seq)]:
            block = self._block.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def next_name(self, seq: Sequence) -> bytes | None:
        """Name of the block that ``seq`` would compute next, if it could have it from somebody else."""
        index = seq.computed // self._block_size
        return seq.hashes[index] if index < self._usable(seq) else None

    def attach(self, seq: Sequence) -> None:
        """Let ``seq`` hold all that ``find`` finds; a block half done for the same tokens is given back."""
        found = self.find(seq)
        if not found:
            return
        have, before = seq.computed // self._block_size, seq.computed
        self._pool.share(found)
        self._pool.release(seq.block_table[have:])
        seq.block_table[have:] = found
        seq.computed = (have + len(found)) * self._block_size
        if not seq.preempted:
            self.hits += seq.computed - before
            seq.cached_tokens += max(0, min(seq.computed, seq.prompt_len) - before)

    def started(self, seq: Sequence) -> None:
        """Count ``seq`` as one that looks for its tokens here, unless it has been counted."""
        if self._enabled and not seq.preempted:
            self.queries += len(seq.tokens)

    def publish(self, seq: Sequence, before: int) -> None:
        """Blocks of ``seq`` became full when it was computed from ``before`` to where it is: name them."""
        size = self._block_size
        if not self._enabled or before // size == seq.computed // size:
            return
        self.name_blocks(seq)
        for index in range(before // size, seq.computed // size):
            name, block = seq.hashes[index], seq.block_table[index]
            if name not in self._block:
                self._block[name], self._name[block] = block, name

    def forget(self, blocks: Iterable[int]) -> None:
        """These will be written anew, or what is in them is no good."""
        for block in blocks:
            name = self._name.pop(block, None)
            if name is not None:
                del self._block[name]

    def check(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless the invariant holds, and named blocks are where their names say."""
        assert len(self._block) == len(self._name), "two blocks have one name, or two names one block"
        assert all(self._block[name] == block for block, name in self._name.items())
        for seq in running:
            for index, block in enumerate(seq.block_table):
                full = (index + 1) * self._block_size <= seq.computed
                named = self._name.get(block)
                assert full or self._pool.refs(block) == 1, f"{seq.id} shares a block that is not full"
                assert full or named is None, f"{seq.id} will write to a block that others may find"
                assert named in (None, *seq.hashes[index : index + 1]), f"{seq.id} holds another's tokens"

    def _usable(self, seq: Sequence) -> int:
        if seq.wants_its_prompt_fed:
            return 0
        return min(len(seq.hashes), (len(seq.tokens) - 1) // self._block_size)


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES).digest()
