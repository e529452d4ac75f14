"""Models for the tests: tiny random ones of several families, and the default model."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from quantized import quantize
from tiny_models import write_tiny

from pysteer import shipped

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The duration of an example depends on the load of the machine, not on the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_addoption(parser):
    parser.addoption(
        "--devices",
        choices=["host", "rpc"],
        default="host",
        help="where models are loaded: in host memory, or onto two RPC servers on this machine",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--devices") == "host":
        for item in items:
            if item.get_closest_marker("devices"):
                item.add_marker(pytest.mark.skip(reason="needs --devices rpc"))


@pytest.fixture(scope="session", autouse=True)
def devices(request):
    """Load every model of the tests where --devices says."""
    if request.config.getoption("--devices") == "host":
        yield
        return
    from rpc import loaded_onto, servers

    with servers() as endpoints, loaded_onto(endpoints):
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Function from family and dtype or quantisation to the path of a tiny random model."""
    folder = tmp_path_factory.mktemp("models")

    def get(family: str, kind: str = "F32", **sizes: int) -> Path:
        stem = "-".join([family, kind, *(f"{k}{v}" for k, v in sorted(sizes.items()))])
        path = folder / f"{stem}.gguf"
        if not path.exists():
            if kind in ("F32", "F16"):
                write_tiny(family, path, dtype=kind, **sizes)
            else:
                quantize(get(family, "F16", **sizes), path, kind)
        return path

    return get


@pytest.fixture(scope="session")
def tiny_llama(tiny_model):
    """Path of a tiny random Llama: F32, 4 layers, n_embd 64, 320 tokens."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def default_model():
    """Path of SmolLM2-135M-Instruct, Q4_1."""
    return shipped.default_model()
