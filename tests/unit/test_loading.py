"""Large checkpoints are read ahead, whole, and say how far they are."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from gristmill.engine import loading
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.weights import Checkpoint

from ..support.waiting import wait_until


def cached_pages(path: Path) -> int:
    """Pages of a file that can be read without waiting for the disk."""
    buffer, count = bytearray(4096), 0
    with path.open("rb") as file:
        for at in range(0, path.stat().st_size, 4096):
            try:
                count += os.preadv(file.fileno(), [buffer], at, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                continue
            except OSError:
                pytest.skip("this file system does not say what is in the page cache")
    return count


def forgotten(path: Path) -> bool:
    """Ask the page cache to drop the file; pages that are being written, or looked at, stay."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_pages(path) == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_all_of_a_large_checkpoint_is_read_ahead_by_one_process_or_by_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    monkeypatch.setattr(loading, "LARGE_BYTES", 1)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 65_536)
    files = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(files):
        path.write_bytes(os.urandom(1_000_000 + number))
        wait_until(lambda path=path: forgotten(path), 10, "the page cache lets go of it")
    asked = loading.Loading(files)
    threads = [thread for part in range(parts) for thread in asked.read_ahead(10**9, part=part, parts=parts)]
    for thread in threads:
        thread.join()
    assert threads
    assert [cached_pages(path) for path in files] == [-(-path.stat().st_size // 4096) for path in files]


def test_what_is_small_or_would_not_fit_is_left_to_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(loading.LARGE_BYTES)
    assert loading.Loading([path]).read_ahead(loading.LARGE_BYTES - 1) == []
    with path.open("wb") as file:
        file.truncate(loading.LARGE_BYTES - 1)
    assert loading.Loading([path]).read_ahead(10**12) == []


def test_a_long_load_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "LOG_EVERY_S", 0.0)
    checkpoint = Checkpoint(write_tiny(tmp_path, shards=2))
    with caplog.at_level(logging.INFO, "gristmill.engine.loading"):
        for name in checkpoint.names:
            checkpoint.tensor(name, torch.float32, torch.device("cpu"))
    last = caplog.records[-1]
    assert last.message == "weights.loading"
    sizes = sum(each.stat().st_size for each in tmp_path.glob("*.safetensors"))
    assert last.__dict__["total_bytes"] == sizes
    assert 0.9 * sizes < last.__dict__["bytes"] < sizes
