"""The protocol as a model: claim, renew, journal, commit, acknowledge, and all that can go wrong.

START HERE. A ``World`` is all that matters of clients, broker, state server, store and workers at one moment;
an action is a generator that looks at a world and yields the worlds it may become: nothing if its guard does
not hold. ``successors`` tries them all. Each action's docstring names the code it stands for, and
``test_conformance.py`` replays traces against that code. Time is left out: a lease may run out whenever
nobody who is alive renews it. What the protocol relies on is in ``Rules``, to be switched off one by one.

Tokens are numbers, the undisturbed output is 0, 1, 2, … An engine that gets the same prompt and tokens draws
the same next one; so the only ways to go wrong are to leave one out, to write one twice, or too late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .checker import Kind, Label

SUCCEEDED, CANCELLED = "succeeded", "cancelled"
FINAL = frozenset({SUCCEEDED, CANCELLED})
STARTED, TOKENS, RELEASED, DONE, END = "started", "tokens", "released", "done", "end"
FULL, CUT = "full", "cut"
"""A lease: its owner's for as long as that one lives; or run out, because the broker was away."""


class Entry(NamedTuple):
    """In the log: id ``<attempt>-<seq>``."""

    attempt: int
    seq: int
    kind: str
    tokens: tuple[int, ...] = ()
    state: str = ""
    """Of DONE and END."""


class Result(NamedTuple):
    """The object. ``attempt`` wrote it: two results with the same text are still two objects."""

    state: str
    tokens: tuple[int, ...]
    attempt: int


class Job(NamedTuple):
    """What the state server, the store and the client have of one job; the last line is nobody's memory."""

    state: str = "queued"
    """"" if the server knows nothing."""
    attempt: int = 0
    cancel: bool = False
    log: tuple[Entry, ...] = ()
    result: Result | None = None
    resubmit: bool = False
    """The broker lost everything: the client, which has its idempotency key, sends it again."""
    bases: int = 1
    begun: int = 0
    """Attempts ever begun. The server's clock: no later attempt has a smaller number, whatever was lost."""
    may_cancel: bool = False
    forgotten: bool = False
    """State or log were lost at some time."""


class Message(NamedTuple):
    """Waiting, after ``n`` claims."""

    job: int
    base: int
    n: int


class Lease(NamedTuple):
    """A claim. Its first three fields are the tag."""

    job: int
    base: int
    n: int
    left: str = FULL


class Delivery(NamedTuple):
    """One delivery in a worker's hands."""

    job: int
    base: int
    n: int
    step: str
    attempt: int = 0
    tokens: tuple[int, ...] = ()
    done: str = ""
    sent: int = 0
    """Tokens that stand in the log or in ``unconfirmed``."""
    seq: int = 0
    unconfirmed: tuple[Entry, ...] = ()
    engine: int = 0
    """The token that the engine draws next."""
    found: tuple[Result, ...] = ()
    """The result that counts, once the object exists."""


class Worker(NamedTuple):
    """A process with work in hand. One without is not remembered: there is always another."""

    stalled: bool
    closing: bool
    hand: tuple[Delivery, ...]


class World(NamedTuple):
    jobs: tuple[Job, ...]
    waiting: tuple[Message, ...]
    claims: tuple[Lease, ...] = ()
    workers: tuple[Worker, ...] = ()
    late: tuple[tuple[int, tuple[Entry, ...]], ...] = ()
    """A publish that hangs in the network: it arrives some time, or never."""
    store_up: bool = True
    hold: bool = False
    """After an outage owners get time to renew before anything is swept."""


