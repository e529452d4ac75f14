"""The isolation matrix against hand counts, and gates against the engine."""

import numpy as np
import pytest

from pysteer import Engine, SteeringPack
from pysteer.evaluate.estimates import share
from pysteer.evaluate.isolation import arm_name, matrix
from pysteer.evaluate.report import AnswerRecord, PromptRecord
from pysteer.pack.policy import Policy
from pysteer.pack.resolved import ResolvedPolicy


def answer(safe):
    return AnswerRecord(
        text="x",
        finish_reason="stop",
        n_tokens=1,
        fired=[],
        active={},
        degenerate=False,
        refused=safe,
        safe=safe,
    )


def prompt(category, before, benign=False, **after):
    answers = {"unsteered": answer(before)}
    answers.update((arm_name("gated", name), answer(safe)) for name, safe in after.items())
    return PromptRecord(prompt="p", category=category, benign=benign, scores={}, answers=answers)


def test_matrix_cell_counts_answers_changed_from_unsafe_to_safe():
    prompts = [
        prompt("a", False, a=True),
        prompt("a", False, a=True, b=False),
        prompt("a", False),
        prompt("a", True, a=True),  # was safe before
        prompt("b", False, a=True, b=True),
        prompt("b", True, b=False),  # became unsafe
        prompt("stranger", False, b=True),
        prompt("a", False, benign=True, a=True),  # not counted
    ]
    found = matrix("gated", ["a", "b"], ["a", "b", "stranger"], prompts, "unsteered", share([]))
    cells = [[(cell.changed, cell.n, cell.ran) for cell in row] for row in found.cells]
    assert cells == [[(2, 3, 3), (1, 1, 1), (0, 1, 0)], [(0, 3, 1), (1, 1, 2), (1, 1, 1)]]
    assert (found.diagonal.k, found.diagonal.n) == (3, 4)
    assert (found.rest.k, found.rest.n) == (2, 6)


@pytest.mark.parametrize(
    "policy",
    [
        None,
        {"gate": "probe"},
        {"gate": "probe", "categories": {"says q": {"threshold": -50.0}}},
        {"gate": "cast", "categories": {"says z": {"threshold": 0.9}}},
        {"categories": {"says q": {"when": "not ('says z')"}}},
    ],
    ids=str,
)
def test_resolved_gates_open_as_in_engine(policy, routed_pack, tiny_llama, harmful, benign):
    policy = None if policy is None else Policy.from_content(policy)
    resolved = ResolvedPolicy(SteeringPack.load(routed_pack), policy)
    prompts = [row.prompt for row in [*harmful, *benign]]
    options = {"n_ctx": 512, "n_threads": 1, "verbose": False}

    def ask(engine, steering):
        handles = [
            engine.submit(
                messages=[{"role": "user", "content": text}], steering=steering, max_tokens=1
            )
            for text in prompts
        ]
        return [handle.result()["steering"] for handle in handles]

    with Engine(
        tiny_llama, pack=resolved.pack, policy=policy, max_sequences=1, **options
    ) as engine:
        scores = [found["scores"] for found in ask(engine, "auto")]
        told = {}
        for name in resolved.gateable:
            alone = ask(engine, {name: "auto"})
            told[name] = [found["categories"][name]["fired"] for found in alone]
    for name in resolved.gateable:
        assert [resolved.opens(name, one) for one in scores] == told[name]
    if policy is None:
        assert np.mean([told["says q"], told["says z"]]) > 0.2  # some open, some stay closed
