import copy
import itertools
import json
import pickle
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import numpy as np
import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pysteer import FormatError, SteeringError
from pysteer.pack import router
from pysteer.pack.policy import CategoryPolicy, CategorySettings, GateKind, Policy
from pysteer.pack.policy_error import PolicyError
from pysteer.pack.policy_file import MAX_BYTES
from pysteer.pack.rules import Rule
from pysteer.pack.scope import Scope

WRITTEN = """\
# as a person writes it
gate: probe
conflict: sum
recheck: 32
scope: response
categories:
  malware:
    mode: auto
    strength: 1.0
    threshold: 0.4
    scope: first 8
    when: malware and not privacy_violation
  "self harm": {strength: 5e-1, mode: off}
  thoughts:
    mode: always
    strength: -2
    threshold: null
    scope:
      tokens: response
      exclude: ["<think>", "</think>"]
"""
MEANT = {
    "gate": "probe",
    "conflict": "sum",
    "recheck": 32,
    "scope": "response",
    "categories": {
        "malware": {
            "mode": "auto",
            "strength": 1.0,
            "threshold": 0.4,
            "scope": "first 8",
            "when": "malware and not privacy_violation",
        },
        "self harm": {"mode": "off", "strength": 0.5},
        "thoughts": {
            "mode": "always",
            "strength": -2.0,
            "threshold": None,
            "scope": {"tokens": "response", "exclude": ["<think>", "</think>"]},
        },
    },
}

# --- generated policies ------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
NAMES = st.sampled_from(["a", "b", "off", "3", "self harm", "null", "x: y", "- z", "1e3"]) | (
    TEXT.filter(str.strip)
)
NUMBERS = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
SCOPES = st.sampled_from(
    ["all", "prompt", "first 8", "range 3", "range 3 20", "values 1 0.5", "cosine 4"]
) | st.just({"first": 8, "exclude": ["<think>", "</think>"]})


def some(**parts):
    return st.fixed_dictionaries({}, optional=parts)


@st.composite
def contents(draw):
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    gate = draw(st.sampled_from(["probe", None]) | st.sampled_from(router.GATES))
    rules = NAMES.map(lambda name: f"not ({Rule.of_category(name)} or a)")
    category = some(
        mode=st.sampled_from(["auto", "always", "off", None]),
        strength=NUMBERS,
        threshold=st.none() | (NUMBERS if gate == "probe" else st.floats(0, 1)),
        scope=st.none() | SCOPES,
        when=st.none() | rules,
    )
    content = draw(
        some(
            conflict=st.sampled_from(["sum", "strongest", "first"]),
            recheck=st.none() | st.integers(1, 2**31 - 1),
            scope=SCOPES,
            categories=st.fixed_dictionaries(dict.fromkeys(names, category)),
        )
    )
    return {"gate": gate, **content} if gate else content


