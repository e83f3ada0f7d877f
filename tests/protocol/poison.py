"""Suspects and trials as a model: rows that kill whatever runs them, and who is blamed for it.

Another question than ``model.py``'s, so a model of its own. What decides is the real code, ``EngineClient``
with its ``Trials`` and ``History``: before each action it is put into the world's state, afterwards its state
is the world's. Modelled are the listener and the publisher around it (``Hand``: listener.py, generation.py,
publisher.py), an engine that answers in any order, and a log that is written some time later.

One worker lives at a time. Jobs share nothing but an engine, so that two workers show nothing that two in a
row do not, and one that stands still looks to a log as one that died. An outage of the server is a write that
comes late. Left out: cancellations, and an engine that is given up for good.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gristmill.engine.messages import Output, Request, Stats, Step
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.events import Crashed, Delta, Event, Released, Started, Trial
from gristmill.worker.engine_client import CANARY, EngineClient
from gristmill.worker.history import LOSSES_BEFORE_TRIAL, History
from gristmill.worker.trials import REPEATED, SOON, Trials, Verdict, _Member

from .checker import Kind, Label, Property

MAX_ATTEMPTS = 3
SUCCEEDED, GIVEN_UP = "succeeded", "given up"
STATS = Stats(running=1, waiting=0, free_blocks=9, total_blocks=9, preemptions=0, step_s=0.01, tokens=1)
NAMES = "abcdefghijklmnopqrstuvwxyz"
EVENTS: dict[str, Event] = {
    "started": Started(worker="w", at=1.0),
    "tokens": Delta(offset=0, ids=(5,)),
    "released": Released(at=1.0),
    "trial": Trial(at=1.0),
    "alone": Crashed(code="engine_died", message="", worker="w", alone=True, at=1.0),
    "in company": Crashed(code="engine_died", message="", worker="w", alone=False, at=1.0),
}


@dataclass(frozen=True)
class Rules:
    """What nobody's innocence can do without."""

    runs_after_the_record: bool = True
    """A suspect runs alone once that is in its log."""
    others_run_after_the_record: bool = True
    """And others once it says what came of that."""
    company_is_no_strike: bool = True
    doubtful_run_alone: bool = True
    a_crash_alone_is_a_strike: bool = True


@dataclass(frozen=True)
class Size:
    """Who runs, and how much may happen to them from outside."""

    poison: tuple[int | None, ...]
    """One for each job: the token (0 is the first) at which it kills whatever runs it; None: an innocent."""
    tokens: int = 1
    faults: int = 0
    hasty: bool = False
    """Whatever is pending is done first and in order: only deaths are left to chance. For many jobs."""


class Record(NamedTuple):
    """A job's log, folded: what ``History`` remembers of it."""

    strikes: int = 0
    losses: int = 0
    crashed: bool = False
    open: bool = False
    quiet: bool = False
    alone: bool = False
    tokens: int = 0


class Hand(NamedTuple):
    """One job in the worker's hands: of its Generation what matters here."""

    made: int
    sent: int
    """Tokens in the log or in ``unconfirmed``."""
    strikes: int
    marks: tuple[str, ...] = ()
    done: str = ""
    on_trial: bool = False
    """By the log."""
    knows_trial: bool = False
    """``on_trial``, by the last answer of the server."""
    written: bool = False
    """It has not heard yet of a trial's begin or end, or of its own, that is in the log."""


class Client(NamedTuple):
    """EngineClient's state. What it believes to be inside the engine is inside."""

    members: tuple[tuple[str, tuple[int, ...]], ...] = ()
    groups: tuple[tuple[str, ...], ...] = ()
    inside: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    arming: str | None = None
    armed: str | None = None
    proven: bool = True


class World(NamedTuple):
    records: tuple[Record, ...]
    ends: tuple[str, ...]
    hands: tuple[Hand | None, ...]
    """All None: no worker lives, or one that has just started."""
    client: Client = Client()
    outside: int = 0
    """Deaths that no job has caused."""


class FakeProcess:
    """Stands for any engine process: the model says what becomes of it."""

    def __init__(self, _settings: EngineSettings) -> None:
        self.untaken: frozenset[str] = frozenset()

    def start(self) -> None: ...
    def wait_ready(self, _timeout_s: float) -> None: ...
    def add(self, requests: list[Request]) -> None: ...
    def abort(self, ids: set[str]) -> None: ...
    def stop(self, _timeout_s: float = 0.0) -> None: ...


