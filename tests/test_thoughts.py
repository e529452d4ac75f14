"""Answers behind thoughts, in the formats of reasoning models."""

import pytest

from pysteer.thoughts import answered, opening_of

# Format to the text of a thought {T} and an answer {A}, as a model of that format writes them.
TEXTS = {
    "DeepSeek-R1, Qwen 3": "<think>\n{T}\n</think>\n\n{A}",
    "prompted": "<thinking>{T}</thinking>\n{A}",
    "EXAONE Deep": "<thought>\n{T}\n</thought>\n\n{A}",
    "fine-tunes": "<reasoning>\n{T}\n</reasoning>\n{A}",
    "Magistral": "[THINK]{T}[/THINK]{A}",
    "Seed-OSS": "<seed:think>{T}</seed:think>{A}",
    "MiniMax M3": "<mm:think>{T}</mm:think>{A}",
    "Kimi": "◁think▷{T}◁/think▷{A}",
    "Command R7B": "<|START_THINKING|>{T}<|END_THINKING|>{A}",
    "Gemma 4": "<|channel>thought\n{T}<channel|>{A}",
    "Apertus": "<|inner_prefix|>{T}<|inner_suffix|>{A}",
    "OpenThinker": "<|begin_of_thought|>\n\n{T}\n\n<|end_of_thought|>\n\n{A}",
    "Solar Open": "<|think|>{T}<|end|><|begin|>assistant<|content|>{A}",
    "Granite 3.2": "Here is my thought process:\n{T}\n\nHere is my response:\n{A}",
    "Apriel": (
        "Here are my reasoning steps:\n{T}\n[BEGIN FINAL RESPONSE]\n{A}\n[END FINAL RESPONSE]"
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|>{T}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>{A}<|return|>"
    ),
    "gpt-oss, special tokens left out": "analysis{T}assistantfinal{A}",
}
# The opening marker is in the prompt of these.
OPENED = {
    "DeepSeek-R1": ("<|Assistant|><think>\n", "{T}\n</think>\n\n{A}"),
    "Magistral": ("[/INST][THINK]", "{T}[/THINK]{A}"),
    "Apertus": ("<|assistant_start|><|inner_prefix|>", "{T}<|inner_suffix|>{A}"),
    "Apriel": ("<|assistant|>\nHere are my reasoning steps:\n", "{T}\n[BEGIN FINAL RESPONSE]\n{A}"),
    "gpt-oss": (
        "<|start|>assistant<|channel|>analysis<|message|>",
        "{T}<|end|><|start|>assistant<|channel|>final<|message|>{A}",
    ),
}
THOUGHT, ANSWER = "I can't help with that. Or can I?", "First, mix the two."


def _put(text):
    """Put the thought and the answer in place of {T} and {A}."""
    return text.replace("{T}", THOUGHT).replace("{A}", ANSWER)


@pytest.mark.parametrize("name", TEXTS)
def test_answer_follows_the_thought(name):
    text = _put(TEXTS[name])
    assert answered(text) == (ANSWER, False)
    assert answered(answered(text).answer) == (ANSWER, False)


@pytest.mark.parametrize("name", TEXTS)
def test_thought_without_end_has_no_answer(name):
    text = _put(TEXTS[name])
    start = text.index(THOUGHT)
    for end in (start + 1, start + len(THOUGHT) // 2, start + len(THOUGHT)):
        assert answered(text[:end]) == ("", True), text[:end]
    assert answered(text[: text.index(ANSWER)]) == ("", True)


@pytest.mark.parametrize("name", OPENED)
def test_thought_may_begin_in_the_prompt(name):
    prompt, text = OPENED[name]
    text = _put(text)
    opening = opening_of(prompt)
    assert opening
    assert answered(text, opening) == (ANSWER, False)
    assert answered(THOUGHT, opening) == ("", True)
    assert answered(text) == (ANSWER, False)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "<|im_start|>assistant\n",
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",  # thinking is off
        "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n",
    ],
)
def test_prompt_without_an_open_thought_has_no_opening(prompt):
    assert opening_of(prompt) == ""


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "  Two eggs, a cup of milk.\n",
        "I think so. Here is my response: two eggs.",
        "analysis of variance compares means",
        "analysis_2024.csv has the figures",
        "a <b>bold</b> word, a <thin> space, 3 < 4 > 2",
        "if (a <|end|> b) { return; }",
    ],
)
def test_text_without_thought_is_its_own_answer(text):
    assert answered(text) == (text, False)


def test_last_closing_marker_ends_the_thought():
    assert answered("a</think>b</think>c").answer == "c"
    assert answered("<think>a <think> b</think>c</think>d").answer == "d"


def test_text_before_a_thought_belongs_to_the_answer():
    found = answered("First, mix the two.<think>Wait.</think>I can't help with that.")
    assert found.answer == "First, mix the two.\nI can't help with that."


def test_thought_is_closed_by_the_marker_of_its_own_format():
    assert answered("<think>the user wrote [/THINK] and I refuse").unfinished
    assert answered("<think>the user wrote [/THINK]</think>A").answer == "A"


def test_markers_ignore_case():
    assert answered("<Think>T</THINK>A").answer == "A"
