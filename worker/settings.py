"""The worker's settings: connections, the engine's knobs, and how it lives and ends."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import NoDecode

from ..engine.settings import DType, EngineSettings, KVDType, Quantize
from ..schemas.errors import Misconfigured
from ..schemas.model_names import served_name
from ..schemas.settings import Seconds, Settings, misconfigured


def _tgi(name: str) -> AliasChoices:
    """The knob under our prefix, or under the bare name that TGI's launcher made known."""
    return AliasChoices(name, f"GRISTMILL_{name.upper()}", name.upper())


class WorkerSettings(Settings):
    """Read once, at start-up, from flags, ``GRISTMILL_*`` and TGI's names. Frozen. ``_s``: seconds."""

    model: Annotated[
        str | None, Field(validation_alias=AliasChoices("model", "GRISTMILL_MODEL", "MODEL_ID"))
    ] = None
    revision: Annotated[str | None, Field(validation_alias=_tgi("revision"))] = None
    served_model_name: str | None = None
    """The name jobs use; default: the model as given, or a directory's name."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Annotated[DType, Field(validation_alias=_tgi("dtype"))] = "auto"
    quantize: Annotated[Quantize | None, Field(validation_alias=_tgi("quantize"))] = None
    quantize_head: bool = True
    attention: Literal["auto", "cpu", "torch", "triton", "flash"] = "auto"
    max_num_seqs: PositiveInt = 128
    max_batch_prefill_tokens: Annotated[
        PositiveInt | None, Field(validation_alias=_tgi("max_batch_prefill_tokens"))
    ] = None
    max_input_tokens: Annotated[
        PositiveInt | None,
        Field(
            validation_alias=AliasChoices(
                "max_input_tokens", "GRISTMILL_MAX_INPUT_TOKENS", "MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"
            )
        ),
    ] = None
    """Of one prompt. None: as many as ``max_total_tokens`` leaves."""
    max_total_tokens: Annotated[PositiveInt | None, Field(validation_alias=_tgi("max_total_tokens"))] = None
    max_batch_total_tokens: Annotated[
        PositiveInt | None, Field(validation_alias=_tgi("max_batch_total_tokens"))
    ] = None
    waiting_served_ratio: Annotated[
        float, Field(ge=0.0, allow_inf_nan=False, validation_alias=_tgi("waiting_served_ratio"))
    ] = 0.0
    max_waiting_tokens: Annotated[NonNegativeInt, Field(validation_alias=_tgi("max_waiting_tokens"))] = 20
    max_concurrent_requests: Annotated[
        PositiveInt | None, Field(validation_alias=_tgi("max_concurrent_requests"))
    ] = None
    """Jobs of a class, and of those above it, that the worker takes on; the others stay in the queue.
    None: as many as run together, and a few."""
    kv_block_size: PositiveInt | None = None
    kv_cache_dtype: Annotated[KVDType, Field(validation_alias=_tgi("kv_cache_dtype"))] = "auto"
    prefix_cache: bool = True
    swap_gib: Annotated[float, Field(ge=0.0)] = 0.0
    overlap: bool | None = None
    native_products: bool = True
    shared_attention: bool = True
    cuda_graphs: bool = True
    speculate: Annotated[NonNegativeInt, Field(validation_alias=_tgi("speculate"))] = 8
    memory_fraction: Annotated[
        float,
        Field(
            gt=0.0,
            le=1.0,
            validation_alias=AliasChoices(
                "memory_fraction", "GRISTMILL_MEMORY_FRACTION", "CUDA_MEMORY_FRACTION"
            ),
        ),
    ] = 0.9
    tensor_parallel_size: Annotated[
        PositiveInt,
        Field(
            validation_alias=AliasChoices(
                "tensor_parallel_size", "GRISTMILL_TENSOR_PARALLEL_SIZE", "TENSOR_PARALLEL_SIZE", "NUM_SHARD"
            )
        ),
    ] = 1
    num_threads: PositiveInt | None = None
    lora_adapters: Annotated[dict[str, Path], NoDecode, Field(validation_alias=_tgi("lora_adapters"))] = (
        Field(default_factory=dict[str, Path])
    )
    """In the environment: ``name=directory,name=directory``."""
    lora_dir: Path | None = None
    lora_memory_mib: PositiveInt = 512
    lora_max_rank: PositiveInt = 256
    deterministic: bool = False
    quick_start: bool = True

    max_stop_sequences: Annotated[PositiveInt, Field(validation_alias=_tgi("max_stop_sequences"))] = 16
    max_top_n_tokens: Annotated[int, Field(ge=0, validation_alias=_tgi("max_top_n_tokens"))] = 20
    """Of the likeliest tokens, told with each token: ``logprobs``, ``prompt_logprobs``."""
    max_best_of: Annotated[PositiveInt, Field(validation_alias=_tgi("max_best_of"))] = 16
    watermark_gamma: Annotated[float, Field(gt=0.0, lt=1.0, validation_alias=_tgi("watermark_gamma"))] = 0.5
    """The part of the vocabulary that a watermark favours …"""
    watermark_delta: Annotated[
        float, Field(ge=-100.0, le=100.0, validation_alias=_tgi("watermark_delta"))
    ] = 2.0
    """… and by how much."""
    default_max_tokens: PositiveInt = 1024
    """Tokens of output for a request that names no number; less where the context is shorter."""
    health_host: str = "127.0.0.1"
    health_port: Annotated[int, Field(ge=0, le=65_535)] = 8077
    """0: any free port."""
    heartbeat_every_s: Seconds = 5.0
    engine_start_s: Seconds = 600.0
    engine_stall_s: Seconds = 300.0
    """How long one step may take before the engine counts as hung, and is replaced."""
    engine_restarts: Annotated[int, Field(ge=0)] = 3
    """Restarts without a token in between before the worker gives up."""
    max_attempts: PositiveInt = 3
    """Crashes while it ran alone before a job is given up and goes to the dead letters."""
    drain_s: Annotated[float, Field(ge=0, le=1e9)] = 25.0
    spool_max_results: PositiveInt = 512
    """Finished jobs whose results may wait for the store; then intake stops. Each holds a thread."""
    spool_max_bytes: PositiveInt = 256 * 1024 * 1024
    """The same, by the size of the results."""
    bulk_write_every_s: Seconds = 10.0
    """Rows of a batch that have ended join it so often; sooner where they are many."""
    keeper: bool = True
    """Bring a keeper along, which ends jobs that nobody runs."""
    burst: bool = False
    """Exit once the queues are empty and nothing runs."""
    idle_exit_s: Annotated[float, Field(ge=0, le=1e9)] | None = None
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def model_name(self) -> str:
        """The name under which jobs find this worker."""
        if self.model is None:
            raise Misconfigured("no model given: use --model NAME or GRISTMILL_MODEL")
        return self.served_model_name or served_name(self.model)

    @model_validator(mode="after")
    def _a_prompt_leaves_room_for_output(self) -> Self:
        prompt, whole = self.max_input_tokens, self.max_total_tokens
        if prompt is not None and whole is not None and prompt >= whole:
            raise ValueError(
                f"max_input_tokens ({prompt}) must be less than max_total_tokens ({whole}), which counts the "
                "output, too"
            )
        return self

    @field_validator("lora_adapters", mode="before")
    @classmethod
    def _named_directories(cls, value: object) -> object:
        """TGI takes a bare path or Hub id as well, which would leave the name to guesswork."""
        if not isinstance(value, str):
            return value
        pairs = [part.strip().partition("=") for part in value.split(",") if part.strip()]
        if wrong := next((name for name, _, path in pairs if not name or not path), None):
            raise ValueError(f"{wrong!r} is not name=directory; write them as a=/x,b=/y")
        return {name: path for name, _, path in pairs}

    def engine(self, model_dir: Path) -> EngineSettings:
        """The part the engine needs, for a model that lies in ``model_dir``.

        Raises Misconfigured for knobs that contradict each other.
        """
        names = EngineSettings.model_fields.keys() & type(self).model_fields.keys() - {"model"}
        try:
            return EngineSettings(
                model=str(model_dir),
                kernel_cache=self.home / "kernels",
                **{name: getattr(self, name) for name in names},
            )
        except ValidationError as exc:
            raise misconfigured(exc) from exc


def load_worker_settings(**overrides: object) -> WorkerSettings:
    """Environment plus flags (None means: not given). Raises Misconfigured naming the setting."""
    try:
        return WorkerSettings(**{k: v for k, v in overrides.items() if v is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as exc:
        raise misconfigured(exc) from exc
