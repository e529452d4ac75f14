"""Threads of an extraction: cores that other programs leave free, and a limit on libraries."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import joblib  # type: ignore[import-untyped]
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

_PROBE = 0.5
"""Seconds over which the load is measured."""

_STAT = Path("/proc/stat")


def usable_cores() -> int:
    """Return the number of cores that the process may use: affinity and the cgroup's quota."""
    return max(1, int(joblib.cpu_count()))


def free_cores() -> int:
    """Return the number of usable cores that are idle now, at least 1.

    The time of each core is measured for half a second while this thread sleeps; without a
    record of the system, the load average of the last minute counts. With more threads than
    free cores, every step waits for the thread that another program has displaced.
    """
    cores = usable_cores()
    idle = _idle_cores()
    if idle is None:
        idle = cores - os.getloadavg()[0] if hasattr(os, "getloadavg") else float(cores)
    return max(1, min(cores, round(idle)))


@contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Limit torch and the OpenMP and BLAS libraries that are loaded to n threads, inside the block.

    The former limits return at the end. Models of llama.cpp have `n_threads` instead.
    """
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(n))
        torch = sys.modules.get("torch")
        if torch is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(n)
        yield


def _idle_cores() -> float | None:
    """Return the idle time of the cores over the time measured; None if the system has no record.

    The record covers the whole machine, without a quota of the process.
    """
    before = _times()
    if before is None:
        return None
    time.sleep(_PROBE)
    after = _times()
    if after is None:
        return None
    idle = 0.0
    for core, (all_then, idle_then) in before.items():
        all_now, idle_now = after.get(core, (all_then, idle_then))
        idle += (idle_now - idle_then) / max(1, all_now - all_then)
    return idle


def _times() -> dict[str, tuple[int, int]] | None:
    """Return the total and the idle time of each core that the process may run on, in ticks."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        lines = _STAT.read_text().splitlines()
    except (AttributeError, OSError):
        return None
    found = {}
    for line in lines:
        name, *fields = line.split()
        if name in allowed:
            ticks = [int(field) for field in fields[:8]]  # guest time is counted as user time
            found[name] = sum(ticks), ticks[3] + ticks[4]
    return found or None
