"""Degenerate texts, and sound texts that come close."""

from __future__ import annotations

import pytest

from pysteer.evaluate import degeneration
from pysteer.evaluate.degeneration import distinct_share, is_degenerate

DEGENERATE = [
    "",
    " \n\t ",
    "I can help with that. I can help with that. I can help with that.",
    "the the the the the the",
    "No no NO no, no!",
    "You should be kind and you should be safe. " * 4,
    "!!!!!!!!!!!!!!!!!!!!",
    "hahahahahahahahahahahahahahaha",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "The answer is " + "\u4f60\u597d" * 15,
    "-" * 200,
    "It is safe . . . . " + ". " * 100,
    "safe legal safe safe legal help safe legal legal safe help help safe legal safe help",
    "Harm of harm is harm of harm, and harm is harm of harm; harm and harm is harm.",
    "<unk><unk><unk><unk><unk><unk><unk><unk><unk><unk><unk><unk><unk>",
]

SOUND = [
    "I can't help with that.",
    "I can't help with that. If you like, I can suggest something safe and legal instead.",
    "Lisbon.",
    "42",
    "1000000000000000",
    "No, no, no! The moon is much smaller than the earth.",
    "The cat sat on the mat. The dog sat on the rug, and the bird sat on the old branch.",
    "1. Use a long password.\n2. Turn on the second factor.\n3. Update your phone.",
    "| Name | Price |\n|--------------------|--------------------|\n| Tea | 3 |\n| Coffee | 4 |",
    "Title\n" + "=" * 60 + "\nA short paragraph about bees.",
    "def reverse(text):\n            return text[::-1]\n\n\n            # done",
    "Row, row, row your boat, gently down the stream.",
    "Photosynthesis is how plants make food. They take in light, water and carbon dioxide, and "
    "give off oxygen. The green colour in their leaves catches the light, and the sugar that they "
    "make feeds the roots, the stem and the fruit, and in the end nearly every animal on earth.",
    "\u6708\u306f\u5730\u7403\u306e\u885b\u661f\u3067\u3059\u3002",
]


@pytest.mark.parametrize("text", DEGENERATE)
def test_broken_text_is_degenerate(text: str) -> None:
    assert is_degenerate(text)


@pytest.mark.parametrize("text", SOUND)
def test_sound_text_is_not_degenerate(text: str) -> None:
    assert not is_degenerate(text)


def test_four_gram_three_times_is_degenerate_and_twice_is_not() -> None:
    clause = "please call the office"
    assert not is_degenerate(f"{clause} today, or {clause} tomorrow")
    assert is_degenerate(f"{clause} today, or {clause} tomorrow, or {clause} on Friday")


def test_word_run_at_limit_is_degenerate() -> None:
    # Five words are too few for all measures but the limit on runs.
    assert not is_degenerate("very " * (degeneration.WORD_RUN - 1) + "good")
    assert is_degenerate("very " * degeneration.WORD_RUN + "good")


def test_distinct_share_is_lowest_of_all_windows() -> None:
    window = degeneration.DISTINCT_WINDOW
    fresh = [f"w{i}" for i in range(200)]
    assert distinct_share(fresh) == 1.0
    stuck = fresh[:100] + ["a", "b", "c", "d", "e"] * (window // 5) + fresh[100:]
    assert distinct_share(stuck) == pytest.approx(5 / window)


def test_distinct_share_of_few_words_is_one() -> None:
    assert distinct_share(["a"] * (degeneration.DISTINCT_MINIMUM - 1)) == 1.0


def test_long_sound_text_is_not_degenerate() -> None:
    # The share of distinct words is low over the whole long text, but in no window.
    vocabulary = [f"w{i}" for i in range(2 * degeneration.DISTINCT_WINDOW)]
    text = vocabulary * 20
    assert len(set(text)) / len(text) < degeneration.DISTINCT_WORDS
    assert distinct_share(text) == 1.0
