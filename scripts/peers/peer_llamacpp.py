"""llama.cpp's server, built from source for this CPU: slots, continuous batching, flash attention."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving import Row, serve, threads

SLOTS, SLOT_TOKENS, PORT = 32, 1280, 18080
READY_S = 120.0


class LlamaCpp:
    """``argv``: a GGUF file and the server's program."""

    def __init__(self) -> None:
        flags = ["-np", str(SLOTS), "-cb", "-c", str(SLOTS * SLOT_TOKENS), "-b", "2048", "-ub", "512"]
        flags += ["-fa", "auto", "-t", str(threads()), "--port", str(PORT), "--no-webui"]
        self._server = subprocess.Popen([sys.argv[2], "-m", sys.argv[1], *flags], stdout=subprocess.DEVNULL)
        self.about = {"slots": SLOTS, "flags": " ".join(flags)}
        deadline = time.monotonic() + READY_S
        while not self._healthy():
            assert self._server.poll() is None, "llama-server ended"
            assert time.monotonic() < deadline, "llama-server is not ready"
            time.sleep(0.01)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError):
            return False

    def batch(self, rows: Sequence[Row]) -> int:
        with ThreadPoolExecutor(len(rows)) as pool:
            return sum(pool.map(lambda row: sum(1 for _ in self.single(row)), rows))

    def single(self, row: Row) -> Iterator[None]:
        ids, wanted = row
        body: dict[str, Any] = {
            "prompt": list(ids),
            "n_predict": wanted,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
            "return_tokens": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=1200) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    yield from [None] * len(event.get("tokens", ()))


serve(LlamaCpp)
