"""Threads: the free cores beside real programs, and limits that end."""

import subprocess
import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from pysteer.extract.threads import free_cores, limited_threads, usable_cores


def limits():
    np.ones((2, 2)) @ np.ones((2, 2))  # loads the BLAS
    return {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}


def test_free_cores_are_one_beside_programs_that_use_all():
    spin = [sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"]
    programs = [subprocess.Popen(spin, stdout=subprocess.PIPE) for _ in range(2 * usable_cores())]
    try:
        for program in programs:
            program.stdout.readline()
        assert free_cores() == 1
    finally:
        for program in programs:
            program.kill()
            program.communicate()
    assert 1 <= free_cores() <= usable_cores()


def limited_and_failed(torch):
    with limited_threads(1):
        assert torch.get_num_threads() == 1
        assert set(limits().values()) == {1}
        raise KeyError


def test_limit_holds_for_torch_and_blas_and_ends_after_an_error():
    torch = pytest.importorskip("torch")
    before, of_torch = limits(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyError):
            limited_and_failed(torch)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(of_torch)
    assert limits() == before
