"""The model and the code agree: random traces on the real scripts, a real Valkey and a real directory.

After each action the answer is compared with the model's, and so is all that server and store then hold. What
only happens inside a worker (a step of its engine, its death) has no counterpart here.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.backends.state import Claim, Final, State, Write
from gristmill.backends.store import FileStore
from gristmill.schemas import keys, result
from gristmill.schemas.events import Delta, Done, End, Event, Released, Started
from gristmill.schemas.job import JobState
from gristmill.schemas.result import Choice, FinishReason, Timings

from ..support.journal import make_job
from ..support.valkey import Valkey
from . import model
from .checker import Kind, Label
from .model import CANCELLED, DONE, END, FINAL, RELEASED, STARTED, TOKENS, Entry, Model, Size, World

LEASE_MS = 9_000
QUEUE, TENANT = "gm-tiny-normal", "default"
REASONS = {model.SUCCEEDED: FinishReason.LENGTH, CANCELLED: FinishReason.CANCELLED}
TRACES, STEPS = 60, 60


class Real:
    """The servers, told what happened in the model. ``play`` asserts that each answer is the model's."""

    def __init__(self, valkey: Valkey, state: State, folder: Path, jobs: int) -> None:
        self.client, self.state, self.store = valkey.client(), state, FileStore(folder)
        self.client.flushall()
        self.queue = MessageQueue(self.client, lease_s=LEASE_MS / 1000, now_ms=1_000_000)
        self.jobs = [make_job(stream=True) for _ in range(jobs)]
        self.attempts: dict[tuple[int, int], int] = {}
        self.run = 0
        self._let_pass_a_hold()
        for index, job in enumerate(self.jobs):
            assert state.submit(job)
            self._put(index, 0)

    def play(self, label: Label, before: World, after: World) -> None:
        """What the label says, and nothing else."""
        self.queue.now_ms = (self.queue.now_ms or 0) + 1
        act = getattr(self, "do_" + label.name.replace(" ", "_"), None)
        if act is not None:
            act(label, before, after)

    # ---- the queue

    def take(self) -> tuple[int, ...] | None:
        """The tag that the real queue gives out."""
        got = self.queue.claim([QUEUE])
        return parse_tag(got.tag) if isinstance(got, ClaimedMessage) else None

    def do_renew(self, label: Label, _before: World, _after: World) -> None:
        assert self.queue.renew([tag(label.at)]) == []

    def do_acknowledge(self, label: Label, before: World, _after: World) -> None:
        assert self.queue.ack(tag(label.at)) == [label.at in {c[:3] for c in before.claims}]

    def do_requeue(self, label: Label, before: World, _after: World) -> None:
        assert self.queue.requeue(tag(label.at)) == [label.at in {c[:3] for c in before.claims}]

    def do_sweep(self, label: Label, before: World, _after: World) -> None:
        """Time is up for this one alone: the model lets leases run out one by one."""
        self.queue.renew([tag(lease[:3]) for lease in before.claims])
        self._expire(label.at)
        assert self._sweep() == (1, 0.0)

    def do_broker_outage(self, _label: Label, before: World, _after: World) -> None:
        for lease in before.claims:
            self._expire(lease[:3])
        self.run += 1  # the server is another one: restarted, say
        assert self._sweep() == (0, LEASE_MS / 1000)

    def do_hold_ends(self, _label: Label, _before: World, _after: World) -> None:
        self._let_pass_a_hold()

    def _expire(self, at: tuple[int, ...]) -> None:
        self.client.zadd(keys.CLAIM_EXPIRY, {tag(at): self.queue.now_ms or 0}, xx=True)

    def _sweep(self) -> tuple[int, float]:
        swept = self.queue.sweep(server=(f"run{self.run}", 0))
        return swept.returned, swept.hold_s

    def _let_pass_a_hold(self) -> None:
        """One lease, swept in vain as often as workers do."""
        assert self._sweep()[0] == 0
        for _ in range(3):
            self.queue.now_ms = (self.queue.now_ms or 0) + LEASE_MS // 3 - 100
            assert self._sweep()[0] == 0, "swept in spite of the hold"
        self.queue.now_ms = (self.queue.now_ms or 0) + 320

    def _put(self, index: int, base: int) -> None:
        self.queue.put(QUEUE, TENANT, f"{index}.{base}", self.jobs[index].to_json())

    # ---- attempts

    def do_begin(self, label: Label, before: World, after: World) -> None:
        index = label.at[0]
        was, job = before.jobs[index], self.jobs[index]
        last = max([real for (at, _), real in self.attempts.items() if at == index], default=0)
        while self.server_ms() <= last:  # two attempts within a millisecond, and the state lost in between
            pass
        claim = self.state.claim(job.id, "w", job.expires_at)
        if was.state in FINAL:
            assert claim == Final(JobState(was.state))
            return
        assert isinstance(claim, Claim)
        assert claim.attempt > last
        self.attempts[index, after.jobs[index].attempt] = claim.attempt
        assert claim.cancelled == was.cancel
        assert [self.read(index, *entry) for entry in claim.entries] == self.known(index, was.log)

    do_begin_reply_lost = do_begin

    def server_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def do_publish(self, label: Label, before: World, _after: World) -> None:
        d = next(d for worker in before.workers for d in worker.hand if d[:3] == label.at)
        self._publish(d.job, before, model.taken(d).unconfirmed)

    do_publish_reply_lost = do_publish

    def do_late_publish_arrives(self, _label: Label, before: World, _after: World) -> None:
        self._publish(*before.late[0][:1], before, before.late[0][1])

    def _publish(self, index: int, before: World, entries: tuple[Entry, ...]) -> None:
        job = self.jobs[index]
        writes = [Write(job.id, self.attempts[index, e.attempt], e.seq, event(e).to_json()) for e in entries]
        _, refused = model.published(Model(Size()), before.jobs[index], entries)
        assert self.state.publish(writes) == ({job.id} if refused else set())

    def do_release(self, label: Label, before: World, _after: World) -> None:
        d = next(d for worker in before.workers for d in worker.hand if d[:3] == label.at)
        job = before.jobs[d.job]
        mine = job.state == "running" and job.attempt == d.attempt
        assert self.state.release(self.jobs[d.job].id, self.attempts[d.job, d.attempt]) is mine

    # ---- the commit

    def do_put_object(self, label: Label, before: World, after: World) -> None:
        d = next(d for worker in before.workers for d in worker.hand if d[:3] == label.at)
        fresh = self._store(d.job, model.Result(d.done, d.tokens, d.attempt))
        assert fresh == (before.jobs[d.job].result is None)
        assert self.stored(d.job) == after.jobs[d.job].result

    do_put_reply_lost = do_put_object

    def _store(self, index: int, r: model.Result) -> bool:
        job = self.jobs[index]
        choice = Choice(text=text(r.tokens), finish_reason=REASONS[r.state])
        record = result.Result(
            job_id=job.id,
            model=job.model,
            state=JobState(r.state),
            choices=(choice,),
            timings=Timings(submitted_at=1.0, finished_at=2.0),
            attempts=r.attempt,
        )
        return self.store.put_new(keys.result_object(job.id), record.to_json().encode())

    def stored(self, index: int) -> model.Result | None:
        body = self.store.get(keys.result_object(self.jobs[index].id))
        if body is None:
            return None
        record = result.Result.from_json(body)
        return model.Result(record.state.value, tuple(map(int, record.text.split())), record.attempts)

    def do_finish(self, label: Label, before: World, _after: World) -> None:
        index = label.at[0]
        found = self.stored(index)
        assert found is not None
        end = End(state=JobState(found.state), finish_reason=REASONS[found.state], result="there")
        fresh = before.jobs[index].state not in FINAL
        assert self.state.finish(self.jobs[index].id, end, None) is fresh

    # ---- clients and losses

    def do_cancel(self, label: Label, before: World, _after: World) -> None:
        index = label.at[0]
        assert self.state.cancel(self.jobs[index].id).value == before.jobs[index].state

    def do_submit_twice(self, label: Label, before: World, _after: World) -> None:
        index = label.at[0]
        was = before.jobs[index]
        assert self.state.submit(self.jobs[index]) is (was.state == "")
        self._put(index, was.bases)

    do_submit_again = do_submit_twice

    def do_redis_loses_everything(self, _label: Label, _before: World, _after: World) -> None:
        self.client.flushall()
        self._let_pass_a_hold()

    def do_redis_loses_states_and_logs(self, _label: Label, _before: World, _after: World) -> None:
        for job in self.jobs:
            self.client.delete(keys.state(job.id), keys.log(job.id))

    def do_log_expires(self, label: Label, _before: World, _after: World) -> None:
        self.client.delete(keys.log(self.jobs[label.at[0]].id))

    def do_state_expires(self, label: Label, _before: World, _after: World) -> None:
        self.client.delete(keys.state(self.jobs[label.at[0]].id))

    # ---- what they hold now

    def compare(self, w: World) -> None:
        """Everything that the model says of the servers."""
        rows = self.client.lrange(keys.queue_messages(QUEUE, TENANT), 0, -1)
        waiting = Counter(parse_tag(row.partition(b"\n")[0].decode()) for row in rows)
        assert waiting == Counter(tuple(m) for m in w.waiting)
        claimed = {parse_tag(name.decode()) for name in self.client.hkeys(keys.CLAIMS)}
        assert claimed == {c[:3] for c in w.claims}
        assert claimed == {parse_tag(name.decode()) for name in self.client.zrange(keys.CLAIM_EXPIRY, 0, -1)}
        for index, job in enumerate(w.jobs):
            self.compare_job(index, job)

    def compare_job(self, index: int, job: model.Job) -> None:
        name = self.jobs[index].id
        state, attempt, cancel = self.client.hmget(keys.state(name), "state", "attempt", "cancel")
        assert (state or b"").decode() == job.state
        assert int(attempt or 0) == (self.attempts[index, job.attempt] if job.attempt else 0)
        assert bool(cancel) == job.cancel
        log = [self.read(index, *entry) for entry in self.state.read_log(name)]
        assert log == self.known(index, job.log)
        assert self.stored(index) == job.result

    def read(self, index: int, at: object, event: Event) -> Entry:
        """An entry of the real log, with the model's number of its attempt; 0 for an end without any."""
        names = {real: number for (job, number), real in self.attempts.items() if job == index}
        attempt, seq = names.get(at.attempt, 0), at.seq  # type: ignore[attr-defined]
        match event:
            case Started():
                return Entry(attempt, seq, STARTED)
            case Delta():
                return Entry(attempt, seq, TOKENS, event.ids)
            case Released():
                return Entry(attempt, seq, RELEASED)
            case Done():
                return Entry(attempt, seq, DONE, state=event.reason.state.value)
            case End():
                return Entry(attempt, seq, END, state=event.state.value)
        raise AssertionError(f"what is {event}?")

    def known(self, index: int, log: tuple[Entry, ...]) -> list[Entry]:
        """The model's log, as ``read`` would have it."""
        return [e if (index, e.attempt) in self.attempts else e._replace(attempt=0) for e in log]