def loaded(text, suffix=".yaml"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"policy{suffix}"
        path.write_text(text, encoding="utf-8", newline="")
        return Policy.load(path)


def block(value, indent=0):
    """`value` as YAML in block style, all text in double quotes."""
    if isinstance(value, dict) and value:
        lines = (
            f"{' ' * indent}{quoted(key)}:{block(part, indent + 2)}" for key, part in value.items()
        )
        return ("\n" if indent else "") + "".join(lines)
    if isinstance(value, list):
        return "".join(f"\n{' ' * indent}-{block(part, indent + 2)[:-1]}" for part in value) + "\n"
    return f" {quoted(value) if isinstance(value, str) else json.dumps(value)}\n"


def quoted(text):
    """YAML's double quotes, in which astral characters are escaped with eight digits."""
    return (
        '"'
        + "".join(c if " " <= c <= "~" and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
        + '"'
    )


@given(contents())
def test_policy_round_trips_through_plain_data(content):
    policy = Policy.from_content(content)
    again = Policy.from_content(json.loads(json.dumps(policy.content())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.content() == policy.content() == content
    assert policy.content().keys() == content.keys()


@given(contents())
def test_policy_round_trips_through_json_files(content):
    policy = Policy.from_content(content)
    for ascii_only, indent in itertools.product((True, False), (None, "\t", 2)):
        text = json.dumps(policy.content(), ensure_ascii=ascii_only, indent=indent)
        assert loaded(text, ".json") == policy
    assert loaded(json.dumps(policy.content(), separators=(",", ":")), ".JSON") == policy


def differs_between_yaml_versions(name):
    """Return True if PyYAML writes the name without quotes, which YAML 1.2 reads as a number."""
    try:
        float(name)
    except ValueError:
        return False
    return True


@given(contents(), st.sampled_from([None, False, True]), st.booleans())
def test_policy_round_trips_through_yaml_of_another_writer(content, style, wide):
    policy = Policy.from_content(content)
    categories = policy.content().get("categories", {})
    assume(not any(differs_between_yaml_versions(name) for name in categories))
    text = yaml.safe_dump(
        policy.content(), default_flow_style=style, allow_unicode=wide, sort_keys=False
    )
    assert loaded(text) == policy
    assert loaded(text.replace("\n", "\r\n")) == policy


@given(contents())
def test_policy_round_trips_through_block_style_yaml(content):
    policy = Policy.from_content(content)
    assume(policy.content())
    assert loaded(block(policy.content())) == policy


@given(contents())
def test_copies_and_pickles_are_equal(content):
    policy = Policy.from_content(content)
    for again in (pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy), copy.copy(policy)):
        assert again == policy
        assert hash(again) == hash(policy)
        assert again.content() == policy.content()


def overlaid(mine, theirs):
    """`merged`, written out on plain data."""
    content = copy.deepcopy(mine)
    if "scope" in theirs:
        for settings in content.get("categories", {}).values():
            settings.pop("scope", None)
    for key, value in theirs.items():
        if key == "categories":
            for name, settings in value.items():
                content.setdefault("categories", {}).setdefault(name, {}).update(settings)
        else:
            content[key] = value
    return content


@given(contents(), contents())
def test_merged_takes_the_settings_of_the_other_policy(mine, theirs):
    mine["gate"] = theirs["gate"] = "probe"
    for content, name in itertools.product((mine, theirs), ("a", "b")):
        content.setdefault("categories", {}).setdefault(name, {})
    merged = Policy.from_content(mine).merged(Policy.from_content(theirs))
    assert merged == Policy.from_content(overlaid(mine, theirs))


@given(contents())
def test_merging_an_empty_policy_changes_nothing(content):
    policy = Policy.from_content(content)
    assert policy.merged(Policy()) == Policy().merged(policy) == policy.merged(policy) == policy


# --- settings of a policy ----------------------------------------------------------------------


def test_handwritten_yaml_is_read(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(WRITTEN)
    policy = Policy.load(path)
    assert policy.content() == MEANT
    assert list(policy.content()) == list(MEANT)
    assert policy == Policy.from_content(MEANT) == Policy(**MEANT)
    assert policy.settings("malware") == CategorySettings(
        "auto", 1.0, 0.4, Scope("first", length=8), Rule("malware and not privacy_violation")
    )
    assert policy.settings("self harm") == CategorySettings(
        "off", 0.5, None, Scope("response"), Rule('"self harm"')
    )
    thinking = Scope("response", exclude=("<think>", "</think>"))
    assert policy.settings("thoughts") == CategorySettings(
        "always", -2.0, None, thinking, Rule("thoughts")
    )
    assert policy.settings("more") == CategorySettings(
        "auto", 1.0, None, Scope("response"), Rule("more")
    )


def test_examples_of_the_documentation_hold(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
    [written] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    [example] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(written)
    exec(compile(example, "policy.md", "exec"), {})
    assert "strength=0.5" in capsys.readouterr().out

    names = ["malware", "self harm", "privacy_violation"]
    Policy.load("policy.yaml").check(categories=names, known=names, kinds=["probe"])
    Path("policy.yaml").write_text(written.replace("privacy_violation\n", "privacy\n", 1))
    [error] = re.findall(r"^policy\.yaml, line .*$", text, re.MULTILINE)
    with pytest.raises(FormatError, match=f"^{re.escape(error)}$"):
        Policy.load("policy.yaml").check(categories=names, known=names, kinds=["probe"])

    rows = re.findall(r"^\| `([^`]+)` \| `(\{[^`]+\})` \|", text, re.MULTILINE)
    assert len(rows) == 9
    for short, mapping in rows:
        assert Scope.parse(short) == Scope.parse(yaml.safe_load(mapping))


def test_empty_policy_has_the_defaults():
    policy = Policy()
    assert (policy.gate, policy.conflict, policy.recheck) == (None, "strongest", None)
    assert (policy.scope, dict(policy.categories)) == (Scope("all"), {})
    assert policy.content() == {}
    assert policy.settings("a") == CategorySettings("auto", 1.0, None, Scope("all"), Rule("a"))


def test_gate_kinds_are_the_router_s():
    assert get_args(GateKind) == router.GATES


def test_category_without_a_mode_is_gated_if_the_router_knows_its_rule():
    policy = Policy(categories={"a": {"when": "b and not c"}, "d": {"mode": "always"}})
    assert policy.settings("a").mode == "auto"
    assert policy.settings("a", known=["b", "c"]).mode == "auto"
    assert policy.settings("a", known=["a", "b"]).mode == "off"
    assert policy.settings("b", known=["b"]).mode == "auto"
    assert policy.settings("b", known=[]).mode == "off"
    assert policy.settings("d", known=[]).mode == "always"


def test_python_values_are_accepted():
    scope, rule = Scope("first", length=2), Rule("b")
    settings = CategoryPolicy(scope=scope, when=rule, strength=np.float32(0.5), threshold=1)
    policy = Policy(scope=scope, categories=MappingProxyType({"a": settings}))
    assert policy == Policy(
        scope="first 2",
        categories={"a": {"scope": "first 2", "when": "b", "strength": 0.5, "threshold": 1.0}},
    )
    assert type(policy.settings("a").strength) is float


def test_equality_compares_the_settings_given_not_their_meaning():
    assert Policy(gate="multinomial") != Policy()
    assert Policy(gate="cast").merged(Policy(gate="probe")).gate == "probe"
    assert Policy(gate="cast").merged(Policy()).gate == "cast"
    assert CategoryPolicy(strength=1) != CategoryPolicy()
    assert CategoryPolicy(strength=1) != 1
    assert Policy(categories={"a": {}}) != Policy(categories={"b": {}})
    assert Policy(categories={"a": {"strength": 0.0}}) == Policy(
        categories={"a": {"strength": -0.0}}
    )
    assert len({Policy(), Policy(), Policy(gate="cast"), Policy(categories={"a": {}})}) == 3


def test_null_in_the_other_policy_restores_the_default():
    pack = Policy(recheck=8, categories={"a": {"threshold": 0.5, "scope": "first 2", "when": "b"}})
    nothing = {"threshold": None, "scope": None, "when": None, "mode": None}
    merged = pack.merged(Policy(recheck=None, categories={"a": nothing}))
    assert merged.recheck is None
    assert merged.settings("a") == Policy().settings("a")


def test_policy_is_immutable():
    mine = {"a": {"strength": 1}}
    policy = Policy(categories=mine)
    mine["a"]["strength"] = 2
    mine["b"] = {}
    assert policy.content() == {"categories": {"a": {"strength": 1.0}}}
    with pytest.raises(ValidationError, match="frozen"):
        policy.gate = "cast"
    with pytest.raises(ValidationError, match="frozen"):
        policy.categories["a"].strength = 3
    with pytest.raises(TypeError):
        policy.categories["b"] = CategoryPolicy()


# --- invalid policies, and their places ---------------------------------------------------------


def refusal(tmp_path, text, name="policy.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(FormatError) as caught:
        Policy.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500 + len(str(path))
    assert message.startswith(str(path))
    return message.removeprefix(str(tmp_path) + "/")


def changed(old, new):
    assert WRITTEN.count(old) == 1
    return WRITTEN.replace(old, new)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed("gate: probe", "gate: svm"), "line 2, gate: must be 'margin', 'multinomial', "),
        (changed("gate: probe", "gate: 1"), "line 2, gate: must be "),
        (changed("gate: probe", "gate: [probe]"), "line 2, gate: must be "),
        (changed("gate:", "gates:"), "line 2, gates: unknown key; there are gate, conflict, "),
        (
            changed("conflict: sum", "conflict: all"),
            "line 3, conflict: must be 'sum', 'strongest' or ",
        ),
        (changed("conflict: sum", "conflict: on"), "line 3, conflict: must be"),
        (changed("32", "0"), "line 4, recheck: must be a number of tokens from 1 to"),
        (changed("32", "3.5"), "line 4, recheck: must be a number of tokens"),
        (changed("32", "true"), "line 4, recheck: must be a number of tokens"),
        (changed("32", "9999999999"), "line 4, recheck: must be a number of tokens"),
        (changed("32", "9" * 5000), "line 4, recheck: must be a number of tokens"),
        (changed("32", "'32'"), "line 4, recheck: must be a number of tokens .* not '32'"),
        (changed("scope: response", "scope: null"), "line 5, scope: None is not a scope"),
        (changed("scope: response", "scope: on"), "line 5, scope: unknown scope 'on'"),
        (changed("mode: auto", "mode: true"), "line 8, categories.malware.mode: must be 'auto', "),
        (changed("mode: auto", "mode: yes"), "line 8, categories.malware.mode: .* not 'yes'"),
        (
            changed("strength: 1.0", "strength: yes"),
            "line 9, categories.malware.strength: must be a finite number, not 'yes'",
        ),
        (
            changed("strength: 1.0", "strength: true"),
            "line 9, categories.malware.strength: must be a finite number, not True",
        ),
        (changed("strength: 1.0", "strength: '1.0'"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "strength: .inf"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "strength: 1e999"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "strength: nan"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "strength: [1]"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "strength: null"), "line 9, .*strength: must be a finite"),
        (changed("strength: 1.0", "Strength: 1"), "line 9, categories.malware.Strength: unknown"),
        (changed("threshold: 0.4", "threshold: high"), "line 10, .*threshold: must be a finite"),
        (changed("first 8", "first 0"), "line 11, categories.malware.scope: the scope 'first' "),
        (changed("first 8", "range 8 3"), "line 11, .*scope: the range 8 3 is empty"),
        (changed("first 8", "8"), "line 11, .*scope: 8 is not a scope"),
        (
            changed("scope: first 8", "scope: {tokens: prompt, linear: 8}"),
            "line 11, .*scope: a scope of prompt tokens has no 'linear'",
        ),
        (
            changed("malware and not", "malware or and not"),
            "line 12, categories.malware.when: column 12: expected a name, found 'and'",
        ),
        (changed("when: malware and not privacy_violation", "when: true"), "line 12, .*not True"),
        (changed("when: malware and not privacy_violation", "when:\n"), None),
        (changed("{strength: 5e-1, mode: off}", "5"), "line 13, categories.'self harm': must be a"),
        (changed("{strength: 5e-1, mode: off}", ""), "line 13, categories.'self harm': must be a"),
        (changed("5e-1", "5f-1"), "line 13, categories.'self harm'.strength: must be"),
        (
            changed('["<think>", "</think>"]', "[a, a]"),
            "line 18, categories.thoughts.scope: the st",
        ),
        ("categories: [malware]\n", "line 1, categories: must be a mapping"),
        ("categories:\n", "line 1, categories: must be a mapping"),
        ("categories:\n  ' ': {}\n", "line 1, categories: ' ' is not a category name"),
        (
            "gate: multinomial\ncategories:\n  a:\n    threshold: 2.5",
            "line 4, categories.a.threshold: 2.5 cannot be crossed: .* between 0 and 1$",
        ),
        (
            "categories: {a: {threshold: -1.5}}\n\ngate: cast",
            "line 1, categories.a.threshold: -1.5 cannot be crossed: .* between -1 and 1$",
        ),
        ("- gate: probe\n", "line 1: must be a mapping with keys such as gate, conflict"),
        ("probe", "line 1: must be a mapping"),
        ("\n\n# nothing\n", ": the file is empty; an empty policy is {}"),
        ("", ": the file is empty"),
    ],
)
def test_invalid_setting_in_a_file_raises_with_its_line(tmp_path, text, message):
    if message is None:  # left empty is as good as left out
        assert loaded(text).settings("malware").rule == Rule("malware")
        return
    comma = "" if message.startswith(":") else ", "
    assert re.match(re.escape(f"policy.yaml{comma}") + message, refusal(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate: cast\nscope: all\ngate: probe\n", ", line 3, gate: given twice, first in line 1"),
        (
            "categories:\n  a: {strength: 1,\n      strength: 2}\n",
            ", line 3, categories.a.strength: given twice, first in line 2",
        ),
        (
            "categories:\n  a: {}\n  b: {}\n  'a': {}\n",
            ", line 4, categories.a: given twice, first in line 2",
        ),
        ("gate: cast\n3: 4\n", ", line 2: the key '3' is not text; put it in quotes"),
        ("categories:\n  null: {}\n", ", line 2, categories: the key 'null' is not text"),
        ("categories:\n  true: {}\n", ", line 2, categories: the key 'true' is not text"),
        ("categories:\n  1e3: {}\n", ", line 2, categories: the key '1e3' is not text"),
        ("gate: cast\n[a]: 4\n", ", line 2: a key is a list or a mapping"),
        ("gate: cast\n? {a: b}\n: 4\n", ", line 2: a key is a list or a mapping"),
        ("gate: cast\nscope: &x all\n", ", line 2, scope: anchors and aliases are not supported"),
        ("gate: &x cast\nscope: *x\n", ", line 1, gate: anchors and aliases are not supported"),
        ("gate: cast\nscope: *x\n", ", line 2, scope: anchors and aliases are not supported"),
        ("gate: cast\n&x scope: all\n", ", line 2: anchors and aliases are not supported"),
        ("gate: cast\n*x : all\n", ", line 2: anchors and aliases are not supported"),
        ("gate: cast\ncategories: &x {}\n", ", line 2, categories: anchors and aliases"),
        ("gate: cast\n<<: {scope: all}\n", ", line 2, <<: unknown key".replace("<<", "'<<'")),
        ("scope: !!str all\n", ", line 1, scope: the tag 'tag:yaml.org,2002:str' is not supported"),
        ("scope: !x {}\n", ", line 1, scope: the tag '!x' is not supported"),
        ("scope: !!python/object:os.system []\n", ", line 1, scope: the tag "),
        (
            "gate: cast\nscope: " + "[" * 500,
            ", line 2, scope.0.0.0.0.0.0.0: nested more than 8",
        ),
        (
            "gate: cast\nscope: " + "{a: " * 500,
            ", line 2, scope.a.a.a.a.a.a.a: nested more than 8",
        ),
        ("gate: cast\nscope: " + "[" * 100_000, ", line 2"),  # some versions of libyaml refuse it
        ("gate: cast\n---\ngate: cast\n", ", line 2: a second document begins"),
        ("gate: cast\nscope: [1,\n", ", line 2: not YAML: "),
        ("gate: cast\n\tscope: all\n", ", line 2: not YAML: "),
        ("gate: cast\nscope: a: b\n", ", line 2: not YAML: "),
        ("gate: cast\nscope: \x01\n", ", line 2: not YAML: "),
        (b"gate: \xff\n", ": 'utf-8' codec can't decode"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), ", line 1: not YAML: "),
        ("#" + " " * MAX_BYTES, ": the file is larger than 1048576 bytes"),
    ],
)
def test_unsupported_yaml_raises_with_its_line(tmp_path, text, message):
    assert refusal(tmp_path, text).startswith("policy.yaml" + message)


def test_rule_that_begins_with_a_quote_raises_with_the_way_out(tmp_path):
    text = "categories:\n  a:\n    when: 'self harm' and b\n"
    message = refusal(tmp_path, text)
    assert message.startswith("policy.yaml, line 3: not YAML: ")
    assert message.endswith("put parentheses around a name in quotes at the start of a rule")
    rule = loaded(text.replace("'self harm'", "('self harm')")).settings("a").rule
    assert rule.names == ("self harm", "b")


def test_invalid_json_raises_with_its_line(tmp_path):
    text = json.dumps({"gate": "cast", "categories": {"😀 b": {"mode": "on"}}}, indent="\t")
    message = "policy.json, line 5, categories.'😀 b'.mode: must be 'auto', 'always' or 'off'"
    assert refusal(tmp_path, text, "policy.json").startswith(message)
    twice = '{"gate": "cast",\n "gate": "cast"}'
    message = "policy.json, line 2, gate: given twice, first in line 1"
    assert refusal(tmp_path, twice, "policy.json") == message


def test_yaml_without_the_c_library_reads_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    test_handwritten_yaml_is_read(tmp_path)
    text = changed("32", "0")
    assert refusal(tmp_path, text).startswith("policy.yaml, line 4, recheck: must be")
    for text in ("a: [1,\n", "a: \x01", "'", "a: b: c"):
        assert refusal(tmp_path, text).startswith("policy.yaml, line 1: not YAML: ")


def test_unreadable_file_raises_with_its_name(tmp_path):
    with pytest.raises(FormatError, match=r"missing\.yaml: No such file"):
        Policy.load(tmp_path / "missing.yaml")
    with pytest.raises(FormatError, match=r"found a folder"):
        Policy.load(tmp_path)


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xef\xbb\xbfgate: cast\n")
    assert Policy.load(path) == Policy(gate="cast")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a mapping with keys such as gate"),
        ([], "must be a mapping"),
        ("gate: probe", "must be a mapping"),
        ({1: 2}, "the key 1 is not text"),
        ({"gate": "svm"}, "gate: must be"),
        ({"self": 1}, "self: unknown key"),
        ({"_places": {}}, "_places: unknown key"),
        ({"categories": {1: {}}}, "categories: 1 is not a category name"),
        ({"categories": {"\ud800": {}}}, "categories: .* is not a category name"),
        ({"categories": {"a": None}}, "categories.a: must be a mapping with keys such as mode"),
        ({"categories": {"a": {None: 1}}}, "categories.a: the key None is not text"),
        ({"categories": {"a": {"strength": 10**400}}}, "categories.a.strength: must be a finite"),
        ({"categories": {"a": {"strength": 1j}}}, "categories.a.strength: must be a finite"),
        ({"categories": {"a.b": {"x": 1}}}, "categories.'a.b'.x: unknown key"),
        ({"categories": {"a\nb": {"x": 1}}}, r"categories.'a\\nb'.x: unknown key"),
        ({"categories": {"a" * 500: {"x": 1}}}, "categories.'aaa"),
    ],
)
def test_invalid_content_raises_with_its_path(content, message):
    with pytest.raises(SteeringError, match="^" + message) as caught:
        Policy.from_content(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_constructors_raise_with_the_path():
    with pytest.raises(PolicyError, match=r"^categories\.a\.mode: must be") as caught:
        Policy(categories={"a": {"mode": "maybe"}})
    assert caught.value.path == ("categories", "a", "mode")
    with pytest.raises(PolicyError, match=r"^mode: must be"):
        CategoryPolicy(mode="maybe")
    with pytest.raises(PolicyError, match="unknown key; there are mode, strength"):
        CategoryPolicy(weight=1)


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["gate", "conflict", "recheck", "scope", "categories", "other"])


