"""AWQ checkpoints (Lin et al. 2023) in the ``gemm`` layout: 4 bits, scales and zeros by group of inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..models.config import Config
from ..weights import Stored
from .grouped import Grouped
from .method import INT32, Site, divided

COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word, counted from the low end, is output ``8 * word + COLUMN_OF_NIBBLE[i]``."""
LAYOUTS = ("gemm",)


class Awq:
    """Raises ModelInvalid for the gemv layouts, whose words hold inputs instead of outputs."""

    name = "awq"
    marks = ("qweight", "qzeros", "scales")

    def __init__(self, _model: Config, config: Config) -> None:
        self._config = config
        bits = config.integer("bits", config.values.get("w_bit"))
        if bits != 4:
            raise config.invalid(f"bits is {bits}; 4 is supported")
        layout = config.text("version", config.values.get("checkpoint_format") or "gemm").lower()
        if layout not in LAYOUTS:
            raise config.invalid(f"version is {layout!r}; {', '.join(LAYOUTS)} is supported")
        self._group = config.integer("group_size", config.values.get("q_group_size"), least=-1)

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        group = site.columns if self._group < 1 else self._group
        divided(self._config, site, inputs=group, outputs=8)
        groups = site.columns // group
        return {
            "qweight": Stored((site.columns, site.rows // 8), INT32),
            "qzeros": Stored((groups, site.rows // 8), INT32),
            "scales": Stored((groups, site.rows)),
        }

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Grouped:
        codes, zeros = _outputs(found["qweight"], site.rows), _outputs(found["qzeros"], site.rows)
        return Grouped.of(4, codes.T, found["scales"].T, zeros.T)


def _outputs(words: Tensor, outputs: int) -> Tensor:
    """int32 [n, outputs / 8] → codes [n, outputs]."""
    shifts = [4 * COLUMN_OF_NIBBLE.index(column) for column in range(8)]
    fields = (words[..., None] >> torch.tensor(shifts, device=words.device)) & 15
    return fields.view(len(words), outputs)