class Model:
    """Searchable. Also the client's listener: what EngineListener does, on hands."""

    def __init__(self, size: Size, rules: Rules = Rules()) -> None:
        self.size, self.rules, self.faults = size, rules, size.faults
        self.jobs = range(len(size.poison))
        settings = EngineSettings(model=str(Path("/nowhere")))
        self._client = EngineClient(settings, self, start_timeout_s=1, stall_s=1, restarts=1_000_000)
        self._hands: list[Hand | None] = []
        self._records: list[Record] = []
        self._ends: list[str] = []
        self._to_arm: list[str] = []

    def start(self) -> World:
        """All jobs accepted, nobody at work."""
        count = len(self.jobs)
        return World((Record(),) * count, ("",) * count, (None,) * count)

    def canonical(self, w: World) -> World:
        """Counters stand still where more changes nothing, and what nobody will look at is blank."""
        records = tuple(
            r._replace(losses=min(r.losses, LOSSES_BEFORE_TRIAL), open=r.quiet, alone=r.alone and r.quiet)
            for r in w.records
        )
        members = tuple(
            (name, (made, need, min(crashes, REPEATED), min(soon, SOON)))
            for name, (made, need, crashes, soon) in w.client.members
        )
        arming = w.client.arming if w.client.arming in dict(members) else None
        return w._replace(records=records, client=w.client._replace(members=members, arming=arming))

    def successors(self, w: World, *, faults: bool = True) -> Iterator[tuple[Label, World]]:
        for label, do in self._possible(w):
            if label.kind is Kind.FAULT and not faults:
                continue
            yield label, self._after(w, label, do)

    # ---- what may happen

    def _possible(self, w: World) -> Iterator[tuple[Label, Callable[[], None]]]:
        chores = self._chores(w)
        if self.size.hasty and (chore := next(chores, None)) is not None:
            yield chore
        else:
            yield from chores
            yield from self._engine(w)
        if any(w.hands):
            yield Label("worker is killed", Kind.FAULT), self._worker_dies
            yield Label("worker drains", Kind.FAULT), self._drain
            yield Label("engine is killed", Kind.FAULT), lambda: self._engine_dies(frozenset())

    def _chores(self, w: World) -> Iterator[tuple[Label, Callable[[], None]]]:
        """What worker, queue and log do by themselves."""
        for index, hand in enumerate(w.hands):
            at = (index,)
            if hand is None:
                if not w.ends[index]:
                    yield Label("claim", Kind.PROGRESS, at), lambda index=index: self._claim(index)
            elif hand.written:
                yield Label("confirm", Kind.PROGRESS, at), lambda index=index: self._confirm(index)
            elif _pending(hand):
                yield Label("write", Kind.PROGRESS, at), lambda index=index: self._write(index)
        if not w.client.proven:
            yield Label("canary", Kind.PROGRESS), lambda: self._step(CANARY.id, token=False)
        for name in sorted(w.client.leaving):
            at = (NAMES.index(name),)
            yield Label("leave", Kind.PROGRESS, at), lambda name=name: self._step(name, finish="abort")

    def _engine(self, w: World) -> Iterator[tuple[Label, Callable[[], None]]]:
        """What is inside the engine makes a token, or kills."""
        told = False
        for name in sorted(w.client.inside):
            index = NAMES.index(name)
            hand = w.hands[index]
            made = hand.made if hand is not None else 0
            if self.size.poison[index] == made:
                yield Label("worker dies of", Kind.HARM, (index,)), self._worker_dies
                yield Label("engine dies of", Kind.HARM, (index,)), lambda: self._engine_dies(frozenset())
                members = dict(w.client.members)
                fresh = {i for i in w.client.inside if i in members and not members[i][0]} - {name}
                if fresh and not self.size.hasty:
                    label = Label("engine dies before it read the others, of", Kind.HARM, (index,))
                    yield label, lambda fresh=fresh: self._engine_dies(frozenset(fresh))
            elif not (self.size.hasty and told):
                told = True
                last = made + 1 >= self.size.tokens and self.size.poison[index] is None
                finish = "length" if last else None
                label = Label("token", Kind.PROGRESS, (index,))
                yield label, lambda name=name, finish=finish: self._step(name, finish=finish)

    # ---- how it happens

    def _after(self, w: World, label: Label, do: Callable[[], None]) -> World:
        self._hands, self._records, self._ends = list(w.hands), list(w.records), list(w.ends)
        self._load(w.client)
        do()
        while self._to_arm:
            self._client.armed(self._to_arm.pop())
        return World(
            tuple(self._records),
            tuple(self._ends),
            tuple(self._hands),
            self._save(),
            w.outside + label.name.endswith("is killed"),
        )

    def _claim(self, index: int) -> None:
        """JobHandler._prepare and _run."""
        record = self._records[index] = fold(self.rules, self._records[index], None)
        done = GIVEN_UP if record.strikes >= MAX_ATTEMPTS else ""
        if self.size.poison[index] is None and record.tokens >= self.size.tokens:
            done = SUCCEEDED
        self._log(index, "started")
        self._hands[index] = Hand(record.tokens, record.tokens, record.strikes, done=done)
        if not done:
            suspect = doubtful(self.rules, record) and self.rules.doubtful_run_alone
            self._client.submit(_request(NAMES[index]), suspect=suspect)

    def _write(self, index: int) -> None:
        """Generation.take_entries and publish.lua: tokens, marks, the end."""
        hand = self._hands[index]
        assert hand is not None
        entries = ("tokens",) * (hand.made - hand.sent) + hand.marks + ((hand.done,) if hand.done else ())
        for entry in entries:
            if entry in EVENTS:
                self._log(index, entry)
            else:
                self._ends[index] = entry
        hand = hand._replace(sent=hand.made, marks=())
        told = hand.on_trial or "trial" in entries or bool(self._ends[index])
        self._hands[index] = hand._replace(on_trial=entries[-1] == "trial", written=told)

    def _confirm(self, index: int) -> None:
        """Generation.confirm, Publisher._settle, EngineListener.on_trial_recorded."""
        hand = self._hands[index]
        assert hand is not None
        self._hands[index] = (
            None if self._ends[index] else hand._replace(written=False, knows_trial=hand.on_trial)
        )
        if hand.on_trial:
            self._client.armed(NAMES[index])
        else:
            self._client.recorded()

    def _step(self, name: str, *, token: bool = True, finish: str | None = None) -> None:
        ids = [5] if token and finish != "abort" else []
        self._client._take(Step(outputs=[Output(id=name, token_ids=ids, finish=finish)], stats=STATS))

    def _engine_dies(self, untaken: frozenset[str]) -> None:
        self._client._process.untaken = untaken  # type: ignore[union-attr]
        self._client._recover("engine_died: SIGKILL")

    def _worker_dies(self) -> None:
        """With all it holds. Whoever claims next finds what is in the logs."""
        self._hands = [None] * len(self.jobs)
        self._load(Client())

    def _drain(self) -> None:
        """JobHandler.hand_back, with a server that answers."""
        for index, hand in enumerate(self._hands):
            if hand is not None:
                if _pending(hand):
                    self._write(index)
                if not self._ends[index]:
                    self._log(index, "released")
        self._worker_dies()

    def _log(self, index: int, event: str) -> None:
        self._records[index] = fold(self.rules, self._records[index], event)

    # ---- the client's listener

    def on_step(self, outputs: list[Output], _stats: Stats, _now: float) -> None:
        for output in outputs:
            index = NAMES.index(output.id)
            hand = self._hands[index]
            if hand is not None and not hand.done:
                done = SUCCEEDED if output.finish == "length" else ""
                self._hands[index] = hand._replace(made=hand.made + len(output.token_ids), done=done)

    def on_crash(self, _reason: str, verdict: Verdict, _now: float) -> set[str]:
        given_up: set[str] = set()
        for name in verdict.suspects:
            index = NAMES.index(name)
            hand = self._hands[index]
            if hand is None or hand.done:
                continue
            strike = name == verdict.alone and self.rules.a_crash_alone_is_a_strike
            hand = hand._replace(marks=(*hand.marks, "alone" if strike else "in company"))
            hand = hand._replace(strikes=hand.strikes + strike)
            if hand.strikes >= MAX_ATTEMPTS:
                hand = hand._replace(done=GIVEN_UP)
                given_up.add(name)
            self._hands[index] = hand
        return given_up

    def arm(self, request_id: str) -> bool:
        index = NAMES.index(request_id)
        hand = self._hands[index]
        if hand is None or hand.done:
            return False
        self._hands[index] = hand._replace(marks=(*hand.marks, "trial"))
        if not self.rules.runs_after_the_record:
            self._to_arm.append(request_id)
        return True

    def awaits_record(self, request_id: str) -> bool:
        hand = self._hands[NAMES.index(request_id)]
        if hand is None or not self.rules.others_run_after_the_record:
            return False
        return hand.knows_trial

    def resume(self, request_ids: set[str]) -> list[Request]:
        hands = ((name, self._hands[NAMES.index(name)]) for name in sorted(request_ids))
        return [_request(name) for name, hand in hands if hand is not None and not hand.done]

    def on_engine_gone(self, reason: str) -> None:
        raise AssertionError(reason)

    # ---- its state, as a value

    def _load(self, state: Client) -> None:
        it, trials = self._client, Trials()
        trials._members = {name: _Member(*member) for name, member in state.members}
        trials._groups = deque(state.groups)
        it._trials, it._process = trials, FakeProcess(it._settings)  # type: ignore[assignment]
        it._open = {name: {name} for name in trials._members}
        it._inside, it._leaving = set(state.inside), set(state.leaving)
        it._arming, it._armed, it._proven = state.arming, state.armed, state.proven

    def _save(self) -> Client:
        it = self._client
        it._trials.check()
        assert it._open == {name: {name} for name in it._trials._members}, "an attempt is its one request"
        return Client(
            tuple((name, _values(member)) for name, member in sorted(it._trials._members.items())),
            tuple(it._trials._groups),
            frozenset(it._inside),
            frozenset(it._leaving),
            it._arming,
            it._armed,
            it._proven,
        )


