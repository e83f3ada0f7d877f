"""GrammarChecker: whether a grammar can be used, found out in a process that may be killed.

llguidance's own limits bound the work of a step, but not compiling: a list of 100,000 values or a multipleOf
of 99,991 takes seconds, and memory. So whoever takes requests in asks here first, and the engine never sees
what took too long. ``python -m gristmill.engine.guided MODEL_DIR VOCAB_SIZE`` is the process: a line of JSON
in, a line out.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from typing import Any, cast

from ...schemas.errors import EngineUnavailable, InvalidSchema
from ..messages import Grammar
from .source import to_source

MAX_COMPILE_S = 2
"""Of processor time, in whole seconds (the kernel's SIGXCPU): what is refused must not depend on how busy the
machine is."""
PATIENCE_S = 20.0
"""Of the clock, for the same."""
START_S = 60.0
"""For the process to read the tokenizer."""
KEPT_ANSWERS = 1_024
MAX_MEMORY_BYTES = 2 * 1024**3
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

Verdict = tuple[int | None, str | None]
"""Tokens of the shortest text found, if one was; why the grammar cannot be used, if it cannot."""


class GrammarChecker:
    """Starts its process with the first grammar, and again after it had to be killed. Threads may share it;
    they wait for one another."""

    def __init__(self, model_dir: str, vocab_size: int) -> None:
        self._model_dir, self._vocab_size = model_dir, vocab_size
        self._process: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, grammar: Grammar, max_tokens: int) -> None:
        """Raises InvalidSchema if it cannot be used, takes too long, or if no text of it fits ``max_tokens``;
        EngineUnavailable if the process does not start."""
        to_source(grammar)  # what is wrong at first sight needs no process
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        with self._lock:
            verdict = self._known.get(key)
            if verdict is None:
                verdict = self._known[key] = self._ask(grammar)
                while len(self._known) > KEPT_ANSWERS:
                    self._known.popitem(last=False)
        least, why = verdict
        if why is not None:
            raise InvalidSchema(why)
        if grammar.close and least is not None and least > max_tokens:
            raise InvalidSchema(
                f"the shortest text found for this grammar takes {least:,} tokens and max_tokens is "
                f"{max_tokens:,}; raise max_tokens to at least that, or give json_close=false"
            )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()

    def _ask(self, grammar: Grammar) -> Verdict:
        process = self._running()
        assert process.stdin
        line = json.dumps({"kind": grammar.kind, "text": grammar.text}).encode() + b"\n"
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._read(process, PATIENCE_S)
        except OSError:
            answer = b""
        if not answer:
            late = answer is None or process.wait() == -signal.SIGXCPU
            self._kill()
            limit = f"{MAX_COMPILE_S} s" if late else f"{MAX_MEMORY_BYTES // 1024**3} GiB of memory"
            return None, (
                f"the grammar takes more than {limit} to compile, which is the limit; "
                "use shorter lists, smaller repetitions and bounds"
            )
        found = cast("dict[str, Any]", json.loads(answer))
        return found["least"], found["why"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", str(__package__), self._model_dir, str(self._vocab_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
        if not self._read(self._process, START_S):
            self._kill()
            raise EngineUnavailable(
                f"the process that checks grammars is not ready after {START_S:g} s, or has ended; try again"
            )
        return self._process

    def _read(self, process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """A line. None: too late; empty: the process has ended."""
        assert process.stdout
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline, line = time.monotonic() + timeout_s, b""
        while not line.endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            piece = os.read(process.stdout.fileno(), 65_536)
            if not piece:
                return b""
            line += piece
        return line

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()
