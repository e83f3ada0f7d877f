"""Gristmill's engine in its own process, as a worker runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import count

from gristmill.engine.spawn import begin_early
from gristmill.worker.settings import load_worker_settings

load_worker_settings(model=sys.argv[1])
begin_early()  # where a worker does: its settings are right, and the rest is not imported

from gristmill.engine.messages import Failed, Request
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from serving import Row, serve, threads

READY_S = STEP_S = 180.0


class Gristmill:
    """``argv``: a model, and maybe how to quantize it."""

    def __init__(self) -> None:
        quantize = sys.argv[2] if len(sys.argv) > 2 else None
        settings = EngineSettings(
            model=sys.argv[1], dtype="bfloat16", num_threads=threads(), quantize=quantize
        )
        self._engine = EngineProcess(settings)
        self._engine.start()
        info = self._engine.wait_ready(READY_S)
        self.about = {
            "attention": info.attention,
            "quantize": quantize,
            "step_tokens": info.step_tokens,
            "max_num_seqs": info.max_num_seqs,
        }
        self._numbers = count()

    def batch(self, rows: Sequence[Row]) -> int:
        return sum(1 for _ in self._run(rows))

    def single(self, row: Row) -> Iterator[None]:
        return self._run([row])

    def _run(self, rows: Sequence[Row]) -> Iterator[None]:
        requests = [
            Request(
                id=str(next(self._numbers)),
                prompt_ids=list(ids),
                max_tokens=wanted,
                temperature=0.0,
                ignore_eos=True,
                group="all",
            )
            for ids, wanted in rows
        ]
        self._engine.add(requests)
        running = len(requests)
        while running:
            report = self._engine.recv(STEP_S)
            if report is None or isinstance(report, Failed):
                raise SystemExit(f"the engine failed: {report}")
            for output in report.outputs:
                yield from [None] * len(output.token_ids)
                running -= output.finish is not None


serve(Gristmill)
