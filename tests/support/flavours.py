"""Which CPU the native kernels under test are compiled for."""

import os
from pathlib import Path

from gristmill.engine.native.build import NATIVE


def kernel_target() -> str:
    """This one; or what ``scripts/check_kernels`` asks for, one CPU after the other."""
    return os.environ.get("KERNEL_TARGET", NATIVE)


def is_arm() -> bool:
    """Then it is emulated, whatever this machine is."""
    return kernel_target().startswith("armv")


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux calls it."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()
