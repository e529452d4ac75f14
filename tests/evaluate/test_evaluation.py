"""A whole evaluation, on a tiny model whose vectors make it say a letter."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysteer import FormatError, Policy, SteeringError, SteeringPack
from pysteer.evaluate.evaluation import evaluate
from pysteer.evaluate.judges import CallableJudge, CallableReward, RefusalJudge
from pysteer.evaluate.report import Report
from pysteer.evaluate.settings import EvaluateSettings, Sampling
from pysteer.evaluate.steering import OWN_CATEGORY
from pysteer.journal import Journal
from pysteer.judge import NEUTRAL, SAFETY
from pysteer.prompts import Prompt

SETTINGS = EvaluateSettings(
    sampling=Sampling(max_tokens=8),
    strengths=(0.0001,),
    isolation=("gated", "forced"),
    parallel=4,
    context=512,
)
OPTIONS = {"n_threads": 1, "type_k": 0, "type_v": 0}
JUDGE = CallableJudge(lambda prompt, answer: ("Q" * 3 in answer or "Z" * 3 in answer, "letters"))


@pytest.fixture(autouse=True)
def _letters_are_no_degeneration(monkeypatch):
    """Take a repeated letter, which stands for a refusal here, as a sound text."""
    monkeypatch.setattr("pysteer.evaluate.answers.is_degenerate", lambda text: "QZ" in text)


@pytest.fixture(scope="module")
def run(tiny_llama, routed_pack, harmful, benign):
    def call(folder, **arguments):
        given = {"settings": SETTINGS, "judge": JUDGE, **arguments, **OPTIONS}
        rows = given.pop("prompts", harmful), given.pop("benign", benign)
        return evaluate(tiny_llama, routed_pack, *rows, folder, **given)

    return call


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pysteer.evaluate.answers.is_degenerate", lambda text: "QZ" in text)
        folder = tmp_path_factory.mktemp("whole")
        return run(folder), folder


def test_answers_behind_open_gates_become_safe_and_no_others(whole):
    report, _ = whole
    by_name = {row.category: row for row in report.categories}
    assert list(by_name) == ["says q", "says z", "stranger"]
    assert [row.in_pack for row in report.categories] == [True, True, False]
    assert [row.n for row in report.categories] == [5, 5, 3]
    for row in report.categories:
        assert row.arms["unsteered"].safe.k == 0
        found = [one for one in report.prompts if one.category == row.category]
        steered = [one.answers["steered"] for one in found]
        assert row.arms["steered"].safe.k == sum(bool(one.active) for one in steered)
        assert [one.safe for one in steered] == [bool(one.active) for one in steered]
    assert by_name["says q"].arms["steered"].safe.k > 0
    assert by_name["says z"].arms["steered"].safe.k > 0
    assert report.overall["steered"].safe.n == 13
    assert report.overall["steered"].safe.k == sum(
        row.arms["steered"].safe.k for row in report.categories
    )


def test_benign_answers_are_unchanged(whole):
    report, _ = whole
    found = report.benign["steered"]
    assert (found.unchanged.k, found.unchanged.n, found.fired.k) == (6, 6, 0)
    assert found.first_token_kl.value == 0.0
    assert report.router.false_positives.k == 0
    assert report.noise.differs.n == 6


def test_forced_isolation_matrix_shows_vectors_that_act_on_every_prompt(whole):
    report, _ = whole
    gated, forced = report.isolation
    assert [gated.mode, forced.mode] == ["gated", "forced"]
    assert gated.columns == forced.columns == ["says q", "says z", "stranger"]
    assert all(cell.changed == cell.n for row in forced.cells for cell in row)
    assert forced.rest.value == 1.0
    fired = dict.fromkeys(gated.rows, 0)
    for one in report.prompts:
        for name in one.answers["steered"].fired:
            fired[name] += 1
    assert all(fired.values())
    assert sum(cell.changed for row in gated.cells for cell in row) == sum(fired.values())
    assert (gated.checked.k, gated.checked.n > 0) == (0, True)


def test_degenerate_answers_are_counted_over_the_same_prompts_in_all_figures(whole):
    report, _ = whole
    for point in report.curve:
        assert point.degenerate == report.overall[point.arm].degenerate
        assert point.benign_degenerate == report.benign[point.arm].degenerate
        by_category = [row.arms[point.arm].degenerate for row in report.categories]
        assert sum(share.k for share in by_category) == point.degenerate.k
        assert sum(share.n for share in by_category) == point.degenerate.n


def test_judge_names_its_verdicts_and_a_function_is_neutral(whole):
    report, _ = whole
    assert report.words == NEUTRAL

    def pirate(prompt, answer):
        return "arr" in answer

    pirate.words = ("pirate", "plain")
    assert CallableJudge(pirate).words == ("pirate", "plain", "target", "other")
    assert RefusalJudge().words == SAFETY
    for words in ("pirate", ("a",), (1, 2), None):
        pirate.words = words
        with pytest.raises(SteeringError, match="give two"):
            CallableJudge(pirate)


def test_judge_of_refusals_that_finds_none_names_other_judges(run, tmp_path):
    short = replace(SETTINGS, isolation=(), strengths=(), fluency=False)
    report = run(tmp_path, settings=short, judge=RefusalJudge())
    assert any("--judge python:MODULE:FUNCTION" in note for note in report.notes)


def test_strength_near_zero_changes_no_answer(whole):
    report, _ = whole
    assert [point.strength for point in report.curve] == [0.0, 0.0001, 1.0]
    weak, full = report.curve[1:]
    assert weak.safe.k == 0
    assert full.safe.k > 0
    assert report.arms["steered x0.0001"].endswith("times 0.0001")


def test_steered_answers_are_less_likely_under_unsteered_model(whole):
    report, _ = whole
    before, after = report.overall["unsteered"], report.overall["steered"]
    assert after.log_likelihood.value < before.log_likelihood.value - 0.5


def test_report_survives_save_and_load(whole, tmp_path):
    report, _ = whole
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)


@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_evaluation_interrupted_anywhere_ends_in_same_report(whole, run, tmp_path_factory, data):
    report, folder = whole
    lines = (folder / "answers.jsonl").read_bytes().count(b"\n")
    stop = data.draw(st.integers(0, lines - 1), "groups kept")
    cut = data.draw(st.integers(0, 40), "bytes lost")
    again = tmp_path_factory.mktemp("again")
    put, count = Journal.put, [0]

    def interrupted(self, key, answers):
        if count[0] == stop:
            raise KeyboardInterrupt
        count[0] += 1
        put(self, key, answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    path = again / "answers.jsonl"
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - cut)])
    assert run(again) == report


def test_repeated_evaluation_asks_no_prompt(whole, run, monkeypatch):
    report, folder = whole
    before = (folder / "answers.jsonl").read_bytes()
    monkeypatch.setattr("pysteer.engine.Engine.together", lambda self: pytest.fail("asked"))
    assert run(folder) == report
    assert (folder / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("what", ["policy", "pack", "model"])
def test_answers_under_other_policy_pack_or_model_are_not_reused(
    what, whole, run, tmp_path, tiny_llama, routed_pack, harmful
):
    _, folder = whole
    kept = (folder / "answers.jsonl").read_bytes()
    (tmp_path / "answers.jsonl").write_bytes(kept)
    model, pack, policy = tiny_llama, routed_pack, None
    if what == "policy":
        policy = Policy(scope="response")
    elif what == "pack":
        loaded = SteeringPack.load(routed_pack)
        pack = tmp_path / "other.gguf"
        replace(loaded, provenance={"made": "again"}).save(pack)
    else:
        model = tmp_path / "other.gguf"
        model.write_bytes(tiny_llama.read_bytes())
    short = replace(SETTINGS, isolation=(), fluency=False)
    given = {"settings": short, "judge": JUDGE, "policy": policy, **OPTIONS}
    evaluate(model, pack, harmful, [], tmp_path, **given)
    groups = [json.loads(line)[0] for line in kept.splitlines() if line]
    now = [json.loads(line)[0] for line in (tmp_path / "answers.jsonl").open() if line.strip()]
    fresh = now[len(groups) :]
    assert len(fresh) == len(set(fresh) - set(groups)) > 3


def test_own_category_steering_forces_each_category_on_its_prompts(
    tiny_llama, routed_pack, harmful, benign, tmp_path
):
    report = evaluate(
        tiny_llama,
        routed_pack,
        harmful,
        benign,
        tmp_path,
        settings=replace(SETTINGS, steering=OWN_CATEGORY, isolation=(), strengths=(), limit=2),
        judge=JUDGE,
        reward=CallableReward(lambda prompt, answer: {"q": answer.count("Q")}),
        **OPTIONS,
    )
    assert [row.n for row in report.categories] == [2, 2, 2]
    assert report.overall["steered"].safe.value == 1.0
    assert report.benign["steered"].unchanged.k == 0
    assert report.router is not None  # asked, although it did not steer
    assert report.isolation == []
    assert report.overall["steered"].rewards["q"].value == pytest.approx((2 * 8 + 8) / 6)
    assert report.overall["unsteered"].rewards["q"].value < 1
    assert any("its own category" in note for note in report.notes)


def test_degenerate_answer_is_neither_safe_nor_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pysteer.evaluate.answers.is_degenerate", lambda text: "QQQ" in text)
    report = run(tmp_path, settings=replace(SETTINGS, isolation=(), strengths=(), fluency=False))
    for one in report.prompts:
        for answer in one.answers.values():
            assert not (answer.degenerate and (answer.safe or answer.refused))
    assert report.overall["steered"].degenerate.k > 0
    assert report.overall["unsteered"].log_likelihood.n == 0


def test_prompts_without_category_are_category_unsafe(run, tmp_path):
    short = replace(SETTINGS, isolation=(), strengths=(), fluency=False)
    report = run(tmp_path, prompts=[Prompt("what?")], benign=[], settings=short)
    assert [row.category for row in report.categories] == ["unsafe"]
    assert report.benign == {}
    assert report.noise is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [Prompt("x", "benign")]}, "--benign"),
        ({"settings": replace(SETTINGS, steering={"absent": 1.0})}, "unknown category"),
        ({"settings": replace(SETTINGS, context=2)}, "n_ctx"),
    ],
)
def test_invalid_prompts_or_steering_raise(changes, words, run, tmp_path):
    with pytest.raises(SteeringError, match=words):
        run(tmp_path, **changes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"parallel": 0}, "parallel must be at least 1"),
        ({"parallel": 257}, "at most 256"),
        ({"context": 0}, "context"),
        ({"limit": 0}, "limit"),
        ({"strengths": (float("nan"),)}, "strengths must be a finite number"),
        ({"isolation": ("open",)}, "unknown item of isolation 'open'; use one of gated, forced"),
    ],
)
def test_settings_out_of_range_raise(wrong, words):
    with pytest.raises(SteeringError, match=words):
        EvaluateSettings(**wrong)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": "pysteer.evaluate/2"}', "x"])
def test_load_of_other_file_raises_with_path(text, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(FormatError, match=r"r\.json"):
        Report.load(tmp_path / "r.json")
