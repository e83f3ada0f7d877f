"""What lives and dies during a chaos run: the broker and the workers, and how each is hurt."""

from __future__ import annotations

import heapq
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.stack import Worker
from tests.support.valkey import Valkey

Span = tuple[float, float]
FOREVER = float("inf")


@dataclass
class Member:
    """One worker process, from its start to its death. Times are unix seconds."""

    worker: Worker
    ready_at: float = FOREVER
    dead_at: float = FOREVER
    killed: bool = False
    frozen: list[Span] = field(default_factory=list[Span])

    @property
    def pid(self) -> int:
        return self.worker.process.pid

    def usable(self, at: float) -> bool:
        """Whether it could have claimed a job then, as far as its process goes."""
        return self.ready_at <= at < self.dead_at and not any(a <= at < b for a, b in self.frozen)


class Fleet:
    """Keeps ``count`` workers alive, and carries out what ``strike`` is told to. One thread only.

    ``launch(number)`` starts a worker; ``ready_word`` in its log says that it takes jobs. What happened is
    kept: ``members`` (the dead included), ``away`` (when the broker was dead or frozen), ``kills``,
    ``unasked`` (workers that ended by themselves).
    """

    def __init__(
        self, broker: Valkey, launch: Callable[[int], Worker], count: int, seed: int, ready_word: str
    ) -> None:
        self.broker, self._launch, self._count, self._ready_word = broker, launch, count, ready_word
        self._draw = random.Random(f"fleet {seed}")
        self.members: list[Member] = []
        self.away: list[Span] = []
        self.kills = 0
        self.unasked: list[str] = []
        self.log: list[str] = []
        self._started_at = time.time()
        self._restart_at: list[float] = []
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._broker_down = False
        for _ in range(count):
            self._start_worker()

    # ---- what goes on by itself

    @property
    def living(self) -> list[Member]:
        return [member for member in self.members if member.dead_at == FOREVER]

    @property
    def all_ready(self) -> bool:
        living = self.living
        return len(living) == self._count and all(member.ready_at < FOREVER for member in living)

    def tick(self) -> None:
        """Thaw and restart what is due, notice who is ready and who has died. Call often."""
        now = time.time()
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()
        for member in self.living:
            if member.worker.dead:
                self._bury(member, now)
            elif member.ready_at == FOREVER and member.worker.said(self._ready_word):
                member.ready_at = now
        due = [at for at in self._restart_at if at <= now]
        self._restart_at = [at for at in self._restart_at if at > now]
        for _ in due:
            self._start_worker()

    def calm(self) -> None:
        """No more faults: thaw everybody, start the broker and all workers now."""
        while self._later:
            heapq.heappop(self._later)[2]()
        self._restart_at = [0.0] * len(self._restart_at)
        self.tick()

    def close(self) -> None:
        self.calm()
        for member in self.living:
            member.worker.process.terminate()
        for member in self.living:
            member.worker.close()

    def _start_worker(self) -> None:
        self._number += 1
        self.members.append(Member(self._launch(self._number)))

    def _bury(self, member: Member, now: float) -> None:
        member.dead_at = min(member.dead_at, now)
        if not member.killed:
            status = member.worker.process.returncode
            self.unasked.append(f"worker {member.worker.number} ended by itself with status {status}")
            self._note(self.unasked[-1])
        self._restart_at.append(now + self._draw.uniform(0.0, 3.0))

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.time() + seconds, len(self._later) + id(action), action))

    def _note(self, text: str) -> None:
        self.log.append(f"{time.time():.3f} +{time.time() - self._started_at:.1f}s {text}")

    # ---- faults

    def kill_worker(self, _seconds: float) -> bool:
        """SIGKILL to a ready worker alone: its engine has to notice."""
        member = self._pick()
        if member is None:
            return False
        self._kill(member)
        return True

    def kill_all_workers(self, _seconds: float) -> bool:
        ready = [member for member in self.living if member.ready_at < FOREVER]
        for member in ready:
            self._kill(member)
        return bool(ready)

    def kill_engine(self, _seconds: float) -> bool:
        """SIGKILL to a worker's engine process."""
        member = self._pick()
        engine = children(member.pid) if member else []
        if not engine:
            return False
        self._send(engine[0], signal.SIGKILL)
        self.kills += 1
        self._note(f"killed the engine of worker {member.worker.number if member else 0}")
        return True

    def kill_broker(self, seconds: float) -> bool:
        """SIGKILL; started again on its append-only file after ``seconds``."""
        if self._broker_down:
            return False
        self.broker.kill()
        self.kills += 1
        self._broker_away(seconds, self.broker.start, "killed")
        return True

    def freeze_broker(self, seconds: float) -> bool:
        if self._broker_down:
            return False
        self.broker.freeze()
        self._broker_away(seconds, self.broker.thaw, "froze")
        return True

    def stutter_broker(self, seconds: float) -> bool:
        """Delays: it stands still for 150 ms of every 200, for ``seconds``."""
        if self._broker_down:
            return False
        self._broker_down = True
        self._note(f"delayed the broker's answers for {seconds:.1f} s")
        pulses = int(seconds / 0.2)
        for pulse in range(pulses):
            self._after(0.2 * pulse, self.broker.freeze)
            self._after(0.2 * pulse + 0.15, self.broker.thaw)
        self._after(0.2 * pulses, self._broker_back)
        return True

    def cut_connections(self, _seconds: float) -> bool:
        if self._broker_down:
            return False
        self.broker.drop_clients()
        self._note("cut all connections")
        return True

    def freeze_worker(self, seconds: float) -> bool:
        member = self._pick()
        if member is None:
            return False
        self._freeze(member, member.pid, seconds, "worker")
        return True

    def freeze_engine(self, seconds: float) -> bool:
        member = self._pick()
        engine = children(member.pid) if member else []
        if member is None or not engine:
            return False
        self._freeze(member, engine[0], seconds, "engine of worker")
        return True

    def _pick(self) -> Member | None:
        now = time.time()
        fit = [member for member in self.living if member.usable(now)]
        return self._draw.choice(fit) if fit else None

    def _kill(self, member: Member) -> None:
        member.killed, member.dead_at = True, time.time()
        member.worker.kill()
        self._restart_at.append(time.time() + self._draw.uniform(0.0, 3.0))
        self.kills += 1
        self._note(f"killed worker {member.worker.number}")

    def _freeze(self, member: Member, pid: int, seconds: float, what: str) -> None:
        now = time.time()
        self._send(pid, signal.SIGSTOP)
        member.frozen.append((now, now + seconds))
        self._note(f"froze {what} {member.worker.number} for {seconds:.1f} s")
        self._after(seconds, lambda: self._send(pid, signal.SIGCONT))

    def _broker_away(self, seconds: float, back: Callable[[], object], how: str) -> None:
        self._broker_down = True
        began = time.time()
        self._note(f"{how} the broker for {seconds:.1f} s")

        def end() -> None:
            back()
            self.away.append((began, time.time()))
            self._broker_back()

        self._after(seconds, end)

    def _broker_back(self) -> None:
        self._broker_down = False

    @staticmethod
    def _send(pid: int, number: int) -> None:
        with suppress(ProcessLookupError):  # the worker may have replaced a frozen engine
            os.kill(pid, number)


