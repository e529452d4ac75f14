"""JSON that readers would understand differently is refused, wherever pysteer reads JSON."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysteer import FormatError, SteeringError, SteeringPack, SteeringVector, strict_json
from pysteer.evaluate.judges.endpoint import parse_scores
from pysteer.evaluate.report import SCHEMA, Report
from pysteer.pack.policy import Policy

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
BAD = {
    "twice": '{"a": 1, "a": 1}',
    "twice, escaped": r'{"a": 1, "\u0061": 1}',
    "twice, inside": '[{"b": {"a": 1, "c": 2, "a": 1}}]',
    "not a number": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "too large": '{"a": 1e999}',
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "two values": "1 2",
    "nothing": "",
}


@given(JSON)
def test_json_is_read_as_the_standard_library_reads_it(value):
    text = json.dumps(value)
    assert strict_json.loads(text) == json.loads(text) == value


@pytest.mark.parametrize("kind", BAD)
def test_ambiguous_json_raises(kind):
    with pytest.raises(ValueError, match=r"."):
        strict_json.loads(BAD[kind])


def test_key_given_twice_is_named():
    with pytest.raises(strict_json.DuplicateKeyError, match="the key 'b' occurs twice"):
        strict_json.loads('{"a": 1, "b": 2, "b": 3}')


@pytest.mark.parametrize("kind", BAD)
def test_report_of_bad_json_raises_with_its_name(kind, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(BAD[kind])
    with pytest.raises(FormatError) as caught:
        Report.load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_report_with_a_key_twice_raises(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(f'{{"schema_version": "{SCHEMA}", "pysteer": "1", "pysteer": "2"}}')
    with pytest.raises(FormatError, match="the key 'pysteer' occurs twice"):
        Report.load(path)


def test_policy_with_a_key_twice_raises(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"recheck": 4, "recheck": null}')
    with pytest.raises(FormatError, match=r"recheck.*twice"):
        Policy.load(path)


def test_scores_with_a_key_twice_raise():
    assert parse_scores('{"helpfulness": 2, "coherence": 3}')["helpfulness"] == 2
    with pytest.raises(SteeringError):
        parse_scores('{"helpfulness": 2, "coherence": 3, "helpfulness": 5}')


@pytest.mark.parametrize("key", ["provenance", "policy", "operators", "router.tables"])
def test_pack_with_a_key_twice_raises_with_the_metadata(key, tmp_path):
    """The JSON of each value, in a file whose digest is right."""
    from gguf import GGUFWriter

    values = {
        "provenance": '{"method": "mean", "method": "x"}',
        "policy": '{"recheck": 4, "recheck": 5}',
        "operators": '[{"kind": "ablate", "kind": "add"}]',
        "router.tables": '{"gates": {}, "gates": {}}',
    }
    path = tmp_path / "p.gguf"
    writer = GGUFWriter(path, "pysteer")
    writer.add_uint32("pysteer.format_version", 2 if key in ("policy", "operators") else 1)
    writer.add_array("pysteer.categories", ["a"])
    writer.add_array("pysteer.sites", ["residual"])
    if key == "router.tables":
        writer.add_string("pysteer.router.site", "residual")
        writer.add_array("pysteer.router.layers", [1])
        writer.add_array("pysteer.router.poolings", ["last"])
        writer.add_array("pysteer.router.categories", ["a"])
    writer.add_string(f"pysteer.{key}", values[key])
    writer.add_tensor("category.0.direction.1", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=rf"pysteer\.{key}.*occurs twice"):
        SteeringPack.load(path)


def test_provenance_of_a_saved_pack_is_read_back(tmp_path):
    pack = SteeringPack({"a": SteeringVector({1: np.ones(8)})}, provenance={"a": [1, {"b": None}]})
    pack.save(tmp_path / "p.gguf")
    assert SteeringPack.load(tmp_path / "p.gguf") == pack
