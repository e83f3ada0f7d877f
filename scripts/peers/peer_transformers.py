"""transformers.generate in left-padded batches of 32, sorted by output length (no service could know it)."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from serving import Row, serve, threads
from transformers import AutoModelForCausalLM

BATCH = 32


class Static:
    def __init__(self) -> None:
        torch.set_num_threads(threads())
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            sys.argv[1], dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.model.generation_config.eos_token_id = None
        self.about = {"transformers": transformers.__version__, "torch": torch.__version__, "batch": BATCH}

    def batch(self, rows: Sequence[Row]) -> int:
        order = sorted(rows, key=lambda row: row[1])
        for at in range(0, len(order), BATCH):
            self._generate(order[at : at + BATCH])
        return sum(wanted for _, wanted in rows)

    def single(self, row: Row) -> Iterator[None]:
        ids, wanted = row
        at, cache = torch.tensor([list(ids)]), None
        for _ in range(wanted):
            with torch.inference_mode():
                out = self.model(at, past_key_values=cache, use_cache=True, logits_to_keep=1)
            at, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Row]) -> None:
        width, steps = max(len(ids) for ids, _ in rows), max(wanted for _, wanted in rows)
        pads = [width - len(ids) for ids, _ in rows]
        ids = torch.tensor([[0] * pad + list(ids) for pad, (ids, _) in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
        out = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
        )
        assert out.shape[1] == width + steps


serve(Static)
