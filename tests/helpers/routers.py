"""A router for a tiny model, made by hand from llama.cpp's own activations."""

from contextlib import closing

import numpy as np

from pysteer import HookedLlama
from pysteer.pack.router import GATES, Gate, Read, Router

HALVES_ARE_NOT_ENOUGH = {"type_k": 0, "type_v": 0}  # a KV cache of float32
SEVERAL = (Read(0, "prompt"), Read(2, "suffix"), Read(1, "prompt"), Read(2, "prompt"))


def mean_state(path, tokens, layer, span=None, site="residual"):
    threads = {"n_threads": 1, "n_threads_batch": 1}
    arguments = {"n_ctx": 256, "verbose": False, **threads, **HALVES_ARE_NOT_ENOUGH}
    with closing(HookedLlama(path, **arguments)) as llm:
        return llm.capture(tokens, sites=[site], layers=[layer], pool="mean", span=span)[site][
            layer
        ]


def state_of(path, tokens, router, *, user=None, spans=None):
    """Return the state that a router reads, from a capture for each of its reads.

    Args:
        user: token range of the user's message; None: there is none, so the whole prompt.
        spans: for each read the token range instead; a list.
    """
    n = len(tokens)
    start, stop = user or (0, n)
    ranges = {
        "last": (n - 1, n),
        "prompt": (0, n),
        "user": (start, stop),
        "suffix": (min(stop, n - 1), n),
    }
    if spans is None:
        spans = [ranges[read.pooling] for read in router.reads]
    states = [
        mean_state(path, tokens, read.layer, span, router.site)
        for read, span in zip(router.reads, spans, strict=True)
    ]
    return np.concatenate(states).astype(np.float64)


class _Place:
    def __init__(self, reads, site):
        self.reads, self.site = reads, site


def router_for(path, prompts, *, layer=1, pooling="prompt", site="residual", reads=None):
    """Return a router whose probe k opens for `prompts[k]` alone.

    So does its margin gate, if there are prompts for no gate; else that finds harm everywhere.

    Args:
        prompts: category to tokens; the name "" is for prompts that no gate opens for.
        reads: where it looks; by default `pooling` at `layer` alone.
    """
    reads = tuple(reads or [Read(layer, pooling)])
    states = {n: state_of(path, t, _Place(reads, site)) for n, t in prompts.items()}
    names = [name for name in prompts if name]
    k, n = len(names), len(next(iter(states.values())))
    others = {
        name: np.mean([state for other, state in states.items() if other != name], axis=0)
        for name in names
    }
    probe = np.stack([states[name] - others[name] for name in names])
    middle = [probe[i] @ (states[name] + others[name]) / 2 for i, name in enumerate(names)]
    harmless, threshold = np.zeros(n), 1.0
    if "" in states:
        harmful = np.mean([states[name] for name in names], axis=0)
        harmless = states[""] - harmful
        threshold = harmless @ (states[""] + harmful) / 2
    zeros = np.zeros(k)
    return Router(
        site=site,
        reads=reads,
        categories=names,
        margin_weight=np.vstack([harmless, probe]),
        margin_bias=np.concatenate([[-threshold], -np.array(middle)]),
        allowances=zeros,
        weight=np.vstack([np.zeros(n), probe]),
        bias=np.concatenate([[0.0], -np.array(middle)]),
        probe_weight=probe,
        probe_bias=-np.array(middle),
        centroids=np.stack([states.get("", np.zeros(n)), *[states[name] for name in names]]),
        conditions=probe,
        gates={
            kind: Gate(zeros + (0.5 if kind == "multinomial" else 0), zeros == 0, *[zeros] * 3)
            for kind in GATES
        },
        confusion=np.eye(k + 1, dtype=np.int64),
        threshold_rule="youden",
        train_counts=np.ones(k + 1, np.int64),
    )
