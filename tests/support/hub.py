"""A model hub on a free port: as much of its HTTP interface as the Hub's own library asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from .serving import Serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(Serving):
    """Serves the directory ``files`` as model ``name``.

    ``sent`` counts answers with a body, by file. A file named in ``stalled`` is sent by half, and then
    nothing more: ``half_sent`` is set, and the rest comes when the name is taken out.
    """

    def __init__(self, files: Path, name: str = "someone/something") -> None:
        self.files, self.name = files, name
        self.sent: Counter[str] = Counter()
        self.stalled: set[str] = set()
        self.half_sent = threading.Event()
        super().__init__(self._handler())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                path = self.path.split("?")[0]
                if found := re.fullmatch(rf"/{hub.name}/resolve/[^/]+/([^/]+)", path):
                    self._file(found[1], body=body)
                elif path == f"/api/models/{hub.name}/revision/main":
                    self._json(
                        {"id": hub.name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in hub.names]}
                    )
                elif path == f"/api/models/{hub.name}/tree/{COMMIT}":
                    self._json([hub.entry(name) for name in hub.names])
                else:
                    self._reply(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body=body)

            def _file(self, name: str, *, body: bool) -> None:
                data = (hub.files / name).read_bytes()
                etag = hub.entry(name)["oid"]
                if body:
                    hub.sent[name] += 1
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
                self._reply(200, headers, data, body=body, stall=body and name in hub.stalled and name)

            def _json(self, value: Any) -> None:
                self._reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode(), body=True)

            def _reply(
                self,
                status: int,
                headers: dict[str, str],
                data: bytes,
                *,
                body: bool,
                stall: str | bool = False,
            ) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not body:
                    return
                with suppress(OSError):
                    half = len(data) // 2 if stall else 0
                    self.wfile.write(data[:half])
                    if stall:
                        self.wfile.flush()
                        hub.half_sent.set()
                        while stall in hub.stalled and not hub.closing.wait(0.02):
                            pass
                    self.wfile.write(data[half:])

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    @property
    def names(self) -> list[str]:
        return sorted(each.name for each in self.files.iterdir())

    def entry(self, name: str) -> dict[str, Any]:
        """As the Hub lists a file: a git object's name for small ones, SHA-256 for weights."""
        data = (self.files / name).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            entry["oid"] = entry["lfs"]["oid"]
        return entry


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator[HubServer]:
    """It serves a tiny model in three shards."""
    from gristmill.engine.models.tiny import write_tiny

    server = HubServer(write_tiny(tmp_path / "on-the-hub", shards=3, tokenizer=True))
    yield server
    server.close()
