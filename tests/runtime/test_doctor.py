"""A diagnosis reports what it finds on a model, and goes on after a failure."""

import pytest

from pysteer import HookedLlama, HookError
from pysteer.llama.context import HookedContext
from pysteer.runtime.doctor import diagnose


@pytest.mark.parametrize("family", ["llama", "gemma3n", "mamba"])
def test_every_check_of_a_supported_family_passes(tiny_model, family):
    diagnosis = diagnose(str(tiny_model(family)), n_threads=1)
    assert diagnosis.ok
    assert [check.ok for check in diagnosis.checks] == [True] * len(diagnosis.checks)
    assert len(diagnosis.checks) == (5 if family == "mamba" else 6)


def test_failure_becomes_a_check_that_failed(tiny_llama, monkeypatch):
    def fails(self, *args, **kwargs):
        raise HookError("cannot tell which tokens the rows are")

    monkeypatch.setattr(HookedLlama, "capture", fails)
    diagnosis = diagnose(str(tiny_llama), n_threads=1)
    assert not diagnosis.ok
    first, *rest = diagnosis.checks
    assert (first.ok, first.detail) == (False, "cannot tell which tokens the rows are")
    assert all(check.ok for check in rest)
    set_sequence = HookedContext.set_sequence

    def refuses(self, slot, sequence):
        if sequence is not None:
            raise HookError("the model lacks the site")
        set_sequence(self, slot, sequence)

    monkeypatch.setattr(HookedContext, "set_sequence", refuses)
    names = [check.name for check in diagnose(str(tiny_llama), n_threads=1).checks if not check.ok]
    assert "pysteer hooked equals llama.cpp's control vector" in names
    assert "pysteer steers residual, layer 0, and stops" in names
