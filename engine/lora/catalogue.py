"""Which adapters there are: names given one by one, and the directories below a root."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ...schemas.errors import AdapterNotFound
from .config import CONFIG_FILE

PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""What may be looked up below the root: no separator and no leading dot, so no way out of it."""
MAX_NAMED = 20
"""Names that an error lists."""


class Catalogue:
    """Names → directories. Looks at the root anew each time: adapters may be added while the engine runs."""

    def __init__(self, named: Mapping[str, Path], root: Path | None) -> None:
        self._named, self._root = named, root

    @property
    def empty(self) -> bool:
        """No adapter can ever be found here."""
        return not self._named and self._root is None

    def find(self, name: str) -> Path:
        """The adapter's directory. Raises AdapterNotFound, which says what there is."""
        if name in self._named:
            return self._named[name]
        if self._root is not None and PLAIN_NAME.fullmatch(name):
            directory = self._root / name
            if (directory / CONFIG_FILE).is_file():
                return directory
        raise AdapterNotFound(f"there is no adapter {name[:128]!r} here; {self._what_there_is()}")

    def _what_there_is(self) -> str:
        if self.empty:
            return "this worker serves none: start it with --lora-adapters NAME=DIR or --lora-dir DIR"
        below = (
            {path.parent.name for path in self._root.glob(f"*/{CONFIG_FILE}")} if self._root else set[str]()
        )
        names = sorted(self._named.keys() | {name for name in below if PLAIN_NAME.fullmatch(name)})
        more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
        return f"it serves {', '.join(names[:MAX_NAMED]) or 'none yet'}{more}"
