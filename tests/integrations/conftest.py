"""Models with the same weights: two steered by requests, and two to compare with."""

from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import SimpleNamespace

import llama_cpp
import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringPack, SteeringVector
from pysteer.llama.control_vector import set_native_control_vector

# One thread, for prompts as well: two threads wait for each other in a loop, which takes many times
# as long beside other processes.
ARGUMENTS = {
    "n_ctx": 512,
    "logits_all": True,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
}


@dataclass(frozen=True)
class Models:
    """`plain` is unsteered; `native` has the pack's category as its control vector."""

    plain: llama_cpp.Llama
    native: llama_cpp.Llama
    resident: SteeredLlama
    hooked: SteeredLlama

    @property
    def steered(self) -> tuple[SteeredLlama, SteeredLlama]:
        """The models of both injections."""
        return self.resident, self.hooked


def random_pack(layers, n_embd, scale):
    """Return a pack of one category, "c", which changes the text."""
    rng = np.random.default_rng(11)
    directions = {layer: scale * rng.standard_normal(n_embd) for layer in layers}
    return SteeringPack({"c": SteeringVector(directions)})


def open_models(stack, path, pack, **arguments):
    """Return the models of `path`, closed with `stack`."""
    arguments = {**ARGUMENTS, **arguments}
    plain, native = (
        stack.enter_context(closing(llama_cpp.Llama(str(path), **arguments))) for _ in range(2)
    )
    resident, hooked = (
        stack.enter_context(closing(SteeredLlama(path, pack=pack, injection=mode, **arguments)))
        for mode in ("resident", "hooked")
    )
    rows = np.zeros((resident.n_layer - 1, resident.n_embd()), np.float32)
    for layer, direction in pack["c"].items():
        rows[layer - 1] = direction
    set_native_control_vector(native, rows)
    return Models(plain, native, resident, hooked)


@pytest.fixture(scope="session")
def pack():
    """A pack for the default model."""
    return random_pack((10, 14, 18), 576, 2.0)


@pytest.fixture(scope="module")
def models(default_model, pack):
    """The default model."""
    with ExitStack() as stack:
        yield open_models(stack, default_model, pack)


@pytest.fixture(scope="module")
def tiny_models(tiny_llama):
    """A random model of 320 tokens, for tests that take long with a large vocabulary."""
    with ExitStack() as stack:
        yield open_models(stack, tiny_llama, random_pack((1, 2), 64, 1.0), n_ctx=1024)


@pytest.fixture(scope="session")
def opened():
    """`random_pack` and `open_models`, for tests that choose how a model is loaded."""
    return SimpleNamespace(pack=random_pack, models=open_models)
