"""Imports ``gristmill.X`` from this tree where the project is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


class SourceTree:
    """``gristmill.engine`` is the directory ``engine``, as pyproject.toml's package-dir has it."""

    @staticmethod
    def find_spec(
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG004  # the protocol's
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        parent, _, rest = name.partition(".")
        if parent != "gristmill" or "." in rest:
            return None  # what is deeper is found from its parent
        if rest:
            return PathFinder.find_spec(name, [str(ROOT)], target)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        return spec


def use_source_tree() -> None:
    """From now on; an installed Gristmill is not looked at. Twice does no harm."""
    if SourceTree not in sys.meta_path and "gristmill" not in sys.modules:
        sys.meta_path.insert(0, SourceTree)