def tag(at: tuple[int, ...]) -> str:
    return f"{at[0]}.{at[1]}#{at[2]}"


def parse_tag(name: str) -> tuple[int, ...]:
    stem, _, n = name.partition("#")
    return (*map(int, stem.split(".")), int(n))


def text(tokens: tuple[int, ...]) -> str:
    return "".join(f"{token} " for token in tokens)


def event(entry: Entry) -> Delta | Done:
    if entry.kind == TOKENS:
        return Delta(offset=entry.tokens[0], ids=entry.tokens, text=text(entry.tokens))
    return Done(reason=REASONS[entry.state], at=time.time())


WEIGHTS = {Kind.PROGRESS: 10, Kind.CHOICE: 3, Kind.FAULT: 1}


def next_step(
    rng: random.Random, it: Model, w: World, real: Real, *, faults: bool
) -> tuple[Label, World] | None:
    """A random one; which message is taken is the real queue's choice."""
    steps = list(model.successors(it, w, faults=faults))
    if not steps:
        return None
    label, after = rng.choices(steps, [WEIGHTS[label.kind] for label, _ in steps])[0]
    if label.name != "take":
        return label, after
    taken = real.take()
    return rng.choice(
        [(label, after) for label, after in steps if label.name == "take" and label.at == taken]
    )


@pytest.mark.parametrize("size", [Size(tokens=3, workers=3), Size(jobs=2, workers=2)], ids=["one job", "two"])
def test_the_real_scripts_do_what_the_model_says(
    valkey: Valkey, state: State, tmp_path: Path, size: Size
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    played: Counter[str] = Counter()
    for number in range(TRACES):
        rng = random.Random(seed + number)
        it, trace = Model(size), [f"trace {number} of seed {seed}"]
        real, w, faults = Real(valkey, state, tmp_path, size.jobs), it.start(), 4
        while len(trace) < STEPS and (step := next_step(rng, it, w, real, faults=faults > 0)) is not None:
            label, after = step
            faults -= label.kind is Kind.FAULT
            trace.append(str(label))
            try:
                real.play(label, w, after)
                real.compare(after)
            except AssertionError as exc:
                raise AssertionError("\n".join(trace)) from exc
            w = after
            played[label.name] += 1
    assert {"take", "begin", "publish", "put object", "finish", "acknowledge", "sweep"} <= set(played)
    print(dict(played.most_common()))
