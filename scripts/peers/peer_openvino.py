"""OpenVINO GenAI's continuous batching: bf16 or int8 weights, bf16 arithmetic, its own 8-bit KV cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import numpy as np
import openvino
import openvino_genai as genai
from serving import Row, serve, threads

STEP_TOKENS, MAX_SEQS, CACHE_GIB = 1024, 128, 4


class OpenVino:
    def __init__(self) -> None:
        scheduling = genai.SchedulerConfig()
        scheduling.max_num_batched_tokens, scheduling.max_num_seqs = STEP_TOKENS, MAX_SEQS
        scheduling.cache_size, scheduling.enable_prefix_caching = CACHE_GIB, True
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": threads(),
            "CACHE_DIR": sys.argv[1] + "/compiled",
        }
        self.pipe = genai.ContinuousBatchingPipeline(sys.argv[1], scheduling, "CPU", properties)
        self.about = {
            "openvino": openvino.__version__,
            "openvino_genai": genai.__version__,
            "max_num_batched_tokens": STEP_TOKENS,
            "max_num_seqs": MAX_SEQS,
        }
        self._number = 0

    def batch(self, rows: Sequence[Row]) -> int:
        handles = [self._add(row) for row in rows]
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
        return sum(len(handle.read_all()[0].generated_ids) for handle in handles)

    def single(self, row: Row) -> Iterator[None]:
        handle = self._add(row)
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            while handle.can_read():
                for output in handle.read().values():
                    yield from [None] * len(output.generated_ids)

    def _add(self, row: Row) -> genai.GenerationHandle:
        ids, wanted = row
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = wanted
        config.ignore_eos, config.do_sample = True, False
        self._number += 1
        return self.pipe.add_request(self._number, openvino.Tensor(np.array([list(ids)], np.int64)), config)


serve(OpenVino)
