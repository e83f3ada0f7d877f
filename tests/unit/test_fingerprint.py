"""What stands for all that decides an answer besides the request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from gristmill.worker.fingerprint import DECISIVE, WHOLE_BYTES, fingerprint
from gristmill.worker.settings import WorkerSettings

OTHERWISE: dict[str, Any] = {
    "quantize": "int8",
    "quantize_head": False,
    "deterministic": True,
    "kv_cache_dtype": "int8",
    "max_total_tokens": 64,
    "default_max_tokens": 8,
    "watermark_gamma": 0.25,
    "watermark_delta": 1.0,
}
"""A value besides the default of each setting that decides answers."""


def test_a_fingerprint_follows_the_files_and_how_they_are_run_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    weights = bytes(range(256)) * (WHOLE_BYTES // 128)
    for name, body in {"config.json": b"{}", "a.safetensors": weights, "README.md": b"one"}.items():
        (model / name).write_bytes(body)

    def of(path: Path = model, dtype: str = "float32", **knobs: Any) -> str:
        return fingerprint(path, WorkerSettings(model="m", **knobs), dtype)

    first = of()
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_bytes(b"two")
    (copy / "gristmill-model.json").write_bytes(b"{}")
    assert first == of() == of(copy) == of(max_num_seqs=3, attention="torch", speculate=0)
    others = [of(dtype="bfloat16")]
    (copy / "config.json").write_bytes(b"{ }")
    others.append(of(copy))
    trained = bytes(byte ^ 1 for byte in weights)
    (model / "a.safetensors").write_bytes(trained)
    assert len({first, *others, of()}) == 4


@pytest.mark.parametrize("name", sorted({*DECISIVE, *OTHERWISE}))
def test_a_setting_under_which_answers_differ_is_in_the_fingerprint(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    settings = WorkerSettings(model="m"), WorkerSettings(model="m", **{name: OTHERWISE[name]})
    assert len({fingerprint(tmp_path, each, "float32") for each in settings}) == 2
