"""A pytest plugin for llama-cpp-python's own tests: local models, and SteeredLlama for Llama.

Loaded by name into the subprocess of test_llama_cpp_suite.py, which sets the variables.
"""

import json
import os

import huggingface_hub
import llama_cpp
import pytest

MODELS = "STAND_IN_MODELS"  # JSON object: file name at the hub to the path of a model here
CLASS = "STAND_IN_CLASS"  # "Llama" or "SteeredLlama": the class under test
PACKS = "STAND_IN_PACKS"  # JSON object: path of a model to path of a pack that steers all requests
CREATED = "models created"  # property of each test in the report

_models: dict[str, str] = json.loads(os.environ[MODELS])
_packs: dict[str, str] = json.loads(os.environ[PACKS])
_created: list[object] = []


def _local_model(repo_id: str, filename: str) -> str:
    name = filename.rsplit("/", 1)[-1]
    if name not in _models:
        raise FileNotFoundError(f"no stand-in for {repo_id}/{filename}")
    return _models[name]


def _chosen_class() -> type[llama_cpp.Llama]:
    if os.environ[CLASS] == "Llama":
        return llama_cpp.Llama
    from pysteer import SteeredLlama

    return SteeredLlama


class StandIn(_chosen_class()):  # type: ignore[misc]
    """The class under test, counting its instances."""

    def __init__(self, model_path, **kwargs):
        _created.append(None)
        kwargs.update(n_threads=1, n_threads_batch=1)  # see ARGUMENTS in conftest.py
        if model_path in _packs:
            kwargs["pack"] = _packs[model_path]
            kwargs["policy"] = {"categories": {"c": {"mode": "always"}}}
        if kwargs.get("embedding"):
            # The encoder that they name has its pooling in the file; a decoder is told.
            kwargs.setdefault("pooling_type", llama_cpp.LLAMA_POOLING_TYPE_MEAN)
        super().__init__(model_path, **kwargs)


huggingface_hub.hf_hub_download = _local_model
llama_cpp.Llama = StandIn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Count the models that the test creates."""
    _created.clear()
    try:
        return (yield)
    finally:
        item.user_properties.append((CREATED, len(_created)))
