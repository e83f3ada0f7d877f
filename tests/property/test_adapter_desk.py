"""Any order of arrivals, ends, aborts and loads: memory stays within its bound, and everybody is served."""

from __future__ import annotations

from dataclasses import dataclass

from gristmill.engine.lora.desk import AdapterDesk, Files
from gristmill.engine.lora.pool import AdapterPool
from gristmill.engine.messages import Request
from gristmill.engine.sequence import Sequence
from gristmill.schemas.errors import AdapterInvalid, AdapterNotFound
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

CAPACITY = 10
SIZES = {"a": 3, "b": 4, "c": 5, "d": 10, "broken": 2, "huge": 11}
WAIT_S = 30.0


@dataclass
class Reader:
    """Adapters that are a name and a size; counts what is in memory by what was loaded and not let go."""

    loads: int = 0

    def find(self, name: str) -> str:
        if name not in SIZES:
            raise AdapterNotFound(f"no adapter {name}")
        return name

    def survey(self, name: str) -> tuple[str, int]:
        return name, SIZES[name]

    def load(self, name: str) -> str:
        self.loads += 1
        if name == "broken":
            raise AdapterInvalid("broken")
        return name

    @property
    def files(self) -> Files[str, str]:
        return Files(self.find, self.survey, self.load, lambda name: name)


class DeskMachine(RuleBasedStateMachine):
    """The engine's side of the desk: whoever is ready is scheduled, runs for a while and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = AdapterDesk(Reader().files, AdapterPool(CAPACITY))
        self.scheduled: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.number = 0

    @rule(name=st.sampled_from(sorted(SIZES)), priority=st.integers(0, 2))
    def arrive(self, name: str, priority: int) -> None:
        request = Request(id=f"s{self.number}", prompt_ids=[1], max_tokens=9, adapter=name, priority=priority)
        seq = Sequence(request, limit=10, end_ids=frozenset(), number=self.number)
        self.number += 1
        (self.scheduled if self.desk.add(seq) else self.waiting).append(seq)

    @rule(at=st.integers(0, 99))
    def end_or_abort(self, at: int) -> None:
        everybody = self.scheduled + self.waiting
        if everybody:
            seq = everybody[at % len(everybody)]
            was_waiting = seq in self.waiting
            assert self.desk.remove(seq) == was_waiting
            (self.waiting if was_waiting else self.scheduled).remove(seq)

    @rule()
    def let_the_thread_work(self) -> None:
        self.desk.wait(WAIT_S)

    @rule()
    def turn(self) -> None:
        turn = self.desk.turn()
        for seq in turn.withdrawn:
            self.scheduled.remove(seq)
            self.waiting.append(seq)
        for seq in turn.ready:
            self.waiting.remove(seq)
            self.scheduled.append(seq)
        for seq, error in turn.failed:
            self.waiting.remove(seq)
            assert seq.adapter in ("broken", "huge"), error.message

    # No precondition: who waits depends on how far the thread is, and what is drawn must not.
    @rule()
    def everybody_is_served_once_the_scheduled_end(self) -> None:
        """Nobody new arrives: each turn either serves somebody or waits for somebody who was served."""
        patience = 6 * len(self.waiting) + 6
        while self.waiting:
            assert patience, f"{[seq.id for seq in self.waiting]} are never served"
            patience -= 1
            for seq in list(self.scheduled):
                self.desk.remove(seq)
                self.scheduled.remove(seq)
            self.let_the_thread_work()
            self.turn()

    @invariant()
    def books_balance(self) -> None:
        self.desk.check()
        assert self.desk.scheduled == set(self.scheduled)
        assert set(self.desk.waiting) == set(self.waiting)
        assert all(seq.adapter in self.desk.loaded for seq in self.scheduled), "runs without its adapter"
        assert sum(SIZES[name] for name in self.desk.loaded) <= CAPACITY


TestDesk = DeskMachine.TestCase
TestDesk.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def sequence(number: int, name: str, priority: int = 1) -> Sequence:
    request = Request(id=f"s{number}", prompt_ids=[1], max_tokens=9, adapter=name, priority=priority)
    return Sequence(request, limit=10, end_ids=frozenset(), number=number)


def settled(desk: AdapterDesk[str, str]) -> list[str]:
    """Who is let through once the thread has done all it can."""
    ready: list[str] = []
    for _ in range(8):
        desk.wait(WAIT_S)
        ready += [seq.id for seq in desk.turn().ready]
    return ready


def test_whoever_waits_for_room_is_not_overtaken_by_newcomers_for_ever() -> None:
    desk = AdapterDesk(Reader().files, AdapterPool(CAPACITY))
    first = sequence(0, "a")
    desk.add(first)
    assert settled(desk) == ["s0"]
    assert not desk.add(sequence(1, "d"))
    assert settled(desk) == []
    assert not desk.add(sequence(2, "a")), "a newcomer for a loaded adapter would keep it pinned"
    desk.remove(first)
    assert settled(desk) == ["s1"]


def test_those_in_hand_go_before_an_adapter_is_given_up() -> None:
    desk = AdapterDesk(Reader().files, AdapterPool(CAPACITY))
    for number, name in enumerate(("a", "d", "a")):
        desk.add(sequence(number, name))
    assert settled(desk) == ["s0", "s2"]


def test_a_higher_class_takes_the_adapter_of_a_lower_one_at_once() -> None:
    desk = AdapterDesk(Reader().files, AdapterPool(CAPACITY))
    batch = sequence(0, "c", priority=2)
    desk.add(batch)
    assert settled(desk) == ["s0"]
    desk.add(sequence(1, "d", priority=0))
    withdrawn: list[Sequence] = []
    ready: list[str] = []
    while not ready:
        desk.wait(WAIT_S)
        turn = desk.turn()
        withdrawn += turn.withdrawn
        ready += [seq.id for seq in turn.ready]
    assert withdrawn == [batch] == desk.waiting
    assert ready == ["s1"]


def test_contents_that_change_under_a_name_are_refused() -> None:
    """The prefix cache may hold keys and values that the old contents made."""
    contents = iter(["old", "other", "new"])
    reader = Reader()
    files = Files(reader.find, reader.survey, lambda name: next(contents), lambda adapter: adapter)
    desk = AdapterDesk(files, AdapterPool(CAPACITY))
    failed: list[tuple[str, str]] = []
    for number, name in enumerate(("a", "d", "a")):  # d needs all of the memory
        desk.add(sequence(number, name))
        while desk.waiting:
            desk.wait(WAIT_S)
            turn = desk.turn()
            failed += [(seq.id, error.message) for seq, error in turn.failed]
            for seq in turn.ready:
                desk.remove(seq)
    assert [seq_id for seq_id, _ in failed] == ["s2"]
    assert "'a' has changed on disk since it was first loaded" in failed[0][1]
