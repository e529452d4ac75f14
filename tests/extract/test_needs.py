"""The needs that methods declare are the inputs that they use."""

import pytest
from extraction import GENERIC_DATA, MATCHED_DATA, TWINS, UNSAFE, FakeCapture, FakeJudge

from pysteer import SteeringError
from pysteer.extract.data import Data
from pysteer.extract.extraction import extract
from pysteer.extract.methods import METHODS
from pysteer.extract.settings import ExtractSettings
from pysteer.prompts import Prompt
from pysteer.settings import described

IN_ANY_ENGINE = [method for method in METHODS.values() if not method.needs.gradients]
methods = pytest.mark.parametrize("method", IN_ANY_ENGINE, ids=lambda method: method.name)


def ran_by(method, folder, data=MATCHED_DATA, **options):
    unsafe = {p.prompt for p in UNSAFE}
    judge = FakeJudge(lambda prompt, _: prompt not in unsafe) if method.needs.labels else None
    without_responses = Data(
        [Prompt(p.prompt, p.category, pair_id=p.pair_id) for p in data.unsafe],
        [Prompt(p.prompt, p.category, pair_id=p.pair_id) for p in data.safe],
        answers=data.answers,
    )
    capture = FakeCapture()
    settings = ExtractSettings(method=method.name, layers=(1, 2), router=False, **options)
    extract(capture, without_responses, settings, cache=folder, judge=judge)
    return capture.ran


@methods
def test_own_answers_are_asked_for_only_where_declared(method, tmp_path):
    asked = any(what[0] == "answer" for what in ran_by(method, tmp_path))
    assert asked is method.needs.own_answers


@methods
def test_safe_answers_are_taken_only_where_declared(method, tmp_path):
    answers = [Prompt("", response="never")]
    data = Data(UNSAFE, TWINS, answers=answers)
    if not method.needs.safe_answers:
        with pytest.raises(SteeringError, match=f"not for {method.name}"):
            ran_by(method, tmp_path, data)
        return
    with_answers = ran_by(method, tmp_path / "1", data)
    assert with_answers != ran_by(method, tmp_path / "2")


@methods
def test_prompts_are_pooled_only_where_answers_are_not_read(method, tmp_path):
    if method.reads_answers:
        with pytest.raises(SteeringError, match="no pooling"):
            ran_by(method, tmp_path, pooling="last")
        return
    assert ran_by(method, tmp_path / "1", pooling="last") != ran_by(method, tmp_path / "2")


def test_methods_describe_themselves():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert method.scope in ("all", "prompt")
        defaults = method.configured({})
        assert vars(defaults).keys() >= described(method.options).keys()
        assert all(option.help for option in described(method.options).values())


def test_unknown_option_raises_with_known_names():
    with pytest.raises(SteeringError, match="pca has no option 'C'; it has variant"):
        METHODS["pca"].configured({"C": 1.0})
    with pytest.raises(SteeringError, match=r"mean has no option 'C'$"):
        METHODS["mean"].configured({"C": 1.0})


@methods
def test_pairs_follow_the_data_only_where_declared(method, tmp_path):
    needed = method.needs_pairs(method.configured({}))
    if needed:
        with pytest.raises(SteeringError, match="this method needs pairs"):
            ran_by(method, tmp_path, Data(GENERIC_DATA.unsafe, [Prompt("please")]))
    else:
        ran_by(method, tmp_path, GENERIC_DATA)
