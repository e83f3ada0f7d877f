"""vLLM's CPU build: bf16, or a compressed-tensors W8A8 checkpoint; torch.compile on, as it comes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(os.environ['BENCH_THREADS']) - 1}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its memory and time are ours
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from serving import Row, serve
from vllm import LLM, SamplingParams, TokensPrompt

MAX_SEQS, STEP_TOKENS, MAX_LEN = 128, 2048, 2048


class Vllm:
    def __init__(self) -> None:
        self.llm = LLM(
            sys.argv[1],
            dtype="bfloat16",
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=STEP_TOKENS,
            max_model_len=MAX_LEN,
            enable_prefix_caching=True,
            disable_log_stats=True,
        )
        self.about = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "max_num_seqs": MAX_SEQS,
            "max_num_batched_tokens": STEP_TOKENS,
            "preload": os.environ.get("LD_PRELOAD", ""),
        }
        self._number = 0

    def batch(self, rows: Sequence[Row]) -> int:
        prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids, _ in rows]
        answers = self.llm.generate(prompts, [params(wanted) for _, wanted in rows], use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    def single(self, row: Row) -> Iterator[None]:
        ids, wanted = row
        self._number += 1
        engine = self.llm.llm_engine
        engine.add_request(f"single-{self._number}", TokensPrompt(prompt_token_ids=list(ids)), params(wanted))
        known = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                now = len(output.outputs[0].token_ids)
                yield from [None] * (now - known)
                known = now


def params(wanted: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.0, max_tokens=wanted, min_tokens=wanted, ignore_eos=True, detokenize=False
    )


serve(Vllm)
