"""Operators as values: their options, and packs that store them."""

import re

import numpy as np
import pytest

from pysteer import SteeringError, SteeringPack, SteeringVector
from pysteer.pack.operators import OPERATORS, Operator

EVERY_KIND = [
    Operator(),
    Operator(keep_norm=True),
    Operator("ablate", one_sided=True),
    Operator("clamp", low=-1.5, high=2.5),
    Operator("clamp", high=0.25, keep_norm=True),
    Operator("rotate", angle=0.5, target=True),
    Operator("low_rank"),
]


def test_every_kind_is_among_the_examples():
    assert {operator.kind for operator in EVERY_KIND} == set(OPERATORS)


@pytest.mark.parametrize("operator", EVERY_KIND, ids=str)
def test_operator_from_its_content_equals_the_operator(operator):
    assert Operator.from_content(operator.content()) == operator


@pytest.mark.parametrize("operator", EVERY_KIND, ids=str)
def test_saved_pack_keeps_operator_and_rows(operator, tmp_path):
    rng = np.random.default_rng(0)
    n_rows = operator.rows_per_layer or 4
    shape = (8,) if n_rows == 1 else (n_rows, 8)
    directions = {layer: rng.standard_normal(shape).astype(np.float32) for layer in (0, 3)}
    vector = SteeringVector(directions, operator=operator)
    SteeringPack({"malware": vector}).save(tmp_path / "pack.gguf")
    loaded = SteeringPack.load(tmp_path / "pack.gguf")["malware"]
    assert loaded.operator == operator
    assert loaded == vector
    for layer, rows in directions.items():
        np.testing.assert_array_equal(loaded.direction(layer), rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "scale"}, "unknown operator 'scale'; use one of add, ablate"),
        ({"kind": ["add"]}, "unknown operator"),
        ({"keep_norm": 1}, "keep_norm of an operator is 1, not True or False"),
        ({"one_sided": True}, "the operator add has no one_sided; one_sided belongs to ablate"),
        ({"kind": "ablate", "low": 1.0}, "has no low; low belongs to clamp"),
        ({"kind": "clamp", "low": 1.0, "angle": 1.0}, "has no angle; angle belongs to rotate"),
        ({"kind": "clamp"}, "the operator clamp needs low, high or both"),
        ({"kind": "clamp", "low": 2, "high": 1}, "low 2.0 above high 1.0"),
        ({"kind": "clamp", "low": float("nan")}, "low of an operator is nan, not a finite number"),
        ({"kind": "clamp", "low": True}, "low of an operator is True, not a finite number"),
        ({"kind": "rotate"}, "the operator rotate needs an angle"),
        ({"kind": "rotate", "angle": None}, "angle of an operator is None, not a finite number"),
        ({"kind": "rotate", "angle": 1e39}, "not a finite number"),
    ],
)
def test_invalid_options_raise_with_the_option_named(options, message):
    with pytest.raises(SteeringError, match=re.escape(message)):
        Operator(**options)
