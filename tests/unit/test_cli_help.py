"""Help begins with examples, and they are ones the command takes."""

from __future__ import annotations

import shlex

import pytest
from click import Command
from gristmill.producer import commands_jobs as jobs
from gristmill.producer.commands_batch import submit as batch_submit
from gristmill.producer.commands_run import run


@pytest.mark.parametrize(
    "command", [jobs.submit, jobs.follow, jobs.status, jobs.result, jobs.cancel], ids=lambda each: each.name
)
def test_the_examples_of_a_command_are_ones_it_takes(command: Command) -> None:
    lines = [line.strip() for line in (command.help or "").split("Examples:")[1].splitlines() if line.strip()]
    assert lines
    for line in lines:
        words = shlex.split(
            line.partition(" > ")[0].partition("| ")[2] or line.partition(" > ")[0], comments=True
        )
        assert words[:2] == ["gristmill", command.name]
        assert command.make_context("gristmill", words[2:], resilient_parsing=True).params


@pytest.mark.parametrize(
    ("command", "args", "default"),
    [(run, ["in.jsonl", "-o", "-"], True), (batch_submit, ["in.jsonl"], False)],
)
def test_run_and_batch_submit_have_the_same_flags_for_the_order_of_answers(
    command: Command, args: list[str], default: bool
) -> None:
    said = [
        command.make_context("x", [*args, *flags]).params["input_order"]
        for flags in ((), ("--input-order",), ("--any-order",))
    ]
    assert said == [default, True, False]
