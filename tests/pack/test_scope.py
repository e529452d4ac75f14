import dataclasses
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import SteeringError
from pysteer.pack.scope import COUNTED, KINDS, MAX_POSITION, Scope

COUNTS = st.integers(1, MAX_POSITION)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MARKERS = st.tuples(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
).filter(lambda pair: not pair[0].endswith(pair[1]) and not pair[1].endswith(pair[0]))


@st.composite
def scopes(draw):
    kind = draw(st.sampled_from(KINDS))
    exclude = draw(st.none() | MARKERS)
    if kind in COUNTED:
        return Scope(kind, length=draw(COUNTS), exclude=exclude)
    if kind == "values":
        return Scope(kind, values=tuple(draw(st.lists(FINITE, min_size=1))), exclude=exclude)
    if kind == "range":
        start = draw(st.integers(0, MAX_POSITION - 1))
        stop = draw(st.none() | st.integers(start + 1, MAX_POSITION))
        return Scope(kind, start=start, stop=stop, exclude=exclude)
    return Scope(kind, exclude=exclude)


@given(scopes())
def test_scope_round_trips_through_text_and_json(scope):
    assert Scope.parse(str(scope)) == scope
    assert Scope.from_content(json.loads(json.dumps(scope.content()))) == scope
    assert Scope.parse(scope) is scope
    assert pickle.loads(pickle.dumps(scope)) == scope
    assert hash(Scope.parse(str(scope))) == hash(scope)


@given(scopes(), scopes())
def test_different_scopes_have_different_texts(one, other):
    assert (str(one) == str(other)) == (one == other)


THINK = ["<think>", "</think>"]


@pytest.mark.parametrize(
    ("text", "mapping", "scope"),
    [
        ("all", {"tokens": "all"}, Scope()),
        ("prompt", {"tokens": "prompt"}, Scope("prompt")),
        ("response", {"tokens": "response"}, Scope("response")),
        ("first 8", {"first": 8}, Scope("first", length=8)),
        ("range 3 20", {"range": [3, 20]}, Scope("range", start=3, stop=20)),
        ("range 3", {"range": [3]}, Scope("range", start=3)),
        ("range 0 1", {"range": (0, 1)}, Scope("range", stop=1)),
        ("linear 32", {"linear": 32}, Scope("linear", length=32)),
        ("cosine 32", {"cosine": 32}, Scope("cosine", length=32)),
        ("values 1 0.5 -2", {"values": [1, 0.5, -2]}, Scope("values", values=(1.0, 0.5, -2.0))),
        (
            'first 8 exclude "<think>" "</think>"',
            {"first": 8, "exclude": THINK},
            Scope("first", length=8, exclude=("<think>", "</think>")),
        ),
        (
            'all exclude "a exclude" "say \\"b\\""',
            {"tokens": "all", "exclude": ["a exclude", 'say "b"']},
            Scope(exclude=("a exclude", 'say "b"')),
        ),
    ],
)
def test_text_and_mapping_give_the_same_scope(text, mapping, scope):
    assert Scope.parse(text) == Scope.parse(mapping) == scope
    assert str(scope) == text
    assert Scope.parse(f"  {text.replace(' ', '  ', 1)} ") == scope


