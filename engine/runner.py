"""StepPlan → packed tensors → logits. Owns the model, the KV tensors and the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..schemas.errors import Misconfigured
from .attention.choice import Wanted, block_tokens
from .batch import Arrays, Batch, Coming, Fed, Feed, Piece, gather, guess_rows, upload
from .graphs import Graphs, Record
from .kernels import attention_backend, elementwise, native_library, native_products
from .kv_cache import is_plentiful
from .kv_numbers import numbers_of
from .kv_room import KVRoom
from .layers.invariant import Make, invariant
from .layers.linear import Linear, linear, unpacked
from .lora.adapter import Adapter, Blueprint
from .lora.adapter import load as load_adapter
from .lora.files import Desk, open_desk
from .lora.rows import Adapted, adapted
from .memory import OutOfStep, is_out_of_memory
from .models.assembly import none_is
from .models.config import Config
from .models.decoder import Decoder
from .models.fallback import Fallback, is_ours
from .models.fallback_trial import try_out
from .models.families import from_hf
from .models.spec import ModelSpec
from .native.library import Library
from .native.products import in_use, used
from .parallel.adapters import narrow
from .parallel.feed import told
from .parallel.messages import Adapt
from .parallel.ranks import ONE_RANK, Ranks
from .parallel.shard import Shard, shard
from .parallel.weights import NarrowWeights
from .quant.onload import quantizing
from .quant.stored import stored_weights
from .quant.weights import ModelWeights
from .settings import EngineSettings
from .stopwatch import Stopwatch

log = logging.getLogger(__name__)

NO_ADAPTERS: Mapping[str, Adapter] = {}
CPU_STEP_TOKENS = 512
CUDA_STEP_TOKENS = 8192
SMALL_STEP_TOKENS = 16
SCORED_AT_ONCE = 32
"""Rows of a prompt whose logits exist at a time: bounds memory."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Plan(Protocol):
    """What ``forward`` reads of a StepPlan."""

    @property
    def work(self) -> Sequence[Piece]: ...


class Scorer(Protocol):
    """Wants logits of more rows than are sampled from: the prompt's."""

    @property
    def rows(self) -> Sequence[int]: ...

    def take(self, logits: Tensor) -> None:
        """[n, vocab]: of the next ``n`` of its rows."""
        ...


