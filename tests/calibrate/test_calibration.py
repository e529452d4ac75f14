"""A whole calibration, on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from prompting import prompts

from pysteer import Policy, SteeringError, SteeringPack
from pysteer.calibrate import calibration
from pysteer.calibrate.calibration import calibrate
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.calibrate.split import PromptSet, split
from pysteer.engine import Engine
from pysteer.evaluate.judges import CallableJudge
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.extract.settings import ExtractSettings
from pysteer.pack.scope import Scope
from pysteer.prompts import Prompt, load_prompts, write_prompts

SETTINGS = CalibrateSettings(
    methods=("mean",),
    layers=(1, 2),
    strengths=(0.5, 8.0),
    scopes=("all", "response"),
    trials=4,
    max_degenerate=1.0,
    max_tokens=6,
    parallel=4,
    context=512,
    minutes=60,
    others=2,
)
OPTIONS = {"n_threads": 1, "type_k": 0, "type_v": 0}
JUDGE = CallableJudge(lambda prompt, answer: (sum(map(ord, answer)) % 2 == 0, "parity"))


UNSAFE = [*prompts("harm", "hate", 16), *prompts("harm", "malware", 15)]
SAFE = [*prompts("calm", "hate", 16), *prompts("calm", "malware", 15)]
BENIGN = prompts("please", "", 20)
PROMPTS = PromptSet(UNSAFE, SAFE, BENIGN)


@pytest.fixture(scope="module")
def capture(tiny_llama):
    return LlamaCapture(tiny_llama, n_ctx=256, n_threads=1)


@pytest.fixture(scope="module")
def run(tiny_llama, capture):
    def call(folder, **arguments):
        given = {"settings": SETTINGS, "judge": JUDGE, **arguments}
        kinds = [kind for kind in ("unsafe", "safe", "benign") if kind in given]
        rows = replace(PROMPTS, **{kind: given.pop(kind) for kind in kinds})
        return calibrate(capture, tiny_llama, rows, folder, **given, **OPTIONS)

    return call


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    return run(folder), folder


def test_pack_at_strength_one_is_chosen_trial(done, capture, tmp_path):
    """Compare with a separate extraction from the training part."""
    pack = done[0].pack
    train = split(PROMPTS, SETTINGS).train
    for name, one in done[0].search.chosen.items():
        way, _, numbers = one.trial.candidate.partition(" at ")
        layers = tuple(map(int, numbers.split("+")))
        settings = ExtractSettings(method="mean", layers=layers, router=False, held_out=0.0)
        data = Data(train.unsafe, [*train.safe, *train.benign])
        own = extract(capture, data, settings, cache=tmp_path).categories
        taken = [own[name]] if way == "mean" else list(own.values())
        assert pack[name].layers == layers
        for layer in layers:
            wanted = np.mean([vector.direction(layer) for vector in taken], axis=0)
            wanted *= np.linalg.norm(own[name].direction(layer)) / np.linalg.norm(wanted)
            np.testing.assert_allclose(
                pack[name].direction(layer), one.trial.strength * wanted, rtol=1e-4, atol=1e-6
            )
        assert pack.policy.settings(name).scope == Scope.parse(one.trial.scope)
    assert pack.policy.conflict == "strongest"


def test_best_trial_is_chosen(done):
    found = done[0].search
    assert (found.rounds, found.stopped) == (4, "trials")
    for name, tried in found.trials.items():
        assert len(tried) == 4
        values = [one.outcome.value(SETTINGS.max_degenerate) for one in tried]
        assert found.chosen[name].outcome.value(SETTINGS.max_degenerate) == max(values)


def test_pack_answers_as_its_trial_did(done, tiny_llama):
    """Forced at strength 1.0, in the same groups, validation prompts get the trial's answers."""
    pack, found = done[0].pack, done[0].search
    own = split(PROMPTS, SETTINGS).validation.unsafe
    lines = (done[1] / "trials.jsonl").read_text().splitlines()
    answers = [answer for line in lines for answer in json.loads(line)[1]]
    request = {"max_tokens": 6, "temperature": 0.0}
    options = {"max_sequences": 4, "n_ctx": 1024, "n_threads_batch": 1, "verbose": False, **OPTIONS}
    with Engine(tiny_llama, pack=pack, **options) as engine:
        for name, one in found.chosen.items():
            key = f"{name}: {one.trial.candidate}"
            tried = [
                answer["text"]
                for answer in answers
                if answer["active"].get(key) == pytest.approx(one.trial.strength)
            ]
            handles = [
                engine.submit(
                    messages=[{"role": "user", "content": p.prompt}],
                    steering={name: 1.0},
                    **request,
                )
                for p in own
                if p.category == name
            ]
            texts = [h.result()["choices"][0]["message"]["content"] for h in handles]
            assert sum(text in tried for text in texts) >= len(texts) - 1  # rounding may change one


