"""Text Generation Inference's answers: of ``/generate``, of ``/generate_stream``, and errors.

Two differences: the end token is not among the tokens, because it has no text here; and a stream, which is
made without the tokenizer, has texts for what was generated and ids alone for other likely tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from .batch_lines import http_status
from .logprobs import TokenLogprobs
from .result import Choice, ErrorInfo, FinishReason, Result, TokenLogprob, TopLogprob


class Piece(Protocol):
    """A follower's chunk, as far as it matters here."""

    @property
    def text(self) -> str: ...
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None: ...
    @property
    def reset(self) -> bool: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def stop_reason(self) -> str | int | None: ...


def generate_body(result: Result) -> dict[str, Any]:
    """The answer of ``/generate`` for a job that succeeded; ``/`` puts it into a list."""
    best = result.choices[0]
    details = None if best.logprobs is None else _details(result)
    return {"generated_text": best.text, "details": details}


def error_answer(error: ErrorInfo) -> tuple[int, dict[str, Any]]:
    """HTTP status and body; within a stream the body is an event."""
    status = http_status(error.code)
    kind, ours = (
        ("validation", 422) if status < 500 else ("overloaded", 429) if status == 503 else ("generation", 424)
    )
    return ours, {"error": error.message, "error_type": kind}


def stream_events(pieces: Iterable[Piece], input_length: int | None = None) -> Iterator[dict[str, Any]]:
    """The events of ``/generate_stream``, one a token, from the pieces of a job's one choice.

    A token's event goes out when the next one is there, since the last one says how it ended. Joined token
    texts are the generated text; where tokens come several in a piece, the last of them has the text.
    """
    held: dict[str, Any] | None = None
    texts: list[str] = []
    index = 0
    for piece in pieces:
        if piece.reset:
            yield {"error": "the text changed after a crash", "error_type": "incomplete_generation_stream"}
            return
        texts.append(piece.text)
        for position, token in enumerate(piece.ids):
            if held is not None:
                yield held
            index += 1
            held = _event(index, token, piece.logprobs[position] if piece.logprobs else None)
        held = held or _event(1, 0, None, special=True)  # no token at all: it ended at once
        held["token"]["text"] += piece.text
        if piece.finish_reason is not None:
            held["generated_text"] = "".join(texts)
            held["details"] = {
                "finish_reason": _finish(piece.finish_reason, piece.stop_reason),
                "generated_tokens": index,
                "seed": None,
                "input_length": input_length,
            }
            yield held
            return


def _event(index: int, token: int, told: TokenLogprobs | None, *, special: bool = False) -> dict[str, Any]:
    top: list[tuple[int, float]] = []
    if told is not None:
        top = [*zip(told.top_ids, told.top_logprobs, strict=True)]
    return {
        "index": index,
        "token": {"id": token, "text": "", "logprob": told.logprob if told else 0.0, "special": special},
        "top_tokens": [{"id": i, "text": "", "logprob": logprob, "special": False} for i, logprob in top],
        "generated_text": None,
        "details": None,
    }


def _details(result: Result) -> dict[str, Any]:
    best, *others = result.choices
    prefill = [{"id": t.id, "text": t.token, "logprob": t.logprob} for t in result.prompt_logprobs or ()]
    return {
        **_sequence(best),
        "seed": result.seed,
        "prefill": prefill,
        "best_of_sequences": [
            {"generated_text": each.text, "seed": result.seed, "prefill": [], **_sequence(each)}
            for each in others
        ]
        or None,
    }


def _sequence(choice: Choice) -> dict[str, Any]:
    told: Sequence[TokenLogprob] = choice.logprobs or ()
    body: dict[str, Any] = {
        "finish_reason": _finish(choice.finish_reason, choice.stop_reason),
        "generated_tokens": len(told),
        "tokens": [_token(each) for each in told],
    }
    if any(each.top for each in told):
        body["top_tokens"] = [[_token(top) for top in each.top] for each in told]
    return body


def _token(told: TopLogprob) -> dict[str, Any]:
    return {"id": told.id, "text": told.token, "logprob": told.logprob, "special": told.special}


def _finish(reason: FinishReason, stop_reason: str | int | None) -> str:
    if reason is FinishReason.LENGTH:
        return "length"
    return "stop_sequence" if isinstance(stop_reason, str) else "eos_token"
