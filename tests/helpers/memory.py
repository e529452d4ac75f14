"""Resident memory of this process, and of a function in a new process."""

import ctypes
import gc
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

measurable = pytest.mark.skipif(
    sys.platform != "linux" or "PYSTEER_EXPECT_SANITIZER" in os.environ,
    reason="reads /proc, and sanitizers keep memory of their own",
)


def resident_bytes():
    """Return the resident memory after free memory went back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def in_own_process(function, *arguments):
    """Call a test module's function in a new process, where no other test has left memory.

    Args:
        function: takes texts; returns JSON data.
        arguments: passed as texts.
    """
    module = Path(inspect.getfile(function))
    program = (
        "import json, sys\n"
        f"from {module.stem} import {function.__name__} as function\n"
        "print(json.dumps(function(*sys.argv[1:])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(module.parent), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
