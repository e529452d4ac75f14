"""Settings classes: descriptions of fields, and invalid values."""

import json
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest

from pysteer import SteeringError
from pysteer.settings import Setting, check, content, described, setting


@dataclass(frozen=True)
class Example:
    """Settings of every kind."""

    count: int = setting(3, "A count.", minimum=1, maximum=9)
    rate: float = setting(0.5, "A rate.", above=0)
    share: float | None = setting(None, "A share.", minimum=0, below=1)
    kind: Literal["plain", "fancy"] = setting("plain", "A kind.", choices=("plain", "fancy"))
    kinds: tuple[str, ...] = setting(("a",), "Kinds.", choices=("a", "b"))
    layers: tuple[int, ...] | None = setting(None, "Layers.", minimum=0)
    pooling: Literal["last", "user"] | tuple[int, int] = setting("last", "Tokens.", minimum=0)
    options: dict[str, float] = setting({}, "More.")
    plain: str = "not described"

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"count": 0}, "count must be at least 1 and at most 9, not 0"),
        ({"count": 10}, "count must be at least 1 and at most 9, not 10"),
        ({"count": 2.5}, "count must be an integer, not 2.5"),
        ({"count": "3"}, "count must be a finite number, not '3'"),
        ({"count": None}, "count must be a finite number, not None"),
        ({"rate": 0}, "rate must be above 0, not 0"),
        ({"rate": math.inf}, "rate must be a finite number, not inf"),
        ({"rate": math.nan}, "rate must be a finite number, not nan"),
        ({"share": 1.0}, "share must be at least 0 and below 1, not 1.0"),
        ({"share": -0.1}, "share must be at least 0 and below 1, not -0.1"),
        ({"kind": "odd"}, "unknown kind 'odd'; use one of plain, fancy"),
        ({"kinds": ("a", "c")}, "unknown item of kinds 'c'; use one of a, b"),
        ({"layers": (1, -1)}, "layers must be at least 0, not -1"),
        ({"pooling": (-1, 3)}, "pooling must be at least 0, not -1"),
    ],
)
def test_value_out_of_range_raises_with_expected_values(wrong, message):
    with pytest.raises(SteeringError) as raised:
        Example(**wrong)
    assert str(raised.value) == message


def test_values_at_the_bounds_pass():
    Example(count=9, rate=1e-9, share=0, kind="fancy", kinds=("b", "a"), layers=(0,))
    Example(count=np.int64(1), rate=np.float32(2), kinds=(), layers=(), pooling=(0, 3))
    Example(rate=1)


def test_described_lists_help_and_range_in_order():
    found = described(Example)
    assert list(found) == [
        "count", "rate", "share", "kind", "kinds", "layers", "pooling", "options",
    ]  # fmt: skip
    assert found["count"] == Setting("A count.", minimum=1, maximum=9)
    assert found["kinds"].choices == ("a", "b")


def test_mutable_default_is_copied_for_each_instance():
    Example().options["x"] = 1.0
    assert Example().options == {}


def test_content_is_json_data_of_every_field():
    found = content(Example(layers=(1, 2), options={"a": 1.0}))
    assert json.loads(json.dumps(found)) == found
    assert found["layers"] == [1, 2]
    assert found.keys() == vars(Example()).keys()
