"""Fixtures that every kind of test may ask for; they live in ``support``, by what they provide."""

import os
from pathlib import Path

import pytest

# Before torch is loaded: on shared cores, threads that spin for each other make every step 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from .support.command_line import run
from .support.journal import settings, state
from .support.model import kernels, smollm2
from .support.played import played, tokenizer
from .support.relay import relay
from .support.s3 import moto_client, s3, s3_proxy
from .support.sqs import ministack_endpoint, moto_sqs, sqs
from .support.stack import stack, tiny, tiny_stack
from .support.threads import one_thread
from .support.valkey import valkey, valkey_replica

__all__ = [
    "kernels",
    "ministack_endpoint",
    "moto_client",
    "moto_sqs",
    "one_thread",
    "played",
    "relay",
    "run",
    "s3",
    "s3_proxy",
    "settings",
    "smollm2",
    "sqs",
    "stack",
    "state",
    "tiny",
    "tiny_stack",
    "tokenizer",
    "valkey",
    "valkey_replica",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip where the kernel shows no NVIDIA device.

    The file that computes most comes first: it would end alone, minutes after the others.
    """
    items.sort(key=lambda item: item.path.parts[-2:] != ("parity", "test_engine.py"))
    if not Path("/dev/nvidiactl").exists():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no NVIDIA device"))
