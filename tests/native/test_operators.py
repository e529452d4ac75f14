"""Every operator against its formula in numpy, on rows and inside a model."""

from contextlib import closing

import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringPack, SteeringVector, _native
from pysteer.pack.operators import Operator
from pysteer.runtime.native import native_operator

WIDTH = 96
RANK = 3
OPERATORS = {
    "add": Operator(),
    "ablate": Operator("ablate"),
    "ablate one-sided": Operator("ablate", one_sided=True),
    "clamp to a value": Operator("clamp", low=1.5, high=1.5),
    "clamp to a range": Operator("clamp", low=-0.5, high=0.5),
    "clamp from below": Operator("clamp", low=0.25),
    "clamp from above": Operator("clamp", high=-0.25),
    "rotate": Operator("rotate", angle=0.7),
    "rotate to a target": Operator("rotate", angle=2.5, target=True),
    "low_rank": Operator("low_rank"),
}
ROWS = {"rotate": 2, "low_rank": 2 * RANK}


def reference(operator, d, s, h):
    """The formulas of pysteer.pack.operators in float64; d: (rows, width), h: (n, width)."""
    d, h = d.astype(np.float64), h.astype(np.float64)
    out = []
    for row in h:
        new = row
        e = d[0] / np.linalg.norm(d[0])
        if operator.kind == "add":
            new = row + s * d[0]
        elif operator.kind == "ablate":
            if not operator.one_sided or row @ e > 0:
                new = row - s * (row @ e) * e
        elif operator.kind == "clamp":
            low = -np.inf if operator.low is None else operator.low
            high = np.inf if operator.high is None else operator.high
            new = row + s * (np.clip(row @ e, low, high) - row @ e) * e
        elif operator.kind == "rotate":
            second = d[1] - (d[1] @ e) * e
            second /= np.linalg.norm(second)
            c, angle = np.array([row @ e, row @ second]), s * operator.angle
            turned = np.array(
                [
                    [np.cos(angle), -np.sin(angle)],
                    [np.sin(angle), np.cos(angle)],
                ]
            ) @ (np.array([np.linalg.norm(c), 0.0]) if operator.target else c)
            new = row + (turned - c) @ np.array([e, second])
        elif operator.kind == "low_rank":
            u, v = d[:RANK].T, d[RANK:].T
            new = row + s * (u @ (v.T @ row))
        else:
            raise ValueError(f"no formula for {operator.kind}")
        if operator.keep_norm:
            new = new * np.linalg.norm(row) / np.linalg.norm(new)
        out.append(new)
    return np.array(out)


def directions(operator, seed=0, width=WIDTH, scale=1.0):
    rng = np.random.default_rng(seed)
    shape = (ROWS[operator.kind], width) if operator.kind in ROWS else (width,)
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def relative_error(found, expected):
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return errors.max()


@pytest.mark.parametrize("n_rows", [1, 512])
@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.4, 2.5])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_its_formula(name, strength, keep_norm, n_rows):
    operator = Operator(**{**vars(OPERATORS[name]), "keep_norm": keep_norm})
    d = directions(operator)
    vector = SteeringVector({1: d}, operator=operator)
    h = np.random.default_rng(n_rows).standard_normal((n_rows, WIDTH)).astype(np.float32)
    found = native_operator(operator).apply(vector.prepared[0], strength, h)
    expected = reference(operator, np.atleast_2d(d), np.float32(strength), h)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(expected, h.astype(np.float64)) > 1e-3 or n_rows == 1


def test_zero_row_stays_zero_when_norm_is_kept():
    operator = Operator("ablate", keep_norm=True)
    d = SteeringVector({1: directions(operator)}, operator=operator).prepared[0]
    assert not native_operator(operator).apply(d, 1.0, np.zeros((2, WIDTH), np.float32)).any()


ARGUMENTS = {"n_ctx": 64, "verbose": False, "n_threads": 1, "n_ubatch": 7}
TOKENS = list(range(10, 30))


@pytest.mark.parametrize("site", ["residual", "attention", "mlp"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_in_a_model_equals_operator_on_captured_rows(tiny_llama, site, name):
    operator = OPERATORS[name]
    d = directions(operator, width=64, scale=0.3)
    pack = SteeringPack({"c": SteeringVector({2: d}, site=site, operator=operator)})
    ask = {"sites": [site], "layers": [2], "pool": "all"}
    with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
        before = llm.capture(TOKENS, **ask)[site][2]
        with llm.steering({"c": 0.75}):
            after = llm.capture(TOKENS, **ask)[site][2]
    expected = reference(operator, np.atleast_2d(d), 0.75, before)
    assert relative_error(after, expected) < 1e-5
    assert not np.array_equal(after, before)


def test_operators_on_one_layer_act_in_pack_order(tiny_llama):
    names = ["add", "rotate", "ablate", "low_rank", "clamp to a value"]
    d = [directions(OPERATORS[n], seed, 64, 0.3) for seed, n in enumerate(names)]
    categories = {
        name: SteeringVector({1: rows}, operator=OPERATORS[name])
        for name, rows in zip(names, d, strict=True)
    }
    ask = {"layers": [1], "pool": "all"}
    for order in (names, names[::-1]):
        pack = SteeringPack({name: categories[name] for name in order})
        with closing(SteeredLlama(tiny_llama, pack=pack, **ARGUMENTS)) as llm:
            expected = llm.capture(TOKENS, **ask)["residual"][1]
            with llm.steering(dict.fromkeys(names, 0.5)):
                found = llm.capture(TOKENS, **ask)["residual"][1]
        for name in order:
            rows = np.atleast_2d(d[names.index(name)])
            expected = reference(OPERATORS[name], rows, 0.5, expected)
        assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
@pytest.mark.parametrize("other", [np.nan, -np.nan, np.inf, -np.inf, np.float32(-0.0), 3e38, -3e38])
def test_logits_are_usable_as_by_numpy_wherever_the_odd_value_stands(n, other):
    logits = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    for at in {0, n // 2, n - 1}:
        odd = logits.copy()
        odd[at] = other
        bad = np.isnan(odd).any() or np.isposinf(odd).any() or not np.isfinite(odd).any()
        assert _native.has_usable_logits(odd) == (not bad)
        assert _native.has_usable_logits(np.full(n, other, np.float32)) == bool(np.isfinite(other))
    assert _native.has_usable_logits(logits)
    assert not _native.has_usable_logits(np.empty(0, np.float32))
