"""Whatever a request says of sampling, it runs to its end or is refused by the name of a field.

From keyword arguments to a result, as a worker goes, but for the queue and the processes between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.guided.checker import GrammarChecker
from gristmill.engine.models.tiny import VOCAB, write_tiny
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer
from gristmill.producer import core
from gristmill.producer.core import Submission
from gristmill.schemas.errors import BadInput
from gristmill.schemas.job import Job
from gristmill.schemas.result import Result
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import load_settings
from gristmill.worker import intake, wishes
from gristmill.worker.generation import Generation
from gristmill.worker.settings import WorkerSettings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("one_thread")
LONGEST = 96
MOST_STEPS = 200
FOREVER = 1e9
WORDS = ["a", "aa", "\n", "\x00", "🙂" * 20, " ", "the", "é", "<|im_end|>"]
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.sampled_from([1, 2, 5, 12, LONGEST, 2**31]),
    "min_tokens": st.sampled_from([0, 1, 5, 2**31]),
    "temperature": st.sampled_from([0.0, 1e-320, 1e-30, 0.7, 100.0, float("nan"), float("inf")]),
    "top_p": st.sampled_from([1e-320, 1e-9, 0.5, 1.0, 0.0]),
    "top_k": st.sampled_from([-1, 0, 1, 5, 2**31 - 1]),
    "min_p": st.sampled_from([0.0, 1e-320, 0.5, 1.0]),
    "typical_p": st.sampled_from([1e-320, 0.3, 1.0]),
    "seed": st.sampled_from([-1, 0, 2**63, 2**64 - 1, 2**64]),
    "n": st.sampled_from([1, 2, 16, 17]),
    "best_of": st.sampled_from([1, 3]),
    "repetition_penalty": st.sampled_from([1e-320, 0.01, 1.2, 100.0]),
    "frequency_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
    "presence_penalty": st.sampled_from([-2.0, 2.0]),
    "dry_multiplier": st.sampled_from([0.5, 100.0]),
    "dry_base": st.sampled_from([1.0, 100.0]),
    "dry_allowed_length": st.sampled_from([1, 3]),
    "dry_range": st.sampled_from([1, 5]),
    "dry_sequence_breakers": st.lists(st.sampled_from(WORDS), max_size=4),
    "logit_bias": st.sampled_from([{1: -100.0}, dict.fromkeys(range(VOCAB), 100.0), {VOCAB: 1.0}]),
    "allowed_token_ids": st.sampled_from([[], [5], [5, 5], [*range(VOCAB)], [VOCAB]]),
    "bad_words": st.sampled_from([["a"], WORDS, [chr(code) for code in range(1, 128)]]),
    "watermark": st.booleans(),
    "stop": st.lists(st.sampled_from([*WORDS, ""]), max_size=5),
    "stop_token_ids": st.sampled_from([[], [7], [*range(64)], [VOCAB]]),
    "include_stop": st.booleans(),
    "ignore_eos": st.booleans(),
    "guided_regex": st.sampled_from(["a*", "[a-z]{3,9}", "()", "\x00+", "(a"]),
    "guided_json": st.sampled_from([{"type": "integer"}, {"enum": ["é", 1]}, {"$ref": "#"}]),
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}]),
    "json_close": st.booleans(),
    "adapter_id": st.sampled_from(["nobody", "../..", "\x00"]),
    "logprobs": st.sampled_from([0, 20, 21]),
    "prompt_logprobs": st.sampled_from([0, 20]),
    "echo": st.booleans(),
    "truncate": st.sampled_from([1, 3, 2**31]),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
}
ENGINE_KNOWS = {"nothing_allowed", "adapter_not_found"}
"""What only the engine finds out: while it samples, or once a grammar is compiled."""
NAMED = {*FIELDS, "prompt", "grammar"}


@dataclass
class Mill:
    engine: Engine
    tokenizer: Tokenizer
    checker: GrammarChecker
    settings: WorkerSettings

    def answer(self, job: Job) -> Result:
        """Raises BadInput."""
        info, tokenizer = self.engine.info, self.tokenizer
        ids = intake.encode(job, tokenizer, info.vocab_size)
        allowed = intake.budget(job, len(ids), info.max_model_len, 20, knob=info.length_knob)
        wishes.check_limits(job.sampling, self.settings)
        wishes.check_ids(job.sampling, info)
        made = Generation(job, 1, 1, 10.0, tokenizer)
        made.processors = wishes.processors(job.sampling, tokenizer, info.vocab_size, self.settings)
        if job.sampling.grammar is not None:
            intake.check_grammar(job, self.checker, allowed)
        made.admit(ids, allowed, 10.0)
        for request in intake.engine_requests(made) if made.done is None else ():
            self.engine.add(request)
        for _ in range(MOST_STEPS):
            if not self.engine.has_work:
                break
            self._step(made)
        assert made.complete, "it never ended"
        return made.result()

    def _step(self, made: Generation) -> None:
        for output in self.engine.step():
            made.push(output, 11.0)
            if output.finish is None and output.id not in {name for name, _ in made.running}:
                self.engine.abort(output.id)
        made.take_entries(FOREVER)
        made.confirm()
        self.engine.check()


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mill]:
    directory = tmp_path_factory.mktemp("requests")
    model = write_tiny(directory / "model", tokenizer=True, max_position_embeddings=LONGEST)
    knobs: dict[str, Any] = {"attention": "torch", "device": "cpu", "num_threads": 1, "max_num_seqs": 16}
    engine = Engine(EngineSettings(model=str(model), lora_dir=directory, **knobs))
    checker = GrammarChecker(str(model), VOCAB)
    yield Mill(engine, Tokenizer(model), checker, WorkerSettings(model="m"))
    checker.close()


def test_every_wish_is_tried() -> None:
    assert set(SamplingParams.model_fields) - {"grammar"} <= set(FIELDS)


@settings(
    max_examples=25, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
    names=st.lists(st.sampled_from([*FIELDS]), max_size=5, unique=True),
    prompt=st.sampled_from(["hello", "\x00", "ab" * 20, "a" * 200]),
    data=st.data(),
)
def test_a_request_runs_to_its_end_or_is_refused_by_the_name_of_a_field(
    mill: Mill, names: list[str], prompt: str, data: st.DataObject
) -> None:
    sampling = {name: data.draw(FIELDS[name], name) for name in names}
    try:
        job = core.draft_job(Submission(prompt=prompt), sampling, load_settings(), 1000.0)
        ended = mill.answer(Job.from_json(job.to_json()))
    except BadInput as exc:
        refused = exc
    else:
        assert ended.error is None or ended.error.code in ENGINE_KNOWS, ended.error
        assert Result.from_json(ended.to_json()) == ended
        return
    assert str(getattr(refused, "param", None)).partition(".")[0] in NAMED, refused.message
