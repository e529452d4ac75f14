"""Vectors of a small pack for the tiny Llama, and options of commands that run the model."""

import numpy as np

from pysteer import SteeringVector

# One thread: several wait for each other on a busy machine. llama.cpp warns of a context that is
# longer than the model was trained for.
OPTIONS = ("--context", "256", "--threads", "1")
N_EMBD = 64


def directions(*layers, width=N_EMBD):
    rng = np.random.default_rng(1)
    return {layer: rng.normal(size=width) for layer in layers}


HATE = SteeringVector(directions(1, 2, 3))
MALWARE = SteeringVector(directions(0, 2), site="attention")
