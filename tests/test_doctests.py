"""The examples in docstrings, run as doctests."""

import doctest
import importlib
from pathlib import Path

import pytest

import pysteer
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.pack.router import Router

PACKAGE = Path(pysteer.__file__).parent


def modules_with_examples():
    """Return the names of the modules that hold a doctest, found without importing any."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if ">>> " in path.read_text(encoding="utf-8"):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            found.append(".".join(parts).removesuffix(".__init__"))
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of_module_give_the_shown_output(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for examples that write files
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize(
    "value",
    [pysteer.SteeringVector, pysteer.SteeringPack, pysteer.Policy, Router, ResolvedPolicy],
    ids=lambda value: value.__name__,
)
def test_values_that_users_build_have_examples(value):
    assert doctest.DocTestParser().get_examples(value.__doc__)
