"""Settings of an extraction: invalid values, and JSON content."""

import json
import math

import pytest

from pysteer import SteeringError
from pysteer.extract.methods import METHODS
from pysteer.extract.settings import ExtractSettings
from pysteer.settings import content as content_of


def test_registry_has_every_method():
    assert set(METHODS) == {
        "mean", "pruned", "guided", "pca", "logistic", "lda", "contrast", "learned",
    }  # fmt: skip
    for method in METHODS:
        assert ExtractSettings(method=method).method == method


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"method": "median"}, "unknown method 'median'.*mean, pruned"),
        ({"site": "nowhere"}, "unknown site 'nowhere'.*residual"),
        ({"pooling": "first"}, "unknown pooling 'first'.*last"),
        ({"pooling": (3, 3)}, r"range \(3, 3\) is empty"),
        ({"pooling": (-1, 3)}, "is empty"),
        ({"gates": ("svm",)}, "unknown item of gates 'svm'.*margin, multinomial, .*cast"),
        ({"gates": ("probe",)}, "one of margin, multinomial"),
        ({"gates": ()}, "one of margin, multinomial"),
        ({"orthogonalise": "all"}, "unknown orthogonalise 'all'.*categories, benign"),
        ({"layers": ()}, "no layers"),
        (
            {"method": "contrast", "options": {"response_tokens": 0}},
            "response_tokens must be.*not 0",
        ),
        ({"top_k": 0}, "top_k must be at least 1, not 0"),
        ({"mask_massive": 1.0}, "mask_massive must be above 1, not 1.0"),
        ({"mask_massive": math.nan}, "mask_massive must be a finite number, not nan"),
        ({"scale": -0.1}, "scale must be at least 0, not -0.1"),
        ({"scale": math.nan}, "scale must be a finite number, not nan"),
        ({"scale": math.inf}, "scale must be a finite number, not inf"),
        ({"false_positive_rate": 1.0}, "false_positive_rate must be.*below 1, not 1.0"),
        ({"false_positive_rate": -0.1}, "false_positive_rate must be at least 0.*not -0.1"),
        ({"held_out": 1.0}, "held_out must be.*below 1, not 1.0"),
        ({"held_out": -0.1}, "held_out must be at least 0.*not -0.1"),
        ({"seed": -1}, "seed must be at least 0.*not -1"),
        ({"seed": 2**32}, "seed must be.*at most"),
        ({"unit_norm": True, "scale": 0.5}, "norm 1 and a scale"),
        ({"method": "mean", "options": {"paired": True}}, "mean has no option 'paired'"),
        ({"method": "learned", "options": {"C": 1.0}}, "learned has no option 'C'"),
        ({"method": "guided", "options": {"confirmed_unsafe": [True]}}, "has no option"),
        ({"method": "pca", "options": {"variant": "median"}}, "unknown variant 'median'"),
        ({"method": "contrast", "matched": True}, "contrast reads answers"),
        ({"method": "learned", "matched": False}, "learned reads answers"),
        ({"method": "contrast", "pooling": "last"}, "contrast.*no pooling"),
        ({"method": "learned", "pooling": "last"}, "learned.*no pooling"),
        ({"method": "pruned", "options": {"paired": True}, "matched": False}, "pairs are matched"),
        ({"method": "pca", "matched": False}, "pairs are matched"),
    ],
)
def test_invalid_settings_raise(wrong, words):
    with pytest.raises(SteeringError, match=words):
        ExtractSettings(**wrong)


@pytest.mark.parametrize(
    ("given", "paired"),
    [
        ({"method": "mean"}, False),
        ({"method": "pruned"}, False),
        ({"method": "pruned", "options": {"paired": True}}, True),
        ({"method": "pca"}, True),
        ({"method": "pca", "options": {"variant": "centred"}}, False),
        ({"method": "pca", "options": {"variant": "difference"}}, True),
        ({"method": "contrast"}, False),  # contrast makes its own pairs
        ({"method": "learned"}, False),
    ],
)
def test_needs_pairs_follows_method_and_options(given, paired):
    assert ExtractSettings(**given).needs_pairs is paired


def test_values_at_the_bounds_pass():
    ExtractSettings(held_out=0, scale=0.0, unit_norm=True, false_positive_rate=0.0, top_k=1)
    ExtractSettings(mask_massive=None, pooling=(0, 1), seed=2**32 - 1)


def test_content_is_json_with_every_setting():
    settings = ExtractSettings(
        method="logistic", options={"C": 0.5}, layers=(1, 2), pooling=(3, 10), top_k=4
    )
    content = content_of(settings)
    assert json.loads(json.dumps(content)) == content
    assert content["layers"] == [1, 2]
    assert content["pooling"] == [3, 10]
    assert content["options"] == {"C": 0.5}
    assert content.keys() == vars(settings).keys()
