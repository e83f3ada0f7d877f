"""What a request must be for the engine to take it. The limits of people's wishes are the consumer's."""

from __future__ import annotations

from ..schemas.errors import InvalidRequest, PromptTooLong
from .messages import Request
from .processors import check_processors


def check_request(
    request: Request, *, max_model_len: int, vocab_size: int, length_knob: str | None = None
) -> None:
    """Raises PromptTooLong, or InvalidRequest naming the field, the value and the range."""
    if not request.prompt_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt_ids")
    if len(request.prompt_ids) >= max_model_len:
        raise PromptTooLong(
            prompt_tokens=len(request.prompt_ids), max_tokens=None, limit=max_model_len, knob=length_knob
        )
    for name, ids in (
        ("prompt_ids", request.prompt_ids),
        ("output_ids", request.output_ids),
        ("stop_token_ids", request.stop_token_ids),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(i for i in ids if not 0 <= i < vocab_size)
            raise InvalidRequest(f"token id {wrong} in {name} is not below {vocab_size:,}", param=name)
    for name, fine, rule in _ranges(request, vocab_size):
        if not fine:
            raise InvalidRequest(f"{name} is {getattr(request, name)}; it must be {rule}", param=name)
    check_processors(request, vocab_size)


def _ranges(request: Request, vocab: int) -> tuple[tuple[str, bool, str], ...]:
    """(field, whether it is in range, the range in words). A NaN is in no range."""
    r = request
    return (
        ("max_tokens", r.max_tokens >= 1, "at least 1"),
        ("min_tokens", 0 <= r.min_tokens <= r.max_tokens, f"0 to max_tokens ({r.max_tokens})"),
        ("temperature", 0.0 <= r.temperature < float("inf"), "0 or more"),
        ("top_p", 0.0 < r.top_p <= 1.0, "above 0 and at most 1"),
        ("top_k", r.top_k >= 0, "0 (off) or more"),
        ("min_p", 0.0 <= r.min_p <= 1.0, "0 to 1"),
        ("logprobs", 0 <= (r.logprobs or 0) <= vocab, f"0 to the size of the vocabulary ({vocab:,})"),
        ("prompt_logprobs", 0 <= (r.prompt_logprobs or 0) <= vocab, f"0 to {vocab:,}"),
        ("seed", 0 <= r.seed < 2**64, "an unsigned 64-bit integer"),
        ("choice", 0 <= r.choice < 2**32, "an unsigned 32-bit integer"),
        ("priority", 0 <= r.priority <= 2, "0, 1 or 2"),
    )