def test_usual_spellings_of_numbers_are_read():
    assert Scope.parse("values 1. .5 1e-2 +2").values == (1.0, 0.5, 0.01, 2.0)
    assert str(Scope("values", values=(-0.0,))) == "values 0"


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "unknown scope ''"),
        ("everything", "unknown scope 'everything'; use all, prompt"),
        ("All", "unknown scope"),
        ("tokens all", "unknown scope"),
        ("all 8", "takes no argument; remove '8'"),
        ("response 8", "takes no argument; remove '8'"),
        ("prompt linear 8", "takes no argument; remove 'linear'"),
        ("first", "needs one number of tokens, as in 'first 8'"),
        ("first 8 9", "needs one number"),
        ("first 0", "'first' needs a number of tokens from 1 .* not 0"),
        ("linear 0", "'linear' needs a number of tokens from 1"),
        ("cosine -4", "'cosine' needs a number of tokens from 1 .* not -4"),
        ("first 1.5", "'1.5' in a scope is not a number of tokens"),
        ("first eight", "'eight' in a scope is not"),
        ("first 9999999999", "from 1 to 2147483647"),
        ("first 99999999999999999999", "is not a number of tokens"),
        ("range", "needs a start"),
        ("range 1 2 3", "needs a start"),
        ("range 20 3", "20 3 is empty"),
        ("range 3 3", "3 3 is empty"),
        ("range -1 3", "start of a range is -1"),
        ("range 1 -3", "stop of a range is -3"),
        ("range 1 9999999999", "stop of a range"),
        ("values", "at least one number"),
        ("values 1 nan", "'nan' in a scope is not a finite number"),
        ("values 1 1e999", "finite numbers, not inf"),
        ("values 1,2", "'1,2' in a scope"),
        ("values 1_0", "'1_0' in a scope"),
        ("all exclude", "two markers in double quotes"),
        ("all exclude <think> </think>", "two markers in double quotes"),
        ('all exclude "a"', "two markers"),
        ('all exclude "a" "b" "c"', "two markers"),
        ('all exclude "a" 1', "a marker to exclude is 1"),
        ('all exclude "a" ' + "[" * 100_000, "two markers"),
        ('all exclude "" "b"', "a marker to exclude is ''"),
        ('all exclude "a" "a"', "are both 'a'"),
        ('all exclude "xa" "a"', "ends with the other"),
        ('all exclude "a" "xa"', "ends with the other"),
        ('all exclude "\\ud800" "a"', "not UTF-8 text"),
        ({}, "names no tokens"),
        ({"exclude": THINK}, "names no tokens"),
        ({"tokens": "first"}, "'tokens' is one of all, prompt, response, not 'first'"),
        ({"tokens": ["all"]}, "'tokens' is one of"),
        ({"tokens": None}, "'tokens' is one of"),
        ({"all": True}, "unknown key 'all' in a scope; there are tokens, first"),
        ({1: 2}, "unknown key 1"),
        ({"tokens": "prompt", "linear": 8}, "a scope of prompt tokens has no 'linear'"),
        ({"linear": 8, "tokens": "prompt"}, "a scope of prompt tokens has no 'linear'"),
        ({"first": 8, "linear": 8}, "one of first, linear, not several at once"),
        ({"tokens": "response", "first": 8}, "not several at once"),
        ({"first": True}, "not True"),
        ({"first": 8.0}, "not 8.0"),
        ({"first": "8"}, "not '8'"),
        ({"linear": None}, "not None"),
        ({"range": 3}, "needs a start"),
        ({"range": []}, "needs a start"),
        ({"range": [3, None]}, "has no stop, as in 'range 3'"),
        ({"range": [None, 3]}, "start of a range is None"),
        ({"range": [False, 3]}, "start of a range is False"),
        ({"range": [0, 3.0]}, "stop of a range is 3.0"),
        ({"values": []}, "at least one number"),
        ({"values": 1}, "at least one number"),
        ({"values": "1 2"}, "at least one number"),
        ({"values": [1, NAN]}, "finite numbers, not nan"),
        ({"values": [1, -INFINITY]}, "finite numbers, not -inf"),
        ({"values": [1, "1"]}, "finite numbers, not '1'"),
        ({"values": [True]}, "finite numbers, not True"),
        ({"values": [10**400]}, "finite numbers"),
        ({"values": [1] * 70_000}, "more than 65536"),
        ({"tokens": "all", "exclude": None}, "a start and an end marker"),
        ({"tokens": "all", "exclude": "<think>"}, "a start and an end marker"),
        ({"tokens": "all", "exclude": ["a"]}, "a start and an end marker"),
        ({"tokens": "all", "exclude": ["a", 1]}, "a marker to exclude is 1"),
        ({"tokens": "all", "exclude": ["a", ""]}, "a marker to exclude is ''"),
        ({"tokens": "all", "exclude": ["b" * 257, "a"]}, "longer than 256"),
        (8, "8 is not a scope"),
        (None, "None is not a scope"),
        (["first", 8], "is not a scope"),
    ],
)
def test_invalid_scope_raises_in_one_line(given, words):
    with pytest.raises(SteeringError, match=words) as caught:
        Scope.parse(given)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"kind": "last"}, "unknown scope 'last'"),
        ({"kind": ["all"]}, "unknown scope"),
        ({"start": 1}, "no start and stop"),
        ({"stop": 1}, "no start and stop"),
        ({"length": 1}, "no length; use one of first"),
        ({"kind": "range", "length": 1}, "no length"),
        ({"values": (1,)}, "no values"),
        ({"kind": "first", "length": 1, "values": (1,)}, "no values"),
        ({"kind": "first", "length": 1, "start": 1}, "no start"),
        ({"kind": "first"}, "needs a number of tokens"),
        ({"kind": "values"}, "at least one number"),
        ({"exclude": "ab"}, "a start and an end marker"),
    ],
)
def test_attribute_of_another_kind_raises(parts, words):
    with pytest.raises(SteeringError, match=words):
        Scope(**parts)


def test_scope_is_immutable():
    mine = [1, 2]
    scope = Scope("values", values=mine, exclude=["a", "b"])
    mine[0] = 3
    assert scope.values == (1.0, 2.0)
    assert scope.exclude == ("a", "b")
    assert isinstance(scope.values[0], float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scope.kind = "all"


@given(st.text() | st.dictionaries(st.sampled_from(["tokens", *KINDS, "exclude"]), st.text()))
def test_any_data_gives_a_scope_or_a_steering_error(given):
    try:
        refusal, scope = "", Scope.parse(given)
    except SteeringError as error:
        refusal, scope = str(error), None
    assert bool(scope) != bool(refusal)
    assert "\n" not in refusal
