"""A GGUF file's tensors as numpy arrays in float32, for converting a model that ships as GGUF."""

import numpy as np

from ..schemas.gguf import LAYOUTS, GgufFile, Layout, Metadata
from .gguf_blocks import UNPACK, Bytes, Floats

__all__ = ["LAYOUTS", "Floats", "GgufFile", "Metadata", "tensor"]


def tensor(gguf: GgufFile, name: str) -> Floats:
    """The tensor in float32, in its own memory. Raises ModelInvalid if the file has no such tensor."""
    raw = np.frombuffer(gguf.raw(name), dtype=np.uint8)
    info = gguf.tensors[name]
    return _dequantize(raw, info.layout).reshape(info.shape)


def _dequantize(raw: Bytes, layout: Layout) -> Floats:
    """Flat float32 values of ``raw``. Arithmetic in float32, as ggml's own reference does it."""
    match layout.name:
        case "F32":
            return raw.view(np.float32).copy()
        case "F16":
            return raw.view(np.float16).astype(np.float32)
        case "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        case _:
            return UNPACK[layout.name](raw.reshape(-1, layout.size_bytes)).reshape(-1)
