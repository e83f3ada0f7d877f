"""GPTQ checkpoints (Frantar et al. 2022), as AutoGPTQ and GPTQModel write them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..models.config import Config
from ..weights import Stored
from .grouped import Grouped, column_order, unpack_bits
from .method import INT32, Site, divided

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}
"""checkpoint_format → what is to be added to the stored zeros."""


class Gptq:
    """Codes packed along the inputs, zeros along the outputs; ``g_idx`` is each input's group (act-order)."""

    name = "gptq"
    marks = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, _model: Config, config: Config) -> None:
        self._config = config
        self._bits = config.integer("bits")
        if self._bits not in BITS:
            raise config.invalid(f"bits is {self._bits}; {', '.join(map(str, BITS))} are supported")
        form = config.text("checkpoint_format", config.values.get("format") or "gptq")
        if form not in FORMATS or config.boolean("is_marlin_format", False):
            raise config.invalid(f"checkpoint_format {form!r} is not supported; {', '.join(FORMATS)} are")
        if config.values.get("dynamic"):
            raise config.invalid("settings for single modules (dynamic) are not supported")
        self._more = FORMATS[form]
        self._group = config.integer("group_size", -1, least=-1)
        self._act_order = config.boolean("desc_act", False)

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        group = site.columns if self._group < 1 else self._group
        divided(self._config, site, inputs=group)
        whole = 32 if self._bits == 3 else 32 // self._bits  # three words hold 32 codes of 3 bits
        divided(self._config, site, inputs=whole, outputs=whole)
        groups = site.columns // group
        return {
            "qweight": Stored((site.columns * self._bits // 32, site.rows), INT32),
            "qzeros": Stored((groups, site.rows * self._bits // 32), INT32),
            "scales": Stored((groups, site.rows)),
            "g_idx": Stored((site.columns,), INT32, optional=not self._act_order),
        }

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Grouped:
        codes = unpack_bits(found["qweight"].T, self._bits, site.columns)
        stored = unpack_bits(found["qzeros"], self._bits, site.rows)
        zeros = (stored + self._more) & ((1 << self._bits) - 1)
        order = None
        if "g_idx" in found:
            order = column_order(self._config, f"{site.module}.g_idx", found["g_idx"], len(zeros))
        codes = codes if order is None else codes[:, order]
        return Grouped.of(self._bits, codes, found["scales"].T, zeros.T, order)
