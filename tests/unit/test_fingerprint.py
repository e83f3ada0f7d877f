"""What stands for all that decides an answer besides the request."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gristmill.worker.fingerprint import WHOLE_BYTES, fingerprint
from gristmill.worker.settings import WorkerSettings


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
    others = [of(dtype="bfloat16"), of(quantize="int8"), of(quantize="int8", quantize_head=False)]
    others += [of(quantize="int8", deterministic=True), of(kv_cache_dtype="int8"), of(default_max_tokens=8)]
    (copy / "config.json").write_bytes(b"{ }")
    others.append(of(copy))
    trained = bytes(byte ^ 1 for byte in weights)
    (model / "a.safetensors").write_bytes(trained)
    assert len({first, *others, of()}) == 9