def test_provenance_records_calibration(done):
    figures = done[0].pack.provenance["calibration"]
    assert figures["judge"] == "python"
    assert figures["prompts"]["test"] == {"unsafe": 6, "safe": 6, "benign": 4}
    assert set(figures["chosen"]) == {"hate", "malware"}
    validation = figures["validation"]
    assert {row["n"] for row in validation["categories"].values()} == {3}
    assert validation["benign"]["n"] == 4
    blind = SteeringPack.load(done[1] / "validated.gguf")
    assert blind.router != done[0].pack.router
    assert list(blind.router.train_counts) == [10 + 9 + 12, 10, 9]  # twins and benign prompts first
    rows = [one for one in done[0].validation.prompts if not one.benign]
    open_ = [
        [one.scores[name] >= blind.router.gates["margin"].thresholds[i] for one in rows]
        for i, name in enumerate(blind.router.categories)
    ]
    own = [
        open_[i][j]
        for i, name in enumerate(blind.router.categories)
        for j, one in enumerate(rows)
        if one.category == name
    ]
    assert validation["gates"]["own"] == np.mean(own)
    assert validation["gates"]["others"] == (np.sum(open_) - np.sum(own)) / len(own)
    report = done[0].validation
    assert validation["safe"] == report.overall["steered"].safe.value
    assert SteeringPack.load(done[1] / "pack.gguf").categories == done[0].pack.categories


def test_calibration_sees_no_test_prompt(done):
    report = done[0].validation
    seen = {one.prompt for one in report.prompts}
    parts = split(PROMPTS, SETTINGS)
    assert done[0].test == parts.test
    assert seen == {p.prompt for p in (*parts.validation.unsafe, *parts.validation.benign)}


def test_calibration_is_reproducible_and_differs_with_seed(done, run, tmp_path):
    again = run(tmp_path / "again").pack
    again.save(tmp_path / "again.gguf")
    done[0].pack.save(tmp_path / "first.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    other = run(tmp_path / "other", settings=replace(SETTINGS, seed=1)).pack
    assert other.categories != again.categories


def test_repeated_calibration_resumes_from_folder(done, run, monkeypatch):
    def submit(*args, **kwargs):
        raise AssertionError("nothing is left to be answered")

    monkeypatch.setattr(Engine, "submit", submit)
    assert run(done[1]).pack == done[0].pack


def test_calibration_interrupted_in_search_keeps_best(run, tmp_path):
    class Interrupting:
        def start(self, stage, total, unit=""):
            if stage == "trial 3":
                raise KeyboardInterrupt
            return lambda units: None

    rounds = []
    result = run(tmp_path, progress=Interrupting(), on_round=lambda found: rounds.append(1))
    assert (result.search.rounds, result.search.stopped) == (2, "interrupted")
    assert len(rounds) == 2
    assert result.validation is not None


def test_calibration_interrupted_in_validation_returns_pack(run, tmp_path, monkeypatch, caplog):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "evaluate", interrupted)
    result = run(tmp_path)
    assert result.validation is None
    assert result.pack.provenance["calibration"]["validation"] is None
    assert "before the pack was validated" in caplog.text


