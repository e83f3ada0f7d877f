"""Answers of earlier runs by what was asked, in a file that its user names: opt-in, and on this machine.

A row is asked the same if its model and all of its request are the same, its custom_id and metadata aside.
Without a seed a sampled row would come out otherwise each time; from here it comes as it did the first time.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterable
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

    def taken(self, batch: Batch, own: OwnRows, row: Spooled) -> bool:
        """Answer a row of a batch if that is known; else note what it asks."""
        key = hashlib.sha256(f"{batch.model}\0".encode() + content_of(row.body)).digest()
        found = self._db.execute("SELECT body FROM answers WHERE key = ?", (key,)).fetchone()
        if found is None:
            self._db.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?)", (batch.id, row.line, key))
            return False
        name = row_id(batch.id, row.line)
        response = Response(
            status_code=OK, request_id=f"req_{name}", body=json.loads(zlib.decompress(found[0]))
        )
        own.answer(row.line, OutputLine(id=f"batch_req_{name}", custom_id=row.custom_id, response=response))
        self.hits += 1
        return True

    def keep(self, batch: Batch, lines: Iterable[bytes]) -> None:
        """The answers of a batch, of rows that were noted. It may have ended in part."""
        for data in lines:
            line = line_of(data)
            asked: Any = self._db.execute(
                "SELECT key FROM asked WHERE batch = ? AND line = ?", (batch.id, line)
            ).fetchone()
            response = OutputLine.from_json(data).response
            if asked is not None and response is not None:
                body = zlib.compress(json.dumps(response.body, separators=(",", ":")).encode(), 1)
                self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (asked[0], body))
        if batch.status.final:
            self._db.execute("DELETE FROM asked WHERE batch = ?", (batch.id,))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.execute("COMMIT")
        self._db.close()