@dataclass(frozen=True)
class Fault:
    at_s: float
    name: str
    seconds: float


KINDS: dict[str, tuple[int, tuple[tuple[float, float], ...]]] = {
    "kill_worker": (30, ()),
    "kill_all_workers": (4, ()),
    "kill_engine": (18, ()),
    "kill_broker": (8, ((0.1, 0.7),)),
    "cut_connections": (12, ()),
    "freeze_worker": (12, ((0.2, 1.0), (1.1, 2.0))),
    "freeze_engine": (6, ((0.1, 0.9), (1.1, 1.5))),
    "freeze_broker": (6, ((0.1, 0.8), (1.1, 1.5))),
    "stutter_broker": (4, ((0.2, 0.7),)),
}
"""Methods of Fleet: how often of 100, and for how long: one of these ranges, in leases."""


def draw_faults(seed: int, seconds: float, lease_s: float, every_s: float) -> list[Fault]:
    """What happens when, in order: one fault each ``every_s`` on average, of weighted kinds."""
    draw = random.Random(f"faults {seed}")
    weights = [weight for weight, _ in KINDS.values()]
    faults: list[Fault] = []
    at_s = draw.uniform(1.0, every_s)
    while at_s < seconds:
        ((name, (_, spans)),) = draw.choices(list(KINDS.items()), weights)
        leases = draw.uniform(*draw.choice(spans)) if spans else 0.0
        faults.append(Fault(at_s, name, lease_s * leases))
        at_s += draw.uniform(0.3, 1.7) * every_s
    return faults


def children(pid: int) -> list[int]:
    """Process ids of the children of ``pid``: a worker has one, its engine."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                stat = (entry / "stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return sorted(found)
