"""A pack whose categories overflow where nothing is steered, for the tests of the engine."""

from contextlib import closing
from functools import cache

import numpy as np
from routers import router_for
from serving import PROMPTS

from pysteer import HookedLlama, SteeringPack, SteeringVector
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy

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