class Weights(Protocol):
    """What the decoder is made of; ``ModelWeights`` has it from files."""

    @property
    def stored_as(self) -> str | None:
        """The quantization that they are stored in. None: plain numbers."""
        ...

    def fetch(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def lend(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same to look at, maybe the file's own pages: whoever keeps it makes a copy."""
        ...

    def layer(
        self, modules: Sequence[str], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Linear | None: ...


WeightsOf = Callable[[Path, Config, ModelSpec], Weights]


class Runner:
    """Loads a model and runs steps of it. One thread only.

    ``num_blocks`` and ``max_model_len`` are known after construction: the constructor runs the largest step
    and gives what memory is left to the KV cache.

    On one of several ranks ``spec`` describes the whole model, and the part that is loaded is ``shard.spec``.
    Every rank makes a Runner at the same time; later ``forward`` is rank 0's, ``follow`` the others'.
    """

    def __init__(
        self, settings: EngineSettings, weights_of: WeightsOf = stored_weights, ranks: Ranks = ONE_RANK
    ) -> None:
        """``weights_of`` says where weights come from: the model's files.

        Raises ModelNotFound, ModelInvalid, Misconfigured (a knob that cannot work here).
        """
        if settings.tensor_parallel_size != ranks.size:
            raise Misconfigured(
                f"tensor_parallel_size is {settings.tensor_parallel_size}, and this engine was started as "
                f"{ranks.size} of a kind; EngineProcess starts as many as it takes"
            )
        self.load_s: dict[str, float] = {}
        self.ranks, self._leads = ranks, False
        self.graphs: Graphs | None = None
        self.away = Stopwatch()
        """In the model, with its logits (scores, masks, sampling), or waiting: all but the loop's own."""
        self.device = _device(settings, ranks)
        self.deterministic = _deterministic(settings, self.device)
        self.dtype = _dtype(settings, self.device)
        if (threads := _threads(settings, ranks)) and self.device.type == "cpu":
            torch.set_num_threads(threads)
        with self._timed("open"):
            directory = Path(settings.model)
            config = Config.load(directory)
            model: Weights | Fallback
            if is_ours(config):
                self.spec: ModelSpec = from_hf(config)
                self.shard: Shard = shard(self.spec, ranks.rank, ranks.size)
                model = weights_of(directory, config, self.spec)
                if isinstance(model, ModelWeights):
                    model.read_ahead(ranks.rank, ranks.size)
                if ranks.size > 1:
                    if not isinstance(model, ModelWeights):
                        raise Misconfigured(
                            "tensor_parallel_size needs a checkpoint in safetensors; a GGUF file is not cut"
                        )
                    model = NarrowWeights(model, self.shard)
            else:
                model = Fallback(directory, config, settings, self.dtype, self.device)
                self.spec = model.spec
                self.shard = shard(self.spec, 0, 1)
        self._numbers = numbers = numbers_of(settings.kv_cache_dtype)
        self.max_model_len = _max_model_len(settings, self.spec)
        self.length_knob = "max_total_tokens" if settings.max_total_tokens else None
        self.step_tokens = _step_tokens(settings, self.device)
        with self._timed("kernels"):
            wanted = Wanted(self.shard.spec, self.max_model_len, self.device, self.dtype, numbers)
            library = native_library(settings, wanted, block_tokens(settings))
            products = native_products(settings, self.device)
            self._attention = attention_backend(
                settings, wanted, block_tokens(settings), library, uniform=self.deterministic
            )
            self.block_size = self._attention.block_size
            if ranks.least(self.block_size) != -ranks.least(-self.block_size):
                raise Misconfigured(
                    "the ranks found different attention kernels to be the fastest; name one of them: "
                    "attention=triton"
                )
        layers, kv_heads = self.spec.num_layers, self.shard.spec.num_kv_heads
        self.room = KVRoom(self._attention, layers, kv_heads, numbers, self.dtype, self.device, ranks)
        with self._timed("weights"), torch.inference_mode(), used(products):
            self._decoder = (
                self._made_ours(model, settings)
                if isinstance(model, Fallback)
                else self._assembled(model, settings, library)
            )
        with self._timed("warm_up"):
            self.num_blocks = self._warm_up(settings)  # which each rank does by itself, at the same time
        self._leads = ranks.size > 1 and ranks.rank == 0
        self.graphs = self._new_graphs(settings, model)
        log.info("runner.ready", extra=self._summary())

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.spec.eos_token_ids

    @property
    def attention(self) -> str:
        """Name of the attention backend in use."""
        return self._attention.name

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def forward(
        self,
        plan: Plan,
        adapters: Mapping[str, Adapter] = NO_ADAPTERS,
        scorer: Scorer | None = None,
        coming: Coming | None = None,
    ) -> Tensor:
        """Run one step and return logits [rows, vocab] in the engine's dtype.

        One row for each work that reaches its sequence's end, in plan order, then one for each guess; the
        sequences are not changed.
        ``adapters``: those that the sequences name. The ``scorer`` is given the logits of its rows, a few at
        a time. ``coming``: the tokens that sequences have been given on the device and do not know of.
        Nothing waits for the device.
        """
        assert plan.work, "an empty plan"
        scored = list(scorer.rows if scorer else ())
        also = guess_rows(plan.work) + scored
        assert also == sorted(also), "guesses in a step that scores a prompt"
        arrays = gather(plan.work, self.block_size, also)
        owners = adapted(plan.work, adapters, also) if adapters else Adapted()
        if self.graphs is not None and not (owners.fed or also):
            with self.away:
                hidden = self.graphs.run(arrays, coming, plan.work)
                if hidden is not None:
                    return self._decoder.logits(hidden)
        batch = upload(arrays, self.device)
        if coming is not None:
            assert not self._leads, "the other ranks do not have these tokens"
            coming.put(batch.tokens, plan.work)
        if not self._leads:
            return self._run(batch, owners, scorer, len(scored))
        self.ranks.tell(told(arrays, owners, len(scored)))
        try:
            return self._run(batch, owners, scorer, len(scored))
        except Exception as exc:
            if is_out_of_memory(exc):
                raise OutOfStep(self.ranks.size) from exc
            raise

    @torch.inference_mode()
    def follow(self, arrays: Arrays, owners: Adapted, scored: int) -> None:
        """A step as another rank than 0 runs it: the same, and what comes out goes to rank 0."""
        self._run(upload(arrays, self.device), owners, None, scored)

    def _run(self, batch: Batch, owners: Adapted, scorer: Scorer | None, scored: int) -> Tensor:
        with self.away:
            hidden = self._decoder.forward(batch, self._attention, owners)
            sampled = len(hidden) - scored
            for start in range(sampled, len(hidden), SCORED_AT_ONCE):
                logits = self._decoder.logits(hidden[start : start + SCORED_AT_ONCE])
                if scorer is not None:
                    scorer.take(logits)
            return self._decoder.logits(hidden[:sampled])

    def adapter_desk(self, settings: EngineSettings) -> Desk:
        """Where sequences wait for adapters to this model."""

        def loaded(blueprint: Blueprint) -> Adapter:
            adapter = self.adapter(blueprint)
            if self._leads:
                kept = [each.digest for each in desk.loaded.values()]
                self.ranks.tell(Adapt(str(blueprint.directory), adapter.digest, kept))
            return adapter

        desk = open_desk(settings, self.spec, self.dtype, loaded)
        return desk

    def adapter(self, blueprint: Blueprint) -> Adapter:
        """Read an adapter, or this rank's part of it. Raises AdapterInvalid."""
        return load_adapter(
            blueprint, self.dtype, self.device, self._linear(unpacked), partial(narrow, self.shard)
        )

    def _assembled(self, weights: Weights, settings: EngineSettings, library: Library | None) -> Decoder:
        fetch = partial(weights.fetch, dtype=self.dtype, device=self.device)
        lend = partial(weights.lend, dtype=self.dtype, device=self.device)
        packed = partial(weights.layer, dtype=self.dtype, device=self.device)
        make = self._linear(linear)
        ops = elementwise(self._attention, library, uniform=self.deterministic)
        inner = quantizing(settings.quantize, weights.stored_as, make, unpack=self.deterministic)
        # Deterministic mode knows dense layers only: weights are unpacked on load then.
        packed = none_is if self.deterministic else packed
        across = self.ranks.across(self.shard)
        head = self._head(settings, make) if weights.stored_as is None else make
        return Decoder(self.shard.spec, fetch, ops, inner, packed, head=head, across=across, lend=lend)

    def _head(self, settings: EngineSettings, make: Make) -> Make:
        """Weights alone in int8, so that logits are nearly as exact; where that is read faster."""
        ours = in_use()
        fast = ours is not None and ours.int8_ways and self.dtype == torch.bfloat16
        if settings.quantize != "int8" or not settings.quantize_head or not fast or self.deterministic:
            return make
        return quantizing("eetq", None, make, unpack=False)

    def _made_ours(self, fallback: Fallback, settings: EngineSettings) -> Fallback:
        """Tried, then with our linears. Raises ModelInvalid if our attention is not all that it needs."""
        try_out(fallback, self._attention, self.room.use, exact=self._numbers is None)
        fallback.rebuild(quantizing(settings.quantize, None, linear, unpack=False), head=linear)
        return fallback

    def _linear(self, make: Make) -> Make:
        return partial(invariant, make) if self.deterministic else make

    def _new_graphs(self, settings: EngineSettings, model: Weights | Fallback) -> Graphs | None:
        """Where launches can be recorded: experts choose their rows on the host, and what transformers' code
        does nobody knows."""
        able = self._attention.graphs and self.spec.moe is None and not isinstance(model, Fallback)
        if self.device.type != "cuda" or not settings.cuda_graphs or not able or self.ranks.size > 1:
            return None
        return self.graphs_over(settings.max_num_seqs)

    def graphs_over(self, rows: int, record: Record | None = None) -> Graphs:
        """For steps of up to ``rows`` sequences; ``record`` instead of CUDA graphs."""
        return Graphs(
            lambda batch: self._decoder.forward(batch, self._attention),
            rows=rows,
            longest=self.max_model_len,
            block_size=self.block_size,
            device=self.device,
            record=record,
        )

    def _warm_up(self, settings: EngineSettings) -> int:
        """Run the largest step this engine can be asked for, then count the blocks that fit beside it.

        A small step does where memory is plentiful: the largest takes as long as the weights to load.
        """
        tokens, seqs = self.step_tokens, settings.max_num_seqs
        known = self.ranks.size == 1 and not isinstance(self._decoder, Fallback)
        if known and is_plentiful(self.device, self._ample_step_bytes(seqs)):
            tokens, seqs = min(tokens, SMALL_STEP_TOKENS), 1
        work = _largest_step(tokens, seqs, self.max_model_len, self.block_size)
        try:
            self.room.use(1 + max(max(piece.seq.block_table) for piece in work))
            self.forward(_WarmUp(work))
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            raise Misconfigured(
                f"a step of {self.step_tokens} tokens does not fit this device's memory; "
                f"lower max_batch_prefill_tokens or max_num_seqs: {exc}"
            ) from exc
        blocks, per_sequence = (
            self.room.fill(settings, self.max_model_len),
            -(-self.max_model_len // self.block_size),
        )
        if blocks < per_sequence:  # one sequence alone must fit, or it could never finish
            self.max_model_len, self.length_knob = blocks * self.block_size, "max_batch_total_tokens"
            log.warning(
                "runner.context_shortened", extra={"max_model_len": self.max_model_len, "blocks": blocks}
            )
        return blocks

    def _ample_step_bytes(self, seqs: int) -> int:
        """Several times what the largest step has been seen to take: eight copies in fp32 of all rows that a
        layer and the head make."""
        spec = self.spec
        inner = spec.intermediate_size
        if spec.moe:
            inner += spec.moe.chosen * spec.moe.intermediate_size
        widths = spec.hidden_size + spec.q_size + 2 * spec.kv_size + 2 * inner
        logits = min(seqs, self.step_tokens) * spec.vocab_size
        return 8 * torch.float32.itemsize * (self.step_tokens * widths + logits)

    def _summary(self) -> dict[str, object]:
        return {
            "family": self.spec.family,
            "dtype": self.dtype_name,
            "device": self.device.type,
            "attention": self.attention,
            "kv_cache_dtype": self._numbers.name if self._numbers else self.dtype_name,
            "num_blocks": self.num_blocks,
            "kv_cache_tokens": self.num_blocks * self.block_size,
            "kv_cache_bytes": self.num_blocks * self.room.block_bytes,
            "max_model_len": self.max_model_len,
            "ranks": self.ranks.size,
            "load_s": self.load_s,
        }

    @contextmanager
    def _timed(self, phase: str) -> Generator[None]:
        started = time.monotonic()
        yield
        self.load_s[phase] = time.monotonic() - started


@dataclass(frozen=True, slots=True)
class _WarmUp:
    work: list[Feed]


def _largest_step(budget: int, max_seqs: int, max_len: int, block_size: int) -> list[Feed]:
    """``budget`` tokens over as many sequences as may run: the longest prefill, and a logits row of each.

    All share the same blocks: what is computed does not matter, only how much.
    """
    counts = [1] * min(max_seqs, budget)
    left = budget - len(counts)
    for i in range(len(counts)):
        more = min(left, max_len - 1)
        counts[i], left = counts[i] + more, left - more
    return [Feed(Fed([0] * n, range(-(-n // block_size))), n) for n in counts]


def _threads(settings: EngineSettings, ranks: Ranks) -> int | None:
    """Of this rank: all ranks of a CPU together have what one would. None: as torch chooses."""
    if ranks.size == 1:
        return settings.num_threads
    return max(1, (settings.num_threads or torch.get_num_threads()) // ranks.size)


def _device(settings: EngineSettings, ranks: Ranks) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Misconfigured(
            "device=cuda, and torch sees no CUDA device; use device=auto or install a CUDA torch"
        )
    if settings.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if ranks.size > 1:
        if ranks.size > torch.cuda.device_count():
            raise Misconfigured(
                f"tensor_parallel_size is {ranks.size}, and torch sees {torch.cuda.device_count()} CUDA "
                "devices; lower it, or use device=cpu"
            )
        torch.cuda.set_device(ranks.rank)
    return torch.device("cuda", torch.cuda.current_device())


def _deterministic(settings: EngineSettings, device: torch.device) -> bool:
    if settings.deterministic and device.type != "cpu":
        raise Misconfigured("deterministic mode runs on CPUs only so far; use device=cpu, or leave it off")
    return settings.deterministic


def _dtype(settings: EngineSettings, device: torch.device) -> torch.dtype:
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32  # pyright: ignore


def _max_model_len(settings: EngineSettings, spec: ModelSpec) -> int:
    wanted = settings.max_total_tokens or spec.max_positions
    if wanted > spec.max_positions:
        raise Misconfigured(
            f"max_total_tokens is {wanted:,} and the model has {spec.max_positions:,} positions; lower it"
        )
    return wanted


def _step_tokens(settings: EngineSettings, device: torch.device) -> int:
    """The token budget of a step; at least one token for each sequence that may run."""
    if settings.max_batch_prefill_tokens:
        return settings.max_batch_prefill_tokens
    return max(settings.max_num_seqs, CUDA_STEP_TOKENS if device.type == "cuda" else CPU_STEP_TOKENS)
