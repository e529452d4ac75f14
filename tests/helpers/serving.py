"""A pack, random requests and their solo answers, for the tests of the engine."""

from contextlib import closing
from functools import cache

import numpy as np
from routers import router_for

from pysteer import SteeredLlama, SteeringPack, SteeringVector
from pysteer.pack.operators import Operator
from pysteer.pack.policy import Policy
from pysteer.runtime.ledger import CacheLedger

N_EMBD = 64
F32 = 0  # type of the KV cache: halves would hide differences
ARGUMENTS = {
    "max_relative_norm": None,  # or `TOO_STRONG` would be refused before anything is decoded
    "n_ctx": 512,
    "verbose": False,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": F32,
    "type_v": F32,
}
HIGH_BYTES = range(5 + 128, 5 + 256)  # kept out, so that every character is complete
GREEDY = {"temperature": 0.0, "logit_bias": dict.fromkeys(HIGH_BYTES, -1e3)}
PROMPTS = {
    "a": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20],
    "b": [40, 41, 42, 43, 44, 45, 46, 47],
    "": [70, 71, 72, 73, 74, 75, 76, 77, 78, 79],
}
STEERINGS = [
    (None, None),
    ("auto", None),
    ({"a": 1.0}, None),
    ({"b": -0.5, "c": 0.5}, None),
    ({"a": "auto", "b": 0.25}, None),
    ("auto", {"scope": "response"}),
    ("auto", {"recheck": 3, "scope": "response", "categories": {"a": {"threshold": 0.1}}}),
    ({"a": 1.0}, {"scope": "linear 6"}),
    ({"a": 1.0}, {"scope": {"tokens": "all", "exclude": ["a", "e"]}}),
    ("auto", {"conflict": "sum", "categories": {"b": {"when": "not a"}}}),
]
TOO_STRONG = [{"wild": 3e38}, {"a": "auto", "wild": 3e38}, {"huge": 1.0}]
"""Steerings that take the hidden state past float32; the last by smaller additions."""


def vector(seed, layers=(1, 2), **options):
    rng = np.random.default_rng(seed)
    return SteeringVector({i: 2 * rng.standard_normal(N_EMBD) for i in layers}, **options)


@cache
def pack_for(path):
    site = "residual" if path.name.startswith("mamba") else "attention"
    return SteeringPack(
        {
            "a": vector(1),
            "b": vector(2, layers=[2], site=site),  # where lfm2 has attention, too
            "c": vector(3, layers=[0, 3]),
            "wild": vector(4, layers=[0], operator=Operator("ablate")),
            "huge": SteeringVector(dict.fromkeys([1, 2], np.full(N_EMBD, 2e38))),
        },
        router=router_for(path, PROMPTS),
        policy=Policy(gate="probe"),
    )


def text(result):
    choice = result["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def random_requests(n, seed=0, longest=40):
    rng = np.random.default_rng(seed)
    requests = []
    for k in range(n):
        name = list(PROMPTS)[rng.integers(3)]
        head = PROMPTS[name] if k % 2 else []
        prompt = [*head, *rng.integers(266, 320, rng.integers(1, longest)).tolist()]
        steering, policy = STEERINGS[rng.integers(len(STEERINGS))]
        requests.append(
            {
                "prompt": prompt if k % 3 else PROMPTS[name],
                "steering": steering,
                "policy": policy,
                "max_tokens": int(rng.integers(1, 12)),
                **GREEDY,
            }
        )
    return requests


def solo_answers(path, requests, **arguments):
    """Return the answers of a `SteeredLlama`, each from an empty context."""
    with closing(SteeredLlama(path, pack=pack_for(path), **{**ARGUMENTS, **arguments})) as llm:
        found = []
        for request in requests:
            llm.reset()
            llm._cache._ledger = CacheLedger()
            found.append(llm.create_completion(**request))
    return found


def told(result):
    """Return the report without numbers that differ between batch sizes."""
    steering = dict(result["steering"])
    steering.pop("scores")
    steering.pop("ranks")
    categories = {}
    for name, category in steering.pop("categories").items():
        categories[name] = {key: value for key, value in category.items() if key != "score"}
    return steering, categories


def outcome(result):
    """Return everything that has to be equal for a request alone and in a batch."""
    return text(result), result["choices"][0]["finish_reason"], result["usage"], told(result)
