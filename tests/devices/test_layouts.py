"""Layers on servers, in every layout of llama.cpp's: steered, read and captured alike.

The other tests run with --devices rpc as well; there, each server holds about half of the layers.
"""

from contextlib import closing

import numpy as np
import pytest
from exactness import check_exact, random_vector, same_bits
from states import LAYER, components_of, reading_pack

from pysteer import HookedLlama, SteeredLlama, SteeringPack, SteeringVector
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy

pytestmark = pytest.mark.devices

N_LAYER, N_EMBD = 4, 64
TOKENS = [int(t) for t in np.random.default_rng(8).integers(5, 320, 21)]
ARGUMENTS = {"n_ctx": 128, "n_ubatch": 8, "logits_all": True, "verbose": False}
# Arguments of llama.cpp, and for each layer the memory of its output: "0" and "1" are the servers,
# "h" is the host. llama.cpp counts the output matrix as one more layer, and computes the output of
# the last layer on the host where the next layer is.
LAYOUTS = {
    "halves": ({"tensor_split": [2, 3]}, "0011"),
    "uneven": ({"tensor_split": [1, 4]}, "0111"),
    "first layers on the host": ({"n_gpu_layers": 4, "tensor_split": [1, 1]}, "0001"),
    "only the last layer on a server": ({"n_gpu_layers": 2}, "hh00"),
    "cache on the host": ({"offload_kqv": False, "tensor_split": [2, 3]}, "0011"),
    "some layers and the cache on the host": ({"n_gpu_layers": 3, "offload_kqv": False}, "h000"),
    "one server": ({"split_mode": 0, "main_gpu": 1}, "1111"),
    "host": ({"n_gpu_layers": 0}, "hhhh"),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_layers_are_in_the_memory_of_the_layout(tiny_llama, layout):
    arguments, expected = LAYOUTS[layout]
    with closing(HookedLlama(tiny_llama, **ARGUMENTS, **arguments)) as llm:
        residual = [node for node in llm.context.site_nodes if node.site.name == "residual"]
    names = {node.layer: node.backend for node in residual}
    on_servers = ["RPC" in names[layer] for layer in range(N_LAYER)]
    assert on_servers == [memory != "h" for memory in expected]
    for layer in range(N_LAYER - 1):
        same = expected[layer] == expected[layer + 1]
        assert (names[layer] == names[layer + 1]) is same


@layouts
@pytest.mark.parametrize("family", ["llama", "gemma3n"])
def test_logits_equal_the_control_vector_in_every_layout(tiny_model, family, layout):
    check_exact(tiny_model(family), scale=0.3, n_ubatch=16, **LAYOUTS[layout][0])


@layouts
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
def test_capture_equals_the_host_in_every_layout(tiny_llama, layout, site):
    found = []
    for arguments in (LAYOUTS[layout][0], {"n_gpu_layers": 0}):
        with closing(HookedLlama(tiny_llama, **ARGUMENTS, **arguments)) as llm:
            found.append(llm.capture(TOKENS, sites=[site], pool="all")[site])
    for layer in range(N_LAYER):
        # A server computes with other kernels than the host, which rearranges weights.
        np.testing.assert_allclose(found[0][layer], found[1][layer], atol=2e-4)


@layouts
@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
def test_ablation_at_all_layers_removes_the_direction_in_every_layout(tiny_llama, layout, site):
    directions = np.random.default_rng(3).standard_normal((N_LAYER, N_EMBD))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    vector = SteeringVector(dict(enumerate(directions)), site=site, operator=Operator("ablate"))
    arguments = {**ARGUMENTS, **LAYOUTS[layout][0]}
    with closing(SteeredLlama(tiny_llama, pack=SteeringPack({"c": vector}), **arguments)) as llm:
        plain = llm.capture(TOKENS, sites=[site], pool="all")[site]
        with llm.steering({"c": 1.0}):
            steered = llm.capture(TOKENS, sites=[site], pool="all")[site]
    expected = plain[0] - np.outer(plain[0] @ directions[0], directions[0])
    np.testing.assert_allclose(steered[0], expected, atol=1e-5)  # later layers have other inputs
    for layer, direction in enumerate(directions):
        assert np.abs(steered[layer] @ direction).max() < 1e-5
        assert np.abs(plain[layer] @ direction).max() > 1e-2


@layouts
def test_router_reads_the_captured_rows_in_every_layout(tiny_llama, layout):
    pack = reading_pack(N_EMBD, poolings=("prompt", "last"))
    arguments = {**ARGUMENTS, **LAYOUTS[layout][0]}
    with closing(SteeredLlama(tiny_llama, pack=pack, **arguments)) as llm:
        result = llm.create_completion(TOKENS, steering="auto", max_tokens=2)
        expected = [
            llm.capture(TOKENS, layers=[LAYER], pool=pool)["residual"][LAYER][component]
            for pool in ("mean", "last")
            for component in components_of(N_EMBD)
        ]
    scores = list(result["steering"]["scores"].values())
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@layouts
@pytest.mark.parametrize("family", ["llama", "gemma3n"])
def test_scheduled_rows_equal_hooked_rows_in_every_layout(tiny_model, family, layout):
    """Every token has a factor of its own, from a table in the memory of each layer."""
    path = tiny_model(family)
    arguments = {**ARGUMENTS, **LAYOUTS[layout][0]}
    found = []
    for injection in ("auto", "hooked"):
        with closing(HookedLlama(path, **arguments)) as llm:
            vector = random_vector(llm.n_layer, llm.n_embd(), 0.3)
        pack = SteeringPack({"c": vector}, policy=Policy(scope="linear 90"))
        with closing(SteeredLlama(path, pack=pack, injection=injection, **arguments)) as llm:
            with llm.steering({"c": 1.0}):
                llm.eval(TOKENS[:-1])
                llm.eval(TOKENS[-1:])
            found.append((llm.scores[: len(TOKENS)].copy(), llm.context.cuts))
    assert same_bits(found[0][0], found[1][0])
    assert found[0][1] == 0
    assert found[1][1] > 0