@given(JSON_LIKE | st.dictionaries(KEYS, JSON_LIKE))
def test_any_data_gives_a_policy_or_a_steering_error(content):
    try:
        refused, policy = "", Policy.from_content(content)
    except SteeringError as error:
        refused, policy = str(error), None
    assert (policy is None) == bool(refused)
    assert "\n" not in refused


@given(st.text("gate:probe{}[]-,'\"\n &*!#?|>%@`~.0123 ", max_size=60) | st.text())
def test_any_text_gives_a_policy_or_a_format_error(text):
    try:
        refused, policy = "", loaded(text)
    except FormatError as error:
        refused, policy = str(error), None
    assert (policy is None) == bool(refused)
    assert "\n" not in refused


# --- against a pack ----------------------------------------------------------------------------


def check(policy, categories="abc", known="ab", kinds=("margin", "probe")):
    policy.check(categories=list(categories), known=list(known), kinds=kinds if known else [])


def test_policy_that_fits_the_pack_passes():
    check(Policy())
    check(Policy(categories={"a": {"mode": "auto", "threshold": 0.5, "when": "a and not b"}}))
    check(Policy(conflict="sum", categories={"c": {"mode": "auto", "when": "a or b"}}))
    check(Policy(categories={"c": {"strength": 2}}), known="")
    check(Policy(categories={"c": {"mode": "always"}, "a": {"mode": "off"}}), known="")
    check(Policy(conflict="strongest", categories={"a": {"when": "b"}, "c": {}}))


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("x: {}", 2, "categories.x: unknown category 'x'; this pack has a, b, c"),
        ("a: {when: a and x}", 2, "categories.a.when: unknown category 'x'; this pack has a, b"),
        (
            "a:\n    strength: 1\n    when: a and\n      c\n    mode: off",
            4,
            "categories.a.when: the pack has no gate for 'c' (its router knows a, b)",
        ),
        (
            "a: {}\n  c:\n    mode: auto",
            4,
            "categories.c.mode: the pack has no gate for 'c' (its router knows a, b); use always, ",
        ),
        ("c:\n    threshold: 1", 3, "categories.c.threshold: the pack has no gate for 'c'"),
        (
            "c: {when: a}\nconflict: strongest",
            2,
            "categories.c.when: the pack has no gate for 'c' (its router knows a, b), to be comp",
        ),
    ],
)
def test_policy_that_does_not_fit_the_pack_raises_with_its_line(
    tmp_path, monkeypatch, content, line, message
):
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text(f"categories:\n  {content}\n")
    policy = Policy.load("policy.yaml")
    for same in (policy, pickle.loads(pickle.dumps(policy)), copy.deepcopy(policy)):
        with pytest.raises(FormatError) as caught:
            check(same)
        assert str(caught.value).startswith(f"policy.yaml, line {line}, {message}")
    with pytest.raises(PolicyError) as caught:
        check(Policy.from_content(policy.content()))
    assert str(caught.value).startswith(message)


