"""What /metrics says after things have happened to a worker."""

# ruff: noqa: N802 - NVML has its own manner of naming functions

from __future__ import annotations

from dataclasses import replace

import pytest
from gristmill.engine.messages import EngineInfo, Stats
from gristmill.schemas.job import JobState
from gristmill.schemas.result import Choice, ErrorInfo, FinishReason, Result, Timings, Usage
from gristmill.worker.gpu import GpuCollector
from gristmill.worker.metrics import Metrics

MODEL = "tiny"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> Metrics:
    return Metrics(MODEL, clock=clock)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"gristmill_{name}", {"model_name": MODEL, **labels})


def stats(*, running: int = 1, free: int = 6, preemptions: int = 0) -> Stats:
    return Stats(
        running=running,
        waiting=2,
        free_blocks=free,
        total_blocks=8,
        preemptions=preemptions,
        step_s=0.02,
        loop_s=0.003,
        report_s=0.0004,
        tokens=5,
    )


def result(
    state: JobState = JobState.SUCCEEDED,
    reason: FinishReason = FinishReason.LENGTH,
    error: ErrorInfo | None = None,
) -> Result:
    return Result(
        job_id="job-1",
        model=MODEL,
        state=state,
        choices=(Choice(text="four words of text", finish_reason=reason),),
        usage=Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=4),
        timings=Timings(submitted_at=10.0, started_at=11.0, first_token_at=12.0, finished_at=14.0),
        error=error,
    )


def test_a_step_sets_the_gauges_and_counts_its_tokens(metrics: Metrics) -> None:
    metrics.on_step(stats(running=3, free=6))
    assert value(metrics, "requests_running") == 3
    assert value(metrics, "requests_waiting") == 2
    assert value(metrics, "kv_cache_usage_ratio") == pytest.approx(0.25)
    assert value(metrics, "engine_tokens_total") == 5
    assert value(metrics, "engine_step_seconds_sum") == pytest.approx(0.02)
    assert value(metrics, "engine_loop_seconds_sum") == pytest.approx(0.003)
    assert value(metrics, "engine_report_seconds_sum") == pytest.approx(0.0004)


def test_time_between_steps_counts_only_while_something_runs(metrics: Metrics, clock: Clock) -> None:
    metrics.on_step(stats(running=1))
    clock.now += 0.03
    metrics.on_step(stats(running=0))  # the last sequence ended in this step
    clock.now += 600.0  # an idle night is no latency
    metrics.on_step(stats(running=1))
    assert value(metrics, "inter_token_latency_seconds_count") == 1
    assert value(metrics, "inter_token_latency_seconds_sum") == pytest.approx(0.03)


def test_preemptions_go_on_counting_when_a_new_engine_starts_from_zero(metrics: Metrics) -> None:
    for seen in (0, 4, 5, 0, 2):
        metrics.on_step(stats(preemptions=seen))
    assert value(metrics, "num_preemptions_total") == 5 + 2


def test_tokens_found_in_the_prefix_cache_are_counted(metrics: Metrics) -> None:
    metrics.on_step(replace(stats(), prefix_queries=100, prefix_hits=40))
    metrics.on_step(replace(stats(), prefix_queries=150, prefix_hits=80))
    assert value(metrics, "prefix_cache_queries_total") == 150
    assert value(metrics, "prefix_cache_hits_total") == 80
    metrics.on_finish(result())
    assert value(metrics, "prompt_tokens_cached_total") == 4


def test_a_finished_request_counts_its_tokens_and_its_three_waits(metrics: Metrics) -> None:
    metrics.on_finish(result())
    assert value(metrics, "requests_finished_total", state="succeeded") == 1
    assert value(metrics, "request_success_total", finished_reason="length") == 1
    assert value(metrics, "prompt_tokens_total") == 7
    assert value(metrics, "generation_tokens_total") == 5
    assert value(metrics, "request_queue_time_seconds_sum") == pytest.approx(1.0)
    assert value(metrics, "e2e_request_latency_seconds_sum") == pytest.approx(4.0)
    assert value(metrics, "request_time_per_output_token_seconds_sum") == pytest.approx(2.0 / 4)


def test_a_failure_counts_under_its_code_and_not_as_a_success(metrics: Metrics) -> None:
    error = ErrorInfo(code="context_length_exceeded", message="too long")
    metrics.on_finish(result(JobState.FAILED, FinishReason.ERROR, error))
    assert value(metrics, "request_failure_total", code="context_length_exceeded") == 1
    assert value(metrics, "requests_finished_total", state="failed") == 1
    assert value(metrics, "request_success_total", finished_reason="stop") == 0


