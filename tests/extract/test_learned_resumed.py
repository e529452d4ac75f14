"""A descent that ends early: by a kill, or by its deadline; and the run that goes on from there."""

import importlib
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from pysteer.extract.learning.descent import Descent  # noqa: E402
from pysteer.extract.learning.learn import Example, learn  # noqa: E402
from pysteer.extract.learning.settings import LearnedSettings, OutOfTimeError  # noqa: E402
from pysteer.extract.threads import limited_threads  # noqa: E402
from pysteer.extract.torch_model import TorchModel  # noqa: E402

pytestmark = pytest.mark.torch

SETTINGS = LearnedSettings(
    batch_size=4, benign_batch_size=2, shared_steps=12, category_steps=6, kl_tokens=3, check_every=2
)
STEPS = 12 + 2 * 6
clock = importlib.import_module("pysteer.extract.learning.descent").time


def tokens(count, seed):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(3, 300, rng.integers(4, 12)).tolist()) for _ in range(count)]


def examples(seed):
    answers = [answer[:4] for answer in tokens(3, 99)]
    return [Example(p, answers[i % 3]) for i, p in enumerate(tokens(20, seed))]


class Printed:
    """A `Progress` that prints each step."""

    def start(self, stage, total, unit=""):
        return lambda units: print("step", units, flush=True)


class Counted(list):
    """A `Progress` that is the list of its steps."""

    def start(self, stage, total, unit=""):
        return self.append


def learned(path, folder, **options):
    model = TorchModel(path, dtype=torch.float32)
    unsafe = {"a": examples(1), "b": examples(2)}
    return learn(
        model, unsafe, tokens(12, 9), layers=[1], settings=SETTINGS, folder=folder, **options
    )


def arrays(found):
    return [found.shared.directions[1], *(one.directions[1] for one in found.categories.values())]


def child(model, folder):
    """A process that learns on one thread and prints its steps."""
    code = (
        "import sys, torch; torch.set_num_threads(1); from pathlib import Path; "
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_learned_resumed as t; "
        "t.learned(sys.argv[1], Path(sys.argv[2]), progress=t.Printed())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(model), str(folder)], stdout=subprocess.PIPE, text=True
    )


def test_killed_descent_goes_on_to_the_same_bits(tiny_llama, tmp_path):
    with child(tiny_llama, tmp_path) as process:
        for number, _ in enumerate(process.stdout, 1):
            if number == 7:
                process.kill()
    assert process.returncode != 0
    steps = Counted()
    with limited_threads(1):
        found = arrays(learned(tiny_llama, tmp_path, progress=steps))
        whole = arrays(learned(tiny_llama, None))
    # The first report is the step that the run goes on from; the kill may have come a bit late.
    assert steps[0] >= 6
    assert sum(steps) == STEPS
    for resumed, expected in zip(found, whole, strict=True):
        np.testing.assert_array_equal(resumed, expected)
    assert not list(tmp_path.glob("*.steps.npz"))


def test_deadline_ends_a_descent_and_the_next_run_goes_on(
    tiny_llama, tmp_path, monkeypatch, caplog
):
    torch.manual_seed(0)
    whole = learned(tiny_llama, tmp_path / "whole")
    now = [0.0]

    class Clock:
        def start(self, stage, total, unit=""):
            def advance(units):
                now[0] += units

            return advance

    monkeypatch.setattr(clock, "monotonic", lambda: now[0])
    cut = learned(tiny_llama, tmp_path / "cut", progress=Clock(), deadline=7.0)
    assert cut.shared.steps == 7
    assert "was up at step 7 of 12 of 'shared'" in caplog.text
    assert caplog.text.count("was up") == 1
    for one in cut.categories.values():
        np.testing.assert_array_equal(one.directions[1], cut.shared.directions[1])
        assert one.validation_loss is None
    assert cut.shared.validation_loss < math.inf
    resumed = learned(tiny_llama, tmp_path / "cut")
    for one, other in zip(arrays(resumed), arrays(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_deadline_before_the_first_step_raises(tiny_llama, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("no time is left to run prompts")

    monkeypatch.setattr(Descent, "_losses", never)
    with pytest.raises(OutOfTimeError, match="before the first useful step"):
        learned(tiny_llama, tmp_path, deadline=time.monotonic())
