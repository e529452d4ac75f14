"""The prompts that fit in a calibration's time."""

import importlib

import pytest
from extraction import FakeCapture, prompts

from pysteer.calibrate.budget import (
    VALIDATION_MARGIN,
    Size,
    affordable,
    fitting_size,
)
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet, split

FULL = Size(unsafe=12, others=3, benign=24)
COUNTS = {"a": 20, "b": 5}


def test_answers_of_a_size_are_those_of_a_round_and_of_the_validation():
    # One round: 12 + 5 own prompts, and 3 others each, steered and unsteered.
    assert FULL.trial_answers(COUNTS) == 12 + 5 + 2 * 3 * 2
    # Unsafe prompts in two arms, benign prompts in three.
    assert FULL.validation_answers(COUNTS) == 2 * (12 + 5) + 3 * 24


def test_size_is_full_with_enough_time_and_falls_with_the_time_left():
    needed = FULL.trial_answers(COUNTS) + VALIDATION_MARGIN * FULL.validation_answers(COUNTS)
    assert fitting_size(FULL, COUNTS, 1.0, needed, trial=True) == FULL
    sizes = [fitting_size(FULL, COUNTS, 1.0, needed * left, trial=True) for left in (0.9, 0.5, 0.2)]
    found = [size.trial_answers(COUNTS) + size.validation_answers(COUNTS) for size in sizes]
    assert sorted(found, reverse=True) == found
    for size, left in zip(sizes, (0.9, 0.5, 0.2), strict=True):
        spent = size.trial_answers(COUNTS) + VALIDATION_MARGIN * size.validation_answers(COUNTS)
        assert spent <= needed * left
        assert size.unsafe >= 2
    assert fitting_size(FULL, COUNTS, 1.0, 3.0, trial=True) is None
    assert fitting_size(FULL, COUNTS, 0.0, 0.0, trial=True) == FULL


@pytest.fixture
def slow(monkeypatch):
    """A model that takes a second for each row, by a clock of the test's."""
    now = [0.0]

    class Slow(FakeCapture):
        def activations(self, rows, *, site, layers):
            for found in super().activations(rows, site=site, layers=layers):
                now[0] += 1.0
                yield found

    module = importlib.import_module("pysteer.calibrate.budget")
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return Slow()


PARTS = split(
    PromptSet(
        [*prompts("harm", "hate", 60), *prompts("harm", "malware", 60)],
        [*prompts("calm", "hate", 60)],
        prompts("please", "", 100, listed=""),
    ),
    CalibrateSettings(),
)


def size_of(parts):
    return sum(
        len(rows) for part in (parts.train, parts.validation) for rows in vars(part).values()
    )


def test_training_prompts_are_cut_to_the_time_evenly(slow, caplog):
    assert affordable(PARTS, slow, size_of(PARTS) + 1.0) == PARTS
    assert caplog.text == ""
    cut = affordable(PARTS, slow, 0.6 * size_of(PARTS))
    assert size_of(cut) <= 0.6 * size_of(PARTS)
    assert cut.test == PARTS.test
    assert {p.prompt for p in cut.validation.unsafe} < {p.prompt for p in PARTS.validation.unsafe}
    counts = [sum(p.category == name for p in cut.train.unsafe) for name in ("hate", "malware")]
    assert counts[0] == counts[1] >= 5
    assert {p.pair_id for p in cut.train.safe} <= {p.pair_id for p in cut.train.unsafe}
    assert (
        "the time suffices to learn from 1 in 2 of the prompts (1.0 prompts a second)"
        in caplog.text
    )


def test_without_any_time_a_category_keeps_enough_to_learn_from(slow):
    cut = affordable(PARTS, slow, 0.0)
    for name in ("hate", "malware"):
        assert sum(p.category == name for p in cut.train.unsafe) == 5
    assert len(cut.train.benign) == 5
