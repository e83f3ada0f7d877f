"""BENCHMARKS.md has a verdict for every model type that we say we run."""

from __future__ import annotations

import re
from pathlib import Path

from gristmill.engine.models.families import FAMILIES

PAGE = Path(__file__).parents[2] / "BENCHMARKS.md"


def test_every_model_type_has_a_row_and_none_differs() -> None:
    page = (
        PAGE.read_text()
        .partition("<!-- parity table -->")[2]
        .partition("<!-- end of the parity table -->")[0]
    )
    rows = {found[1]: line for line in page.splitlines() if (found := re.match(r"\| `(\w+)`", line))}
    assert not FAMILIES.keys() - rows.keys()
    assert not [line for line in rows.values() if "differs" in line]
