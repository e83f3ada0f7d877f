"""The attention interface of transformers: what each layer of a model asks of it, and our answer.

transformers calls one function for every attention layer, with queries and keys that are rotated already. It
is registered once; who answers is decided by the step that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..attention.backend import Attention
from .config import Config
from .spec import ModelSpec

PAGED, SURVEYED = "gristmill_paged", "gristmill_surveyed"
"""Attention implementations by the names they are registered under. For the first transformers makes no
masks, for nobody has registered how; for the second each mask is one of ``Survey``'s tickets."""

WITHOUT_EFFECT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "dropout",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)
"""What models hand to attention and we have considered: everything else that is not None is refused."""
NAMED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "sparse attention over chosen keys",
    "block_indices": "sparse attention over chosen blocks",
    "position_bias": "a bias by position",
}
ROWS_PROBED = 16

Visible = Callable[[Any, Any, Any, Any], Any]
"""(batch, head, query position, key position), as broadcast tensors → whether the query sees the key."""


class Answer(Protocol):
    """Whoever answers the calls of one forward pass."""

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, asked: dict[str, Any]
    ) -> Tensor:
        """q, k, v: [1, heads, tokens, dim]. Returns [1, tokens, heads, dim of v]."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What one layer wants."""

    heads: int
    kv_heads: int
    dim: int
    """Of a query or key."""
    value_dim: int
    scale: float
    softcap: float | None
    window: int | None


_answer: ContextVar[Answer] = ContextVar("answer")


@contextmanager
def answered_by(answer: Answer) -> Generator[None]:
    """Within, this is who the models of this thread ask."""
    token = _answer.set(answer)
    try:
        yield
    finally:
        _answer.reset(token)


def register(transformers: Any) -> None:
    """Make our two implementations known. Doing it again changes nothing."""
    transformers.AttentionInterface.register(PAGED, _attend)
    transformers.AttentionInterface.register(SURVEYED, _attend)
    transformers.AttentionMaskInterface.register(SURVEYED, _mask)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    return _answer.get().attend(module, query, key, value, attention_mask, asked), None


def _mask(*, mask_function: Visible, **shape: Any) -> Tensor:
    answer = _answer.get()
    assert isinstance(answer, Survey), "masks are asked for in a survey only"
    return answer.ticket(mask_function, shape)


class Paged:
    """Answers the calls of one step with paged attention, the first call being that of the first layer."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[Asked], attention: Attention, dtype: torch.dtype
    ) -> None:
        self._spec, self._layers, self._attention, self._dtype = spec, layers, attention, dtype
        self.calls = 0

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, asked: dict[str, Any]
    ) -> Tensor:
        del module, mask, asked
        layer, spec = self._layers[self.calls], self._spec
        if layer.scale != spec.scale:
            q = q * (layer.scale / spec.scale)
        rows = [_rows(x, spec.head_dim) for x in (q, k, v)]
        qkv = torch.cat(rows, 1).to(self._dtype).flatten(1)
        out = self._attention.attend(self.calls, qkv, None, None)
        self.calls += 1
        return out.view(1, len(qkv), spec.num_heads, spec.head_dim)[..., : layer.value_dim]


def _rows(x: Tensor, dim: int) -> Tensor:
    """[1, heads, tokens, d] → [tokens, heads, dim]; zeros behind d change neither scores nor sums."""
    return nnf.pad(x[0].transpose(0, 1), (0, dim - x.shape[-1]))


class RowCounts(TorchFunctionMode):
    """Within, notes the modules that number the rows of a step themselves (``torch.arange`` of so many).

    Rows are those of many sequences: who takes their numbers for positions is wrong, perhaps only far on.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows
        self._running: list[nn.Module] = []
        self.modules: set[nn.Module] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.arange and self._rows in args:
            self.modules.update(self._running)
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, given: Any) -> None:
        del given
        self._running.append(module)

    def leave(self, module: nn.Module, given: Any, made: Any) -> None:
        del given, made
        assert self._running.pop() is module, "modules do not end in the order they began in"


