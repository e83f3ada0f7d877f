"""Several choices in a terminal: texts on stdout one behind the other, which is which on stderr."""

from __future__ import annotations

import random

import pytest
from gristmill.producer import commands_jobs
from gristmill.producer.replica import Chunk
from gristmill.schemas.events import EntryId
from gristmill.schemas.result import FinishReason

Pages = commands_jobs._Pages  # pyright: ignore[reportPrivateUsage]
HEADINGS = "(choice 2:)\n(choice 3:)\n"


def chunk(choice: int, text: str, *, last: bool = False, reset: bool = False) -> Chunk:
    reason = FinishReason.STOP if last else None
    return Chunk(text, (), choice, 0, EntryId(1, 1), reset, finish_reason=reason)


@pytest.mark.parametrize("seed", range(10))
def test_choices_do_not_mix_however_their_pieces_come(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    waiting = [[chunk(i, f"{i}a "), chunk(i, f"{i}b "), chunk(i, f"{i}c", last=True)] for i in range(3)]
    pages = Pages()
    while some := [each for each in waiting if each]:
        pages.show(rng.choice(some).pop(0))
    pages.close()
    out, err = capsys.readouterr()
    assert out == "0a 0b 0c\n1a 1b 1c\n2a 2b 2c"
    assert err == HEADINGS


def test_the_first_choice_is_shown_as_it_is_made_and_the_second_once_the_first_has_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pages = Pages()
    pages.show(chunk(1, "other"))
    pages.show(chunk(0, "one"))
    assert capsys.readouterr() == ("one", "")
    pages.show(chunk(0, " more", last=True))
    assert capsys.readouterr() == (" more\nother", "(choice 2:)\n")


def test_who_follows_from_the_middle_sees_what_is_left_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    pages = Pages()
    pages.show(chunk(2, "third", last=True))
    pages.show(chunk(1, "anew", reset=True))
    assert capsys.readouterr().out == "", "the first one's turn may still come"
    pages.close()
    out, err = capsys.readouterr()
    assert out == "\nanew\nthird"
    assert err.startswith("(choice 2:)\n\n(the job began anew")
    assert err.endswith("(choice 3:)\n")
