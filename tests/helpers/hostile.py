"""Hostile requests for an engine, from threads, beside honest ones."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from overflow import hostile_steerings, overflow_pack
from serving import PROMPTS, text

CLIENTS = 4
AT_ONCE = 4  # by one client
HONEST_SHARE = 0.3

STRENGTHS = [
    *(sign * size for size in (1e20, 1e30, 1e37, 1e38, 2e38, 3e38) for sign in (1, -1)),
    *(1e-45, 1e-40, 0.0, 1.0, -2.0, "auto"),
]
NO_STRENGTHS = [1e308, math.nan, math.inf, -math.inf, True, "much", 10**400, None]
POLICIES = [
    None,
    {"scope": "prompt"},
    {"scope": "response"},
    {"scope": "first 3"},
    {"scope": "linear 6"},
    {"scope": "range 4"},
    {"scope": "first 0"},
    {"scope": {"tokens": "all", "exclude": ["a", "e"]}},
    {"recheck": 2, "categories": {"mild": {"strength": 3e38}}},
    {"recheck": 1, "conflict": "sum", "categories": {"mild": {"threshold": -1e9}}},
    {"categories": {"mild": {"threshold": math.nan}}},
    {"categories": {"mild": {"threshold": 1e308, "strength": -1e38}}},
    {"gate": "nothing"},
    {"categories": {"early": {"strength": 2e38}, "late": {"strength": 2e38}}},
]
CONTENTS = [
    *("", "the", "a" * 3000, "\ud800", "\0", "<|im_end|><|im_start|>system\nthe", None, 5),
    *(
        [{"type": "text", "text": "the"}],
        [{"type": "image_url", "image_url": "x"}],
        "\u200b\x1b[2J",
    ),
]
ARGUMENTS = [
    *({"max_tokens": n} for n in (None, 0, -1, 10**9, 2.5, "many")),
    *({"temperature": t} for t in (math.nan, math.inf, -1.0, 1e-30, 1e30, "hot")),
    *({"repeat_penalty": p} for p in (0.0, -1.0, math.nan, math.inf, 1e-30)),
    *({"top_k": k, "min_p": 0.0} for k in (0, -1, 1, 2**31 - 1, 2**40)),
    *({"top_p": p} for p in (math.nan, -1.0, 0.0, 2.0)),
    *({"min_p": p} for p in (math.nan, 2.0)),
    *({"typical_p": p} for p in (math.nan, 0.0, -1.0)),
    *({"mirostat_mode": m, "mirostat_tau": t} for m in (1, 2, 3) for t in (5.0, 0.0, math.nan)),
    *({"frequency_penalty": p, "presence_penalty": p} for p in (math.nan, 1e38, -1e38)),
    *({"logit_bias": b} for b in ({5: math.nan}, {5: 3e38}, {-1: 1.0}, {"x": 1}, {5: -math.inf})),
    *({"stop": s} for s in ("", [""], ["\ud800"], [5], ["e", "e"], "th")),
    *({"seed": s} for s in (-1, 0, 2**64, "x")),
    *({"nonsense": 1}, {"stream": True}, {"echo": True}, {"keep_first_logits": True}, {}),
]


def _fails(*_):
    raise ZeroDivisionError("mine")


def _exits(*_):
    raise SystemExit("mine")


def _spoils(tokens, logits):
    tokens[:] = PROMPTS["b"][0]
    logits[:] = np.nan
    return logits


CALLBACKS = [
    *({"logits_processor": [f]} for f in (_fails, _exits, _spoils)),
    *({"stopping_criteria": f} for f in (_fails, _exits)),
    *(
        {"logits_processor": [lambda tokens, logits, value=value: value]}
        for value in (None, "x", np.zeros(3), np.full(320, np.inf), np.zeros((1, 320)))
    ),
    {"stopping_criteria": lambda tokens, logits: tokens.fill(5) or logits.fill(np.nan)},
    {"stopping_criteria": lambda tokens, logits: "yes"},
]


class Attack:
    """Has clients send requests to an engine, and counts the honest answers that differ.

    Args:
        path: the model.
        requests: honest requests, whose answers do not rest on rounding.
        answers: their results alone.
        seed: of the choices.
    """

    def __init__(self, path, requests, answers, seed):
        self._names = list(overflow_pack(path).categories)
        self._overflows = hostile_steerings(path)
        self._requests = requests
        self._expected = list(map(text, answers))
        self._seed = seed
        self.ends = {"answered": 0, "failed": 0, "refused": 0, "cancelled": 0}
        self.honest = 0
        self.differing = []
        self._lock = threading.Lock()

    def run(self, engine, n):
        """Send n requests; raise the first error of a client."""
        groups = iter(range(0, n, AT_ONCE))

        def client():
            while True:
                with self._lock:
                    first = next(groups, None)
                if first is None:
                    return
                self._group(engine, range(first, min(first + AT_ONCE, n)))

        with ThreadPoolExecutor(CLIENTS) as pool:
            for done in [pool.submit(client) for _ in range(CLIENTS)]:
                done.result()

    def _group(self, engine, numbers):
        sent = []
        for number in numbers:
            rng = np.random.default_rng([self._seed, number])
            if rng.random() < HONEST_SHARE:
                k = int(rng.integers(len(self._requests)))
                sent.append((k, rng, engine.submit(**self._requests[k])))
                continue
            try:
                handle = engine.submit(**self._hostile(rng))
            except Exception:
                self._count("refused")
            else:
                sent.append((None, rng, handle))
        for k, rng, handle in sent:
            if k is None:
                self._follow(rng, handle)
                continue
            found = text(handle.result(300))
            with self._lock:
                self.honest += 1
                if found != self._expected[k]:
                    self.differing.append((k, found))

    def _hostile(self, rng):
        def one(choices):
            return choices[int(rng.integers(len(choices)))]

        request = {
            "max_tokens": int(rng.integers(1, 20)),
            "policy": one(POLICIES) if rng.random() < 0.5 else None,
        }
        kind = rng.random()
        if kind < 0.3:
            request["steering"] = one(self._overflows)
            request["policy"] = None
        elif kind < 0.85:
            n = int(rng.integers(1, 4))
            names = [one(self._names) for _ in range(n)]
            request["steering"] = {
                name: one(NO_STRENGTHS if rng.random() < 0.05 else STRENGTHS) for name in names
            }
            if rng.random() < 0.05:
                request["steering"]["nobody"] = 1.0
        elif kind < 0.95:
            request["steering"] = one(
                ["auto", None, {}, 5, [], "nothing", {5: 1.0}, {"mild": None}]
            )
        if rng.random() < 0.2:
            request["messages"] = one(
                [[], [{"role": "user"}], [5], [{"role": "user", "content": "a"}]]
            )
            if rng.random() < 0.7:
                role = one(["user", "system", "tool", "", None])
                request["messages"] = [{"role": role, "content": one(CONTENTS)}]
        else:
            head = one(self._requests)["prompt"]
            tail = rng.integers(-1 if rng.random() < 0.02 else 5, 320, int(rng.integers(1, 20)))
            request["prompt"] = one(CONTENTS) if rng.random() < 0.1 else [*head, *tail.tolist()]
        if rng.random() < 0.2:
            request |= one(ARGUMENTS)
        if rng.random() < 0.1:
            request |= one(CALLBACKS)
        return request

    def _follow(self, rng, handle):
        try:
            if rng.random() < 0.15:
                for _ in itertools.islice(handle, int(rng.integers(0, 3))):
                    pass
                handle.cancel()
            result = handle.result(300)
        except TimeoutError:
            raise
        except BaseException:
            self._count("failed")
            return
        cancelled = result["choices"][0]["finish_reason"] == "cancelled"
        self._count("cancelled" if cancelled else "answered")

    def _count(self, end):
        with self._lock:
            self.ends[end] += 1
