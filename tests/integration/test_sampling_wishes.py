"""What a request asks of the sampler reaches the engine in its own process, and comes back in the result."""

from __future__ import annotations

import json

import pytest
from gristmill.schemas.errors import JobFailed
from gristmill.schemas.openai import response_body

from ..support.stack import Stack


def test_every_wish_goes_through_the_queue_and_what_is_told_comes_back(tiny_stack: Stack) -> None:
    tiny_stack.worker()
    client = tiny_stack.client
    wishes: dict[str, object] = {
        "max_tokens": 12,
        "seed": 4,
        "ignore_eos": True,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "dry_multiplier": 0.8,
        "logit_bias": {65: 5.0},
        "allowed_token_ids": list(range(60, 90)),
        "bad_words": ["B"],
        "typical_p": 0.9,
        "watermark": True,
        "logprobs": 3,
        "prompt_logprobs": 1,
        "echo": True,
        "return_token_ids": True,
    }
    first, again, plain = [
        client.submit("Tell me", **given).result(timeout_s=120)
        for given in (wishes, wishes, {"max_tokens": 12, "seed": 4, "ignore_eos": True})
    ]
    (choice,), (other,) = first.choices, again.choices
    assert choice == other
    assert choice.text.startswith("Tell me")
    assert choice.token_ids is not None
    assert len(choice.token_ids) == 12
    assert set(choice.token_ids) <= set(range(60, 90)) - {66}
    assert choice.logprobs is not None
    assert [len(one.top) for one in choice.logprobs] == [3] * 12
    assert first.prompt_logprobs is not None
    assert "".join(one.token for one in first.prompt_logprobs) == "Tell me"
    assert [one.logprob is None for one in first.prompt_logprobs] == [True] + [False] * 6
    json.dumps(response_body(first), allow_nan=False)
    assert (plain.choices[0].logprobs, plain.prompt_logprobs) == (None, None)

    with pytest.raises(JobFailed, match="GRISTMILL_MAX_TOP_N_TOKENS"):
        client.submit("x", logprobs=21).result(timeout_s=60)