def test_a_cancelled_request_is_neither_a_success_nor_a_failure(metrics: Metrics) -> None:
    metrics.on_finish(result(JobState.CANCELLED, FinishReason.CANCELLED))
    assert value(metrics, "requests_finished_total", state="cancelled") == 1
    samples = [s for m in metrics.registry.collect() for s in m.samples]
    assert not [s for s in samples if s.name in _OUTCOMES and s.value]


_OUTCOMES = {"gristmill_request_success_total", "gristmill_request_failure_total"}


def test_a_ready_engine_tells_its_cache_and_how_long_each_phase_took(metrics: Metrics) -> None:
    info = EngineInfo(
        vocab_size=100,
        max_model_len=64,
        num_blocks=8,
        block_size=16,
        max_num_seqs=4,
        step_tokens=32,
        dtype="float32",
        attention="torch",
        eos_token_ids=[2],
        load_s={"weights": 0.5, "warmup": 0.25},
    )
    metrics.on_ready(info)
    assert value(metrics, "kv_cache_blocks") == 8
    assert value(metrics, "cold_start_seconds", phase="weights") == 0.5
    assert value(metrics, "cold_start_seconds", phase="warmup") == 0.25


def test_what_happens_at_the_queue_has_a_counter_each(metrics: Metrics) -> None:
    metrics.on_redelivered()
    metrics.on_fenced()
    metrics.on_duplicate_commit()
    metrics.on_engine_restart()
    metrics.on_queue_depth("gm-tiny-batch", "ready", 12)
    for name in ("redelivered", "lease_lost", "duplicate_commit_rejected", "engine_restarts"):
        assert value(metrics, f"{name}_total") == 1, name
    assert value(metrics, "queue_depth", queue="gm-tiny-batch", state="ready") == 12


def test_a_first_token_before_its_submission_is_a_clock_and_counts_as_zero(metrics: Metrics) -> None:
    metrics.on_first_token(-3.0)
    assert value(metrics, "time_to_first_token_seconds_sum") == 0.0
    assert value(metrics, "time_to_first_token_seconds_count") == 1


def test_two_workers_in_one_process_do_not_share_numbers(clock: Clock) -> None:
    one, other = Metrics(MODEL, clock=clock), Metrics(MODEL, clock=clock)
    one.on_redelivered()
    assert value(other, "redelivered_total") == 0


def test_every_name_has_our_prefix_and_a_help_text(metrics: Metrics) -> None:
    families = [f for f in metrics.registry.collect() if not f.name.startswith("process_")]
    assert families
    assert not [f.name for f in families if not f.name.startswith("gristmill_") or not f.documentation]


class NvmlError(Exception):
    """What NVML raises for a number that a card does not know."""


class Nvml:
    """The calls we make, for a card that will not tell its power. Real ones are read under the gpu mark."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = 0
    total, used, gpu = 80_000, 20_000, 50

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Nvml:
        return self

    def nvmlDeviceGetName(self, card: Nvml) -> str:
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, card: Nvml) -> Nvml:
        return self

    def nvmlDeviceGetUtilizationRates(self, card: Nvml) -> Nvml:
        return self

    def nvmlDeviceGetTemperature(self, card: Nvml, sensor: int) -> int:
        return 41

    def nvmlDeviceGetPowerUsage(self, card: Nvml) -> int:
        raise NvmlError


def test_what_a_gpu_will_not_tell_is_left_out_and_the_rest_is_shown(metrics: Metrics) -> None:
    metrics.registry.register(GpuCollector(Nvml()))
    labels = {"gpu": "0", "name": "H100"}

    def told(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"gristmill_gpu_{name}", labels)

    assert told("memory_used_bytes") == 20_000
    assert told("utilization_ratio") == 0.5
    assert told("temperature_celsius") == 41
    assert told("power_watts") is None


@pytest.mark.gpu
def test_a_real_card_tells_its_memory_and_temperature() -> None:
    collector = GpuCollector.if_there()
    assert collector is not None, "NVML answers on a machine with a GPU and nvidia-ml-py"
    told = {f.name: [s.value for s in f.samples] for f in collector.collect()}
    assert told["gristmill_gpu_memory_total_bytes"][0] > told["gristmill_gpu_memory_used_bytes"][0]
    assert 0 < told["gristmill_gpu_temperature_celsius"][0] < 120
