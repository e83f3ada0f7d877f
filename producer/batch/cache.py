"""Answers of earlier runs by what was asked, in a file that its user names: opt-in, and on this machine.

A row is asked the same if its model and all of its request are the same, its custom_id and metadata aside,
and if what answered it serves that model now: the same files, run in the same way (``fingerprint``). Without
a seed a sampled row would come out otherwise each time; from here it comes as it did the first time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Self

from ...schemas.batch import Batch, row_id
from ...schemas.batch_lines import OutputLine, Response
from ...schemas.errors import Misconfigured
from .answers import line_of
from .molds import content_of
from .spool import Spooled
from .submission import OwnRows

OK = 200
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, body BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS asked
  (batch TEXT, line INTEGER, key BLOB, PRIMARY KEY (batch, line)) WITHOUT ROWID;
"""


class Cache:
    """An SQLite file; what each row of a batch asks is noted there, until the batch's answers are kept.

    A context manager. Raises Misconfigured for a file that is none of ours.
    """

    def __init__(self, path: str) -> None:
        try:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + _TABLES)
            self._db.execute("BEGIN")
        except (sqlite3.Error, OSError) as exc:
            raise Misconfigured(f"--cache {path}: {exc}; name a file that may be written") from exc
        self.hits = 0

    def taken(self, batch: Batch, own: OwnRows, row: Spooled, serving: Collection[str]) -> bool:
        """Answer a row of a batch if that is known; else note what it asks. ``serving``: fingerprints of who
        would answer it.

        Rows with a LoRA adapter are left alone: another one may have its name by now.
        """
        if b'"adapter_id":' in row.body:
            return False
        asked = hashlib.sha256(f"{batch.model}\0".encode() + content_of(row.body)).digest()
        found = self._found(_key(asked, each) for each in serving)
        if found is None:
            self._db.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?)", (batch.id, row.line, asked))
            return False
        name = row_id(batch.id, row.line)
        response = Response(status_code=OK, request_id=f"req_{name}", body=json.loads(zlib.decompress(found)))
        own.answer(row.line, OutputLine(id=f"batch_req_{name}", custom_id=row.custom_id, response=response))
        self.hits += 1
        return True

    def _found(self, names: Iterable[bytes]) -> bytes | None:
        rows: Iterable[Any] = (
            self._db.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone() for key in names
        )
        return next((row[0] for row in rows if row is not None), None)

    def keep(self, batch: Batch, lines: Iterable[bytes]) -> None:
        """The answers of a batch, of rows that were noted. It may have ended in part. Each says itself what
        answered it, whoever serves the model by now."""
        for data in lines:
            line = line_of(data)
            asked: Any = self._db.execute(
                "SELECT key FROM asked WHERE batch = ? AND line = ?", (batch.id, line)
            ).fetchone()
            response = OutputLine.from_json(data).response
            by = None if response is None else response.body.get("system_fingerprint")
            if asked is not None and response is not None and by is not None:
                body = zlib.compress(json.dumps(response.body, separators=(",", ":")).encode(), 1)
                self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (_key(asked[0], by), body))
        if batch.status.final:
            self._db.execute("DELETE FROM asked WHERE batch = ?", (batch.id,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.execute("COMMIT")
        self._db.close()


def _key(asked: bytes, fingerprint: str) -> bytes:
    return hashlib.sha256(asked + fingerprint.encode()).digest()
