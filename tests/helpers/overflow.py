"""A pack whose categories overflow where nothing is steered, for the tests of the engine."""

from contextlib import closing
from functools import cache

import llama_cpp
import numpy as np
from routers import router_for
from serving import ARGUMENTS, GREEDY, PROMPTS, text

from pysteer import Engine, HookedLlama, SteeringPack, SteeringVector
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy

HONEST = [
    {"prompt": [*PROMPTS["a"], *range(270, 300)], "steering": None},
    {"prompt": [*PROMPTS["a"], *range(270, 300)], "steering": {"mild": 1.0}},
    {"prompt": PROMPTS["a"], "steering": "auto"},
    {"prompt": PROMPTS[""], "steering": "auto", "policy": {"recheck": 4, "scope": "response"}},
    {"prompt": [*range(266, 316)] * 2, "steering": {"mild": -1.0}, "seed": 3, "temperature": 0.8},
    {"prompt": PROMPTS["b"], "steering": {"mild": "auto"}, "seed": 4, "temperature": 1.0},
    {"prompt": PROMPTS["b"], "steering": {"mild": 0.5}, "policy": {"scope": "linear 6"}},
    {"prompt": [*PROMPTS["a"], *range(270, 305)], "steering": None},
]
"""Requests of all kinds of steering, short of the arguments of `honest`."""

SIGNS = np.sign(np.random.default_rng(0).standard_normal(4096)).astype(np.float32)


@cache
def overflow_pack(path):
    """Return categories that are finite where they act, alone, up to a strength of 3e38.

    Two of them overflow in the sum of the residual, or one by itself under LayerNorm.
    """
    with closing(HookedLlama(path, verbose=False)) as llm:
        width, sites, top = llm.n_embd(), llm.sites, llm.n_layer - 1
    signs = SIGNS[:width]
    places = {"early": ("residual", 1), "late": ("residual", 2), "last": ("residual", top)}
    for site in ("attention", "mlp"):
        layers = [layer for layer in sites[site] if layer > 1]
        if layers:
            places[site] = (site, layers[0])
    vectors = {
        name: SteeringVector({layer: signs}, site=site) for name, (site, layer) in places.items()
    }
    vectors["low_rank"] = SteeringVector(
        {1: np.stack([signs, signs])}, operator=Operator("low_rank")
    )
    vectors["mild"] = SteeringVector({1: 0.5 * SIGNS[-width:]})
    return SteeringPack(
        vectors,
        router=router_for(path, {"mild": PROMPTS["a"], "": PROMPTS[""]}),
        policy=Policy(gate="probe"),
    )


def hostile_steerings(path):
    """Return steerings that fail on this model: the first at a site, the others behind it."""
    found = [{"early": 2e38, "late": 2e38}]
    if not {"gemma3", "mamba"} & set(path.stem.split("-")):  # these get a last state of zeros
        found += [{"early": 2e38, name: 2e38} for name in ("attention", "mlp")]
    if "gpt2" in path.stem:  # LayerNorm
        found += [{"early": 3e38}, {"low_rank": 1e37}]
    return [each for each in found if set(each) <= set(overflow_pack(path).categories)]


def honest(request):
    return {"max_tokens": 24, **GREEDY, **request}


def engine_for(path, **arguments):
    pack = overflow_pack(path)
    return Engine(path, pack=pack, **{**ARGUMENTS, "max_sequences": 12, "n_ctx": 2048, **arguments})


def alone(path, requests, **arguments):
    """Return the answers to requests, each from an engine's empty cache, one after the other."""
    with engine_for(path, **arguments) as engine:
        found = []
        for request in requests:
            with engine.together():
                handle = engine.submit(**request)
            found.append(handle.result(60))
    return found


def steady(path, requests, *, noise, **arguments):
    """Return the requests whose answers do not rest on rounding, and their answers alone.

    Sums round differently in batches of different sizes.
    """

    def disturb(seed):
        rng = np.random.default_rng(seed)

        def process(tokens, logits):
            return logits + rng.uniform(-noise, noise, len(logits)).astype(np.float32)

        return llama_cpp.LogitsProcessorList([process])

    expected = alone(path, requests, **arguments)
    others = [
        alone(
            path, [{**request, "logits_processor": disturb(k)} for request in requests], **arguments
        )
        for k in range(2)
    ]
    kept = [
        k
        for k, each in enumerate(expected)
        if all(text(each) == text(other[k]) for other in others)
    ]
    assert len(kept) >= 5
    return [requests[k] for k in kept], [expected[k] for k in kept]
