"""`gristmill run` and `up` hand engine flags on to a worker that they may not import: both must agree."""

import click
import pytest
from gristmill.producer.commands_run import run
from gristmill.producer.commands_up import up
from gristmill.producer.knobs import KNOBS, worker_flags
from gristmill.worker.cli import cli

WORKER = {
    flag: option for option in cli.commands["run"].params for flag in (*option.opts, *option.secondary_opts)
}


@pytest.mark.parametrize("name", KNOBS)
def test_the_worker_has_each_flag_that_run_and_up_hand_on(name: str) -> None:
    assert f"--{name}" in WORKER


@pytest.mark.parametrize(
    "name", [name for name, (kind, _) in KNOBS.items() if isinstance(kind, click.Choice)]
)
def test_run_and_up_offer_the_choices_of_the_worker(name: str) -> None:
    theirs = WORKER[f"--{name}"].type
    assert isinstance(theirs, click.Choice)
    assert list(KNOBS[name][0].choices) == list(theirs.choices)


def test_adapters_and_deterministic_mode_are_handed_on() -> None:
    given = {"lora_dir": "/a", "lora_memory_mib": 64, "deterministic": True, "prefix_cache": False}
    flags = ["--lora-dir", "/a", "--lora-memory-mib", "64", "--deterministic"]
    assert sorted(worker_flags(given)) == sorted([*flags, "--no-prefix-cache"])
    for command in (run, up):
        parsed = command.make_parser(click.Context(command)).parse_args([*flags, "x"])[0]
        assert worker_flags(parsed) == flags


def test_weights_can_be_quantized_from_the_command_line_of_run_and_up() -> None:
    assert worker_flags({"quantize": "eetq", "dtype": None}) == ["--quantize", "eetq"]
