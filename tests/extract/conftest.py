"""Tiny models in torch."""

import pytest


@pytest.fixture(scope="module")
def load(tiny_model):
    """A function from a family to its tiny model in torch, float32."""
    import torch

    from pysteer.extract.torch_model import TorchModel

    loaded = {}

    def get(family="llama"):
        if family not in loaded:
            loaded[family] = TorchModel(str(tiny_model(family)), dtype=torch.float32)
        return loaded[family]

    return get


@pytest.fixture
def model(load):
    return load()
