"""What a model is called by jobs, from what its worker was told to load."""

from __future__ import annotations

from pathlib import Path


def served_name(model: str) -> str:
    """A directory's own name, a GGUF file's without its ending, the last part of a bucket's prefix; anything
    else as it is."""
    if model.startswith("s3://"):
        return model.rstrip("/").rpartition("/")[2]
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path.stem
    return path.resolve().name if path.is_dir() else model
