"""Files for users replace files, and nothing else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gristmill.producer.batch import output
from gristmill.producer.commands_run import default_errors
from gristmill.schemas.settings import load_settings

SETTINGS = load_settings()


def test_a_pipe_or_a_device_is_written_into_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    output.check_target(str(pipe), "--output", SETTINGS)
    assert output.write(str(pipe), [b"one\n", b"two\n"], SETTINGS) == 2
    output.remove(str(pipe))
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert os.read(reader, 100) == b"one\ntwo\n"
    os.close(reader)
    assert list(tmp_path.iterdir()) == [pipe]
    assert default_errors(str(pipe)) is None, "there is no place beside it"


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "out.jsonl", tmp_path / "out.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    output.write(str(link), [b"new\n"], SETTINGS)
    assert link.is_symlink()
    assert target.read_text() == "new\n"
