"""adapter_config.json of a PEFT adapter: which modules it changes, by which rank and scale.

What changes the arithmetic and is not done here is refused by name, and so is every field this file has never
heard of, unless it is switched off: an adapter either means what it meant in training or is not loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ...schemas.errors import AdapterInvalid

CONFIG_FILE = "adapter_config.json"
_DESCRIBES = frozenset[str](
    """auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config inference_mode
    loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size revision
    runtime_config task_type""".split()  # noqa: SIM905  (a list of fifteen lines reads no better)
)
"""What training did, or where the adapter comes from: it changes nothing in what was saved."""
_MEANS = frozenset[str](
    """alpha_pattern bias exclude_modules init_lora_weights layers_pattern layers_to_transform lora_alpha
    peft_type r rank_pattern target_modules use_rslora""".split()  # noqa: SIM905
)
_KEEPS_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base model's weights alone. The others (pissa, olora, corda,
lora_ga, loftq …) move part of the base into the adapter: beside the original base it would count twice."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What a config says of a module, named as in ``model.layers.0.self_attn.q_proj``."""

    targets: Callable[[str], bool]
    rank: Callable[[str], int]
    scale: Callable[[str], float]


def load_config(directory: Path, layers: str = "layers") -> AdapterConfig:
    """Read and check ``directory``'s config. Raises AdapterInvalid naming the field.

    ``layers``: what the model calls its list of layers.
    """
    path = directory / CONFIG_FILE
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as exc:
        raise AdapterInvalid(f"{path} cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise AdapterInvalid(f"{path} is not a JSON object")
    return _Parser(cast("dict[str, Any]", found), path, layers).config()


class _Parser:
    def __init__(self, values: dict[str, Any], path: Path, layers: str) -> None:
        self._values, self._path, self._layers = values, path, layers

    def config(self) -> AdapterConfig:
        self._refuse_what_we_lack()
        ranks, alphas = self._pattern("rank_pattern"), self._pattern("alpha_pattern")
        default_rank, default_alpha = self._number("r", least=1), self._number("lora_alpha")
        stabilised = bool(self._values.get("use_rslora"))

        def rank(module: str) -> int:
            return int(_looked_up(ranks, module, default_rank))

        def scale(module: str) -> float:
            alpha = _looked_up(alphas, module, default_alpha)
            return alpha / (rank(module) ** 0.5 if stabilised else rank(module))

        return AdapterConfig(self._targets(), rank, scale)

    def _refuse_what_we_lack(self) -> None:
        values = self._values
        if values.get("peft_type") != "LORA":
            raise self._invalid(f"peft_type is {values.get('peft_type')!r}; LORA is supported")
        if values.get("bias", "none") != "none":
            raise self._invalid(f"bias is {values['bias']!r}: trained biases are not supported, none is")
        pattern = values.get("layers_pattern")
        if pattern not in (None, [], "", self._layers, [self._layers]):
            raise self._invalid(f"layers_pattern is {pattern!r}; this model calls them {self._layers}")
        start = values.get("init_lora_weights", True)
        if start not in _KEEPS_THE_BASE:
            raise self._invalid(
                f"init_lora_weights {start!r} changes the base model; convert the adapter (PEFT's "
                "save_pretrained with path_initial_model_for_weight_conversion) and load that"
            )
        for name, value in values.items():
            if name not in _DESCRIBES | _MEANS and value not in (None, False, [], {}, ""):
                raise self._invalid(f"{name} is not supported (it is {str(value)[:60]!r})")

    def _targets(self) -> Callable[[str], bool]:
        wanted, unwanted = self._matcher("target_modules"), self._matcher("exclude_modules")
        if wanted is None:
            raise self._invalid("target_modules is missing")
        layers: Any = self._values.get("layers_to_transform")
        numbered = re.compile(rf"(?:^|\.){self._layers}\.(\d+)\.")
        chosen: list[Any] = [layers] if isinstance(layers, int) else layers or []

        def targets(module: str) -> bool:
            layer = numbered.search(module)
            if chosen and (layer is None or int(layer[1]) not in chosen):
                return False
            return wanted(module) and not (unwanted and unwanted(module))

        return targets

    def _matcher(self, field: str) -> Callable[[str], bool] | None:
        """A list of names or endings, a regular expression for the whole name, or "all-linear"."""
        value: Any = self._values.get(field)
        if not value:
            return None
        if isinstance(value, str):
            if value == "all-linear":
                return lambda module: not module.endswith("lm_head")
            whole = self._regex(field, value).fullmatch
            return lambda module: whole(module) is not None
        if not isinstance(value, list) or not all(isinstance(each, str) for each in cast("list[Any]", value)):
            raise self._invalid(f"{field} is neither a string nor a list of strings")
        names = cast("list[str]", value)
        return lambda module: any(module == name or module.endswith("." + name) for name in names)

    def _pattern(self, field: str) -> list[tuple[re.Pattern[str], float]]:
        found: Any = self._values.get(field) or {}
        if not isinstance(found, dict):
            raise self._invalid(f"{field} is not an object")
        numbers = cast("Mapping[str, Any]", found)
        return [
            (self._regex(field, rf"(.*\.)?({key})$"), self._is_number(f"{field}[{key!r}]", value, 1))
            for key, value in numbers.items()
        ]

    def _regex(self, field: str, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as exc:
            raise self._invalid(f"{field} is not a regular expression: {exc}") from exc

    def _number(self, name: str, least: float = 0) -> float:
        return self._is_number(name, self._values.get(name, 8), least)

    def _is_number(self, name: str, value: Any, least: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e9:
            raise self._invalid(f"{name} is {value!r}, expected a number of at least {least:g}")
        return value

    def _invalid(self, problem: str) -> AdapterInvalid:
        return AdapterInvalid(f"{self._path}: {problem}")


def _looked_up(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    """The first pattern's number that matches the module's name or its end."""
    return next((number for pattern, number in patterns if pattern.match(module)), default)
