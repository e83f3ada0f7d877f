"""The GPU's own numbers, read when somebody asks for /metrics. Absent where there is no NVML."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

GAUGES = {
    "memory_used_bytes": "Memory in use, by everybody.",
    "memory_total_bytes": "Memory of the card.",
    "temperature_celsius": "Temperature of the chip.",
    "power_watts": "Power drawn.",
    "utilization_ratio": "Part of the last sample period in which a kernel ran, 0 to 1.",
}


class GpuCollector(Collector):
    """Memory, temperature, power and use of every card NVML lists, labelled ``gpu`` (index) and ``name``."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml

    @classmethod
    def if_there(cls) -> Self | None:
        """None: no nvidia-ml-py, no driver, or no card."""
        if find_spec("pynvml") is None:
            return None
        nvml = import_module("pynvml")
        try:
            nvml.nvmlInit()
            return cls(nvml) if nvml.nvmlDeviceGetCount() else None
        except nvml.NVMLError as exc:
            log.debug("gpu.no_nvml", extra={"reason": str(exc)})
            return None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One family per number; what a card cannot tell is left out."""
        families = {
            name: GaugeMetricFamily(f"gristmill_gpu_{name}", text, labels=("gpu", "name"))
            for name, text in GAUGES.items()
        }
        for index in range(self._nvml.nvmlDeviceGetCount()):
            card = self._nvml.nvmlDeviceGetHandleByIndex(index)
            for name, value in self._read(card):
                families[name].add_metric((str(index), str(self._nvml.nvmlDeviceGetName(card))), value)
        yield from families.values()

    def _read(self, card: Any) -> Iterator[tuple[str, float]]:
        nvml = self._nvml
        memory = nvml.nvmlDeviceGetMemoryInfo(card)
        yield "memory_used_bytes", memory.used
        yield "memory_total_bytes", memory.total
        for name, ask in (
            ("temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU)),
            ("power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(card) / 1_000),
            ("utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100),
        ):
            try:
                yield name, float(ask())
            except nvml.NVMLError:
                continue  # passively cooled, virtual or sliced cards do not know all of them