_MEMBER = tuple(field.name for field in fields(_Member))


def _values(member: _Member) -> tuple[int, ...]:
    return tuple(getattr(member, name) for name in _MEMBER)


@cache
def _request(name: str) -> Request:
    return Request(id=name, prompt_ids=[1], max_tokens=9)


class Blunt(History):
    """Counts a loss in company as a strike."""

    def _close(self) -> None:
        self._alone = True
        super()._close()


def _unfolded(rules: Rules, record: Record) -> History:
    history = History() if rules.company_is_no_strike else Blunt()
    history.strikes, history._losses, history._crashed = record.strikes, record.losses, record.crashed
    history._attempt = EVENTS["started"] if record.open else None  # type: ignore[assignment]
    history._quiet, history._alone, history._tokens = record.quiet, record.alone, {0: record.tokens}
    return history


@cache
def fold(rules: Rules, record: Record, event: str | None) -> Record:
    """One entry more; None: the log ends here, as for who claims it."""
    history = _unfolded(rules, record)
    if event is None:
        history._close()
    else:
        history.take(EVENTS[event])
    tokens = record.tokens + (event == "tokens")
    open_ = history._attempt is not None
    return Record(
        history.strikes, history._losses, history._crashed, open_, history._quiet, history._alone, tokens
    )


@cache
def doubtful(rules: Rules, record: Record) -> bool:
    return _unfolded(rules, record).doubtful


def _pending(hand: Hand) -> bool:
    return not hand.written and bool(hand.made > hand.sent or hand.marks or hand.done)


# ---- what is promised


def _strikes(model: Model, w: World) -> tuple[int, ...]:
    over = not any(w.hands)
    return tuple((fold(model.rules, r, None) if over else r).strikes for r in w.records)


def _innocent(model: Model, w: World) -> bool:
    """Killed from outside while an innocent runs alone: that alone looks like its guilt."""
    strikes = _strikes(model, w)
    return sum(strikes[i] for i in model.jobs if model.size.poison[i] is None and not w.ends[i]) <= w.outside


def _not_given_up(model: Model, w: World) -> bool:
    return all(
        end != GIVEN_UP or poison is not None for end, poison in zip(w.ends, model.size.poison, strict=True)
    ) or (w.outside >= MAX_ATTEMPTS)


PROPERTIES = (
    Property("no strike for what others did", of_world=_innocent),
    Property("no innocent is given up", of_world=_not_given_up),
)


def ended(w: World) -> bool:
    return all(w.ends)
