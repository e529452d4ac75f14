"""Imports: light until a name is asked for, and complete then."""

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


# Installed with pysteer itself, and still no business of somebody who only imports it.
ASKED_FOR = ["llama_cpp", "numpy", "pydantic", "yaml", "prompt_toolkit", "typer", "rich", "gguf"]


def loaded_by(statement, packages):
    """The packages of a list that a statement loads, in a fresh interpreter."""
    code = f"import sys; {statement}; print(sorted(set(sys.modules) & set({packages})))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("module", ["pysteer", "pysteer.cli", "pysteer.extract"])
def test_import_loads_no_heavy_package(module):
    assert loaded_by(f"import {module}; assert {module!r} in sys.modules", HEAVY) == "[]"


def test_import_of_pysteer_loads_no_dependency():
    assert loaded_by("import pysteer", ASKED_FOR) == "[]"


def test_pack_and_vector_load_neither_llama_cpp_nor_pydantic():
    packages = ["llama_cpp", "pydantic", "prompt_toolkit"]
    assert loaded_by("from pysteer import SteeringPack, SteeringVector", packages) == "[]"


def test_star_import_binds_every_public_name():
    assert (
        loaded_by(
            "from pysteer import *; import pysteer; assert set(pysteer.__all__) <= set(globals())",
            ["torch"],
        )
        == "[]"
    )


def test_unknown_name_raises_attribute_error():
    import pysteer

    with pytest.raises(AttributeError, match="'SteeredLama'"):
        _ = pysteer.SteeredLama


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
