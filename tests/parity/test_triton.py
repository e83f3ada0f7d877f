"""Our Triton kernels say what torch says, in Triton's interpreter: what is tested is the arithmetic."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from gristmill.engine.models.tiny import write_tiny

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 300.0


def interpreted(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted", *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kernel_says_what_torch_says() -> None:
    outcomes = interpreted("kernels")
    assert len(outcomes) > 25
    assert [outcome for outcome in outcomes if not outcome[1] <= outcome[2]] == []


def test_a_backend_that_is_wrong_or_fails_is_found_before_it_is_used() -> None:
    right, wrong, failing = interpreted("tried")
    assert right is None
    assert "off by" in wrong
    assert "shared memory" in failing


def test_an_engine_on_our_kernels_says_the_same_tokens(tmp_path: Path) -> None:
    """Chunked prompts beside decode, head norms, groups of three; norms and gates are the kernels', too."""
    model = write_tiny(tmp_path / "model", "qwen3", num_hidden_layers=2)
    draw = random.Random(3)
    prompts = [[draw.randrange(256) for _ in range(n)] for n in (5, 19)]
    ours, theirs = interpreted("engine", str(model), json.dumps(prompts))
    assert [len(tokens) for tokens in ours] == [4, 4]
    assert ours == theirs
