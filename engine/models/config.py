"""config.json, read with care: every missing or odd field is a ModelInvalid that names it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ...schemas.errors import ModelInvalid, ModelNotFound
from .spec import RopeSpec

_REQUIRED = object()

ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
    "num_experts": ("num_local_experts",),
}
"""One name for what families call differently."""


class Config:
    """A parsed config.json with checked access."""

    def __init__(self, values: dict[str, Any], source: str, defaults: dict[str, Any] | None = None) -> None:
        self.values, self.source, self.defaults = values, source, defaults or {}

    @classmethod
    def load(cls, directory: Path) -> Config:
        """Read ``directory/config.json`` and the end tokens of generation_config.json.

        Raises ModelNotFound (no directory), ModelInvalid (no config, or not a JSON object).
        """
        if not directory.is_dir():
            raise ModelNotFound(f"model directory {str(directory)!r} does not exist")
        values = _read_object(directory / "config.json")
        generation = directory / "generation_config.json"
        if generation.exists():
            eos = _read_object(generation).get("eos_token_id")
            if eos is not None:
                values["eos_token_id"] = eos
        return cls(values, str(directory / "config.json"))

    def invalid(self, problem: str) -> ModelInvalid:
        return ModelInvalid(f"{self.source}: {problem}")

    def integer(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.invalid(f"{name} is {value!r}, expected an integer of at least {least}")
        return value

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.invalid(f"{name} is {value!r}, expected a number")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.invalid(f"{name} is {value!r}, expected true or false")
        return value

    def text(self, name: str, default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.invalid(f"{name} is {value!r}, expected a string")
        return value

    def optional_integer(self, name: str, default: int | None = None) -> int | None:
        """Explicit null and absence differ: absence takes the family's default."""
        if name in self.values and self.values[name] is None:
            return None
        return None if name not in self.values and default is None else self.integer(name, default)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A field that is an id, a list of ids, or null."""
        value = self.values.get(name)
        ids: list[Any] = (
            [] if value is None else cast("list[Any]", value) if isinstance(value, list) else [value]
        )
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.invalid(f"{name} is {value!r}, expected token ids")
        return tuple(ids)

    def otherwise(self, **defaults: Any) -> Config:
        """The same config; a field that it does not have, or has as null, takes its value from here."""
        return Config(self.values, self.source, {**self.defaults, **defaults})

    def only(self, name: str, *values: Any) -> None:
        """Raise ModelInvalid unless the field, if there is one, is among ``values`` or null."""
        found = self._get(name, None)
        if found is not None and found not in values:
            known = " or ".join(json.dumps(value) for value in values)
            raise self.invalid(f"{name} is {found!r}, which is not supported; {known} is")

    def kinds(self, name: str, known: Iterable[str], count: int) -> list[str] | None:
        """A word for each layer, or None where the field is absent."""
        found: Any = self.values.get(name)
        if found is None:
            return None
        words = cast("list[Any]", found) if isinstance(found, list) else []
        if len(words) != count or not all(word in known for word in words):
            raise self.invalid(f"{name} must be {count} of {', '.join(known)}")
        return words

    def numbers(self, name: str) -> tuple[float, ...]:
        found = self._get(name, _REQUIRED)
        values: list[Any] = cast("list[Any]", found) if isinstance(found, list) else [found]
        if not all(isinstance(value, int | float) for value in values):
            raise self.invalid(f"{name} is {found!r}, expected a list of numbers")
        return tuple(float(value) for value in values)

    def part(self, name: str) -> Config | None:
        """An object within the config; None where it is absent, null or empty."""
        raw: Any = self.values.get(name)
        if not raw:
            return None
        if not isinstance(raw, dict):
            raise self.invalid(f"{name} is {raw!r}, expected an object")
        return Config(cast("dict[str, Any]", raw), f"{self.source}: {name}")

    def rope(self, head_dim: int, max_positions: int, layers: str | None = None) -> RopeSpec:
        """Rotary parameters: ``rope_parameters`` (current) or ``rope_theta`` + ``rope_scaling`` (older).

        ``layers``: the kind of layer they are for, where the config gives them for each.
        """
        rope = self.part("rope_parameters") or self.part("rope_scaling")
        if rope and layers and layers in rope.values:
            rope = rope.part(layers)
        rope = rope or Config({}, self.source)
        share = rope.number("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        rotated = int(head_dim * share)
        if rotated % 2 or not 0 < rotated <= head_dim or head_dim % 2:
            raise self.invalid(
                f"head_dim is {head_dim}, of which {rotated} are rotated; rotary embedding needs both even"
            )
        theta = rope.number("rope_theta", self.number("rope_theta", 10_000.0))
        plain = RopeSpec(theta, rotary_dim=rotated if rotated < head_dim else None)
        kind = rope.text("rope_type", rope.values.get("type") or "default")
        if kind not in _SCALINGS:
            raise self.invalid(f"rope type {kind!r} is not supported; {', '.join(_SCALINGS)} are")
        original = rope.integer("original_max_position_embeddings", max_positions)
        original = self.integer("original_max_position_embeddings", original)  # Phi-3's counts more
        spec = _SCALINGS[kind](rope, plain, original, max_positions)
        for name, factors in (("short_factor", spec.short_factors), ("long_factor", spec.long_factors)):
            if spec.kind == "longrope" and len(factors) != rotated // 2:
                raise rope.invalid(f"{name} has {len(factors)} numbers, and {rotated // 2} pairs are rotated")
        return spec

    def _get(self, name: str, default: Any) -> Any:
        for known in (name, *ALIASES.get(name, ())):
            if self.values.get(known) is not None:
                return self.values[known]
        value = self.defaults.get(name, default)
        if value is _REQUIRED:
            raise self.invalid(f"{name} is missing")
        return value


def _default(rope: Config, plain: RopeSpec, original: int, max_positions: int) -> RopeSpec:
    """Also "dynamic": that changes frequencies beyond max_position_embeddings, where we do not go."""
    del rope, original, max_positions
    return plain


def _linear(rope: Config, plain: RopeSpec, original: int, max_positions: int) -> RopeSpec:
    del original, max_positions
    return replace(plain, kind="linear", factor=rope.number("factor"))


def _llama3(rope: Config, plain: RopeSpec, original: int, max_positions: int) -> RopeSpec:
    del max_positions
    return replace(
        plain,
        kind="llama3",
        factor=rope.number("factor"),
        original_max_positions=original,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )


def _longrope(rope: Config, plain: RopeSpec, original: int, max_positions: int) -> RopeSpec:
    """transformers chooses the factors by a sequence's length so far. Here the longest that the engine takes
    decides, so that what is in the cache stays true when a sequence grows."""
    factor = rope.number("factor", max_positions / original)
    worked_out = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return replace(
        plain,
        kind="longrope",
        original_max_positions=original,
        short_factors=rope.numbers("short_factor"),
        long_factors=rope.numbers("long_factor"),
        attention_factor=rope.number("attention_factor", worked_out),
    )


def _yarn(rope: Config, plain: RopeSpec, original: int, max_positions: int) -> RopeSpec:
    factor = rope.number("factor", max_positions / original)
    if rope.values.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    else:
        mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
        if mscale and all_dim:
            attention = _mscale(factor, mscale) / _mscale(factor, all_dim)
        else:
            attention = _mscale(factor, 1.0)
    return replace(
        plain,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.boolean("truncate", True),
        attention_factor=attention,
    )


_SCALINGS: dict[str, Callable[[Config, RopeSpec, int, int], RopeSpec]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature, Peng et al. 2023, section 3.4."""
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise ModelInvalid(f"{path} is missing: not a model directory, or a half-written one") from exc
    except (OSError, ValueError) as exc:
        raise ModelInvalid(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(values, dict):
        raise ModelInvalid(f"{path} holds {type(values).__name__}, expected an object")
    return cast("dict[str, Any]", values)