@dataclass(frozen=True)
class Rules:
    """What the protocol relies on. Each is one line or one script; switched off, some property fails."""

    claim_registers_at_once: bool = True
    claim_reads_log: bool = True
    claim_takes_done_over: bool = True
    attempt_from_clock: bool = True
    publish_checks_attempt: bool = True
    publish_checks_place: bool = True
    publish_needs_running: bool = True
    object_create_only: bool = True
    finish_reads_object: bool = True
    finish_after_object: bool = True
    ack_after_object: bool = True
    ack_by_tag: bool = True
    requeue_by_tag: bool = True
    fenced_keeps_message: bool = True
    sweep_holds: bool = True
    engine_resumes_from_given: bool = True


@dataclass(frozen=True)
class Size:
    """How much may happen: ``faults`` of any of the kinds together."""

    jobs: int = 1
    tokens: int = 2
    workers: int = 2
    faults: int = 2
    cancels: int = 1
    """The first so many jobs may be cancelled, at any time."""


class Model(NamedTuple):
    size: Size
    rules: Rules = Rules()

    def start(self) -> World:
        """All jobs accepted, nobody at work."""
        count = self.size.jobs
        jobs = tuple(Job(may_cancel=i < self.size.cancels) for i in range(count))
        return World(jobs, tuple(Message(i, 0, 0) for i in range(count)))

    @property
    def faults(self) -> int:
        return self.size.faults

    def successors(self, w: World, *, faults: bool = True) -> Iterator[tuple[Label, World]]:
        return successors(self, w, faults=faults)

    def canonical(self, w: World) -> World:
        return canonical(w)


Worlds = Iterator[World]
WorldAction = Callable[[Model, World], Iterator[tuple[tuple[int, ...], World]]]
DeliveryAction = Callable[[Model, World, int, int, Delivery], Worlds]

WORLD_ACTIONS: list[tuple[str, Kind, WorldAction]] = []
DELIVERY_ACTIONS: dict[str, list[tuple[str, Kind, DeliveryAction]]] = {}


def anywhere(kind: Kind) -> Callable[[WorldAction], WorldAction]:
    def register(action: WorldAction) -> WorldAction:
        WORLD_ACTIONS.append((action.__name__.replace("_", " "), kind, action))
        return action

    return register


def during(*steps: str, kind: Kind = Kind.PROGRESS) -> Callable[[DeliveryAction], DeliveryAction]:
    """For each delivery at one of ``steps`` whose worker is not stalled."""

    def register(action: DeliveryAction) -> DeliveryAction:
        for step in steps:
            DELIVERY_ACTIONS.setdefault(step, []).append((action.__name__.replace("_", " "), kind, action))
        return action

    return register


def successors(model: Model, w: World, *, faults: bool = True) -> Iterator[tuple[Label, World]]:
    """Everything that may happen next; without ``faults``, everything but those."""
    for name, kind, act in WORLD_ACTIONS:
        if faults or kind is not Kind.FAULT:
            for at, after in act(model, w):
                yield Label(name, kind, at), after
    for i, worker in enumerate(w.workers):
        if not worker.stalled:
            for k, d in enumerate(worker.hand):
                for name, kind, deliver in DELIVERY_ACTIONS.get(d.step, ()):
                    if faults or kind is not Kind.FAULT:
                        for after in deliver(model, w, i, k, d):
                            yield Label(name, kind, d[:3]), after


# ---- the queue: message_queue.py, claims.py


