"""How much memory this process has."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest

measurable = pytest.mark.skipif(
    sys.platform != "linux" or "PYSTEER_EXPECT_SANITIZER" in os.environ,
    reason="reads /proc, and sanitizers keep memory of their own",
)


def resident_bytes():
    """After all that is free was given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096
