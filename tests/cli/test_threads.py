"""Threads of the commands that learn, in processes of their own."""

import os
import subprocess
import sys

import pytest

WATCH = """
import os, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "llama_cpp"):
            print(name, os.environ.get("OMP_WAIT_POLICY"))

sys.meta_path.insert(0, Watch())
from pysteer.cli import run
print("code", run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["extract", "calibrate"])
@pytest.mark.parametrize("given", [None, "active"])
def test_wait_policy_is_set_before_openmp_loads(command, given, tiny_llama, tmp_path):
    missing = tmp_path / "missing.jsonl"
    files = ["--unsafe", missing, "--safe", missing, "--benign", missing, "-o", tmp_path / "p.gguf"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    ran = subprocess.run(
        [sys.executable, "-c", WATCH, command, "-m", str(tiny_llama), *map(str, files)],
        env=environment | ({} if given is None else {"OMP_WAIT_POLICY": given}),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = ran.stdout.splitlines()
    assert lines[-1] == "code 2"
    assert "missing.jsonl" in ran.stderr
    assert {line.split()[1] for line in lines[:-1]} <= {given or "passive"}
    if command == "calibrate":
        assert lines[:-1]
