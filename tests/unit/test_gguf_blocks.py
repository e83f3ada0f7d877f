"""Every quantized layout of GGUF is unpacked to the numbers that the format's own package gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gristmill.backends.gguf import _dequantize
from gristmill.backends.gguf_blocks import UNPACK
from gristmill.schemas.gguf import LAYOUTS

FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where float16 numbers are in a block; elsewhere they come first, a scale and perhaps a minimum."""


@pytest.mark.parametrize("name", UNPACK)
def test_random_blocks_mean_what_the_reference_says(name: str) -> None:
    kind, layout = next((kind, layout) for kind, layout in LAYOUTS.items() if layout.name == name)
    random = np.random.default_rng(kind)
    blocks = random.integers(0, 256, (40, layout.size_bytes), dtype=np.uint8)
    for at in FACTORS.get(name, (0,) if name.endswith("0") else (0, 2)):  # random bytes may be no number
        blocks[:, at : at + 2] = random.normal(size=(40, 1)).astype(np.float16).view(np.uint8)
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(_dequantize(blocks.reshape(-1), layout), expected.reshape(-1))


def test_sizes_are_those_of_the_format() -> None:
    for kind, layout in LAYOUTS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)] == (layout.block, layout.size_bytes)