def test_calibration_without_time_gives_a_pack_that_was_tried_once(run, tmp_path, caplog):
    result = run(tmp_path, settings=replace(SETTINGS, minutes=0.0))
    assert (result.search.rounds, result.search.stopped) == (1, "time")
    assert {record.outcome.n for rows in result.search.trials.values() for record in rows} == {2}
    assert result.validation is None
    assert "no time is left to validate the pack" in caplog.text
    assert set(result.pack.categories) == set(result.pack.router.categories) == {"hate", "malware"}
    assert SteeringPack.load(tmp_path / "pack.gguf").categories == result.pack.categories
    # The same folder with more time goes on.
    again = run(tmp_path)
    assert again.search.rounds == 4
    assert again.validation is not None


@pytest.mark.torch
def test_calibration_without_time_to_learn_takes_the_mean(tiny_llama, tmp_path, caplog):
    torch = pytest.importorskip("torch")
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    capture = TorchCapture(TorchModel(str(tiny_llama), dtype=torch.float32))
    settings = replace(SETTINGS, minutes=0.0, methods=("learned",))
    result = calibrate(
        capture, tiny_llama, PROMPTS, tmp_path, settings=settings, judge=JUDGE, **OPTIONS
    )
    assert "learned: the time for learning was up before the first useful step" in caplog.text
    assert "the directions are found by mean instead" in caplog.text
    assert {one.trial.candidate.split()[0] for one in result.search.chosen.values()} == {"mean"}
    assert any(
        vector.direction(vector.layers[0]).any() for vector in result.pack.categories.values()
    )


def test_unsafe_categories_are_warned_of(run, tmp_path, caplog):
    settings = replace(SETTINGS, max_degenerate=0.0, strengths=(6.0, 8.0), trials=3)
    never = CallableJudge(lambda prompt, answer: False, name="never")
    run(tmp_path, settings=settings, judge=never)
    assert "answered safely in 'hate', 'malware'" in caplog.text


def test_both_routers_have_limits_of_settings(run, tmp_path, monkeypatch):
    def stop(capture, data, **options):
        limits = ("false_positive_rate", "max_leak", "look_alike_rate", "seed")
        raise KeyError(len(data), *(getattr(options["settings"], name) for name in limits))

    monkeypatch.setattr(calibration, "fit_pack_routers", stop)
    chosen = {"max_benign_change": 0.1, "max_leak": 0.2, "max_look_alike": 0.3, "seed": 4}
    with pytest.raises(KeyError) as caught:
        run(tmp_path, settings=replace(SETTINGS, **chosen))
    assert caught.value.args == (2, 0.1, 0.2, 0.3, 4)


def test_router_closed_by_benign_prompts_is_warned_of(run, tmp_path, caplog):
    run(tmp_path / "apart")
    assert "opens a gate for only" not in caplog.text
    sounding = [Prompt(p.prompt) for p in prompts("harm", "hate", 36)[16:]]
    run(tmp_path / "alike", benign=[*BENIGN, *sounding])
    assert "opens a gate for only" in caplog.text


@pytest.mark.parametrize("lacking", ["unsafe", "benign"])
def test_calibration_without_prompts_raises(run, tmp_path, lacking):
    with pytest.raises(SteeringError, match=f"no {lacking} prompts"):
        run(tmp_path, **{lacking: []})


def test_prompt_file_survives_write_and_load(tmp_path):
    rows = [*UNSAFE, Prompt("é\u2028\n", "c", "answer", "id", "safe", subcategory="s"), *BENIGN]
    write_prompts(rows, tmp_path / "p.jsonl")
    assert load_prompts(tmp_path / "p.jsonl") == rows


def test_calibrated_policy_survives_content_round_trip(done):
    policy = done[0].pack.policy
    assert Policy.from_content(policy.content()) == policy
