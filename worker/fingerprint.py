"""Fingerprint: what stands for all that decides an answer besides the request. OpenAI calls it so, too."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from .settings import WorkerSettings

DECISIVE = (
    *("quantize", "quantize_head", "deterministic", "kv_cache_dtype"),
    *("max_total_tokens", "default_max_tokens", "watermark_gamma", "watermark_delta"),
)
"""Settings under which the same request may be answered otherwise. Kernels, batching and speculation are
none: what they change is rounding, and which tokens nearly tie. Deterministic mode also unpacks weights."""
SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
WHOLE_BYTES = 4 << 20
PAGES, PAGE_BYTES = 256, 4096
"""Read of a larger file: training and quantizing change nearly all of it."""


def fingerprint(model: Path, settings: WorkerSettings, dtype: str) -> str:
    """Of the files in a model's directory, and of how they are run. ``dtype``: as the engine chose it.

    Reads a megabyte of each large file: milliseconds, whatever the model's size. Raises OSError.
    """
    files = {path.name: _digest(path) for path in sorted(model.iterdir()) if _counts(path)}
    knobs = {name: getattr(settings, name) for name in DECISIVE}
    said = json.dumps([version("gristmill"), dtype, knobs, files], sort_keys=True)
    return f"fp_{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def _counts(path: Path) -> bool:
    """Not the list of where a copy is from."""
    return path.suffix in SUFFIXES and not path.name.startswith("gristmill-model") and path.is_file()


def _digest(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    digest.update(f"{size}\0".encode())
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for page in range(PAGES):
                file.seek((size - PAGE_BYTES) * page // (PAGES - 1))
                digest.update(file.read(PAGE_BYTES))
    return digest.hexdigest()
