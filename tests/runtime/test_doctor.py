"""A diagnosis reports what it finds on a model, and goes on after a failure."""

import pytest

from pysteer import HookedLlama, HookError
from pysteer.llama.context import HookedContext
from pysteer.runtime import device_checks
from pysteer.runtime.doctor import diagnose


@pytest.mark.parametrize("family", ["llama", "gemma3n", "mamba"])
def test_every_check_of_a_supported_family_passes(tiny_model, family):
    diagnosis = diagnose(str(tiny_model(family)), n_threads=1)
    assert diagnosis.ok
    assert [check.ok for check in diagnosis.checks] == [True] * len(diagnosis.checks)
    assert len(diagnosis.checks) == (5 if family == "mamba" else 6)
    sites = {"residual"} if family == "mamba" else {"residual", "attention", "mlp"}
    assert {way.site for way in diagnosis.ways} == sites
    assert {device.name for device in diagnosis.devices} == {way.device for way in diagnosis.ways}
    for device in diagnosis.devices:
        steerings = [cost.steering for cost in diagnosis.costs if cost.device == device.name]
        assert steerings == ["none", "add", "ablate"]


def test_ways_name_the_memory_and_the_reason(tiny_llama, pytestconfig):
    if pytestconfig.getoption("--devices") != "host":
        pytest.skip("the layers are in other memories there")
    ways = diagnose(str(tiny_llama), n_threads=1, n_gpu_layers=0).ways
    found = {(way.site, way.layer, way.operator): (way.way, way.reason) for way in ways}
    assert found["residual", 2, "add"] == ("control vector", "the graph stays whole")
    assert found["residual", 2, "ablate"] == ("in place", "the operator is no addition")
    assert found["residual", 0, "add"][0] == found["mlp", 2, "add"][0] == "in place"
    assert all(way.error < 1e-6 for way in ways)


def test_operator_that_differs_from_its_formula_fails(tiny_llama, monkeypatch):
    apply = device_checks.native_operator

    class Wrong:
        def __init__(self, operator):
            self.operator = operator

        def apply(self, rows, strength, h):
            made = apply(self.operator).apply(rows, strength, h)
            return made * (1 + 1e-4) if self.operator.kind == "rotate" else made

    monkeypatch.setattr(device_checks, "native_operator", Wrong)
    diagnosis = diagnose(str(tiny_llama), n_threads=1)
    assert not diagnosis.ok
    assert {way.operator for way in diagnosis.ways if not way.ok} == {"rotate", "rotate, target"}


def test_report_has_no_address_of_a_server():
    assert device_checks.without_address("RPC0[192.168.7.3:50052]") == "RPC0[:50052]"
    assert device_checks.without_address("CUDA0") == "CUDA0"


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