@anywhere(Kind.PROGRESS)
def take(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """queue_claim.lua. Any waiting message: order is not what this model is about."""
    live = [i for i, worker in enumerate(w.workers) if not worker.stalled]
    takers: list[int | None] = [i for i in live if not w.workers[i].closing]
    if len(live) < model.size.workers:
        takers.append(None)
    for message in set(w.waiting):
        tag = (message.job, message.base, message.n + 1)
        waiting = _without(w.waiting, message)
        registers = model.rules.claim_registers_at_once
        claims = tuple(sorted((*w.claims, Lease(*tag)))) if registers else w.claims
        for i in takers:
            worker = Worker(False, False, ()) if i is None else w.workers[i]
            joined = any(d.job == message.job and d.step not in ("ack", "requeue") for d in worker.hand)
            step = ("joined" if joined else "got") if registers else "popped"
            hand = tuple(sorted((*worker.hand, Delivery(*tag, step))))
            others = w.workers if i is None else w.workers[:i] + w.workers[i + 1 :]
            workers = tuple(sorted((*others, worker._replace(hand=hand))))
            yield tag, w._replace(waiting=waiting, claims=claims, workers=workers)


@during("popped")
def register(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """Stock kombu's second step; never reached with ``claim_registers_at_once``."""
    w = w._replace(claims=tuple(sorted((*w.claims, Lease(*d[:3])))))
    yield _deliver(w, i, k, Delivery(*d[:3], "got"))


@during("got", "joined", "run", "fenced", "commit", "object", "ack", "release", "requeue")
def renew(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """queue_renew.lua, by claim_book.py's Renewer. In quiet times it changes nothing: see ``sweep``."""
    if Lease(*d[:3], CUT) in w.claims:
        yield w._replace(
            claims=tuple(sorted(c._replace(left=FULL) if c[:3] == d[:3] else c for c in w.claims))
        )


@anywhere(Kind.FAULT)
def broker_outage(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """Restarted, frozen or out of reach for longer than a lease."""
    if w.claims and not w.hold:
        held = _held(w)
        claims = (lease._replace(left=CUT) if lease[:3] in held else lease for lease in w.claims)
        yield (), w._replace(claims=tuple(sorted(claims)), hold=True)


@anywhere(Kind.PROGRESS)
def hold_ends(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """A hold lasts a lease, which is time for every live owner to renew."""
    held = _held(w)
    if w.hold and not any(lease.left == CUT and lease[:3] in held for lease in w.claims):
        yield (), w._replace(hold=False)


@anywhere(Kind.PROGRESS)
def sweep(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """queue_sweep.lua: what has run out, unless held off.

    That is, what nobody alive holds (a live owner renews three times in a lease), or what an outage cut. A
    worker that wakes after its lease ran out and before the sweep is no other case: sweep first, wake later.
    """
    if w.hold and model.rules.sweep_holds:
        return
    held = _held(w)
    for lease in w.claims:
        if lease.left == CUT or lease[:3] not in held:
            claims = tuple(c for c in w.claims if c is not lease)
            yield (
                lease[:3],
                w._replace(claims=claims, waiting=tuple(sorted((*w.waiting, Message(*lease[:3]))))),
            )


@during("ack")
def acknowledge(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """queue_ack.lua: the tag, and nothing else. What cannot be said now is owed and said later."""
    yield _forget(w._replace(claims=_spend(w.claims, d, by_tag=model.rules.ack_by_tag)), i, k)


@during("requeue")
def requeue(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """queue_requeue.lua: back to the head of its list, if the tag is not spent."""
    claims = _spend(w.claims, d, by_tag=model.rules.requeue_by_tag)
    if claims != w.claims:
        w = w._replace(claims=claims, waiting=tuple(sorted((*w.waiting, Message(*d[:3])))))
    yield _forget(w, i, k)


# ---- an attempt: handler.py, generation.py, publisher.py; claim.lua, publish.lua


@during("got")
def begin(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """State.claim, then JobHandler._prepare: stand where the log stands."""
    job = w.jobs[d.job]
    if job.state in FINAL:
        yield _dispose(w, i, k, "ack")
    elif model.rules.claim_reads_log:
        begun = _claimed(model, job)
        yield _deliver(_with_job(w, d.job, begun), i, k, _prepared(model, d, begun.attempt, job))
    else:  # the log first, the fence afterwards
        yield _deliver(w, i, k, _prepared(model, d, 0, job)._replace(step="read"))


@during("read")
def fence(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """Never reached with ``claim_reads_log``."""
    job = w.jobs[d.job]
    if job.state in FINAL:
        yield _dispose(w, i, k, "ack")
    else:
        begun = _claimed(model, job)
        step = "commit" if any(entry.kind == DONE for entry in job.log) else "run"
        yield _deliver(_with_job(w, d.job, begun), i, k, d._replace(step=step, attempt=begun.attempt))


@during("got", kind=Kind.FAULT)
def begin_reply_lost(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """It is repeated, and begins yet another attempt."""
    job = w.jobs[d.job]
    if job.state not in FINAL and model.rules.claim_reads_log:
        yield _with_job(w, d.job, _claimed(model, job))


@during("run")
def engine_step(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """EngineListener.on_step, Generation.push."""
    if not d.done:
        tokens = (*d.tokens, d.engine)
        done = SUCCEEDED if len(tokens) >= model.size.tokens else ""
        yield _deliver(w, i, k, d._replace(tokens=tokens, done=done, engine=d.engine + 1))


@during("run", kind=Kind.FAULT)
def engine_dies(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """EngineClient._recover: the next engine continues from the tokens the worker has, journalled or not."""
    if not d.done:
        given = len(d.tokens) if model.rules.engine_resumes_from_given else d.sent
        if given != d.engine:  # else it is as if nothing had happened
            yield _deliver(w, i, k, d._replace(engine=given))


@during("run")
def hear_of_cancel(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """Announced, or found by the reconciliation: JobHandler.cancel."""
    if w.jobs[d.job].cancel and not d.done:
        yield _deliver(w, i, k, d._replace(done=CANCELLED))


@during("run")
def publish(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """Publisher._write and _settle: all that is pending in one call."""
    d = taken(d)
    if d.unconfirmed:
        job, refused = published(model, w.jobs[d.job], d.unconfirmed)
        w = _with_job(w, d.job, job)
        if refused:
            yield _deliver(w, i, k, Delivery(*d[:3], "fenced", attempt=d.attempt))
        elif d.unconfirmed[-1].kind == DONE:
            yield _deliver(w, i, k, _complete(d))
        else:
            yield _deliver(w, i, k, d._replace(unconfirmed=()))


@during("run", kind=Kind.FAULT)
def publish_reply_lost(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """The same entries come again."""
    d = taken(d)
    if d.unconfirmed:
        job, refused = published(model, w.jobs[d.job], d.unconfirmed)
        if not refused:
            yield _deliver(_with_job(w, d.job, job), i, k, d)


@during("run", kind=Kind.FAULT)
def publish_delayed(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """It hangs somewhere, and the worker will try again; or die, and it still arrives."""
    d = taken(d)
    if d.unconfirmed and not w.late:
        yield _deliver(w._replace(late=((d.job, d.unconfirmed),)), i, k, d)


@anywhere(Kind.CHOICE)
def late_publish_arrives(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    for index, entries in w.late:
        job, _ = published(model, w.jobs[index], entries)
        yield (index,), _with_job(w._replace(late=()), index, job)


@during("fenced")
def look_who_fenced(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """JobHandler._give_up. The message stays in hand until the job is final, or its new owner is gone.

    A newer attempt need not have a message: its tag may have been spent before it began.
    """
    job = w.jobs[d.job]
    superseded = job.attempt > d.attempt and not model.rules.fenced_keeps_message
    if job.state in FINAL or superseded:
        yield _dispose(w, i, k, "ack")
    elif w.workers[i].closing:
        yield _dispose(w, i, k, "requeue")
    elif job.state != "running" or job.attempt == d.attempt or not _runs(w, d.job, job.attempt):
        yield _dispose(w, i, k, "")


# ---- the commit: backends/sink.py, backends/store.py, finish.lua


@during("commit")
def put_object(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """ResultStore.put_new; whoever comes second reads the first one's."""
    rules = model.rules
    if not rules.finish_after_object and w.jobs[d.job].state not in FINAL:
        yield from _finish(w, i, k, d._replace(found=(Result(d.done, d.tokens, d.attempt),)), "commit")
    elif not rules.ack_after_object and any(lease[:3] == d[:3] for lease in w.claims):
        yield w._replace(claims=_spend(w.claims, d, by_tag=True))
    elif w.store_up:
        w, found = _stored(model, w, d)
        yield _deliver(w, i, k, Delivery(*d[:3], "object", attempt=d.attempt, found=(found,)))


@during("commit", kind=Kind.FAULT)
def put_reply_lost(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """The second try finds an object, and it may be ours."""
    if w.store_up and w.jobs[d.job].result is None:
        yield _stored(model, w, d)[0]


@during("object")
def finish(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """finish.lua, idempotent."""
    yield from _finish(w, i, k, d, "ack")


@anywhere(Kind.FAULT)
def store_fails(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    if w.store_up:
        yield (), w._replace(store_up=False)


@anywhere(Kind.PROGRESS)
def store_returns(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    if not w.store_up:
        yield (), w._replace(store_up=True)


# ---- workers come and go: lifecycle.py, handler.hand_back, release.lua


@anywhere(Kind.FAULT)
def worker_dies(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """kill -9, with all it holds. A stalled one may stay so for ever: killing it shows nothing new."""
    for i, worker in enumerate(w.workers):
        if not worker.stalled:
            yield worker.hand[0][:3], w._replace(workers=w.workers[:i] + w.workers[i + 1 :])


@anywhere(Kind.FAULT)
def worker_stalls(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """SIGSTOP, a paused machine, a cut cable: from now on it renews nothing."""
    for i, worker in enumerate(w.workers):
        if not worker.stalled:
            held = {d[:3] for d in worker.hand}
            claims = (c._replace(left=FULL) if c[:3] in held else c for c in w.claims)
            workers = _replaced(w.workers, i, worker._replace(stalled=True))
            yield worker.hand[0][:3], w._replace(workers=workers, claims=tuple(sorted(claims)))


@anywhere(Kind.CHOICE)
def worker_wakes(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """A zombie, if its leases were swept meanwhile. It does not know, and goes on."""
    for i, worker in enumerate(w.workers):
        if worker.stalled:
            workers = _replaced(w.workers, i, worker._replace(stalled=False))
            yield worker.hand[0][:3], w._replace(workers=workers)


@anywhere(Kind.FAULT)
def worker_drains(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """SIGTERM: it takes nothing more, and finishes or hands back what it has."""
    for i, worker in enumerate(w.workers):
        if not (worker.stalled or worker.closing):
            workers = _replaced(w.workers, i, worker._replace(closing=True))
            yield worker.hand[0][:3], w._replace(workers=workers)


@during("got", "run", "commit", "object")
def hand_back(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """Only at drain; from a commit when store or server do not answer. Nothing more of it is written."""
    if w.workers[i].closing:
        yield (
            _dispose(w, i, k, "requeue")
            if d.step != "run"
            else _deliver(w, i, k, Delivery(*d[:3], "release", attempt=d.attempt))
        )


@during("release")
def release(model: Model, w: World, i: int, k: int, d: Delivery) -> Worlds:
    """release.lua."""
    job = w.jobs[d.job]
    if job.state == "running" and job.attempt == d.attempt:
        log = job.log
        if log and log[-1].attempt == d.attempt:
            log = (*log, Entry(d.attempt, log[-1].seq + 1, RELEASED))
        w = _with_job(w, d.job, job._replace(state="queued", log=log))
    yield _dispose(w, i, k, "requeue")


# ---- clients, and what servers lose


@anywhere(Kind.CHOICE)
def cancel(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """cancel.lua: the flag."""
    for index, job in enumerate(w.jobs):
        if job.may_cancel and job.state in ("queued", "running"):
            yield (index,), _with_job(w, index, job._replace(cancel=True, may_cancel=False))


@anywhere(Kind.FAULT)
def submit_twice(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """The same idempotency key: submit.lua knows it, and the message is published all the same."""
    for index, job in enumerate(w.jobs):
        if job.bases < 2 and not job.resubmit:
            yield (index,), _submitted(w, index, job)


@anywhere(Kind.PROGRESS)
def submit_again(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """The broker lost it, and its client has not seen its end."""
    for index, job in enumerate(w.jobs):
        if job.resubmit:
            yield (index,), _submitted(w, index, job)


@anywhere(Kind.FAULT)
def redis_loses_everything(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    jobs = tuple(_emptied(job)._replace(resubmit=job.result is None) for job in w.jobs)
    yield (), w._replace(jobs=jobs, waiting=(), claims=(), hold=False)


@anywhere(Kind.FAULT)
def redis_loses_states_and_logs(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """The queue is elsewhere: SQS, or another server."""
    if any(job.state for job in w.jobs):
        yield (), w._replace(jobs=tuple(_emptied(job) for job in w.jobs))


@anywhere(Kind.FAULT)
def log_expires(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    for index, job in enumerate(w.jobs):
        if job.log:
            yield (index,), _with_job(w, index, job._replace(log=(), forgotten=True))


@anywhere(Kind.FAULT)
def state_expires(model: Model, w: World) -> Iterator[tuple[tuple[int, ...], World]]:
    """Not of a final job: finish.lua gives both keys the same time to live."""
    for index, job in enumerate(w.jobs):
        if job.log and job.state in ("queued", "running"):
            yield (index,), _with_job(w, index, _emptied(job)._replace(log=job.log))


# ---- what the scripts and the handler do, as functions


def _claimed(model: Model, job: Job) -> Job:
    """claim.lua."""
    last = max(job.attempt, job.log[-1].attempt if job.log else 0)
    attempt = (max(last, job.begun) if model.rules.attempt_from_clock else last) + 1
    log = (*job.log, Entry(attempt, 0, STARTED))
    return job._replace(state="running", attempt=attempt, log=log, begun=max(job.begun, attempt))


def _prepared(model: Model, d: Delivery, attempt: int, job: Job) -> Delivery:
    """Generation.replay and Admission.admit. ``job``: before the claim."""
    tokens = tuple(token for entry in job.log for token in entry.tokens)
    done = next((entry.state for entry in job.log if entry.kind == DONE), "")
    if done and model.rules.claim_takes_done_over:
        return Delivery(*d[:3], "commit", attempt=attempt, tokens=tokens, done=done)
    done = CANCELLED if job.cancel else SUCCEEDED if len(tokens) >= model.size.tokens else ""
    if not model.rules.claim_takes_done_over:
        tokens, done = (), ""
    sent = engine = len(tokens)
    return Delivery(*d[:3], "run", attempt, tokens, done, sent, engine=engine)


def taken(d: Delivery) -> Delivery:
    """Generation.take_entries: until they are confirmed the same ones come again."""
    if d.unconfirmed:
        return d
    entries, seq = [], d.seq
    if fresh := d.tokens[d.sent :]:
        entries.append(Entry(d.attempt, seq := seq + 1, TOKENS, fresh))
    if d.done:
        entries.append(Entry(d.attempt, seq := seq + 1, DONE, state=d.done))
    return d._replace(unconfirmed=tuple(entries), sent=len(d.tokens), seq=seq)


def published(model: Model, job: Job, entries: tuple[Entry, ...]) -> tuple[Job, bool]:
    """publish.lua. The job afterwards, and whether it refused."""
    rules, log = model.rules, job.log
    running = job.state == "running" if rules.publish_needs_running else job.state not in FINAL
    owned = running and job.attempt == entries[0].attempt
    if rules.publish_checks_attempt and not owned:
        return job, True
    if not (rules.publish_checks_place and rules.publish_checks_attempt):
        return job._replace(log=(*log, *entries)), False
    if not log or log[-1].attempt != entries[0].attempt:
        return job, True
    for entry in entries:
        top = log[-1].seq
        if entry.seq > top + 1:
            return job._replace(log=log), True
        if entry.seq == top + 1:
            log = (*log, entry)
    return job._replace(log=log), False


def _complete(d: Delivery) -> Delivery:
    return Delivery(*d[:3], "commit", attempt=d.attempt, tokens=d.tokens, done=d.done)


def _stored(model: Model, w: World, d: Delivery) -> tuple[World, Result]:
    ours, existing = Result(d.done, d.tokens, d.attempt), w.jobs[d.job].result
    if existing is None or not model.rules.object_create_only:
        return _with_job(w, d.job, w.jobs[d.job]._replace(result=ours)), ours
    return w, existing if model.rules.finish_reads_object else ours


def _finish(w: World, i: int, k: int, d: Delivery, step: str) -> Worlds:
    """finish.lua."""
    job = w.jobs[d.job]
    if job.state not in FINAL:
        state, attempt, seq = d.found[0].state, job.attempt, 1
        if job.log and job.log[-1].attempt >= attempt:
            attempt, seq = job.log[-1].attempt, job.log[-1].seq + 1
        elif not job.log and attempt == 0:
            attempt = job.begun + 1  # the time
        log = (*job.log, Entry(attempt, seq, END, state=state))
        w = _with_job(w, d.job, job._replace(state=state, log=log))
    yield _dispose(w, i, k, "ack") if step == "ack" else w


def _submitted(w: World, index: int, job: Job) -> World:
    """Link.submit: the record, then the message."""
    waiting = tuple(sorted((*w.waiting, Message(index, job.bases, 0))))
    job = job._replace(state=job.state or "queued", bases=job.bases + 1, resubmit=False)
    return _with_job(w._replace(waiting=waiting), index, job)


def _emptied(job: Job) -> Job:
    return job._replace(state="", attempt=0, cancel=False, log=(), forgotten=True)


# ---- moving things about


def _held(w: World) -> set[tuple[int, ...]]:
    """Tags in the hands of those who can renew them."""
    return {d[:3] for worker in w.workers if not worker.stalled for d in worker.hand}


def _runs(w: World, job: int, attempt: int) -> bool:
    """The worker that the state names still sends heartbeats."""
    hands = (d for worker in w.workers if not worker.stalled for d in worker.hand)
    return any(d.job == job and d.attempt == attempt for d in hands)


def _without(messages: tuple[Message, ...], one: Message) -> tuple[Message, ...]:
    at = messages.index(one)
    return messages[:at] + messages[at + 1 :]


def _spend(claims: tuple[Lease, ...], d: Delivery, *, by_tag: bool) -> tuple[Lease, ...]:
    width = 3 if by_tag else 2
    return tuple(lease for lease in claims if lease[:width] != d[:width])


def _with_job(w: World, index: int, job: Job) -> World:
    return w._replace(jobs=(*w.jobs[:index], job, *w.jobs[index + 1 :]))


def _replaced(workers: tuple[Worker, ...], i: int, worker: Worker) -> tuple[Worker, ...]:
    return tuple(sorted((*workers[:i], worker, *workers[i + 1 :])))


def _hand(w: World, i: int, hand: list[Delivery]) -> World:
    if hand:
        return w._replace(workers=_replaced(w.workers, i, w.workers[i]._replace(hand=tuple(sorted(hand)))))
    return w._replace(workers=w.workers[:i] + w.workers[i + 1 :])


def _deliver(w: World, i: int, k: int, d: Delivery) -> World:
    hand = list(w.workers[i].hand)
    hand[k] = d
    return _hand(w, i, hand)


def _forget(w: World, i: int, k: int) -> World:
    """Nothing more is done about it, and its lease is not renewed."""
    hand = list(w.workers[i].hand)
    del hand[k]
    return _hand(w, i, hand)


def _dispose(w: World, i: int, k: int, how: str) -> World:
    """JobHandler._run_once: deliveries of one job to one worker end alike. ``how`` "": left alone."""
    hand = list(w.workers[i].hand)
    d = hand[k]
    same = {at for at, other in enumerate(hand) if other.job == d.job and other.step == "joined"} | {k}
    kept = [Delivery(*o[:3], how) if at in same else o for at, o in enumerate(hand) if how or at not in same]
    return _hand(w, i, kept)


# ---- one world for all that differ in names only


def canonical(w: World) -> World:
    """Attempts and tags renumbered in order, and without what can change nothing any more.

    Without this, deliveries that fence one another for ever would make the number of worlds infinite.
    """
    valid = {c[:3] for c in w.claims}
    bases: list[dict[int, int]] = [{} for _ in w.jobs]
    counts: dict[tuple[int, int], dict[int, int]] = {}
    for job, base, n in sorted({*w.waiting, *valid}):
        bases[job].setdefault(base, len(bases[job]))
        ranks = counts.setdefault((job, base), {})
        ranks.setdefault(n, len(ranks))
    late = w.late
    if late and (w.jobs[late[0][0]].attempt != late[0][1][0].attempt or w.jobs[late[0][0]].state in FINAL):
        late = ()  # it would be refused
    attempts: list[dict[int, int]] = []
    for index, job in enumerate(w.jobs):
        used = {0, job.attempt, job.begun}
        if job.log:
            used.add(job.log[-1].attempt)
        used.update(d.attempt for worker in w.workers for d in worker.hand if d.job == index)
        attempts.append({attempt: rank for rank, attempt in enumerate(sorted(used))})

    def renamed(d: Delivery) -> Delivery:
        spent = d[:3] not in valid
        names = attempts[d.job]
        entries = d.unconfirmed and tuple(e._replace(attempt=names[e.attempt]) for e in d.unconfirmed)
        return d._replace(
            base=bases[d.job].get(d.base, -1),
            n=-1 if spent else counts[d.job, d.base][d.n],
            attempt=names[d.attempt],
            unconfirmed=entries,
            found=d.found and (d.found[0]._replace(attempt=0),),
        )

    workers: list[Worker] = []
    for worker in w.workers:
        kept = [d for d in worker.hand if d.step not in ("ack", "requeue") or d.base in bases[d.job]]
        if kept:
            workers.append(worker._replace(hand=tuple(sorted(map(renamed, kept)))))
    return w._replace(
        jobs=tuple(
            job._replace(
                attempt=attempts[index][job.attempt],
                begun=attempts[index][job.begun],
                bases=len(bases[index]),
                log=_digested(job.log, attempts[index]),
                result=job.result and job.result._replace(attempt=0),
            )
            for index, job in enumerate(w.jobs)
        ),
        waiting=tuple(sorted(Message(j, bases[j][b], counts[j, b][n]) for j, b, n in w.waiting)),
        claims=tuple(sorted(Lease(j, bases[j][b], counts[j, b][n], left) for j, b, n, left in w.claims)),
        workers=tuple(sorted(workers)),
        late=tuple((j, tuple(e._replace(attempt=attempts[j][e.attempt]) for e in es)) for j, es in late),
    )


def _digested(log: tuple[Entry, ...], names: dict[int, int]) -> tuple[Entry, ...]:
    """All tokens as one entry, done, and the top."""
    if not log:
        return ()
    top, tokens = log[-1], tuple(token for entry in log for token in entry.tokens)
    short: list[Entry] = []
    if tokens and not top.tokens:
        short.append(Entry(0, 0, TOKENS, tokens))
    short += [Entry(0, 1, DONE, state=entry.state) for entry in log[:-1] if entry.kind == DONE]
    return (*short, top._replace(attempt=names[top.attempt], tokens=tokens if top.tokens else ()))
