"""config.json, read with care: every missing or odd field is a ModelInvalid that names it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

from ...schemas.errors import ModelInvalid, ModelNotFound
from .spec import RopeSpec

_REQUIRED = object()


class Config:
    """A parsed config.json with checked access."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = values, source

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

    def rope(self, head_dim: int, max_positions: int) -> RopeSpec:
        """Rotary parameters: ``rope_parameters`` (current) or ``rope_theta`` + ``rope_scaling`` (older)."""
        raw: Any = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(raw, dict):
            raise self.invalid(f"rope parameters are {raw!r}, expected an object")
        rope = Config(cast("dict[str, Any]", raw), f"{self.source}: rope parameters")
        if (
            rope.number("partial_rotary_factor", 1.0) != 1.0
            or self.number("partial_rotary_factor", 1.0) != 1.0
        ):
            raise self.invalid("partial_rotary_factor is not supported for this model type")
        if head_dim % 2:
            raise self.invalid(f"head_dim is {head_dim}, and rotary embedding needs it even")
        theta = rope.number("rope_theta", self.values.get("rope_theta") or 10_000.0)
        kind = rope.text("rope_type", rope.values.get("type") or "default")
        if kind == "default":
            return RopeSpec(theta)
        if kind == "linear":
            return RopeSpec(theta, "linear", factor=rope.number("factor"))
        original = rope.integer(
            "original_max_position_embeddings",
            self.values.get("original_max_position_embeddings") or max_positions,
        )
        if kind == "llama3":
            return RopeSpec(
                theta,
                "llama3",
                factor=rope.number("factor"),
                original_max_positions=original,
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
            )
        if kind == "yarn":
            return _yarn(rope, theta, original, max_positions)
        raise self.invalid(f"rope type {kind!r} is not supported; default, linear, llama3 and yarn are")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _REQUIRED:
                raise self.invalid(f"{name} is missing")
            return default
        return value


def _yarn(rope: Config, theta: float, original: int, max_positions: int) -> RopeSpec:
    factor = rope.number("factor", max_positions / original)
    if rope.values.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    else:
        mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
        if mscale and all_dim:
            attention = _mscale(factor, mscale) / _mscale(factor, all_dim)
        else:
            attention = _mscale(factor, 1.0)
    return RopeSpec(
        theta,
        "yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.boolean("truncate", True),
        attention_factor=attention,
    )


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
