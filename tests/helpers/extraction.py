"""Data of an extraction, a fake model and a fake judge, for tests without a real model."""

import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from pysteer import BaseModel
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.methods import METHODS
from pysteer.judge import Verdict
from pysteer.prompts import Prompt


def prompts(side, category, count, *, listed=None, seed=0):
    """Return made-up prompts; the first word of each is its side."""
    rng = np.random.default_rng([seed, *f"{side} {category}".encode()])
    words = ["the", "of", "and", "a", "in", "it", "sea", "oil", "ring", "all"]
    found = []
    for i in range(count):
        text = " ".join([side, *category.split(), *rng.choice(words, rng.integers(2, 7))])
        found.append(
            Prompt(
                f"{text} {i}",
                listed if listed is not None else category,
                response=" ".join(["so", side, *rng.choice(words, 3)]),
                pair_id=str(i),
            )
        )
    return found


UNSAFE = [*prompts("harm", "hate", 11), *prompts("harm", "malware", 7)]
TWINS = [*prompts("calm", "malware", 7), *prompts("calm", "hate", 11)]
GENERIC = prompts("please", "any", 9, listed="")
MATCHED_DATA = Data(UNSAFE, TWINS)
GENERIC_DATA = Data(UNSAFE, GENERIC)

WIDTH = 6


class StopError(Exception):
    """Interrupts a test."""


class FakeJudge:
    """A judge by a function of prompt and answer that returns True for a safe answer."""

    name = "fake"
    identity = None

    def __init__(self, is_safe):
        self.is_safe = is_safe

    def judge(self, items):
        return [Verdict(self.is_safe(item.prompt, item.answer)) for item in items]

    def close(self):
        pass


@dataclass
class FakeCapture:
    """A model whose activations are a hash of its tokens; it counts its runs, and can fail."""

    stop_after: int = 10**9
    identity: str = "a file"
    ran: Counter = field(default_factory=Counter)
    weights = "fake"
    base_model = BaseModel("fake", "", 4, WIDTH, 300)
    sites = {"residual": (0, 1, 2, 3), "attention": (1, 2), "mlp": ()}  # noqa: RUF012
    n_ctx = 200
    has_chat_template = True

    def prompt_tokens(self, prompt):
        return (290, *prompt.encode(), 291, 292)

    def response_tokens(self, text):
        return tuple(text.encode())

    def text(self, tokens):
        return bytes(token for token in tokens if token < 256).decode()  # none are special

    def answers(self, prompts, n_tokens):
        for index, prompt in enumerate(prompts):
            self._count(("answer", prompt))
            yield index, tuple(b"sure thing: " + bytes(prompt[1:6]))[:n_tokens]

    def activations(self, rows, *, site, layers):
        for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i)):
            row = rows[index]
            self._count((row, site, tuple(layers)))
            found = []
            for layer in layers:
                start = 1 if site == "residual" else 2
                part = bytes(t % 256 for t in row.tokens[: row.stop])
                seed = zlib.crc32(part + repr((row.start, site, layer)).encode())
                found.append(np.random.default_rng(seed).normal(start, 1, WIDTH))
                found[-1][0] += 3 * (b"harm" in part) + (b"hate" in part)
            yield index, np.array(found, np.float32)

    def _count(self, what):
        if self.stop_after == 0:
            raise StopError
        self.stop_after -= 1
        self.ran[what] += 1


def extract_fake(capture, folder, chosen, **given):
    labels = METHODS[chosen.method].needs.labels
    judge = FakeJudge(lambda prompt, _: prompt[-1] not in "0246") if labels else None
    unsafe = [replace(p, response=None) for p in UNSAFE] if judge else UNSAFE
    data = Data(unsafe, TWINS)
    return extract(capture, data, chosen, cache=folder, judge=judge, **given)


def contents(pack):
    return {
        name: {layer: row.tobytes() for layer, row in vector.items()}
        for name, vector in pack.categories.items()
    }


def tail_of(row):
    """Return the range of the tokens that `FakeCapture` puts behind a message."""
    return len(row.tokens) - 2, len(row.tokens)
