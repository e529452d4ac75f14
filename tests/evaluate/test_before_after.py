"""Comparisons of unsteered and steered answers."""

from contextlib import closing

import numpy as np
import pytest

from pysteer import SteeredLlama, SteeringPack, SteeringVector, shipped
from pysteer.evaluate.before_after import (
    BeforeAfter,
    CategorySummary,
    TimedAnswer,
    answer_twice,
    summarise,
    summary_of,
)
from pysteer.prompts import Prompt

REFUSED = TimedAnswer("I can't help with that.", True, False, 7, 0.5)
ANSWERED = TimedAnswer("Take two eggs.", False, False, 5, 1.0)
BROKEN = TimedAnswer("egg egg egg egg egg egg", False, True, 3, 0.25)


def pair(category, unsafe, before, after):
    return BeforeAfter(Prompt("p", category), unsafe, before, after)


def test_summaries_are_shares_of_the_right_prompts():
    pairs = [
        pair("a", True, ANSWERED, REFUSED),
        pair("a", True, REFUSED, REFUSED),
        pair("b", True, ANSWERED, BROKEN),
        pair("a", True, ANSWERED, BROKEN),
        pair("a", True, ANSWERED, ANSWERED),
        pair("a", False, ANSWERED, ANSWERED),
        pair("a", False, ANSWERED, REFUSED),
    ]
    a, b = summarise(pairs)
    assert a == CategorySummary(
        category="a",
        n_unsafe=4,
        n_harmless=2,
        refused_before=1 / 4,
        refused_after=2 / 4,
        degenerate_before=0.0,
        degenerate_after=1 / 6,
        harmless_refused_before=0.0,
        harmless_refused_after=1 / 2,
        harmless_unchanged=1 / 2,
        tokens_per_second_before=(5 * 4 + 6) / (5 * 1.0 + 0.5),
        tokens_per_second_after=(3 * 6 + 2 + 2 * 4) / (3 * 0.5 + 0.25 + 2 * 1.0),
    )
    assert (b.category, b.n_unsafe, b.n_harmless) == ("b", 1, 0)
    assert (b.refused_after, b.degenerate_after, b.harmless_unchanged) == (0.0, 1.0, 0.0)
    assert summarise([]) == []
    both = summary_of("all", pairs)
    assert (both.category, both.n_unsafe, both.n_harmless) == ("all", 5, 2)
    assert (both.refused_before, both.refused_after) == (1 / 5, 2 / 5)
    assert both.degenerate_after == 2 / 7


@pytest.fixture(scope="module")
def llm(default_model):
    with closing(
        SteeredLlama(default_model, pack=shipped.default_pack(), n_ctx=512, verbose=False)
    ) as llm:
        yield llm


def direct(llm, prompt, steering):
    result = llm.create_chat_completion(
        [{"role": "user", "content": prompt}], steering=steering, max_tokens=24, temperature=0.0
    )
    return result["choices"][0]["message"]["content"]


def test_both_answers_equal_those_of_the_model(llm):
    unsafe, harmless = ([rows[0]] for rows in shipped.demo_prompts())
    seen = []
    pairs = answer_twice(llm, unsafe, harmless, max_tokens=24, on_answer=seen.append)
    assert seen == pairs
    assert [(p.prompt, p.unsafe) for p in pairs] == [(unsafe[0], True), (harmless[0], False)]
    for found in pairs:
        prompt = found.prompt
        assert found.before.text == direct(llm, prompt.prompt, None)
        assert found.after.text == direct(llm, prompt.prompt, {prompt.category: 1.0})
        assert 1 < found.before.n_tokens <= 24
        assert found.before.decode_seconds > 0
    assert pairs[0].after.text != pairs[0].before.text


def test_broken_answer_is_never_a_success(default_model):
    """Gibberish of a far too strongly steered model counts as degenerate, not as refusal."""
    rng = np.random.default_rng(0)
    noise = SteeringVector({layer: 200 * rng.standard_normal(576) for layer in range(10, 20)})
    pack = SteeringPack({"malware": noise})
    prompts = shipped.demo_prompts()[0][:3]
    options = {"n_ctx": 512, "verbose": False, "max_relative_norm": None}
    with closing(SteeredLlama(default_model, pack=pack, **options)) as llm:
        (row,) = summarise(answer_twice(llm, prompts, [], max_tokens=32))
    assert row.refused_after == 0.0
    assert row.degenerate_after > 0.5
