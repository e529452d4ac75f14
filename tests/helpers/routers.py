"""A router for a tiny model, made by hand from activations that llama.cpp itself computes."""

from contextlib import closing

import numpy as np

from pysteer import HookedLlama
from pysteer.router import GATES, Gate, Router

HALVES_ARE_NOT_ENOUGH = {"type_k": 0, "type_v": 0}  # a KV cache of float32


def mean_state(path, tokens, layer, span=None, site="residual"):
    threads = {"n_threads": 1, "n_threads_batch": 1}
    arguments = {"n_ctx": 256, "verbose": False, **threads, **HALVES_ARE_NOT_ENOUGH}
    with closing(HookedLlama(path, **arguments)) as llm:
        return llm.capture(tokens, sites=[site], layers=[layer], pool="mean", span=span)[site][
            layer
        ]


def router_for(path, prompts, *, layer=1, pooling="prompt", site="residual"):
    """Opens category k's probe for `prompts[k]`, and for none of the others.

    Args:
        prompts: category to tokens; the name "" is for prompts that no gate opens for.
    """
    spans = {
        name: (len(t) - 1, len(t)) if pooling == "last" else None for name, t in prompts.items()
    }
    states = {n: mean_state(path, t, layer, spans[n], site) for n, t in prompts.items()}
    names = [name for name in prompts if name]
    k, n = len(names), len(next(iter(states.values())))
    others = {
        name: np.mean([state for other, state in states.items() if other != name], axis=0)
        for name in names
    }
    probe = np.stack([states[name] - others[name] for name in names])
    middle = [probe[i] @ (states[name] + others[name]) / 2 for i, name in enumerate(names)]
    zeros = np.zeros(k)
    return Router(
        site=site,
        layer=layer,
        pooling=pooling,
        categories=names,
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
        layer_scores={},
    )