class Survey:
    """Answers with zeros, and writes down what was asked. Raises ModelInvalid for what we cannot give."""

    def __init__(self, config: Config, positions: int, counts: RowCounts) -> None:
        """``positions``: the longest sequence that will run; masks must be ours up to there."""
        self._config, self._positions, self._counts = config, positions, counts
        self._tickets: dict[int, tuple[Tensor, Visible]] = {}
        self.layers: list[Asked] = []

    def ticket(self, visible: Visible, shape: dict[str, Any]) -> Tensor:
        """What a model takes for its mask, by which ``attend`` knows the rule behind it."""
        size = (shape["batch_size"], 1, shape["q_length"], shape["kv_length"])
        made = torch.zeros(size, dtype=shape["dtype"], device=shape["device"])
        self._tickets[made.data_ptr()] = made, visible
        return made

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, asked: dict[str, Any]
    ) -> Tensor:
        where = f"{type(module).__name__} (attention layer {len(self.layers)})"
        for name in sorted(asked.keys() - WITHOUT_EFFECT):
            if asked[name] is not None:
                raise self._refused(where, NAMED.get(name, f"attention with {name!r}"))
        if q.shape[2] != k.shape[2] or q.shape[0] != 1:
            raise self._refused(where, "attention to something else than its own tokens")
        if module in self._counts.modules:
            raise self._refused(where, "positions by the row of a step")
        scale = asked.get("scaling")
        self.layers.append(
            Asked(
                heads=q.shape[1],
                kv_heads=k.shape[1],
                dim=q.shape[3],
                value_dim=v.shape[3],
                scale=q.shape[3] ** -0.5 if scale is None else float(scale),
                softcap=asked.get("softcap") or None,
                window=self._window(where, module, mask, asked),
            )
        )
        return v.new_zeros(1, q.shape[2], q.shape[1], v.shape[3])

    def _window(self, where: str, module: Any, mask: Tensor | None, asked: dict[str, Any]) -> int | None:
        if mask is None:
            causal = asked.get("is_causal")
            if not (getattr(module, "is_causal", True) if causal is None else causal):
                raise self._refused(where, "attention to what comes after")
            window = asked.get("sliding_window")
        elif (known := self._tickets.get(mask.data_ptr())) is not None:
            window = self._probed(where, known[1], mask.device)
        else:
            raise self._refused(where, "a mask that it makes itself")
        return None if window is None or window >= self._positions else int(window)

    def _probed(self, where: str, visible: Visible, device: torch.device) -> int:
        """How many keys the last query sees; all others must see as many, or all there are."""
        last = self._positions - 1
        keys, zero = torch.arange(last + 1, device=device), torch.zeros((), dtype=torch.long, device=device)
        rows = {round(last * i / ROWS_PROBED) for i in range(ROWS_PROBED + 1)}
        window: int | None = None
        for row in sorted(rows, reverse=True):
            try:
                seen = torch.as_tensor(visible(zero, zero, keys[row], keys)).expand(len(keys))
            except (IndexError, RuntimeError, TypeError) as exc:  # it looks into this batch's tensors
                raise self._refused(where, "a mask that depends on more than positions") from exc
            window = window or int(seen.sum())
            if not torch.equal(seen, (keys <= row) & (keys > row - window)):
                raise self._refused(
                    where,
                    "a mask that is neither causal nor a sliding window",
                    "; if it attends in chunks, set max_total_tokens to at most a chunk's tokens, or",
                )
        return window or 1

    def _refused(self, where: str, what: str, more: str = "") -> Exception:
        return self._config.invalid(
            f"{where} wants {what}, which our attention does not have{more or ';'} serve this model elsewhere"
        )


def spec_of(
    config: Config,
    layers: Sequence[Asked],
    *,
    vocab_size: int,
    hidden_size: int,
    positions: int,
    eos: tuple[int, ...],
) -> ModelSpec:
    """What the engine must know of a model of transformers', for one shape of KV blocks.

    Heads are as wide as the widest layer's. Nothing is rotated: that has happened when attention is asked.
    """
    heads = {(layer.heads, layer.kv_heads) for layer in layers}
    caps = {layer.softcap for layer in layers}
    if len(heads) > 1:
        raise config.invalid(
            f"its layers have different numbers of (heads, key heads): {sorted(heads)}; one is supported"
        )
    if len(caps) > 1:
        raise config.invalid(f"its layers cap scores at {caps}; one cap for all is supported")
    return ModelSpec(
        family=config.text("model_type"),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=len(layers),
        num_heads=layers[0].heads,
        num_kv_heads=layers[0].kv_heads,
        head_dim=max(max(layer.dim, layer.value_dim) for layer in layers),
        intermediate_size=0,
        norm_eps=0.0,
        max_positions=positions,
        tied_embeddings=False,
        ropes=(None,) * len(layers),
        windows=tuple(layer.window for layer in layers),
        eos_token_ids=eos,
        attention_scale=layers[0].scale,
        softcap=layers[0].softcap,
    )
