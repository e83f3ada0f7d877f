"""What a chaos run attacks: the parts every stack has to offer, and Gristmill."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from chaos_jobs import MODEL, Asked
from gristmill.backends.state import open_state
from gristmill.backends.store import open_store
from gristmill.producer import Client
from gristmill.schemas import keys
from gristmill.schemas.events import Delta, Done, End, EntryId
from gristmill.schemas.result import Result
from gristmill.schemas.settings import Settings

from tests.support.faults import fault_env
from tests.support.stack import Worker
from tests.support.valkey import Valkey

RENEWALS = 3
FOLLOW_S = 30.0


@dataclass
class Outcome:
    """How a job ended, as its user finds it."""

    text: str | None
    state: str
    ids: list[int] = field(default_factory=list[int])
    records: dict[str, int] = field(default_factory=dict[str, int])
    """How many there are of what there may be one of."""
    trouble: str | None = None


class Side(Protocol):
    """One stack under attack."""

    model: Path
    ready_word: str

    def launch(self, number: int) -> Worker: ...
    def submit(self, one: Asked) -> None: ...
    def count_ended(self) -> int: ...
    def settled(self, asked: Sequence[Asked], /) -> bool: ...
    def outcome(self, one: Asked) -> Outcome: ...
    def close(self) -> None: ...


@runtime_checkable
class Streams(Protocol):
    """What a stack may offer beyond a ``Side``: to show a job's text while it grows."""

    def stream(self, one: Asked, last: EntryId | None) -> Iterator[Any]: ...


def worker_env(directory: Path, **settings: object) -> dict[str, str]:
    """What every worker process of a run gets: one thread for each engine, and a ledger."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GRISTMILL_")}
    home = {name: os.environ[name] for name in ("GRISTMILL_HOME",) if name in os.environ}
    env |= home | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return env | fault_env(LEDGER=directory / "ledger") | {k: str(v) for k, v in settings.items()}


class Gristmill:
    """Our own client, workers and results in a directory."""

    ready_word = "worker.ready"

    def __init__(
        self,
        broker: Valkey,
        directory: Path,
        model: Path,
        *,
        lease_s: float,
        small: bool,
        flags: Sequence[str] = (),
        env: Mapping[str, object] | None = None,
    ) -> None:
        self.model, self._directory = model, directory
        self._lease_s, self._small = lease_s, small
        self._flags, self._env = flags, dict(env or {})
        self.settings = self._settings = Settings(
            broker_url=broker.url,
            results_url=f"file://{directory}/results",
            model=MODEL,
            visibility_timeout_s=lease_s,
            lease_renew_every_s=lease_s / RENEWALS,
        )
        self._client = Client(self._settings)
        self._state = open_state(self._settings)
        self._store = open_store(self._settings.results, self._settings)

    def launch(self, number: int) -> Worker:
        argv = [sys.executable, "-P", "-m", "gristmill.worker", "run", "--model", str(self.model)]
        argv += ["--served-model-name", MODEL, "--dtype", "float32", "--health-port", "0"]
        argv += ["--num-threads", "1", "--max-num-seqs", "64" if self._small else "16"]
        argv += ["--max-total-tokens", "1024", *self._flags]
        env = worker_env(
            self._directory,
            GRISTMILL_BROKER_URL=self._settings.broker_url,
            GRISTMILL_RESULTS_URL=self._settings.results_url,
            GRISTMILL_VISIBILITY_TIMEOUT_S=self._lease_s,
            GRISTMILL_LEASE_RENEW_EVERY_S=self._lease_s / RENEWALS,
            GRISTMILL_ENGINE_STALL_S=5 if self._small else 20,
            **self._env,
        )
        return Worker(number, argv, env, self._directory / "logs" / f"worker-{number}.log")

    def submit(self, one: Asked) -> None:
        """Returns once it is accepted. Raises GristmillError."""
        self._client.submit(
            one.prompt, idempotency_key=one.key, stream=one.follow is not None, **one.sampling
        )

    def stream(self, one: Asked, last: EntryId | None) -> Iterator[Any]:
        return self._client.get(one.job_id).stream(last, timeout_s=FOLLOW_S)

    def count_ended(self) -> int:
        return _count(self._directory / "results" / "results")

    def settled(self, asked: Sequence[Asked]) -> bool:
        """Nothing waits and nothing is claimed: acknowledged, too."""
        states = self._state.states([one.job_id for one in asked])
        return all(state is None or state.final for state in states)

    def outcome(self, one: Asked) -> Outcome:
        status, body = self._state.status(one.job_id), self._store.get(keys.result_object(one.job_id))
        if status is None or body is None:
            return Outcome(None, "unknown" if status is None else status.state.value)
        result = Result.from_json(body)
        ids, text, trouble = self._logged(one.job_id)
        if trouble is None and text != result.text:
            trouble = f"the log's text has {len(text)} characters, the result's {len(result.text)}"
        if result.error is not None:
            trouble = f"{result.error.code}: {result.error.message}"
        kinds = Counter(type(event).__name__ for _, event in self._state.read_log(one.job_id))
        records = {"Done": kinds["Done"], "End": kinds["End"]}
        state = status.state.value if status.state == result.state else f"{status.state}, not {result.state}"
        return Outcome(result.text, state, ids, records, trouble)

    def _logged(self, job_id: str) -> tuple[list[int], str, str | None]:
        """Ids and text of the log, and what is wrong with it."""
        ids: list[int] = []
        text = ""
        for entry_id, event in self._state.read_log(job_id):
            if isinstance(event, Delta):
                if event.offset != len(ids):
                    return ids, text, f"entry {entry_id}: token {len(ids)} expected, {event.offset} logged"
                ids += event.ids
            if isinstance(event, Delta | Done):
                text += event.text
        last = [event for _, event in self._state.read_log(job_id)][-1:]
        return ids, text, None if last and isinstance(last[0], End) else "the log does not end in End"

    def close(self) -> None:
        self._client.close()
        self._state.close()


def _count(directory: Path) -> int:
    if not directory.exists():
        return 0
    with os.scandir(directory) as entries:
        return sum(not entry.name.startswith(".") for entry in entries)
