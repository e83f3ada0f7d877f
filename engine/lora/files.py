"""Adapter directories for one engine: its model, its dtype, its bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .adapter import Adapter, Blueprint, survey
from .catalogue import Catalogue
from .desk import AdapterDesk, Files
from .pool import AdapterPool

if TYPE_CHECKING:
    from ..models.spec import ModelSpec
    from ..settings import EngineSettings

Desk = AdapterDesk[Blueprint, Adapter]


def open_desk(
    settings: EngineSettings,
    spec: ModelSpec,
    dtype: torch.dtype,
    load: Callable[[Blueprint], Adapter],
) -> Desk:
    """The desk over the adapters that ``settings`` name. Reads none of them yet."""
    catalogue = Catalogue(settings.lora_adapters, settings.lora_dir)

    def measured(name: str) -> tuple[Blueprint, int]:
        blueprint = survey(catalogue.find(name), spec, settings.lora_max_rank)
        return blueprint, blueprint.elements * dtype.itemsize

    def digest(adapter: Adapter) -> str:
        return adapter.digest

    files = Files(catalogue.find, measured, load, digest)
    return AdapterDesk(files, AdapterPool(settings.lora_memory_mib * 2**20))
