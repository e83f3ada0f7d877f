"""How much memory the KV cache may take, asked of the system."""

from __future__ import annotations

import mmap
import subprocess
import sys

PARENT_BYTES = 768 * 1024**2
"""More than an interpreter with torch takes."""


def test_what_the_starter_once_used_is_not_set_aside() -> None:
    """getrusage's peak is handed down to a child: an engine started by a big program got a small cache."""
    with mmap.mmap(-1, PARENT_BYTES) as memory:
        for at in range(0, PARENT_BYTES, mmap.PAGESIZE):
            memory[at] = 1
        code = "from gristmill.engine.kv_cache import step_peak_bytes; print(step_peak_bytes())"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 <= int(child.stdout) < PARENT_BYTES // 2
