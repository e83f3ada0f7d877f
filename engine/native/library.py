"""The built kernels as typed functions over tensors. Each has a torch twin that is its test."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import torch
from torch import Tensor

from ..layers.elementwise import TorchElementwise
from .build import NATIVE, BuildFailed, build

log = logging.getLogger(__name__)

MAX_HEAD_DIM = 1024
_p, _i, _q, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "gm_rms_norm": (_i, _p, _p, _p, _p, _q, _i, _f, _i),
    "gm_silu_mul": (_i, _p, _p, _q, _i, _i),
    "gm_attend": (
        *(_i, *(_p,) * 10, _f, _q),
        *(_p, _p, _i, _p, _i, _p, _i, _p, _i, _f, _f, _p, *(_i,) * 6, _p, _p),
    ),
}


class Library(TorchElementwise):
    """Kernels for one dtype, float32 or bfloat16. Tensors must be contiguous, of that dtype, on the CPU.

    Operations that have none are torch's."""

    native = True

    def __init__(self, path: Path, dtype: torch.dtype, threads: int) -> None:
        assert dtype in (torch.float32, torch.bfloat16), dtype
        dll = ctypes.CDLL(str(path))
        for name, types in _SIGNATURES.items():
            function = getattr(dll, name)
            function.argtypes, function.restype = types, None
        self._norm, self._silu = dll.gm_rms_norm, dll.gm_silu_mul
        self.attend_raw = dll.gm_attend
        self.lanes: int = dll.gm_lanes()
        self.dtype, self.threads = dtype, threads
        self.wide = int(dtype == torch.float32)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """RMS norm of ``x``, or of ``residual + x`` with the sum left in ``residual``. x: [rows, n]."""
        out = torch.empty_like(x)
        rows, n = x.shape
        held = None if residual is None else residual.data_ptr()
        self._norm(
            self.wide, out.data_ptr(), x.data_ptr(), held, weight.data_ptr(), rows, n, eps, self.threads
        )
        return out

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x = [rows, gate | up]."""
        rows, double = x.shape
        out = x.new_empty(rows, double // 2)
        self._silu(self.wide, out.data_ptr(), x.data_ptr(), rows, double // 2, self.threads)
        return out


def load(cache: Path, dtype: torch.dtype, threads: int, target: str = NATIVE) -> Library | None:
    """The kernels, built if need be, or None with a logged reason: then torch does the work, slower."""
    if dtype not in (torch.float32, torch.bfloat16):
        log.warning("kernel.unavailable", extra={"reason": f"no native kernels for {dtype}"})
        return None
    try:
        return Library(build(cache, target=target), dtype, threads)
    # OSError: dlopen refused it; AttributeError: not our library
    except (BuildFailed, OSError, AttributeError) as exc:
        log.warning("kernel.unavailable", extra={"reason": str(exc)})
        return None
