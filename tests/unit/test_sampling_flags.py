"""Whatever a request may ask of the sampler, the command line can ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from gristmill.producer.commands_jobs import submit
from gristmill.producer.core import sampling_params
from gristmill.producer.sampling_flags import FOR_ROWS, GROUPS, dests, sampling_flags, wishes
from gristmill.schemas.batch_lines import parse_line
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.sampling import SamplingParams

FLAGS = """
--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --typical-p 0.8 --seed 3 --repetition-penalty 1.2
--frequency-penalty 0.5 --presence-penalty -1 --dry-multiplier 0.8 --dry-base 1.5 --dry-allowed-length 3
--dry-range 64 --dry-breaker ; --logit-bias 5=-2 --logit-bias 6=1.5 --bad-word no --bad-word never
--allow-token 5 --allow-token 6 --max-tokens 9 --min-tokens 2 --stop END --stop-token 7 --ignore-eos
--logprobs 2 --prompt-logprobs 1 --echo --include-stop --token-ids --special-tokens --truncate 8 --watermark
--n 2 --best-of 3
"""
LINE = FLAGS.split()


def parsed(*words: str, groups: tuple[str, ...] = tuple(GROUPS)) -> dict[str, Any]:
    @click.command()
    @sampling_flags(*groups)
    def command(**given: Any) -> dict[str, Any]:
        return wishes(given)

    return command.main(list(words), standalone_mode=False)


def test_every_field_can_be_asked_for() -> None:
    found = sampling_params(parsed(*LINE))
    elsewhere = {"adapter_id", "grammar"}
    unchanged = {n for n in SamplingParams.model_fields if getattr(found, n) == getattr(SamplingParams(), n)}
    assert unchanged == elsewhere
    assert found.logit_bias == {5: -2.0, 6: 1.5}
    assert (found.bad_words, found.allowed_token_ids, found.stop) == (("no", "never"), (5, 6), ("END",))


def test_what_is_not_asked_for_changes_nothing() -> None:
    assert parsed() == {}


def test_flags_for_rows_are_defaults_that_both_forms_of_a_line_know() -> None:
    words = LINE[: LINE.index("--logprobs")]
    defaults = json.loads(json.dumps(parsed(*words, groups=FOR_ROWS)))
    assert {*defaults} == {*dests(*FOR_ROWS)}
    bare = parse_line(b'{"prompt": "x"}', 1, defaults)
    body = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    assert bare.request.sampling == parse_line(json.dumps(body).encode(), 1, defaults).request.sampling


def test_formats_of_the_answer_come_from_words_and_files(tmp_path: Path) -> None:
    (tmp_path / "g").write_text('start: "a"\n')
    (tmp_path / "t").write_text("[]")
    for words, kind, text in (
        (["--json-object"], "json_object", ""),
        (["--regex", "a+"], "regex", "a+"),
        (["--choice", "yes", "--choice", "no"], "choice", '["yes", "no"]'),
        (["--grammar", str(tmp_path / "g"), "--no-json-close"], "lark", 'start: "a"\n'),
    ):
        grammar = sampling_params(parsed(*words)).grammar
        assert grammar is not None
        assert (grammar.kind, grammar.text, grammar.close) == (kind, text, "--no-json-close" not in words)
    assert parsed("--tools", str(tmp_path / "t"), "--tool-choice", "f") == {
        "tools": [],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    for flag in ("--tools", "--grammar", "--json-schema"):
        with pytest.raises(InvalidRequest):
            parsed(flag, str(tmp_path / "missing"))
    with pytest.raises(click.BadParameter):
        parsed("--logit-bias", "x")


def test_help_shows_the_groups() -> None:
    shown = CliRunner().invoke(submit, ["--help"]).output
    at = [shown.index(f"{name}:") for name in ("Options", *GROUPS)]
    assert at == sorted(at)
    assert shown.index("--deadline-s") < at[1] < shown.index("--top-k") < at[2]
