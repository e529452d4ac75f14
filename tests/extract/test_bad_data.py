"""Faulty data: errors before the model runs, and warnings."""

from dataclasses import replace

import pytest
from extraction import (
    GENERIC,
    GENERIC_DATA,
    MATCHED_DATA,
    TWINS,
    UNSAFE,
    FakeCapture,
    FakeJudge,
    contents,
    prompts,
)

from pysteer import SteeringError
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.settings import ExtractSettings
from pysteer.prompts import Prompt


def refused(words, data=GENERIC_DATA, folder=None, judge=None, **given):
    """Check the error, and that the model did not run."""
    capture = FakeCapture()
    with pytest.raises(SteeringError, match=words):
        extract(capture, data, ExtractSettings(**given), cache=folder, judge=judge)
    assert not capture.ran


def at(row, line, **changed):
    return replace(row, source=f"u.jsonl, line {line}", **changed)


def test_faulty_inputs_raise_before_the_model_runs(tmp_path):
    last = len(UNSAFE) - 1
    bad = [*UNSAFE[:-1], at(UNSAFE[last], 18, response=None)]
    here = {"folder": tmp_path}
    line = r"^u.jsonl, line 18: "
    for seed in range(4):  # whether the prompt is held out or not
        refused(f"{line}.*no response", Data(bad, GENERIC), pooling="response", seed=seed, **here)
        labelled = [replace(p, label="unsafe") for p in bad[:-1]] + bad[-1:]
        refused(f"{line}has no label", Data(labelled, GENERIC), method="guided", seed=seed, **here)
        full = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt="x" * 195)]
        refused(f"{line}.*answer of 8", Data(full, GENERIC), method="contrast", seed=seed, **here)
    long = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt="x" * 150, response=None)]
    judge = {"judge": FakeJudge(lambda *_: False), "method": "guided"}
    refused(f"{line}.*answer of 64", Data(long, GENERIC), **judge, **here)
    empty = [*UNSAFE[:-1], at(UNSAFE[last], 18, prompt=" ")]
    refused(f"{line}the prompt is empty", Data(empty, GENERIC), **here)
    enormous = [*GENERIC, at(GENERIC[0], 18, prompt="x" * 300)]
    refused(f"{line}303 tokens, and the context holds 200", Data(UNSAFE, enormous), **here)
    benign = [at(GENERIC[0], 18, prompt="x" * 300)]
    refused(f"{line}303 tokens", Data(UNSAFE, GENERIC, benign=benign), **here)
    refused("shares a pair_id", Data([replace(p, pair_id=None) for p in UNSAFE], TWINS),
            method="pca", **here)  # fmt: skip
    refused("no safe prompts of category 'hate'", matched=True, **here)
    answers = [Prompt("", response="no"), at(Prompt("", response=" "), 18)]
    refused(f"{line}needs a 'response'", Data(UNSAFE, GENERIC, answers=answers),
            method="contrast", **here)  # fmt: skip
    refused("answers are for contrast and learned, not for mean",
            Data(UNSAFE, GENERIC, answers=answers[:1]), **here)  # fmt: skip
    refused("judge is for guided, not for mean", judge=FakeJudge(lambda *_: False), **here)
    refused(r"no site residual at layers \[4\]; it has layers 0 to 3", layers=(1, 4), **here)
    refused("this model has no site mlp", site="mlp", **here)
    assert list(tmp_path.iterdir()) == []


def test_category_of_one_prompt_is_extracted_and_logged(tmp_path, caplog):
    data = Data([*UNSAFE, *prompts("harm", "theft", 1)], GENERIC)
    capture = FakeCapture()
    pack = extract(capture, data, ExtractSettings(layers=(1, 2)), cache=tmp_path)
    assert set(pack.categories) == {"hate", "malware", "theft"}
    assert set(pack.router.categories) == {"hate", "malware"}
    assert "category theft has 1 prompts, too few to hold any out" in caplog.text
    assert "theft has 1 prompts of the 5 that a router needs" in caplog.text
    assert "theft" not in pack.provenance["separation"]


def test_category_of_one_prompt_raises_for_lda(tmp_path):
    data = Data([*UNSAFE, *prompts("harm", "theft", 1)], GENERIC)
    with pytest.raises(SteeringError, match="category 'theft', layer 1, method lda: 1 unsafe"):
        extract(FakeCapture(), data, ExtractSettings(method="lda", layers=(1, 2)), cache=tmp_path)


