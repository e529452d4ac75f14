"""What importing pysteer must not drag in."""

import subprocess
import sys

import pytest

HEAVY = [
    "torch",
    "transformers",
    "sklearn",
    "matplotlib",
    "scipy",
    "httpx2",
    "hypothesis",
    "pytest",
]


@pytest.mark.parametrize("module", ["pysteer", "pysteer.cli", "pysteer.extract"])
def test_importing_loads_no_heavy_package(module):
    code = (
        f"import sys, {module}; assert {module!r} in sys.modules; "
        f"print(sorted(set(sys.modules) & set({HEAVY})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import pysteer

    assert sorted(pysteer.__all__) == pysteer.__all__
    assert len(pysteer.__all__) <= 12
    for name in pysteer.__all__:
        assert getattr(pysteer, name).__module__.startswith("pysteer.")


def test_every_error_is_a_steering_error():
    import pysteer
    from pysteer import errors

    found = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(found) >= 5
    for error in found:
        assert issubclass(error, pysteer.SteeringError)
        assert issubclass(error, ValueError)
