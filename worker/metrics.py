"""What a worker counts, under names that users of model servers know, and nothing about any one user."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from ..engine.messages import EngineInfo, Stats
from ..schemas.job import FINAL, JobState
from ..schemas.result import FinishReason, Result
from .gpu import GpuCollector

# Edges as vLLM has them, so that boards and alerts written for it can be pointed here.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
PER_TOKEN_S = (
    0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60,
    120, 240, 480, 960, 1920, 7680, 28800, 86400,
)  # fmt: skip
LOOP_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5,
    1, 2.5, 5, 10,
)  # fmt: skip
PREFIX = "gristmill_"
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))


class Metrics:
    """One worker's numbers on a registry of their own; all but the process's carry ``model_name``.

    Methods may be called from any thread and do no I/O. A request's tokens count when it ends, each once,
    however many attempts it took; ``gristmill_engine_tokens_total`` counts work done, step by step.
    """

    def __init__(self, model: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._model, self._clock = model, clock
        self._seen: dict[str, int] = {}
        self._last_step_at: float | None = None
        ProcessCollector(registry=self.registry)
        if (gpu := GpuCollector.if_there()) is not None:
            self.registry.register(gpu)
        self._define_engine()
        self._define_requests()
        self._define_queue()

    def _define_engine(self) -> None:
        self._running = self._gauge("requests_running", "Sequences in the engine that have KV blocks.")
        self._waiting = self._gauge("requests_waiting", "Sequences in the engine that wait for KV blocks.")
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Part of the KV blocks in use, 0 to 1.")
        self._kv_blocks = self._gauge("kv_cache_blocks", "KV blocks in all.")
        self._step_tokens = self._gauge(
            "engine_step_token_budget", "Tokens a step may feed: less once memory ran out."
        )
        self._preemptions = self._counter("num_preemptions", "Sequences that gave their KV blocks up.")
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Tokens looked up in the prefix cache, each request once."
        )
        self._prefix_hits = self._counter("prefix_cache_hits", "Tokens found there.")
        self._blocks_saved = self._counter("kv_blocks_swapped_out", "KV blocks copied to the host's memory.")
        self._blocks_loaded = self._counter("kv_blocks_swapped_in", "KV blocks copied back.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Guessed tokens that were checked.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Guessed tokens that were right.")
        self._engine_tokens = self._counter(
            "engine_tokens", "Tokens fed to the model, recomputed ones included."
        )
        self._step_s = self._histogram("engine_step_seconds", "One step of the engine.", PER_TOKEN_S)
        self._loop_s = self._histogram(
            "engine_loop_seconds", "Of a step, what neither the model nor the sampler took.", LOOP_S
        )
        self._report_s = self._histogram(
            "engine_report_seconds",
            "Writing what a step brought into the pipe; it waits while that is full.",
            LOOP_S,
        )
        self._inter_token_s = self._histogram(
            "inter_token_latency_seconds",
            "From one step to the next while sequences run, once a step.",
            PER_TOKEN_S,
        )
        self._restarts = self._counter("engine_restarts", "Engine processes that died and were replaced.")
        self._cold_start_s = self._gauges(
            "cold_start_seconds", "The last start of the engine, by phase.", "phase"
        )

    def _define_requests(self) -> None:
        self._finished = self._counters("requests_finished", "Requests by final state.", "state")
        self._success = self._counters(
            "request_success", "Requests that ended as they should.", "finished_reason"
        )
        self._failure = self._counters("request_failure", "Requests that ended in an error.", "code")
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests.")
        self._prompt_tokens_cached = self._counter(
            "prompt_tokens_cached", "Prompt tokens of ended requests that the prefix cache had."
        )
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens of ended requests.")
        self._first_token_s = self._histogram(
            "time_to_first_token_seconds",
            "From submission to the first token, queue included.",
            FIRST_TOKEN_S,
        )
        self._per_token_s = self._histogram(
            "request_time_per_output_token_seconds", "A request's mean time between tokens.", PER_TOKEN_S
        )
        self._e2e_s = self._histogram("e2e_request_latency_seconds", "From submission to the end.", REQUEST_S)
        self._queue_s = self._histogram(
            "request_queue_time_seconds", "From submission to the first claim.", REQUEST_S
        )
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt length.", TOKENS)
        self._request_output = self._histogram("request_generation_tokens", "Output length.", TOKENS)
        # Shown as zero from the start: a rate over a series that appears later misses its first step.
        for state in FINAL:
            self._finished.labels(self._model, state.value)
        for reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._success.labels(self._model, reason.value)

    def _define_queue(self) -> None:
        self._depth = self._gauges(
            "queue_depth", "Messages by state: ready, leased, delayed, dead.", "queue", "state"
        )
        self._redelivered = self._counter(
            "redelivered", "Deliveries of a job that an earlier attempt had claimed."
        )
        self._lease_lost = self._counter("lease_lost", "Attempts ended because a newer one owns the job.")
        self._duplicates = self._counter(
            "duplicate_commit_rejected", "Results not written because an earlier attempt's was there."
        )

        self._spool_results = self._gauge("spool_results", "Finished requests whose result is not durable.")
        self._spool_bytes = self._gauge("spool_bytes", "Size of those results.")

    # ---- the engine

    def on_ready(self, info: EngineInfo) -> None:
        """The engine has loaded its model."""
        self._kv_blocks.set(info.num_blocks)
        for phase, seconds in info.load_s.items():
            self._cold_start_s.labels(self._model, phase).set(seconds)

    def on_step(self, stats: Stats) -> None:
        """After each step of the engine."""
        now = self._clock()
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._step_tokens.set(stats.step_tokens)
        self._kv_usage.set(1 - stats.free_blocks / max(1, stats.total_blocks))
        self._step_s.observe(stats.step_s)
        self._loop_s.observe(stats.loop_s)
        self._report_s.observe(stats.report_s)
        self._engine_tokens.inc(stats.tokens)
        self._catch_up(self._preemptions, "preemptions", stats.preemptions)
        self._catch_up(self._prefix_queries, "prefix_queries", stats.prefix_queries)
        self._catch_up(self._prefix_hits, "prefix_hits", stats.prefix_hits)
        self._catch_up(self._blocks_saved, "blocks_saved", stats.blocks_saved)
        self._catch_up(self._blocks_loaded, "blocks_loaded", stats.blocks_loaded)
        self._catch_up(self._drafted, "drafted", stats.drafted)
        self._catch_up(self._accepted, "accepted", stats.accepted)
        if self._last_step_at is not None:
            self._inter_token_s.observe(now - self._last_step_at)
        self._last_step_at = now if stats.running else None

    def _catch_up(self, counter: Counter, name: str, total: int) -> None:
        """Add what is new in the engine's own count. Less than before: a new engine, which began at zero."""
        before = self._seen.get(name, 0)
        counter.inc(total - before if total >= before else total)
        self._seen[name] = total

    def on_engine_restart(self) -> None:
        """An engine process died, and another takes its work."""
        self._restarts.inc()
        self._last_step_at = None

    # ---- requests

    def on_first_token(self, seconds: float) -> None:
        """A request's first token, ``seconds`` after its submission."""
        self._first_token_s.observe(max(0.0, seconds))

    def on_finish(self, result: Result) -> None:
        """A request's result is durable."""
        self.on_row(result)
        usage, timings = result.usage, result.timings
        self._request_prompt.observe(usage.prompt_tokens)
        self._request_output.observe(usage.completion_tokens)
        self._e2e_s.observe(timings.e2e_s)
        if timings.queue_s is not None:
            self._queue_s.observe(timings.queue_s)
        if timings.first_token_at is not None and usage.completion_tokens > 1:
            spent = max(0.0, timings.finished_at - timings.first_token_at)
            self._per_token_s.observe(spent / (usage.completion_tokens - 1))

    def on_row(self, result: Result) -> None:
        """A batch's row has ended. Counted only: nobody waits for it, and there are many."""
        model, usage = self._model, result.usage
        self._finished.labels(model, result.state.value).inc()
        if result.error is not None:
            self._failure.labels(model, result.error.code).inc()
        elif result.state is JobState.SUCCEEDED and result.finish_reason is not None:
            self._success.labels(model, result.finish_reason.value).inc()
        self._prompt_tokens.inc(usage.prompt_tokens)
        self._prompt_tokens_cached.inc(usage.cached_tokens)
        self._generation_tokens.inc(usage.completion_tokens)

    # ---- the queue

    def on_queue_depth(self, queue: str, state: str, messages: int) -> None:
        """How many messages of ``queue`` are ``ready``, ``leased``, ``delayed`` or ``dead``."""
        self._depth.labels(self._model, queue, state).set(messages)

    def on_redelivered(self) -> None:
        """A job was claimed that an earlier attempt had claimed before."""
        self._redelivered.inc()

    def on_fenced(self) -> None:
        """This attempt was told that a newer one owns its job."""
        self._lease_lost.inc()

    def on_duplicate_commit(self) -> None:
        """The result object was there already: the first writer's counts."""
        self._duplicates.inc()

    def on_spool(self, results: int, size: int) -> None:
        """A result began or ceased to wait: how many do now, and their bytes."""
        self._spool_results.set(results)
        self._spool_bytes.set(size)

    # ---- definitions

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._gauges(name, text).labels(self._model)

    def _gauges(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return self._counters(name, text).labels(self._model)

    def _counters(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name", *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, edges: Sequence[float]) -> Histogram:
        metric = Histogram(PREFIX + name, text, ("model_name",), registry=self.registry, buckets=edges)
        return metric.labels(self._model)
