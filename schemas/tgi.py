"""Text Generation Inference's request bodies in: ``/generate``, ``/generate_stream`` and ``/``.

Names and ranges are TGI's. What it samples without being told to follows its code: everything if
``parameters`` is left out, nothing (the likeliest token each time) if it is there and neither ``do_sample``
nor a temperature or filter is.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .errors import Unsupported
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
    def samples(self) -> bool:
        """As TGI decides it: a temperature other than 1, or a filter, is a wish to sample."""
        filters = (self.top_k, self.top_p, self.typical_p)
        return (
            self.do_sample or self.temperature not in (None, 1.0) or any(one is not None for one in filters)
        )

    def sampling(self) -> SamplingParams:
        """Raises InvalidRequest."""
        told = (self.top_n_tokens or 0) if self.details or self.top_n_tokens else None
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
    if parameters.grammar is not None:
        raise Unsupported("grammar: not supported here by this version; leave it out", param="grammar")
    return Request(
        endpoint=Endpoint.NATIVE,
        model=None,
        prompt=given.inputs,
        sampling=parameters.sampling(),
        stream=given.stream,
    )