def test_unequal_category_sizes_are_logged(tmp_path, caplog):
    data = Data([*prompts("harm", "hate", 30), *prompts("harm", "theft", 2)], GENERIC)
    extract(FakeCapture(), data, ExtractSettings(layers=(1, 2), router=False), cache=tmp_path)
    assert "the categories differ widely in size: {'hate': 24, 'theft': 2}" in caplog.text


def test_repeated_prompts_change_nothing_and_are_logged(tmp_path, caplog):
    twice = Data([*UNSAFE, *UNSAFE[3:5]], [*GENERIC, GENERIC[0]])
    packs = [
        extract(FakeCapture(), data, ExtractSettings(layers=(1, 2)), cache=tmp_path / str(i))
        for i, data in enumerate((GENERIC_DATA, twice))
    ]
    assert contents(packs[0]) == contents(packs[1])
    assert "2 unsafe prompts repeat others" in caplog.text
    assert "1 safe prompts repeat others" in caplog.text
    caplog.clear()
    benign = prompts("hello", "any", 6, listed="")
    once, again = (
        extract(
            FakeCapture(),
            Data(UNSAFE, GENERIC, benign=each),
            ExtractSettings(layers=(1, 2)),
            cache=tmp_path / "2",
        )
        for each in (benign, [*benign, *benign, *GENERIC])
    )
    assert once.router.train_counts.tolist() == again.router.train_counts.tolist()
    assert "6 benign prompts repeat others" in caplog.text


def test_prompts_on_both_sides_are_logged(tmp_path, caplog):
    extract(
        FakeCapture(),
        Data(UNSAFE, [*GENERIC, replace(UNSAFE[0], category="")]),
        ExtractSettings(layers=(1, 2), router=False),
        cache=tmp_path,
    )
    assert "1 prompts are both unsafe and safe" in caplog.text


def test_unused_answers_are_logged(tmp_path, caplog):
    answers = [
        Prompt("", "hate", "no"),
        Prompt(UNSAFE[0].prompt, response="no"),
        Prompt("", "heat", "no", source="a.jsonl, line 3"),
        Prompt("another prompt", response="no"),
    ]
    data = Data(UNSAFE, GENERIC, answers=answers)
    chosen = ExtractSettings(method="contrast", layers=(1, 2), router=False)
    extract(FakeCapture(), data, chosen, cache=tmp_path)
    assert "2 answers fit no prompt and no category, the first at a.jsonl, line 3" in caplog.text


def test_judge_confirming_no_prompt_raises(tmp_path):
    chosen = ExtractSettings(method="guided", layers=(1, 2), router=False)
    with pytest.raises(SteeringError, match=r"0 of \d+ answers of hate unsafe.*method mean"):
        extract(
            FakeCapture(), MATCHED_DATA, chosen, cache=tmp_path, judge=FakeJudge(lambda *_: True)
        )


def test_refusing_model_raises_for_contrast(tmp_path, caplog):
    class Refusing(FakeCapture):
        def answers(self, prompts, n_tokens):
            for index, _ in enumerate(prompts):
                yield index, self.response_tokens("no, never")[:n_tokens]

    chosen = ExtractSettings(method="contrast", layers=(1, 2), router=False)
    data = Data(UNSAFE, GENERIC, answers=[Prompt("", response="no, never and not now")])
    with pytest.raises(SteeringError, match="category 'hate': the model complies with no prompt"):
        extract(Refusing(), data, chosen, cache=tmp_path)
    assert "15 of 15 own answers are no contrast" in caplog.text


def test_learned_without_torch_raises_before_the_model_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pysteer.extract.torch_capture", None)
    words = r"torch; run: pip install 'pysteer-llama\[extract\]'"
    refused(words, method="learned", folder=tmp_path)


def test_equal_sides_raise(tmp_path):
    same = [replace(p, category="") for p in UNSAFE if p.category == "hate"]
    data = Data([p for p in UNSAFE if p.category == "hate"], same)
    chosen = ExtractSettings(layers=(1, 2), held_out=0.0, router=False)
    with pytest.raises(SteeringError, match="category 'hate', layer 1, method mean: no direction"):
        extract(FakeCapture(), data, chosen, cache=tmp_path)
