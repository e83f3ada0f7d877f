"""Scheduler: which tokens the next step feeds to the model. Pure: no torch, no clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, deque
from dataclasses import dataclass
from math import inf

from ..schemas.errors import PromptTooLong
from .block_pool import BlockPool
from .cadence import Cadence
from .planner import Planner
from .prefix_cache import PrefixCache
from .sequence import Sequence
from .swap import SwapSpace

SMALLEST_STEP = 16
"""Tokens, or one block if that is more: what a step is shrunk to when memory runs out."""


@dataclass(frozen=True, slots=True)
class Work:
    """Feed ``count`` tokens of ``seq`` from ``seq.computed`` on; blocks for them are in the table.

    ``guesses`` are the last of them: tokens that ``seq`` does not have yet.
    """

    seq: Sequence
    count: int
    guesses: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Tokens that are no guesses."""
        return self.count - len(self.guesses)

    @property
    def samples(self) -> bool:
        """The last known token is fed, so the model's answer is the next one."""
        return self.seq.computed + self.known == self.seq.length


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: the works in order, each sequence at most once."""

    work: tuple[Work, ...]

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.work)


class Scheduler:
    """Queues of sequences in rank order, and the blocks they hold.

    There is no prefill phase and no decode phase: each sequence has ``computed < length`` and every
    step's token budget lets ``computed`` catch up. Sequences with one token to go come first, each gets it;
    the rest of the budget goes to the others, running or waiting, by rank.

    A prompt begins with what the prefix cache has of it. Who would compute a block next that somebody ahead
    computes in this very step waits for that step instead, admitted and without work.

    Rank is (priority, arrival, number). Whoever ranks first of the running can take blocks from everybody
    behind, and fits alone; so it always advances. Who is admitted next is the planner's choice: it lets the
    later come first within bounds, so within a class nobody waits for ever. Classes are strict: a lower one
    waits for as long as a higher one fills the engine. While everybody running decodes, the cadence may hold
    an admission back for a bounded number of steps; never one of a higher class than all of them.

    Invariant, between steps: every known sequence is either running or waiting; a waiting one holds no
    blocks; blocks held by running ones and free ones add up to the pool.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        step_tokens: int,
        max_num_seqs: int,
        prefix_cache: bool = True,
        swap: SwapSpace | None = None,
        planner: Planner | None = None,
        cadence: Cadence | None = None,
    ) -> None:
        self.pool = pool
        self.cache = PrefixCache(pool, block_size, enabled=prefix_cache, swap=swap)
        self.planner = planner or Planner()
        self.cadence = cadence or Cadence()
        self.block_size = block_size
        self.step_tokens = step_tokens
        # No more than the budget feeds with a token each: a running sequence never waits for budget.
        self.max_running = min(max_num_seqs, step_tokens)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self._full = (self.step_tokens, self.max_running)
        self._work: dict[Sequence, int] = {}
        self._preempted: set[Sequence] = set()
        self._coming: dict[bytes, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def firm_blocks(self, priority: int) -> int:
        """Blocks that sequences of this class and of more urgent ones hold, or lost and want back.

        A block that several hold counts once. O(blocks of these), unless all who run are such.
        """
        end = (priority + 1, -inf, 0)
        firm = bisect_left(self.running, end, key=_rank)
        if firm == len(self.running):
            held = self.pool.capacity - self.pool.free
        else:
            held = len(set[int]().union(*(seq.block_table for seq in self.running[:firm])))
        waiting = self.waiting[: bisect_left(self.waiting, end, key=_rank)]
        return held + sum(self._blocks(seq.length) for seq in waiting if seq.preempted)

    def check_fits(self, seq: Sequence) -> None:
        """Raise PromptTooLong if ``seq`` could not finish even with all blocks to itself."""
        if self._blocks(seq.limit) > self.pool.capacity:
            raise PromptTooLong(
                prompt_tokens=seq.prompt_len,
                max_tokens=seq.limit - seq.prompt_len,
                limit=self.pool.capacity * self.block_size,
                knob="max_batch_total_tokens",
            )

    def add(self, seq: Sequence) -> None:
        """Queue ``seq``. Raises PromptTooLong, as ``check_fits``."""
        self.check_fits(seq)
        self._wait(seq)

    def remove(self, seq: Sequence, *, spoiled: bool = False) -> None:
        """Forget ``seq``, finished or aborted, and free its blocks. ``spoiled``: they hold nothing good."""
        if spoiled:
            self.cache.forget(seq.block_table)
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
            self.planner.remove(seq)
            self.cache.unwant(seq)
        self._free(seq)

    def plan(self) -> StepPlan:
        """Choose the tokens of the next step and reserve blocks for them.

        Empty while there is work only where everybody's last token is coming.
        """
        self._work, self._preempted, self._coming = {}, set(), {}
        for seq in list(self.running):
            if seq.pending == 1 and seq not in self._preempted:
                self._grant(seq, 1)

        prefilling = deque(seq for seq in self.running if seq.pending > 1)
        while budget := self.step_tokens - sum(self._work.values()):
            seq = self._next_prefill(prefilling)
            if seq is None:
                break
            self.cache.attach(seq)
            if not self._worth_waiting(seq):
                self._grant(seq, min(seq.pending, budget))
        return StepPlan(tuple(Work(seq, count) for seq, count in self._work.items()))

    @property
    def only_decodes(self) -> bool:
        """Nobody waits, and everybody running has one token to go."""
        return not self.waiting and all(seq.pending == 1 for seq in self.running)

    def add_guesses(self, plan: StepPlan, guesses: dict[Sequence, list[int]]) -> StepPlan:
        """``plan`` with guesses behind what it feeds, as many as free blocks allow: nobody makes room for a
        guess. ``settle`` or ``drop_guesses`` follows."""
        return StepPlan(tuple(self._guess(work, guesses.get(work.seq, [])) for work in plan.work))

    def drop_guesses(self, plan: StepPlan) -> None:
        """The step failed: take back what only the guesses of ``plan`` needed."""
        for work in plan.work:
            self._trim(work.seq)

    def settle(self, seq: Sequence, right: int) -> None:
        """So many guesses about ``seq`` were right and are among its tokens now; keys and values of the rest
        are void."""
        before = seq.computed
        seq.computed += right
        self.cache.publish(seq, before)
        self._trim(seq)

    def advance(self, plan: StepPlan) -> None:
        """The model has run ``plan``: its tokens, guesses apart, have keys and values now."""
        self.cadence.stepped(prompts=any(_in_its_prompt(work.seq) for work in plan.work))
        for work in plan.work:
            before = work.seq.computed
            work.seq.computed += work.known
            self.cache.publish(work.seq, before)

    def learned(self, seq: Sequence, before: int) -> None:
        """The tokens of ``seq`` from ``before`` on have become known; some may have been computed already."""
        self.cache.publish(seq, min(before, seq.computed))

    def shrink(self) -> bool:
        """Ask for less at a time: half the budget, then half as many sequences. False: it cannot be less.

        Whoever is too many goes back to the queue. Between steps, or after one that failed.
        """
        floor = max(SMALLEST_STEP, self.block_size)
        if self.step_tokens > floor:
            self.step_tokens = max(floor, self.step_tokens // 2)
            self.max_running = min(self.max_running, self.step_tokens)
        elif self.max_running > 1 and len(self.running) > 1:
            self.max_running = max(1, min(self.max_running, len(self.running)) // 2)
        else:
            return False
        while len(self.running) > self.max_running:
            self._preempt(self.running[-1])
        return True

    def grow(self) -> bool:
        """Take one ``shrink`` back. False: there is nothing to take back."""
        if (self.step_tokens, self.max_running) == self._full:
            return False
        self.step_tokens = min(self._full[0], 2 * self.step_tokens)
        self.max_running = min(self._full[1], 2 * self.max_running)
        return True

    def _next_prefill(self, prefilling: deque[Sequence]) -> Sequence | None:
        """The best ranked of those half-way through, or who is to be admitted next, if that can be."""
        while prefilling and prefilling[0] in self._preempted:
            prefilling.popleft()
        head = self.planner.next()
        if (
            head
            and (not prefilling or head.rank < prefilling[0].rank)
            and self._may_interrupt(head)
            and self._admit(head)
        ):
            return head
        return prefilling.popleft() if prefilling else None

    def _may_interrupt(self, head: Sequence) -> bool:
        """Whether those who decode may be slowed down for ``head`` now.

        A step that has a prompt in it takes more of them; who was running already goes on at once.
        """
        if self.cadence.off or head.preempted or any(map(_in_its_prompt, self.running)):
            return True
        priority = head.request.priority
        return self.cadence.may_interrupt(
            waiting=bisect_left(self.waiting, (priority + 1, -inf, 0), key=_rank),
            served=bisect_left(self.running, (priority + 1, -inf, 0), key=_rank),
        )

    def _admit(self, seq: Sequence) -> bool:
        """Move one that waits to the running, at the cost of lower classes if need be."""
        if seq in self._preempted:  # it just had to go, and nobody overtakes it
            return False
        keep = len(self.running)
        while not self._fits(seq, keep):
            if not keep or self.running[keep - 1].request.priority <= seq.request.priority:
                return False
            keep -= 1
        for victim in reversed(self.running[keep:]):
            self._preempt(victim)
        self.waiting.remove(seq)
        self.planner.admit(seq)
        insort(self.running, seq, key=_rank)
        self.cache.started(seq)
        return True

    def _fits(self, seq: Sequence, keep: int) -> bool:
        """Whether ``seq`` can run beside the first ``keep`` and each has a block's worth of tokens to grow.

        Without that margin an admission would soon cost a preemption. A block that several hold counts once;
        one that is being computed for several counts for each of them, until it is there.
        """
        if keep >= self.max_running:
            return False
        beside, freed = self.running[:keep], self._held_only_by(self.running[keep:])
        shared = sum(b is not None and b not in freed and self.pool.refs(b) > 0 for b in self.cache.find(seq))
        growth = sum(self._soon(other) - len(other.block_table) for other in beside)
        return growth + self._soon(seq) - shared <= self.pool.free + len(freed)

    def _worth_waiting(self, seq: Sequence) -> bool:
        """Whether the next block of ``seq`` will be there after this step without its doing."""
        name = self.cache.next_name(seq)
        return name is not None and self._coming.get(name) in self._work

    def _soon(self, seq: Sequence) -> int:
        """Blocks ``seq`` holds after one more block's worth of output."""
        return self._blocks(min(seq.length + self.block_size, seq.limit))

    def _grant(self, seq: Sequence, count: int) -> None:
        """Plan up to ``count`` tokens of ``seq``: as many as free blocks and those ranked behind it allow.

        A sequence that gets none keeps its blocks and waits for the next step.
        """
        need = self._blocks(seq.computed + count) - len(seq.block_table)
        if need > self.pool.free:
            count = min(count, self._room(seq))
            if count <= 0:
                return
            need = self._blocks(seq.computed + count) - len(seq.block_table)
        while (blocks := self.cache.allocate(max(0, need))) is None:
            self._preempt(self.running[-1])
        seq.block_table += blocks
        self._work[seq] = count
        first, end = seq.computed // self.block_size, (seq.computed + count) // self.block_size
        for name in seq.hashes[first:end]:
            self._coming.setdefault(name, seq)

    def _guess(self, work: Work, guesses: list[int]) -> Work:
        seq, known = work.seq, work.seq.computed + work.count
        need = self._blocks(known + len(guesses)) - len(seq.block_table)
        blocks = self.cache.allocate(max(0, need))
        if blocks is None:
            guesses, blocks = guesses[: len(seq.block_table) * self.block_size - known], []
        seq.block_table += blocks
        return Work(seq, work.count + len(guesses), tuple(guesses))

    def _trim(self, seq: Sequence) -> None:
        """Give up blocks beyond the known tokens."""
        keep = self._blocks(seq.length)
        self.pool.release(seq.block_table[keep:])
        del seq.block_table[keep:]

    def _room(self, seq: Sequence) -> int:
        """Tokens ``seq`` could still be given if it took all free blocks and those ranked behind it."""
        behind = self.running[self.running.index(seq) + 1 :]
        reachable = self.pool.free + len(self._held_only_by(behind))
        return (len(seq.block_table) + reachable) * self.block_size - seq.computed

    def _held_only_by(self, seqs: list[Sequence]) -> set[int]:
        """Blocks that would be free if these gave theirs up."""
        counts = Counter(block for seq in seqs for block in seq.block_table)
        return {block for block, count in counts.items() if count == self.pool.refs(block)}

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue, at its old place; what the cache loses of it is computed again."""
        self.running.remove(seq)
        self._free(seq)
        seq.preempted = True
        self._wait(seq)
        self._work.pop(seq, None)
        self._preempted.add(seq)
        self.preemptions += 1

    def _wait(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=_rank)
        self.cache.want(seq)
        self.planner.add(seq, self.cache.trail(seq))

    def _free(self, seq: Sequence) -> None:
        self.pool.release(seq.block_table)
        seq.block_table, seq.computed = [], 0

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def check(self) -> None:
        """Raise AssertionError unless the class invariant holds. Between steps only."""
        self.pool.check()
        everybody = self.running + self.waiting
        assert len({seq.id for seq in everybody}) == len(everybody), "a sequence is queued twice"
        assert len(self.running) <= self.max_running
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_rank), "a queue lost its order"
        for seq in everybody:
            assert seq.computed < seq.length, f"{seq.id} has computed tokens that it does not have"
            assert len(seq.tokens) < seq.limit, f"{seq.id} should have ended"
        for seq in self.waiting:
            assert not seq.block_table, f"{seq.id} waits with blocks"
            assert seq.computed == 0, f"{seq.id} waits with tokens computed"
        for seq in self.running:
            held = len(seq.block_table)
            assert self._blocks(seq.computed) <= held <= self._blocks(seq.length), f"{seq.id}: {held}"
        holders = Counter(block for seq in self.running for block in seq.block_table)
        assert all(self.pool.refs(block) == count for block, count in holders.items())
        assert len(holders) + self.pool.free == self.pool.capacity, "a block is held by nobody"
        self.cache.check(self.running, self.waiting)
        self.planner.check(self.waiting)


def _rank(seq: Sequence) -> tuple[int, float, int]:
    return seq.rank


def _in_its_prompt(seq: Sequence) -> bool:
    """Not all of its prompt has been computed."""
    return seq.computed < seq.prompt_len
