"""Another text for the last user message."""

import pytest

from pysteer import SteeringError
from pysteer.chat.messages import replace_user_text, snapshot, user_message

SYSTEM = {"role": "system", "content": "s"}
ANSWER = {"role": "assistant", "content": "a"}
IMAGE = {"type": "image_url", "image_url": "x"}


def part(text):
    return {"type": "text", "text": text}


def in_parts(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user_message("a")], [user_message("new")]),
        (
            [SYSTEM, user_message("a"), ANSWER, user_message("a"), ANSWER],
            [SYSTEM, user_message("a"), ANSWER, user_message("new"), ANSWER],
        ),
        ([user_message(" ")], [user_message("new")]),
        ([{**user_message("a"), "name": "n"}], [{**user_message("new"), "name": "n"}]),
        (
            [in_parts(part("a"), IMAGE, part(""), part("b"))],
            [in_parts(part("new"), IMAGE, part("new"), part("new"))],
        ),
    ],
)
def test_replace_user_text_changes_the_last_user_message(messages, expected):
    before = repr(messages)
    assert replace_user_text(messages, "new") == expected
    assert repr(messages) == before


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [SYSTEM, ANSWER],
        [user_message("a"), user_message("")],
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [in_parts()],
        [in_parts(IMAGE)],
        [in_parts(part(""), IMAGE)],
        ["not a message"],
    ],
)
def test_replace_user_text_without_a_text_returns_none(messages):
    assert replace_user_text(messages, "new") is None


def test_text_instead_of_messages_raises_with_an_example():
    with pytest.raises(SteeringError, match=r"messages='Hello': give a list .*\"role\": \"user\""):
        snapshot("Hello")


def test_snapshot_of_messages_without_an_end_raises():
    nested, endless = user_message("a"), {"role": "user", "content": []}
    for _ in range(5000):
        nested = {"role": "user", "content": "a", "more": nested}
    endless["content"].append(endless)
    for message in (nested, endless):
        with pytest.raises(SteeringError, match="nested more than 64 deep"):
            snapshot([message])
    call = [{"function": {"arguments": {"a": [{"b": [1, {"c": None}]}]}}}]
    assert snapshot([{"role": "tool", "calls": call}]) == [{"role": "tool", "calls": call}]