def test_gate_kind_defaults_to_margin_then_multinomial():
    kinds = ["probe", "multinomial"]
    assert Policy().gate_kind(["margin", *kinds]) == "margin"
    assert Policy().gate_kind(kinds) == Policy(gate=None).gate_kind(kinds) == "multinomial"
    assert Policy(gate="probe").gate_kind(["margin", *kinds]) == "probe"
    assert Policy(gate="probe").merged(Policy()).gate_kind(kinds) == "probe"


def test_gate_that_the_router_lacks_raises_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("policy.yaml").write_text("conflict: sum\ngate: cast\n")
    with pytest.raises(FormatError) as caught:
        check(Policy.load("policy.yaml"))
    expected = "gate: the pack's router has no cast gate; it has margin, probe"
    assert str(caught.value) == f"policy.yaml, line 2, {expected}"
    with pytest.raises(SteeringError, match="has no cast gate"):
        Policy(gate="cast").gate_kind(["margin"])
    check(Policy(gate="cast"), known="")  # nothing is gated


@pytest.mark.parametrize(
    ("kinds", "fits"), [(["margin", "multinomial"], True), (["multinomial"], False)]
)
def test_threshold_outside_the_gate_s_scores_raises(kinds, fits):
    """Scores of the margin gate have no bounds; probabilities have."""
    policy = Policy(categories={"a": {"threshold": -1.5}})
    if fits:
        check(policy, kinds=kinds)
        return
    with pytest.raises(SteeringError, match=r"-1\.5 cannot be crossed: .*'multinomial'"):
        check(policy, kinds=kinds)


