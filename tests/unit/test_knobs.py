"""`gristmill run` and `up` hand engine flags on to a worker that they may not import: both must agree."""

import click
import pytest
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


def test_weights_can_be_quantized_from_the_command_line_of_run_and_up() -> None:
    assert worker_flags({"quantize": "eetq", "dtype": None}) == ["--quantize", "eetq"]
