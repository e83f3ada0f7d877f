"""What the engine may be told. The worker fills these in from flags and ``GRISTMILL_*``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

DType = Literal["auto", "bfloat16", "float16", "float32"]
KVDType = Literal["auto", "int8", "fp8", "fp8_e4m3", "fp8_e4m3fn"]
Quantize = Literal[
    "nf4",
    "fp4",
    "int8",
    "eetq",
    "fp8",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "awq",
    "gptq",
    "compressed-tensors",
]


class EngineSettings(BaseModel):
    """Knobs of one engine. Frozen. None means: decided from the model and the machine at start-up.

    The names are the ones users know from other servers; sizes are in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """A model directory: config.json, safetensors, tokenizer.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: DType = "auto"
    """auto: bfloat16 where the hardware multiplies it, otherwise float16 (CUDA) or float32 (CPU)."""
    quantize: Quantize | None = None
    """Linears in fewer bits (for the output layer see ``quantize_head``): nf4 and fp4 (4 bits), eetq (int8),
    fp8, or int8, which on CPUs has inputs in int8, too, and is the fastest there. TGI's names are known, too.
    """
    quantize_head: bool = True
    """quantize int8 on a CPU that multiplies int8: the output layer's weights, too, a fifth of what a small
    model reads; its inputs are in 16 bits."""
    attention: Literal["auto", "cpu", "torch", "triton", "flash"] = "auto"
    """auto: on a CPU the native kernel, if there is a C++ compiler or one built earlier; on CUDA our Triton
    kernels, or flash-attn where it is installed and faster; otherwise torch."""

    max_num_seqs: PositiveInt = 128
    """Sequences that run together."""
    max_batch_prefill_tokens: PositiveInt | None = None
    """Token budget of one step, decode included. None: 512 on CPU, 8,192 on CUDA."""
    max_total_tokens: PositiveInt | None = None
    """Prompt + output of one sequence. None: what the model was trained for."""
    max_batch_total_tokens: PositiveInt | None = None
    """Tokens in the KV cache, all sequences together. None: as many as the memory warm-up says."""
    waiting_served_ratio: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Let prompts in once this many wait for each sequence that decodes, so that the decoding ones are slowed
    down less often. 0: at once."""
    max_waiting_tokens: NonNegativeInt = 20
    """Tokens that the decoding ones get at most before they are slowed down for whoever waits."""
    kv_block_size: PositiveInt | None = None
    """None: 16, or 256 with flash-attn, whose blocks have a multiple of that."""
    kv_cache_dtype: KVDType = "auto"
    """int8 or fp8 (e4m3): keys and values in a byte each and a scale for each token and head, so that nearly
    twice as many fit in memory; what is generated is no longer exactly the model's. auto: as it computes."""
    prefix_cache: bool = True
    """Keep the keys and values of what was computed for as long as there is room, for who begins likewise."""
    swap_gib: float = Field(default=0.0, ge=0.0)
    """Host memory for KV blocks that had to make way and are wanted again; used where copying them costs less
    than computing them, as measured. 0: none."""
    overlap: bool | None = None
    """Launch a step before the tokens of the one before are known to the host, which then works beside the
    device. None: on CUDA. It changes no token."""
    native_products: bool = True
    """CPU only: multiply with our own kernels where the CPU has a matrix unit or AVX-512 dot products
    (bfloat16, int8). Off: with oneDNN's."""
    shared_attention: bool = True
    """CPU only: sequences that begin with the same KV blocks read these together when they decode. Off: each
    by itself, as in deterministic mode."""
    cuda_graphs: bool = True
    """CUDA only: replay what a step of decodes launches instead of launching it anew. It changes no token."""
    speculate: NonNegativeInt = 8
    """Guesses of what a sequence says next that a step may check along with it, where that pays; 0: none."""
    memory_fraction: float = Field(default=0.9, gt=0.0, le=1.0)
    """CUDA only: the part of the card's memory that weights, activations and KV cache may take together."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that the model is cut for, each with a part of every layer: CUDA devices, or CPU processes."""

    lora_adapters: dict[str, Path] = Field(default_factory=dict[str, Path])
    """LoRA adapters that requests may name: name -> PEFT directory."""
    lora_dir: Path | None = None
    """Every adapter directory right below this one may be named, too."""
    lora_memory_mib: PositiveInt = 512
    """What loaded adapters may take together."""
    lora_max_rank: PositiveInt = 256

    deterministic: bool = False
    """Give a request the same bits whatever else is in the batch, on one machine with one number of threads.
    CPU only; slower."""
    num_threads: PositiveInt | None = None
    """CPU threads. None: as torch chooses (one per physical core it may use)."""
    quick_start: bool = True
    """On a CPU, import torch without what only its compilers and exporters need; who does need it has it read
    then. It changes no token."""
    kernel_cache: Path | None = None
    """Where built kernels are kept. None: ``kernels`` under the Gristmill home."""

    @model_validator(mode="after")
    def _every_sequence_gets_a_token(self) -> Self:
        budget = self.max_batch_prefill_tokens
        if budget is not None and self.max_num_seqs > budget:
            raise ValueError(
                f"max_num_seqs ({self.max_num_seqs}) must not exceed max_batch_prefill_tokens ({budget}): "
                "a step could not feed one token to each running sequence"
            )
        return self

    @model_validator(mode="after")
    def _sums_are_in_one_order(self) -> Self:
        if self.deterministic and self.tensor_parallel_size > 1:
            raise ValueError(
                f"tensor_parallel_size ({self.tensor_parallel_size}) ranks add up in an order that depends "
                "on the batch, and deterministic mode promises the same bits in any; leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _swapped_blocks_can_be_found(self) -> Self:
        if self.swap_gib and not self.prefix_cache:
            raise ValueError(
                f"swap_gib ({self.swap_gib:g}) needs prefix_cache: it finds what was swapped out; "
                "allow the one or set the other to 0"
            )
        return self

    @model_validator(mode="after")
    def _the_cache_holds_a_block(self) -> Self:
        tokens, block = self.max_batch_total_tokens, self.kv_block_size or 16
        if tokens is not None and tokens < block:
            raise ValueError(f"max_batch_total_tokens ({tokens}) must be at least kv_block_size ({block})")
        return self