def test_gated_category_without_a_router_raises():
    with pytest.raises(
        SteeringError, match=r"no gate for 'a' \(it has no router\); use always, off"
    ):
        check(Policy(categories={"a": {"mode": "auto"}}), known="")


def test_many_odd_names_give_one_short_line():
    names = ["a\nb", *(f"category {i}" for i in range(1000))]
    with pytest.raises(SteeringError) as caught:
        check(Policy(categories={"x" * 1000: {}}), names, names)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_merged_policy_remembers_the_place_of_each_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text("categories:\n  a:\n    when: x\n  b: {}\n")
    Path("two.yaml").write_text("\n\ncategories:\n  a:\n    strength: 2\n  b:\n    when: y\n")
    one, two = Policy.load("one.yaml"), Policy.load("two.yaml")
    mine = Policy(categories={"a": {"when": "z"}})

    def message(policy, categories):
        with pytest.raises(SteeringError) as caught:
            check(policy, categories, categories)
        return str(caught.value)

    assert message(one.merged(two), "aby").startswith("one.yaml, line 3, categories.a.when: ")
    assert message(one.merged(two), "abx").startswith("two.yaml, line 7, categories.b.when: ")
    assert message(one.merged(mine), "ab").startswith("categories.a.when: unknown category 'z'")
    assert message(mine.merged(two), "ab").startswith("categories.a.when: unknown category 'z'")
    assert message(mine.merged(one), "ab").startswith("one.yaml, line 3, categories.a.when: ")

    thresholds = Policy(categories={"a": {"threshold": 3}})
    Path("three.yaml").write_text("gate: cast")
    with pytest.raises(PolicyError, match=r"^categories\.a\.threshold: 3\.0 cannot be crossed"):
        thresholds.merged(Policy.load("three.yaml"))


def test_policy_module_loads_neither_numpy_nor_yaml():
    code = textwrap.dedent("""
        import sys
        from pysteer.pack.policy import Policy
        Policy(categories={"a": {"scope": "first 8", "when": "a"}})
        print(sorted({"numpy", "llama_cpp", "yaml"} & set(sys.modules)))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
