"""Prompt files: rows are read as written, and errors have file and line."""

import csv
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pysteer import FormatError
from pysteer.prompts import Prompt, load_prompts

texts = st.text(st.characters(exclude_categories=["Cs"]))
names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]))
optional_texts = st.none() | texts
prompts = st.builds(
    Prompt,
    prompt=texts,
    category=names,
    response=optional_texts,
    pair_id=optional_texts,
    subcategory=names,
    label=st.sampled_from(["safe", "unsafe", None]),
)


def write(folder, content):
    path = folder / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(rows=st.lists(prompts, min_size=1, max_size=4), ascii_only=st.booleans())
def test_jsonl_rows_are_read_back(rows, ascii_only, tmp_path_factory):
    lines = [json.dumps(vars(row), ensure_ascii=ascii_only) for row in rows]
    path = write(tmp_path_factory.mktemp("p"), "\n".join(lines) + "\n")
    assert load_prompts(path) == rows


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_unicode_line_separator_in_a_string_does_not_end_the_line(separator, tmp_path):
    text = f"one{separator}two"
    path = write(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False))
    assert load_prompts(path) == [Prompt(text)]


@pytest.mark.parametrize(("written", "read"), [("7", "7"), ("-1", "-1"), ('"7"', "7"), ("0", "0")])
def test_whole_number_as_pair_id_is_its_text(written, read, tmp_path):
    path = write(tmp_path, f'{{"prompt": "a", "pair_id": {written}}}')
    assert load_prompts(path)[0].pair_id == read
    table = tmp_path / "p.csv"
    table.write_text(f"prompt,pair_id\na,{read}\n")
    assert load_prompts(table) == load_prompts(path)


def test_key_given_twice_is_named(tmp_path):
    with pytest.raises(FormatError, match="line 1: the key 'category' occurs twice"):
        load_prompts(write(tmp_path, '{"prompt": "a", "category": "b", "category": "c"}'))


