"""Text Generation Inference's request bodies in: ``/generate``, ``/generate_stream`` and ``/``.

Names and ranges are TGI's; a stop sequence stays in the text, as it does there. What it samples without
being told to follows its code: everything if ``parameters`` is left out, nothing (the likeliest token each
time) if it is there and neither ``do_sample`` nor a temperature or filter is.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .errors import InvalidRequest
from .grammar import with_grammar
from .job import Endpoint
from .openai import Request
from .sampling import SamplingParams
from .wire import Bool, Count, Float, Int, Record

_Positive = Annotated[Count, Field(ge=1)]
_Inside = Annotated[Float, Field(gt=0.0, lt=1.0)]


class _Parameters(Record):
    max_new_tokens: _Positive | None = None
    do_sample: Bool = False
    temperature: Annotated[Float, Field(gt=0.0, le=100.0)] | None = None
    top_k: _Positive | None = None
    top_p: _Inside | None = None
    typical_p: _Inside | None = None
    repetition_penalty: Annotated[Float, Field(gt=0.0, le=100.0)] | None = None
    frequency_penalty: Annotated[Float, Field(ge=-2.0, le=2.0)] | None = None
    best_of: _Positive | None = None
    seed: Annotated[Int, Field(ge=0, lt=2**64)] | None = None
    stop: tuple[str, ...] = ()
    truncate: _Positive | None = None
    return_full_text: Bool | None = None
    details: Bool = False
    decoder_input_details: Bool = False
    top_n_tokens: _Positive | None = None
    watermark: Bool = False
    grammar: Any = None
    adapter_id: str | None = None

    @property
    def has_details(self) -> bool:
        """The answer has details."""
        return self.details or self.decoder_input_details

    @property
    def samples(self) -> bool:
        """As TGI decides it: a temperature other than 1, or a filter, is a wish to sample."""
        filters = (self.top_k, self.top_p, self.typical_p)
        return (
            self.do_sample or self.temperature not in (None, 1.0) or any(one is not None for one in filters)
        )

    def sampling(self, *, stream: bool) -> SamplingParams:
        """``stream``: each event tells of its token. Raises InvalidRequest."""
        if stream and self.decoder_input_details:
            raise InvalidRequest(
                "decoder_input_details is not to be had with a stream; leave one of them out",
                param="parameters.decoder_input_details",
            )
        told = (self.top_n_tokens or 0) if stream or self.has_details else None
        given: dict[str, Any] = {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature if self.samples else 0.0,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "best_of": self.best_of,
            "seed": self.seed,
            "adapter_id": self.adapter_id,
            "stop": self.stop,
            "include_stop": True,
            **with_grammar({"grammar": self.grammar}),
            "truncate": self.truncate,
            "echo": self.return_full_text,
            "logprobs": told,
            "prompt_logprobs": 0 if self.decoder_input_details else None,
            "watermark": self.watermark,
        }
        return SamplingParams.from_python({name: value for name, value in given.items() if value is not None})


class _Body(Record):
    inputs: Annotated[str, Field(strict=True, min_length=1)]
    parameters: _Parameters | None = None
    stream: Bool = False


def parse_generate(body: Any) -> Request:
    """A body of these routes. Raises InvalidRequest or its subclasses, each naming the field."""
    given = _Body.from_python(body)
    parameters = given.parameters or _Parameters(do_sample=True)
    return Request(
        endpoint=Endpoint.NATIVE,
        model=None,
        prompt=given.inputs,
        sampling=parameters.sampling(stream=given.stream),
        stream=given.stream,
    )
