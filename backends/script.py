"""Script: a Lua file as Redis runs it: its text to a server that does not know it, its digest ever after."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import redis
from redis.exceptions import NoScriptError


@dataclass(frozen=True, slots=True)
class Script:
    """``sha`` is what the server calls it."""

    text: str
    sha: str
    timed: bool = False
    """It tells the time: behind its arguments comes the unix time in ms, or "" for the server's clock."""

    @classmethod
    def of(cls, text: str, *, timed: bool = False) -> Self:
        return cls(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), timed)


def lua(name: str) -> str:
    """The text of ``lua/{name}.lua``."""
    return (Path(__file__).parent / "lua" / f"{name}.lua").read_text(encoding="utf-8")


def run_script(
    client: redis.Redis, script: Script, *args: str | bytes | int, keys: Sequence[str] = ()
) -> Any:
    """EVALSHA; the text only to a server that does not know it: a new one, or one that restarted."""
    rest: Any = (len(keys), *keys, *args)
    try:
        return client.evalsha(script.sha, *rest)
    except NoScriptError:
        return client.eval(script.text, *rest)
