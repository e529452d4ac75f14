"""Examples of a descent, and its losses by plain forward passes with hooks."""

from contextlib import ExitStack

import numpy as np
import torch

from pysteer.extract.learning.learn import Example

WIDTH = 64
# A shared start that is longer than Gemma's tiny sliding window.
START = tuple(range(40, 60))


def tokens(count, seed, start=()):
    """Return sequences of differing lengths, some longer than Gemma's tiny sliding window."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 28, size=count)
    return [start + tuple(rng.integers(5, 300, size=n).tolist()) for n in lengths]


def examples(count, seed, answer_seed=99, start=()):
    answers = [a[:4] for a in tokens(3, answer_seed)]
    return [Example(p, answers[i % 3]) for i, p in enumerate(tokens(count, seed, start))]


def random_directions(n_layers, seed=0, size=0.3):
    rng = np.random.default_rng(seed)
    return torch.tensor(size * rng.standard_normal((n_layers, WIDTH)), dtype=torch.float32)


def plain_logits(model, sequence, site="residual", directions=None):
    """Return logits of one sequence, shape (tokens, n_vocab), by plain hooks."""
    with ExitStack() as stack, torch.no_grad():
        for layer, direction in (directions or {}).items():

            def add(_module, _inputs, output, direction=direction):
                direction = torch.as_tensor(direction)
                if isinstance(output, tuple):
                    return (output[0] + direction, *output[1:])
                return output + direction

            stack.enter_context(model.module(site, layer).register_forward_hook(add))
        ids = torch.tensor([sequence])
        return model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def plain_losses(model, unsafe, benign, directions, first_token_weight, kl_tokens):
    """Return mean cross-entropy and KL, in numpy, one sequence at a time."""

    def log_softmax(logits):
        x = logits.numpy().astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    def mean(values):
        weights = np.ones(len(values))
        weights[0] = first_token_weight
        return (weights * values).sum() / weights.sum()

    ce, kl = [], []
    for prompt, answer in unsafe:
        logits = log_softmax(plain_logits(model, prompt + answer, directions=directions))
        rows = np.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        ce.append(mean(-logits[rows, list(answer)]))
    for prompt in benign:
        answer = ()
        while len(answer) < kl_tokens - 1:  # greedy; no token of these models ends an answer
            answer += (int(plain_logits(model, prompt + answer)[-1].argmax()),)
        before = log_softmax(plain_logits(model, prompt + answer))[len(prompt) - 1 :]
        after = log_softmax(plain_logits(model, prompt + answer, directions=directions))
        after = after[len(prompt) - 1 :]
        kl.append(mean((np.exp(before) * (before - after)).sum(axis=1)))
    return np.mean(ce), np.mean(kl) if kl else 0.0
