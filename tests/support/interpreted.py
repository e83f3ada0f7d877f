"""A program in a process of its own under Triton's interpreter: prints what came out as one JSON object.

TRITON_INTERPRET counts when Triton, and kernels, are first imported; nobody else's process should see it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from gristmill.engine.attention.backend import Attention
from gristmill.engine.attention.choice import Wanted, self_test
from gristmill.engine.attention.flash_backend import FlashAttention
from gristmill.engine.attention.torch_backend import TorchAttention
from gristmill.engine.attention.triton_backend import TritonAttention
from gristmill.engine.engine import Engine
from gristmill.engine.gpu import checks
from gristmill.engine.messages import Request
from gristmill.engine.settings import EngineSettings
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources


def repair() -> None:
    """Make Triton 3.6's interpreter do what its compiler does."""
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def index_too(tensor: Any, scope: Any) -> None:
        """numpy 2.4 makes no number of an array of one."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def float_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """Its bfloat16 numbers lie in uint16, and it multiplies those."""
        return dot(self, *(_wide(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    convert = interpreter.InterpreterBuilder.create_fp_to_fp

    def rounded(self: Any, x: Any, to: Any, mode: Any) -> Any:
        """Its rounding to eight bits forgets to carry: 125 becomes 64."""
        if to.scalar != tl.float8e4nv or x.dtype.scalar != tl.float32:
            return convert(self, x, to, mode)
        eight = torch.from_numpy(x.data).to(torch.float8_e4m3fn).view(torch.uint8)
        return interpreter.TensorHandle(eight.numpy(), tl.float8e4nv)

    interpreter.InterpreterBuilder.create_fp_to_fp = rounded
    interpreter._patch_lang_tensor = index_too
    interpreter.InterpreterBuilder.create_dot = float_dot
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = type(options)(sanitize_overflow=False)  # twice as fast


def _wide(x: Any) -> Any:
    data = interpreter._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


class Documented:
    """flash-attn's two functions as their documentation describes them, for CPUs; it runs on GPUs only."""

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        keys: Tensor,
        most: int,
        longest: int,
        **said: Any,
    ) -> Tensor:
        """``rows`` and ``keys``: where each sequence begins, and where the last one ends."""
        counts, lengths = rows.diff().tolist(), keys.diff().tolist()
        assert (max(counts), max(lengths)) == (most, longest)
        parts = zip(q.split(counts), lengths, said["block_table"], strict=True)
        return torch.cat([_documented(part, k, v, length, table, **said) for part, length, table in parts])

    def flash_attn_with_kvcache(self, q: Tensor, k: Tensor, v: Tensor, **said: Any) -> Tensor:
        parts = zip(q, said["cache_seqlens"].tolist(), said["block_table"], strict=True)
        return torch.stack([_documented(part, k, v, length, table, **said) for part, length, table in parts])


def _documented(q: Tensor, k: Tensor, v: Tensor, length: int, table: Tensor, **said: Any) -> Tensor:
    """Causal from the lower right corner: the last query sees every key. q: [rows, heads, dim]."""
    assert said["causal"]
    group = q.shape[1] // k.shape[2]
    k, v = (x[table.long()].flatten(0, 1)[:length].repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * said["softmax_scale"]
    if cap := said["softcap"]:
        scores = cap * (scores / cap).tanh()
    back = (torch.arange(len(q)) + length - len(q))[:, None] - torch.arange(length)[None]
    if said["alibi_slopes"] is not None:
        scores = scores - said["alibi_slopes"][:, None, None] * back.abs()
    left = said["window_size"][0]
    hidden = (back < 0) | (back > left) if left >= 0 else back < 0
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


FLASH = (
    checks.Case("mixed-window", ((0, 3), (9, 1), (4, 2)), 2, 1, block=4, window=4, softcap=2.0),
    checks.Case("decode-alibi", ((5, 1), (9, 1)), 2, 2, block=4, alibi=True, rope=None),
)


def kernels() -> list[tuple[str, float, float]]:
    """Every case of the kernels: name, difference, tolerance."""
    cpu = torch.device("cpu")
    cases = [(check.name, check.difference(), check.tolerance) for check in checks.checks(cpu)]

    def flash(case: checks.Case, device: torch.device) -> Attention:
        return FlashAttention(case.spec, case.block, case.longest, device, Documented())

    return cases + [(f"flash/{case.name}", checks.equals_torch(flash, case, cpu), 2e-5) for case in FLASH]


def tried() -> list[str | None]:
    """What the self-test says of our kernels, of attention with another scale, and of one that fails."""
    cpu, spec = torch.device("cpu"), checks.Case("small", ((0, 1),)).spec
    wanted = Wanted(spec, 40, cpu, torch.float32)
    wrong = TorchAttention(replace(spec, attention_scale=1.0), 16, 40, cpu)
    failing = TritonAttention(spec, 16, 40, cpu)
    failing.attend = _failing  # type: ignore[method-assign]
    return [self_test(backend, wanted) for backend in (TritonAttention(spec, 16, 40, cpu), wrong, failing)]


def _failing(*_: Any) -> Tensor:
    raise OutOfResources(300_000, 232_448, "shared memory")


def engine(model: str, prompts: str) -> list[list[list[int]]]:
    """Greedy tokens for each prompt, with our kernels and with torch's attention."""
    return [_generate(model, json.loads(prompts), attention) for attention in ("triton", "torch")]


def _generate(model: str, prompts: list[list[int]], attention: str) -> list[list[int]]:
    engine = Engine(
        EngineSettings(
            model=model,
            device="cpu",
            dtype="float32",
            attention=attention,
            max_num_seqs=2,
            max_batch_prefill_tokens=12,
            max_batch_total_tokens=128,
            kv_block_size=8,
        )
    )
    assert engine.info.attention == attention
    said: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        engine.add(Request(id=str(i), prompt_ids=prompt, max_tokens=4, temperature=0.0, ignore_eos=True))
    while engine.has_work:
        for output in engine.step():
            said.setdefault(output.id, []).extend(output.token_ids)
    return [said[str(i)] for i in range(len(prompts))]


if __name__ == "__main__":
    repair()
    torch.set_num_threads(1)
    np.seterr(over="ignore")  # infinity is what its exponential is to be
    print(json.dumps({"kernels": kernels, "tried": tried, "engine": engine}[sys.argv[1]](*sys.argv[2:])))
