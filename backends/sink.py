"""ResultSink: durable first, final second. The acknowledgement comes after both."""

from __future__ import annotations

import logging

from ..schemas import keys
from ..schemas.events import End
from ..schemas.result import Result
from .state import State
from .store import ResultStore

log = logging.getLogger(__name__)


class ResultSink:
    """Writes results. Whoever commits second finds the first one's object and finishes on its behalf."""

    def __init__(self, state: State, store: ResultStore, *, inline_bytes: int) -> None:
        self._state, self.store, self._inline_bytes = state, store, inline_bytes

    def commit(self, result: Result) -> tuple[Result, bool]:
        """Make ``result`` the job's one result, then its state final. Safe to repeat, and to die in between.

        Returns the result that counts, and whether it is this one (False: an earlier attempt already had).
        Raises StoreUnavailable, BrokerUnavailable: nothing is lost, call again.
        """
        name, body = keys.result_object(result.job_id), result.to_json().encode()
        if self.store.put_new(name, body):
            self._finish(name, result, body)
            return result, True
        earlier = self.adopt(result.job_id)
        assert earlier is not None, f"{name} exists and cannot be read"
        return earlier, False

    def adopt(self, job_id: str) -> Result | None:
        """Make the job's state final on behalf of a result that stands already; None: there is none.

        For a job of which the state server knows nothing (any more). Raises as ``commit``.
        """
        name = keys.result_object(job_id)
        body = self.store.get(name)
        if body is None:
            return None
        result = Result.from_json(body)
        self._finish(name, result, body)
        return result

    def _finish(self, name: str, result: Result, body: bytes) -> None:
        end = End(
            state=result.state,
            finish_reason=result.finish_reason,
            usage=result.usage,
            error=result.error,
            result=name,
        )
        inline = body.decode() if len(body) <= self._inline_bytes else None
        about = {n: getattr(result, n) for n in ("custom_id", "retry_of", "metadata")}
        self._state.finish(result.job_id, end, inline, about)
