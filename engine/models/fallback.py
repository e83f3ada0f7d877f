"""Models that we do not run ourselves: transformers' own code with our paged attention in it.

For every causal language model whose attention goes through transformers' attention interface. Slower than
our own decoder. transformers is imported here and nowhere else, when such a model is opened.
"""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...schemas.errors import GristmillError, Misconfigured, ModelInvalid
from ..attention.backend import Attention
from ..batch import Batch
from ..layers.invariant import Make
from ..layers.linear import Linear
from ..lora.rows import Adapted
from ..memory import is_out_of_memory
from ..quant.method import quantization
from ..settings import EngineSettings
from ..weights import HARMLESS_SUFFIXES, Checkpoint
from .config import Config
from .fallback_attention import (
    PAGED,
    SURVEYED,
    Answer,
    Asked,
    Paged,
    RowCounts,
    Survey,
    answered_by,
    register,
    spec_of,
)
from .families import FAMILIES

log = logging.getLogger(__name__)

NOBODY = Adapted()
EAGER = "eager"
SURVEY_TOKENS = 13
"""A number that nothing else in a model has."""
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
"""Linears that choose among experts: that is not done in fewer bits."""


class Fallback:
    """A decoder for the runner made of a model of transformers', and what the engine must know of it."""

    def __init__(
        self,
        directory: Path,
        config: Config,
        settings: EngineSettings,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises ModelInvalid (it cannot run here, and why), Misconfigured (a knob that it does not have)."""
        _refuse_knobs(settings)
        transformers = _import()
        register(transformers)
        self.config, self.dtype, self.device = config, dtype, device
        theirs, family = _find(transformers, directory, config)
        text = theirs.get_text_config(decoder=True)
        positions = _positions(config, text, settings.max_total_tokens)
        self.layer_types: list[str] = list(getattr(text, "layer_types", None) or ())
        self._model = _load(transformers, family, directory, config, dtype).to(device)
        self._body = _body(config, self._model)
        self._called: set[nn.Module] = set()
        with torch.inference_mode(), self._foreign():
            self._layers, hidden_size = self._survey(min(positions, settings.max_total_tokens or positions))
            self._head = _head_alone(self._model, self._body)
            vocab_size = self.logits(torch.zeros(1, hidden_size, dtype=dtype, device=device)).shape[-1]
        self.spec = spec_of(
            config,
            self._layers,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            positions=positions,
            eos=config.token_ids("eos_token_id") or _token_ids(text),
        )
        log.info("runner.fallback", extra={"model": family.__name__, "version": transformers.__version__})

    def forward(self, batch: Batch, attention: Attention, adapted: Adapted = NOBODY) -> Tensor:
        """Hidden states [wanted rows, hidden] of one step, for ``logits``; keys and values are cached."""
        assert not adapted.fed, "adapters are refused at start"
        attention.begin(batch)
        paged = Paged(self.spec, self._layers, attention, self.dtype)
        hidden = self._run(paged, batch.tokens, batch.positions)
        assert paged.calls == self.spec.num_layers, f"{paged.calls} layers of {self.spec.num_layers} attended"
        return hidden if batch.wanted is None else hidden[batch.wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocab], in the engine's dtype."""
        found: Any = self._head(input_ids=None, inputs_embeds=hidden[None], use_cache=False)
        return cast("Tensor", found.logits)[0].to(self.dtype)

    @property
    def has_sdpa(self) -> bool:
        return bool(self._model._supports_sdpa)

    def theirs(self, tokens: Sequence[int], implementation: str = EAGER) -> Tensor:
        """Logits [tokens, vocab] of one sequence, all of it done by transformers."""
        ids = torch.tensor([list(tokens)], device=self.device)
        with self._attending(implementation), self._foreign():
            found: Any = self._model(input_ids=ids, use_cache=False)
        return cast("Tensor", found.logits)[0]

    def rebuild(self, make: Make, head: Make) -> None:
        """Put layers that ``make`` makes in the place of the linears, and one of ``head``'s for the output.

        Only of linears that were called when the model was tried: others are read by name, or belong to
        experts that nobody chose.
        """
        done: dict[nn.Module, nn.Module] = {}
        body = self._model.get_submodule(self._body)
        for parent in list(body.modules()):
            for name, child in list(parent.named_children()):
                if child in self._called and child not in done:
                    done[child] = _Made(child, head if name in ROUTERS else make)
                if child in done:
                    setattr(parent, name, done[child])
        self._called.clear()  # or their weights would stay in memory beside what was made of them
        output = self._model.get_output_embeddings()
        if type(output) is nn.Linear:
            made = _Made(output, head)
            for model in (self._model, self._head):
                for name, child in list(model.named_children()):
                    if child is output:
                        setattr(model, name, made)

    def _survey(self, positions: int) -> tuple[list[Asked], int]:
        """What each layer asks of attention, and the size of hidden states, found by running the model."""
        tokens = torch.arange(SURVEY_TOKENS, device=self.device)
        counts = RowCounts(SURVEY_TOKENS)
        survey = Survey(self.config, positions, counts)

        def mark(module: nn.Module, given: Any, made: Any) -> None:
            del given, made
            self._called.add(module)

        hooks: list[Any] = []
        for each in self._model.get_submodule(self._body).modules():
            hooks += [each.register_forward_pre_hook(counts.enter), each.register_forward_hook(counts.leave)]
            if type(each) is nn.Linear:
                hooks.append(each.register_forward_hook(mark))
        try:
            with self._attending(SURVEYED), counts:
                hidden = self._run(survey, tokens, tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if not survey.layers:
            raise self.config.invalid(
                f"{type(self._model).__name__} does not use transformers' attention interface, so our paged "
                "attention cannot take the place of its own; serve this model elsewhere"
            )
        self._use(PAGED)
        return survey.layers, hidden.shape[-1]

    @contextmanager
    def _foreign(self) -> Generator[None]:
        """Within, whatever their code raises is a ModelInvalid: it may fail in any way."""
        try:
            yield
        except Exception as exc:
            if isinstance(exc, GristmillError) or is_out_of_memory(exc):
                raise
            raise self.config.invalid(
                f"{type(self._model).__name__} of transformers does not work without its own cache and masks "
                f"({_first_line(exc)}); serve this model elsewhere"
            ) from exc

    def _run(self, answer: Answer, tokens: Tensor, positions: Tensor) -> Tensor:
        """Hidden states [tokens, hidden]."""
        with answered_by(answer):
            body = self._model.get_submodule(self._body)
            found: Any = body(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        return cast("Tensor", found.last_hidden_state)[0]

    @contextmanager
    def _attending(self, implementation: str) -> Generator[None]:
        self._use(implementation)
        try:
            yield
        finally:
            self._use(PAGED)

    def _use(self, implementation: str) -> None:
        self._model.set_attn_implementation(implementation)


class _Made(nn.Module):
    """A layer of ours in the place of an ``nn.Linear``."""

    def __init__(self, linear: nn.Module, make: Make) -> None:
        super().__init__()
        assert isinstance(linear, nn.Linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.data  # pyright: ignore[reportUnnecessaryComparison]
        self._inner: Linear = make(linear.weight.data, bias)
        # Its dtype and device are asked for here and there. Empty: to multiply by it is an error.
        self.weight = torch.empty(0, dtype=linear.weight.dtype, device=linear.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        return self._inner(rows).view(*x.shape[:-1], self.out_features)


def is_ours(config: Config) -> bool:
    """Whether our own decoder runs this model type."""
    return config.text("model_type") in FAMILIES


def _refuse_knobs(settings: EngineSettings) -> None:
    lacking = {
        "deterministic": settings.deterministic,
        "lora_adapters": bool(settings.lora_adapters),
        "lora_dir": settings.lora_dir is not None,
        "tensor_parallel_size": settings.tensor_parallel_size > 1,
    }
    if named := [name for name, used in lacking.items() if used]:
        raise Misconfigured(
            f"{' and '.join(named)} cannot be had with a model that runs through transformers' code; leave "
            f"it out, or take one of our own model types: {', '.join(sorted(FAMILIES))}"
        )


def _import() -> Any:
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as exc:
        raise Misconfigured(
            f"this model type runs through transformers, which cannot be imported ({exc}); "
            "pip install 'gristmill[worker]'"
        ) from exc
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _find(transformers: Any, directory: Path, config: Config) -> tuple[Any, Any]:
    """transformers' config of the model, and the class that computes it. Raises ModelInvalid."""
    kind = config.text("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise config.invalid(_unknown(transformers, config, kind))
    if quantization(config) is not None:
        raise config.invalid(
            f"model type {kind!r} runs through transformers' code, for which checkpoints must be plain, and "
            "this one is quantized; take the one that is not, and --quantize to pack it on load"
        )
    try:
        theirs = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
        family = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(theirs), None)
    except Exception as exc:  # each config class has checks of its own
        raise config.invalid(f"transformers does not take this config: {_first_line(exc)}") from exc
    if isinstance(family, tuple):
        family = cast("tuple[Any, ...]", family)[0]
    if family is None or theirs.is_encoder_decoder:
        raise config.invalid(f"model type {kind!r} is no causal language model in transformers")
    if family._is_stateful:
        raise config.invalid(
            f"{family.__name__} keeps a state beside keys and values (state-space or linear attention), for "
            "which the engine has no place; serve this model elsewhere"
        )
    return theirs, family


def _unknown(transformers: Any, config: Config, kind: str) -> str:
    if config.values.get("auto_map"):
        return (
            f"model type {kind!r} comes with code of its own (auto_map), which is never run, and "
            f"transformers {transformers.__version__} has none for it; a later one may: pip install -U "
            "transformers, or look for the model in transformers' format"
        )
    return (
        f"model_type {kind!r} is not supported; our own are {', '.join(sorted(FAMILIES))}, and transformers "
        f"{transformers.__version__} does not know it either; a later one may: pip install -U transformers"
    )


def _load(transformers: Any, family: Any, directory: Path, config: Config, dtype: torch.dtype) -> Any:
    Checkpoint(directory)  # says which file is missing or cut short
    try:
        model, info = family.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=EAGER,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as exc:  # anything from a missing field to a wrong shape
        if is_out_of_memory(exc):
            raise
        raise config.invalid(
            f"transformers {transformers.__version__} cannot load it: {_first_line(exc)}"
        ) from exc
    unknown = {name for name in info["unexpected_keys"] if not name.endswith(HARMLESS_SUFFIXES)}
    for verb, names in (("lacks", info["missing_keys"]), ("holds unexpected", unknown)):
        if names:
            first, more = sorted(names)[:3], len(names) - 3
            raise ModelInvalid(
                f"{directory}: the checkpoint {verb} {', '.join(map(repr, first))}"
                + (f" and {more} more" if more > 0 else "")
            )
    model.requires_grad_(False)
    if hasattr(model.config, "output_router_logits"):
        model.config.output_router_logits = False  # only training wants them
    return model.eval()


def _body(config: Config, model: Any) -> str:
    """Name of the part of a model that makes hidden states of tokens."""
    names = [name for name, _ in model.named_children()]
    for name in (model.base_model_prefix, "model"):
        if name in names:
            return name
    raise config.invalid(f"{type(model).__name__} has no part that makes hidden states: {', '.join(names)}")


class _Handed:
    """What a body returns: hidden states. All else that heads may look for is None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        parts: tuple[Any, ...] = (self.last_hidden_state,)
        return parts[index]

    def __getattr__(self, name: str) -> None:
        return None


class _Given(nn.Module):
    """A body that hands through what it is given."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Handed:
        return _Handed(inputs_embeds)


def _head_alone(model: Any, body: str) -> Any:
    """The same model without its body: what it makes of hidden states, scaled and capped as it does that."""
    head = copy.copy(model)
    head._modules = {**model._modules, body: _Given()}
    return head


def _positions(config: Config, text: Any, wanted: int | None) -> int:
    """The longest sequence that the model takes; ``wanted`` where it does not say."""
    limit: int | None = getattr(text, "max_position_embeddings", None) or wanted
    if not limit:
        raise Misconfigured(f"{config.source} does not say how long a sequence may be; set max_total_tokens")
    ropes: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    by_layer = [cast("dict[str, Any]", each) for each in ropes.values() if isinstance(each, dict)]
    for rope in (ropes, *by_layer):
        if rope.get("rope_type") == "longrope":
            # transformers goes by the longest sequence of a batch: beyond this, neighbours would matter.
            original = rope.get("original_max_position_embeddings", limit)
            limit = min(limit, getattr(text, "original_max_position_embeddings", None) or original)
    return limit


def _token_ids(text: Any) -> tuple[int, ...]:
    found: Any = getattr(text, "eos_token_id", None)
    if isinstance(found, list | tuple):
        return tuple(cast("list[int]", found))
    return () if found is None else (found,)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines() or [""]
    return f"{type(exc).__name__}: {lines[0][:300]}"
