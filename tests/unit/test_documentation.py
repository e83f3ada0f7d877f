"""What the Markdown files say exists does exist: files, settings, commands, flags."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from gristmill.keeper.cli import cli as gristmill_keeper
from gristmill.keeper.settings import KeeperSettings
from gristmill.producer.cli import cli as gristmill
from gristmill.producer.settings import ProducerSettings
from gristmill.worker.cli import cli as gristmill_worker
from gristmill.worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md")] if ".venv" not in path.parts)
PROGRAMS = {
    "gristmill": gristmill,
    "gristmill-keeper": gristmill_keeper,
    "gristmill-worker": gristmill_worker,
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands(text: str) -> Iterator[list[str]]:
    """Command lines of our programs in indented blocks, as words, up to a comment or a pipe."""
    for line in text.splitlines():
        found = re.match(r"^\s*(?:\$ )?(?:.*\| )?(gristmill(?:-worker|-keeper)? .*)$", line)
        if found and line.startswith(("    ", "$ ")):
            words = shlex.split(found[1].replace("…", ""), comments=True)
            end = next((i for i, word in enumerate(words) if word in {"|", "&", ">", "&&"}), len(words))
            yield words[:end]


def unknown(words: list[str]) -> str | None:
    """The first word of a command line that its program does not know."""
    command: click.Command | None = PROGRAMS[words[0]]
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        command = command.get_command(click.Context(command), name)
        if command is None:
            return name
    assert command is not None
    flags = {flag for parameter in command.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    flags |= {"--help", "-h", "--version"}
    given = [word.split("=")[0] for word in rest if re.match(r"^--?[a-z]", word)]
    return next((flag for flag in given if flag not in flags), None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert not [target for target in local if not (page.parent / target).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_variables_are_settings(page: Path) -> None:
    known = {"valkey_password"}.union(
        *(s.model_fields for s in (WorkerSettings, ProducerSettings, KeeperSettings))
    )
    named = {name.lower() for name in re.findall(r"\bGRISTMILL_([A-Z0-9_]+)\b", page.read_text())}
    assert not named - known


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_flags_are_known(page: Path) -> None:
    assert not {" ".join(words): bad for words in commands(page.read_text()) if (bad := unknown(words))}


def test_the_readme_shows_commands_that_are_checked() -> None:
    assert len([*commands((ROOT / "README.md").read_text())]) >= 8


def test_a_flag_that_does_not_exist_would_be_noticed() -> None:
    [words] = commands("    gristmill submit hello --streem")
    assert unknown(words) == "--streem"


def test_packages_and_the_readme_of_each_name_files_that_exist() -> None:
    for folder in ("backends", "engine", "producer", "schemas", "worker"):
        text = (ROOT / folder / "README.md").read_text()
        named = set(re.findall(r"\b([a-z_]+\.(?:py|lua))\b", text))
        there = {path.name for path in (ROOT / folder).rglob("*") if path.is_file()}
        elsewhere = {path.name for path in ROOT.glob("*/*.py")} - there
        assert not named - there - elsewhere, folder