def test_byte_order_mark_is_skipped(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\n')
    assert load_prompts(path) == [Prompt("a")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_blank_lines_and_unknown_keys_are_skipped(newline, tmp_path):
    lines = ["", '{"prompt": "a", "lang": ["en"]}', "  ", '{"prompt": "b", "category": null}', ""]
    assert load_prompts(write(tmp_path, newline.join(lines))) == [Prompt("a"), Prompt("b")]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "nonsense",
        "[1]",
        '"prompt"',
        "null",
        "7",
        "{}",
        '{"prompt": null}',
        '{"prompt": 1}',
        '{"prompt": ["a"]}',
        '{"prompt": "a", "category": 1}',
        '{"prompt": "a", "response": ["x"]}',
        '{"prompt": "a", "pair_id": 7.5}',
        '{"prompt": "a", "pair_id": true}',
        '{"prompt": "a", "pair_id": [7]}',
        '{"prompt": "a", "prompt": "b"}',
        '{"prompt": "a", "label": "safe", "label": "unsafe"}',
        r'{"prompt": "a", "category": "b\u001b[2J"}',
        r'{"prompt": "a", "category": "b\nc"}',
        r'{"prompt": "a", "subcategory": "\u202eb"}',
        '{"prompt": "a", "label": true}',
        '{"prompt": "a", "label": "harmful"}',
        '{"prompt": "a", "label": ""}',
        r'{"prompt": "\ud800"}',
        r'{"prompt": "a", "category": "\udfff"}',
        r'{"prompt": "a", "response": "b\ud83d"}',
        '{"prompt": "a"} {"prompt": "b"}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"prompt": ' + "1" * 5000 + "}",
    ],
    ids=lambda line: line[:24],
)
def test_bad_line_raises_with_file_and_line(line, tmp_path):
    path = write(tmp_path, '{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert len(str(caught.value)) < len(str(path)) + 100


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n"])
def test_file_without_prompts_raises(content, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(FormatError, match="no prompts"):
        load_prompts(path)


@pytest.mark.parametrize(
    "content", [b'{"prompt": "\xff"}', b"\xff\xfe{\x00", b"GGUF\x03\0\0\0\xff"]
)
def test_file_not_in_utf8_raises_with_its_name(content, tmp_path):
    path = write(tmp_path, content)
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)


def test_missing_file_or_folder_raises_with_its_name_once(tmp_path):
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(FormatError) as caught:
            load_prompts(path)
        assert str(caught.value).count(str(path)) == 1


def test_path_may_be_a_string(tmp_path):
    assert load_prompts(str(write(tmp_path, '{"prompt": "a"}'))) == [Prompt("a")]


def test_source_has_file_and_line_and_does_not_affect_equality(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}\n\n{"prompt": "a"}\n')
    first, second = load_prompts(path)
    assert (first.source, second.source) == (f"{path}, line 1", f"{path}, line 3")
    assert first == second
    assert hash(first) == hash(second)


def test_surrogate_pair_is_one_character(tmp_path):
    path = write(tmp_path, r'{"prompt": "\ud83d\ude00"}')
    assert load_prompts(path) == [Prompt("\U0001f600")]


def test_answers_need_no_prompt(tmp_path):
    lines = ['{"response": "no"}', '{"prompt": "a", "response": "never", "category": "c"}']
    found = load_prompts(write(tmp_path, "\n".join(lines)), answers=True)
    assert found == [Prompt("", response="no"), Prompt("a", "c", "never")]


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a"}',
        '{"response": ""}',
        '{"response": " "}',
        '{"response": 1}',
        '{"prompt": 1, "response": "no"}',
        '["no"]',
    ],
)
def test_answer_without_response_raises_with_file_and_line(line, tmp_path):
    path = write(tmp_path, '{"response": "no"}\n' + line)
    with pytest.raises(FormatError) as caught:
        load_prompts(path, answers=True)
    assert str(caught.value).startswith(f"{path}, line 2: ")


@given(rows=st.lists(prompts, min_size=1, max_size=4), dialect=st.sampled_from(["excel", "unix"]))
def test_csv_rows_are_read_back(rows, dialect, tmp_path_factory):
    """Not empty, because a CSV file does not tell an empty cell from a missing one."""
    path = tmp_path_factory.mktemp("p") / "prompts.CSV"
    filled = [r for r in rows if r.prompt and r.response != "" and r.pair_id != ""]
    assume(not any("\0" in str(value) for r in rows for value in vars(r).values()))  # Python 3.10
    with path.open("w", encoding="utf-8", newline="") as file:
        names = ["category", "prompt", "label", "pair_id", "response", "source", "subcategory"]
        writer = csv.DictWriter(file, names, dialect=dialect)
        writer.writeheader()
        writer.writerows(map(vars, filled))
    if filled:
        assert load_prompts(path) == filled
    else:
        with pytest.raises(FormatError, match="no prompts"):
            load_prompts(path)


def test_source_of_a_csv_row_is_its_first_line(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('\ufeffprompt, category\r\n"a\r\nb",x\r\n\r\nc,\r\n', newline="")
    found = load_prompts(path)
    assert found == [Prompt("a\r\nb", "x"), Prompt("c")]
    assert [p.source for p in found] == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("text\na\n", 2, "'prompt'"),
        ("prompt,category\na,b\nc\n", 3, "1 cells"),
        ("prompt\na\nb,c\n", 3, "2 cells"),
        ('prompt\n"a\nb', 2, "end of data"),
        ('prompt\na\n"b"c\n', 3, "expected"),
        ("prompt,label\na,bad\n", 2, "'label'"),
        ("prompt,category\n,b\n", 2, "'prompt'"),
    ],
)
def test_bad_csv_row_raises_with_file_and_line(content, line, words, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text(content)
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert words in str(caught.value)
