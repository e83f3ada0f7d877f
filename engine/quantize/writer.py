"""A checkpoint directory that is written tensor by tensor, and is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  (PathLike is bare there)
from torch import Tensor

from ...schemas.errors import Misconfigured

SHARD_BYTES = 2 * 1024**3
"""A file's tensors are in memory until it is written."""
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")
LEFT_OUT = ("config.json", "gristmill-model.json", "*.index.json")


class CheckpointWriter:
    """Collects tensors and writes a file whenever there are enough of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._waiting: dict[str, Tensor] = {}
        self._bytes, self._files, self._places = 0, 0, dict[str, int]()
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        assert name not in self._places, f"{name} twice"
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._bytes + size > SHARD_BYTES:
            self._flush()
        self._waiting[name] = tensor.to("cpu").contiguous()
        self._places[name] = self._files
        self._bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write the rest, and the index if there are several files."""
        self._flush()
        if self._files == 1:
            self._path(0).rename(self._directory / "model.safetensors")
            return
        names = {i: f"model-{i + 1:05}-of-{self._files:05}.safetensors" for i in range(self._files)}
        for i, name in names.items():
            self._path(i).rename(self._directory / name)
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": {name: names[i] for name, i in self._places.items()},
        }
        write_json(self._directory / "model.safetensors.index.json", index)

    def _flush(self) -> None:
        if self._waiting:
            try:
                save_file(self._waiting, self._path(self._files), metadata={"format": "pt"})
            except SafetensorError as exc:  # how it says that the disk is full
                raise OSError(f"weights cannot be written: {exc}") from exc
            self._path(self._files).chmod(0o644)  # the library makes it for the owner only
            _sync(self._path(self._files))
            self._waiting, self._bytes, self._files = {}, 0, self._files + 1

    def _path(self, number: int) -> Path:
        return self._directory / f".part-{number}"


@contextmanager
def new_directory(out: Path) -> Generator[Path]:
    """A directory beside ``out`` that takes its name when all went well, and is removed otherwise.

    Raises Misconfigured if ``out`` exists: nothing is overwritten; and where there is no room, or no right.
    """
    refuse_existing(out)
    with _file_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        try:
            yield scratch
            scratch.chmod(0o755)
            refuse_existing(out)
            scratch.rename(out)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _file_errors(out: Path) -> Generator[None]:
    try:
        yield
    except OSError as exc:
        raise Misconfigured(
            f"{exc.filename or out}: {exc.strerror or exc}; make room, give this user the right, or name "
            "another directory"
        ) from exc


def refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise Misconfigured(f"{out} exists, and nothing is overwritten; name another directory, or remove it")


def copy_companions(source: Path, target: Path) -> None:
    """The tokenizer, its configuration, chat templates and licences: all but config and weights."""
    left_out = {path.name for pattern in LEFT_OUT for path in source.glob(pattern)}
    for path in sorted({path for pattern in COPIED for path in source.glob(pattern)}):
        if path.is_file() and path.name not in left_out:
            shutil.copyfile(path, target / path.name)


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
