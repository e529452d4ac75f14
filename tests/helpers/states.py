"""Hidden states of a router, when it is fitted and when a model serves."""

import numpy as np

from pysteer import SteeringPack, SteeringVector
from pysteer.extract.inputs import Tokenizer
from pysteer.pack.policy import Policy
from pysteer.pack.router import Gate, Read, Router
from pysteer.prompts import Prompt

LAYER = 1
N_COMPONENTS = 32
POOLINGS = ("user", "suffix", "last", "prompt")


def reading_pack(n_embd, poolings=POOLINGS):
    """A pack whose gates never open, and whose scores are components of what the router reads.

    A probe's score is the product of its weights and h, in float64. The weights are unit vectors,
    so the scores are exactly components of h: first of the mean over the user's message, then of
    the other poolings, `N_COMPONENTS` spread evenly over n_embd.
    """
    width = n_embd * len(poolings)
    components = [
        read * n_embd + component
        for read in range(len(poolings))
        for component in components_of(n_embd)
    ]
    k = len(components)
    names = [f"c{i}" for i in range(k)]
    weights = np.zeros((k, width))
    weights[np.arange(k), components] = 1.0
    never = Gate(np.full(k, 1e30), np.ones(k, bool), *[np.zeros(k)] * 3)
    router = Router(
        site="residual",
        reads=[Read(LAYER, pooling) for pooling in poolings],
        categories=names,
        gates={"probe": never, "multinomial": never},
        confusion=np.eye(k + 1, dtype=np.int64),
        threshold_rule="youden",
        train_counts=np.ones(k + 1, np.int64),
        weight=np.zeros((k + 1, width)),
        bias=np.zeros(k + 1),
        probe_weight=weights,
        probe_bias=np.zeros(k),
    )
    vector = SteeringVector({LAYER: np.ones(n_embd)})
    return SteeringPack(dict.fromkeys(names, vector), router=router, policy=Policy(gate="probe"))


def components_of(n_embd):
    """The components of h that `reading_pack` reads."""
    return np.linspace(0, n_embd - 1, N_COMPONENTS).astype(int)


def read_states(result):
    """Pooling to the components of h that the router read, as float32; of `reading_pack`."""
    scores = np.array(list(result["steering"]["scores"].values()), np.float64)
    return dict(zip(POOLINGS, scores.astype(np.float32).reshape(-1, N_COMPONENTS), strict=True))


def rows_by_pooling(capture, text):
    """Pooling to the row that a router is fitted on."""
    prompt = Tokenizer(capture)(Prompt(text))
    return {pooling: prompt.row(pooling) for pooling in POOLINGS}


def captured_states(capture, rows):
    """The same components of the activations that a router is fitted on, of each row alone."""
    n_embd = capture.base_model.n_embd
    found = {}
    for pooling, row in rows.items():
        ((_, means),) = capture.activations([row], site="residual", layers=[LAYER])
        found[pooling] = means[0, components_of(n_embd)]
    return found
