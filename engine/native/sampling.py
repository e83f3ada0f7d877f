"""The built sampler: ``Sampler``'s twin, without anything of the size of the vocabulary being written."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .build import NATIVE, BuildFailed, build

log = logging.getLogger(__name__)

_p, _i, _q = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class NativeSampling:
    """Float32 or bfloat16 logits on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        self._sample = ctypes.CDLL(str(path)).gm_sample
        self._sample.argtypes, self._sample.restype = (_p, _p, _q, _i, _p, _p, _p, _p, _i), None
        self._threads = threads

    def sample(
        self,
        logits: Tensor,
        knobs: NDArray[np.float64],
        top_k: NDArray[np.int64],
        keys: NDArray[np.uint32],
        instead: tuple[list[int], Tensor] | None = None,
    ) -> list[int]:
        """The next token of each row; -1 where the logits are not numbers.

        logits: [rows, vocab], contiguous. knobs: [rows, 3], temperature, top_p, min_p. keys: [rows, 2].
        instead: some rows, and [those, vocab] to take in their place.
        """
        rows, vocab = logits.shape
        assert knobs.shape == (rows, 3)
        assert top_k.shape == (rows,)
        assert keys.shape == (rows, 2)
        places, wide = _rows_of(logits)
        if instead is not None:
            assert instead[1].shape == (len(instead[0]), vocab)
            places[instead[0]], wide[instead[0]] = _rows_of(instead[1])
        tokens = np.empty(rows, np.int64)
        self._sample(
            places.ctypes.data,
            wide.ctypes.data,
            rows,
            vocab,
            knobs.ctypes.data,
            top_k.ctypes.data,
            keys.ctypes.data,
            tokens.ctypes.data,
            self._threads,
        )
        return tokens.tolist()


def _rows_of(logits: Tensor) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Where each row begins, and whether it is float32."""
    assert logits.is_contiguous()
    assert logits.dtype in (torch.float32, torch.bfloat16), logits.dtype
    rows, vocab = logits.shape
    places = np.arange(rows, dtype=np.uint64) * np.uint64(vocab * logits.element_size())
    return places + np.uint64(logits.data_ptr()), np.full(rows, logits.dtype == torch.float32, np.uint8)


def load_sampling(cache: Path, threads: int, target: str = NATIVE) -> NativeSampling | None:
    """The kernel, built if need be, or None with a logged reason: then torch does the work, slower."""
    try:
        return NativeSampling(build(cache, "sampling", target), threads)
    except (BuildFailed, OSError, AttributeError) as exc:  # dlopen refused it, or it is not our library
        log.warning("kernel.unavailable", extra={"kernel": "sampling", "reason": str(exc)})
        return None
