"""An S3 server on a free port (moto, over HTTP), and a proxy before it that fails on request."""

from __future__ import annotations

import http.client
import logging
import secrets
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from gristmill.schemas.settings import Settings

from .serving import Serving


class S3Server:
    """``endpoint`` is moto's. ``bucket`` exists; each test has its own."""

    def __init__(self, client: Any) -> None:
        self.client, self.endpoint = client, client.meta.endpoint_url
        self.bucket = f"results-{secrets.token_hex(6)}"
        client.create_bucket(Bucket=self.bucket)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/runs/one"

    def settings(self, endpoint: str | None = None, **fields: Any) -> Settings:
        return Settings(
            **{
                "results_url": self.url,
                "s3_endpoint_url": endpoint or self.endpoint,
                "s3_region": "us-east-1",
                "s3_access_key": "test",
                "s3_secret_key": "test",
                "connect_timeout_s": 2.0,
                **fields,
            }
        )


class Proxy(Serving):
    """Passes requests on, but for those that ``faults`` says, first come first served.

    ``(status, code)`` is answered as such; ``drop`` closes the connection unanswered; ``lose reply`` passes
    the request on, and then closes; ``forget condition`` passes it on without If-None-Match; ``half`` closes
    in the middle of the upload; ``stall`` says nothing for as long as the client waits. ``down``, if set, is
    what every request gets.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.faults: deque[str | tuple[int, str]] = deque()
        self.down: str | tuple[int, str] | None = None
        self.requests = 0
        super().__init__(self._handler())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                proxy.requests += 1
                fault = proxy.faults.popleft() if proxy.faults else proxy.down
                if fault == "half":
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self._hang_up()
                    return
                body = self._body()
                if fault == "stall":
                    proxy.closing.wait(10)
                    self._hang_up()
                    return
                if isinstance(fault, tuple):
                    status, code = fault
                    self._reply(status, [], f"<Error><Code>{code}</Code></Error>".encode())
                    return
                if fault == "forget condition":
                    del self.headers["If-None-Match"]
                if fault != "drop":
                    answer = self._forward(body)
                    if fault != "lose reply":
                        self._reply(*answer)
                        return
                self._hang_up()

            def _hang_up(self) -> None:
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    parts: list[bytes] = []
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        parts.append(self.rfile.read(size))
                        self.rfile.readline()
                    self.rfile.readline()
                    return b"".join(parts)
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                upstream = http.client.HTTPConnection(
                    proxy.target.hostname or "", proxy.target.port, timeout=10
                )
                skipped = {"transfer-encoding", "content-length", "expect", "connection"}
                headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
                headers["Content-Length"] = str(len(body))
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                data = response.read()
                kept = [
                    (k, v) for k, v in response.getheaders() if k.lower() not in skipped | {"date", "server"}
                ]
                upstream.close()
                return response.status, kept, data

            def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def in_turn(app: Callable[..., Any]) -> Callable[..., Any]:
    """S3 decides a conditional write in one step. moto looks, then writes: two of eight writers may win."""
    turn = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        with turn if "HTTP_IF_NONE_MATCH" in environ else nullcontext():
            return app(environ, start_response)

    return answer


@pytest.fixture(scope="session")
def moto_client() -> Iterator[Any]:
    """One moto server for the whole run, and a plain client of it: starting each takes a second."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    serving: Any = server._server  # the only way to its application
    serving.app = in_turn(serving.app)
    host, port = server.get_host_and_port()
    yield boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    server.stop()


@pytest.fixture
def s3(moto_client: Any) -> S3Server:
    """The server, with a fresh bucket."""
    return S3Server(moto_client)


@pytest.fixture
def s3_proxy(s3: S3Server) -> Iterator[Proxy]:
    """A proxy before it."""
    proxy = Proxy(s3.endpoint)
    yield proxy
    proxy.close()
