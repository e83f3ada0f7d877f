"""Any order of deliveries, claims, writes, crashes and commits ends in one result and repeats no token.

The machine plays workers that forget, freeze and come back, on a real Valkey and a real directory. An attempt
is never told that it is over: it goes on trying.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from gristmill.backends.state import Claim, Final, State
from gristmill.backends.store import FileStore
from gristmill.producer.replica import Chunk, Item
from gristmill.producer.stream import follow
from gristmill.schemas import keys
from gristmill.schemas.events import Delta, Done, End, EntryId, Released, Started
from gristmill.schemas.job import FINAL, Job, JobState
from gristmill.schemas.result import Choice, FinishReason, Result, Timings
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ..support.journal import Attempt, make_job

TOTAL = 3
"""Tokens of the job. Token n is always the same, as it is for an engine with a seed."""
REST = "end."
TEXT = "".join(f"{n} " for n in range(TOTAL)) + REST


@dataclass(eq=False)
class Player:
    """An attempt, and whether it believes that the log is complete."""

    attempt: Attempt
    complete: bool = False
    broken: bool = False
    """It skipped an entry: what follows would leave a hole."""


class JournalMachine(RuleBasedStateMachine):
    """One job, any number of attempts at it, and a neighbour whose writes travel in the same calls."""

    def __init__(self, state: State, store: FileStore) -> None:
        super().__init__()
        self.state, self.store = state, store
        self.job: Job = make_job(stream=True)
        self.name = keys.result_object(self.job.id)
        self.players: list[Player] = []
        self.owner: Player | None = None
        self.logged = 0
        self.done = False
        self.claims = 0
        self.final: JobState | None = None
        self.objects: list[int] = []
        self.seen: list[Item] = []
        self.cancelled = False

    @initialize(submitted=st.booleans())
    def submit(self, submitted: bool) -> None:
        """Or not: the record may be lost, and the message arrive all the same."""
        if submitted:
            assert self.state.submit(self.job)
        self.neighbour = Attempt.begin(self.state, make_job(), "neighbour")

    # ---- what may happen

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def deliver(self, worker: str) -> None:
        claim = self.state.claim(self.job.id, worker, self.job.expires_at)
        if isinstance(claim, Final):
            assert claim.state == self.final
            return
        assert isinstance(claim, Claim)
        assert self.final is None
        self.claims += 1
        assert claim.attempts == self.claims
        assert claim.cancelled == self.cancelled
        assert all(claim.attempt > player.attempt.id for player in self.players)
        attempt = Attempt(self.state, self.job, claim)
        player = Player(attempt)
        for _, event in claim.entries:
            if isinstance(event, Delta):
                attempt.ids += event.ids
                attempt.parts.append(event.text)
            if isinstance(event, Done):
                attempt.parts.append(event.text)
                player.complete = True
        assert len(attempt.ids) == self.logged
        assert player.complete == self.done
        self.players.append(player)
        self.owner = player

    @precondition(lambda self: self.players)
    @rule(data=st.data(), count=st.integers(1, 3), lost_replies=st.integers(0, 2))
    def write(self, data: st.DataObject, count: int, lost_replies: int) -> None:
        player = data.draw(st.sampled_from(self.players))
        attempt = player.attempt
        count = min(count, TOTAL - len(attempt.ids))
        if count == 0:
            return
        writes = [attempt.entry(f"{len(attempt.ids)} ") for _ in range(count)]
        expected = self.verdict(player)
        for _ in range(1 + lost_replies):
            beside = self.neighbour.entry("x")
            assert self.state.publish([*writes, beside]) == expected
        if not expected:
            self.logged += count

    @precondition(lambda self: self.players)
    @rule(data=st.data())
    def lose_a_write(self, data: st.DataObject) -> None:
        """The next entry of this attempt never arrives (it went to a server that is no more, say)."""
        player = data.draw(st.sampled_from(self.players))
        if len(player.attempt.ids) < TOTAL - 1 and not player.complete:
            player.attempt.entry("lost ")
            player.broken = True

    @precondition(lambda self: self.players)
    @rule(data=st.data())
    def write_done(self, data: st.DataObject) -> None:
        player = data.draw(st.sampled_from(self.players))
        attempt = player.attempt
        if len(attempt.ids) < TOTAL or player.complete:
            return
        fenced = bool(self.verdict(player))
        assert attempt.done(REST) is not fenced
        if not fenced:
            player.complete = self.done = True

    @precondition(lambda self: any(player.complete for player in self.players))
    @rule(data=st.data(), dies=st.booleans())
    def commit(self, data: st.DataObject, dies: bool) -> None:
        """Whoever believes that the log is complete may commit, fenced or not: the text is the same."""
        player = data.draw(st.sampled_from([player for player in self.players if player.complete]))
        result = player.attempt.result()
        if self.store.put_new(self.name, result.to_json().encode()):
            self.objects.append(player.attempt.id)
        if not dies:
            self.finish()

    @precondition(lambda self: not (self.objects or self.done))  # after Done the text is settled
    @rule(happens=st.integers(0, 5).map(lambda n: n == 0))
    def end_from_outside(self, happens: bool) -> None:
        """Somebody ends it, with the text so far, while an attempt may still be alive."""
        if happens:
            result = make_result(self.job, JobState.CANCELLED, "".join(f"{n} " for n in range(self.logged)))
            assert self.store.put_new(self.name, result.to_json().encode())
            self.objects.append(0)
            self.finish()

    @precondition(lambda self: self.objects)
    @rule()
    def finish(self) -> None:
        """On behalf of the object, whoever wrote it."""
        body = self.store.get(self.name)
        assert body is not None
        result = Result.from_json(body)
        end = End(
            state=result.state, finish_reason=result.finish_reason, usage=result.usage, result=self.name
        )
        assert self.state.finish(self.job.id, end, body.decode()) is (self.final is None)
        self.final = result.state

    @precondition(lambda self: self.players)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        player = data.draw(st.sampled_from(self.players))
        before = self.state.status(self.job.id)
        assert before is not None
        mine = player is self.owner and before.state is JobState.RUNNING
        assert self.state.release(self.job.id, player.attempt.id) is mine
        if mine:
            self.owner = None  # what it still tries to write comes too late

    @precondition(lambda self: self.players)
    @rule()
    def cancel(self) -> None:
        state = self.state.cancel(self.job.id)
        assert (state in FINAL) == (self.final is not None)
        self.cancelled = self.cancelled or self.final is None

    @precondition(lambda self: self.players)
    @rule()
    def read_a_little_more(self) -> None:
        """A follower that reconnects again and again, from where it was."""
        last = self.seen[-1].id if self.seen else None
        fresh = [
            event
            for _, event in self.state.read_log(self.job.id, last)
            if not isinstance(event, Started | Released)
        ]
        reader = follow(self.state, self.job.id, last)
        self.seen += [next(reader) for _ in fresh]
        reader.close()

    # ---- what must hold

    def verdict(self, player: Player) -> set[str]:
        may = player is self.owner and self.final is None and not player.broken
        return set() if may else {self.job.id}

    @invariant()
    def the_log_is_whole(self) -> None:
        log = self.state.read_log(self.job.id)
        ids = [entry_id for entry_id, _ in log]
        assert ids == sorted(set(ids))
        assert [EntryId(i.attempt, 0) for i in ids if i.seq == 0] == [
            i for i, event in log if isinstance(event, Started)
        ]
        deltas = [event for _, event in log if isinstance(event, Delta)]
        assert [token for delta in deltas for token in delta.ids] == list(range(self.logged))
        assert [delta.offset for delta in deltas] == list(range(self.logged))
        kinds = [type(event) for _, event in log]
        assert kinds.count(Done) == self.done
        assert kinds.count(End) == (self.final is not None)
        if self.final is not None:
            assert kinds[-1] is End

    @invariant()
    def there_is_one_result_at_most(self) -> None:
        assert len(self.objects) <= 1
        assert self.final is None or self.objects

    @invariant()
    def followers_saw_no_token_twice(self) -> None:
        chunks = [item for item in self.seen if isinstance(item, Chunk)]
        assert not any(chunk.reset for chunk in chunks)
        assert TEXT.startswith("".join(chunk.text for chunk in chunks))
        offsets = [chunk.offset for chunk in chunks]
        assert offsets == sorted(offsets)

    def teardown(self) -> None:
        """Whatever has happened: one more delivery ends the job."""
        if not hasattr(self, "neighbour"):
            return
        if self.final is None:
            self.deliver("last")
            assert self.owner is not None
            attempt = self.owner.attempt
            while len(attempt.ids) < TOTAL:
                assert attempt.write(f"{len(attempt.ids)} ")
            if not self.owner.complete:
                assert attempt.done(REST)
            self.logged, self.done = TOTAL, True
            self.store.put_new(self.name, attempt.result().to_json().encode())
            self.objects = self.objects or [attempt.id]
            self.finish()
        self.finish()
        self.deliver("too late")
        for player in self.players:
            assert self.state.publish([player.attempt.entry("zombie")]) == {self.job.id}
        self.the_log_is_whole()
        body = self.store.get(self.name)
        assert body is not None
        result = Result.from_json(body)
        assert result.text == TEXT or result.state is JobState.CANCELLED
        items = [*follow(self.state, self.job.id)]
        assert "".join(item.text for item in items if isinstance(item, Chunk)) == result.text
        assert not self.state.publish([self.neighbour.entry("y")])
        assert len(self.state.read_log(self.neighbour.job.id)) == 1 + len(self.neighbour.ids)


def make_result(job: Job, state: JobState, text: str) -> Result:
    choice = Choice(text=text, finish_reason=FinishReason.CANCELLED)
    timings = Timings(submitted_at=job.submitted_at, finished_at=job.submitted_at)
    return Result(job_id=job.id, model=job.model, state=state, choices=(choice,), timings=timings)


@pytest.mark.timeout(170)
def test_any_order_of_deliveries_ends_in_one_result(state: State, tmp_path: Path) -> None:
    run_state_machine_as_test(
        lambda: JournalMachine(state, FileStore(tmp_path)),
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
