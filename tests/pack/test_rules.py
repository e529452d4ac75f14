import dataclasses
import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import SteeringError, UnknownCategoryError
from pysteer.pack.rules import MAX_STACK, Rule

# A rule as it is written, beside the same expression for Python: v[i] in the place of name i.
NAMES = ["malware", "self harm", "x_1", "ärger", "and", "it's", 'a "b"', "back\\slash", "a\nb"]
WRITTEN = ["malware", "'self harm'", "x_1", "ärger", '"and"', '"it\'s"', "'a \"b\"'"]
WRITTEN += ['"back\\\\slash"', "'a\nb'"]
SPACE = st.sampled_from([" ", "  ", "\n", "\t "])


@st.composite
def expressions(draw, depth=3):
    """(ours, Python's), without any parentheses but those that were drawn."""
    ours, theirs = "", ""
    for number in range(draw(st.integers(1, 4))):
        if number:
            operator = draw(st.sampled_from(["and", "or"]))
            space = draw(SPACE), draw(SPACE)
            ours += space[0] + operator + space[1]
            theirs += f" {operator} "
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            ours += "not" + draw(SPACE)
            theirs += "not "
        if depth and draw(st.booleans()):
            mine, their = draw(expressions(depth - 1))
            ours += f"({mine})"
            theirs += f"({their})"
        else:
            index = draw(st.integers(0, len(NAMES) - 1))
            ours += WRITTEN[index]
            theirs += f"v[{index}]"
    return ours, theirs


def run(postfix, gates):
    """Evaluate the postfix form as the native part does."""
    stack = []
    for item in postfix:
        if item >= 0:
            stack.append(gates[item])
        elif item == -3:
            stack[-1] = not stack[-1]
        else:
            right, left = stack.pop(), stack.pop()
            stack.append({-1: left and right, -2: left or right}[item])
        assert len(stack) <= MAX_STACK
    [value] = stack
    return value


@given(expressions(), st.lists(st.booleans(), min_size=len(NAMES), max_size=len(NAMES)))
def test_rule_evaluates_as_the_python_expression(expression, values):
    ours, theirs = expression
    expected = eval(theirs.strip(), {}, {"v": values})
    rule = Rule(ours)
    assert rule.evaluate(dict(zip(NAMES, values, strict=True))) is expected
    assert run(rule.postfix({name: i for i, name in enumerate(NAMES)}), values) is expected
    assert set(rule.names) == {NAMES[i] for i in range(len(NAMES)) if f"v[{i}]" in theirs}
    assert len(set(rule.names)) == len(rule.names)
    assert rule.text == str(rule) == ours


@given(st.text().filter(str.strip), st.booleans())
def test_rule_of_a_category_is_its_own_gate(name, value):
    rule = Rule.of_category(name)
    assert rule.names == (name,)
    assert rule.evaluate({name: value}) is value
    assert rule.postfix({name: 7}) == [7]


def test_plain_name_has_no_quotes():
    assert Rule.of_category("malware").text == "malware"
    assert Rule.of_category("not").text == '"not"'
    assert Rule.of_category("self-harm").text == '"self-harm"'


def test_postfix_form_is_that_of_the_native_part():
    rule = Rule("malware and not (privacy or 'self harm') or malware")
    assert rule.names == ("malware", "privacy", "self harm")
    assert rule.postfix({"malware": 4, "privacy": 0, "self harm": 2}) == [
        4,
        0,
        2,
        -2,
        -3,
        -1,
        4,
        -2,
    ]


def test_rules_compare_by_text_and_survive_pickling():
    rule = Rule("a and b")
    again = pickle.loads(pickle.dumps(rule))
    assert again == rule
    assert hash(again) == hash(rule)
    assert again.postfix({"a": 0, "b": 1}) == [0, 1, -1]
    assert Rule("a or b") != rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.text = "b"


def test_name_without_a_gate_raises():
    with pytest.raises(UnknownCategoryError, match="names 'b'"):
        Rule("a and b").postfix({"a": 0})
    with pytest.raises(UnknownCategoryError, match="names 'b'"):
        Rule("a and b").evaluate({"a": False})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "column 1: expected a name, found the end of the rule"),
        ("   ", "column 4: expected a name, found the end"),
        ("a and", "column 6: expected a name, found the end"),
        ("and a", "column 1: expected a name, found 'and'"),
        ("a b", "column 3: expected 'and' or 'or', found 'b'"),
        ("a not b", "column 3: expected 'and' or 'or', found 'not'"),
        ("a AND b", "column 3: expected 'and' or 'or', found 'AND'"),
        ("'a' 'b'", "column 5: expected 'and' or 'or', found 'b'"),
        ("a and ()", "column 8: expected a name, found '\\)'"),
        ("(a", "column 1: this parenthesis is not closed"),
        ("a and (b or (c)", "column 7: this parenthesis is not closed"),
        ("a)", "column 2: this parenthesis was never opened"),
        ("a) or (b", "column 2: this parenthesis was never opened"),
        ("self-harm", "column 5: unexpected '-'.*in quotes$"),
        ("ä é", "column 3: expected 'and' or 'or', found 'é'"),
        ("a && b", "column 3: unexpected '&'"),
        ("a.b", "column 2: unexpected '.'"),
        ("a > 0.5", "column 3: unexpected '>'"),
        ("f(a)", "column 2: expected 'and' or 'or', found '\\('"),
        ("1", "column 1: unexpected '1'"),
        ("a # b", "column 3: unexpected '#'"),
        ("a\x00", "column 2: unexpected"),
        ("a and 'b", "column 7: the quote is not closed"),
        ("a and 'b\\c'", "column 7: the quote is not closed, or has a backslash"),
        ("f'a'", "column 2: expected 'and' or 'or', found 'a'"),
        ("''", "column 1: the name is empty"),
        ("a or ' '", "column 6: the name is empty"),
        (None, "not None"),
        (True, "not True"),
        (["a"], "not \\['a'\\]"),
        ("a or " * 2500 + "a", "longer than 10000"),
        ("a or (" * 100 + "a" + ")" * 100, "more than 32 deep"),
    ],
)
def test_invalid_rule_raises_with_its_column(text, words):
    with pytest.raises(SteeringError, match=words) as caught:
        Rule(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.text("ab()'\"\\ \nandotr-", max_size=30) | st.text())
def test_any_text_gives_a_rule_or_a_steering_error(text):
    try:
        refusal, names = "", Rule(text).names
    except SteeringError as error:
        refusal, names = str(error), ()
    assert bool(names) != bool(refusal)
    assert "\n" not in refusal


def test_deep_nesting_is_read_while_the_stack_stays_small():
    gates = {"a": True, "b": False}
    assert Rule("(" * 4999 + "a" + ")" * 4999).evaluate(gates)
    assert Rule("not " * 2000 + "a").evaluate(gates)
    assert not Rule("not " * 2001 + "a").evaluate(gates)
    assert not Rule(" and ".join(itertools.chain(["a"] * 1000, ["b"]))).evaluate(gates)
    deepest = "a or (" * (MAX_STACK - 1) + "b" + ")" * (MAX_STACK - 1)
    assert Rule(deepest).evaluate(gates)
