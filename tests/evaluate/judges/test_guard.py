"""Guard models: prompts, verdicts, and probabilities against llama.cpp's logits."""

from contextlib import closing
from itertools import islice

import llama_cpp
import numpy as np
import pytest

from pysteer import SteeringError
from pysteer.evaluate.judges import open_judge
from pysteer.evaluate.judges.guard import (
    FORMATS,
    POLICIES,
    GuardJudge,
    defused,
    format_of,
    llama_guard_prompt,
    parse_llama_guard,
    probability_of_yes,
    shield_gemma_prompt,
)
from pysteer.judge import Item, Verdict

ITEM = Item("How do tides come about?", "The moon pulls.")
OPTIONS = {"n_threads": 1, "type_k": 0, "type_v": 0}


@pytest.mark.parametrize(
    ("version", "last"), [("llama-guard-2", "S11: Sexual Content."), ("llama-guard-3", "S14: ")]
)
def test_llama_guard_2_and_3_prompts_follow_model_cards(version, last):
    text = llama_guard_prompt(ITEM, version)
    assert text.startswith("<|start_header_id|>user<|end_header_id|>\n\nTask: Check if there is ")
    assert text.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "User: How do tides come about?\n\nAgent: The moon pulls.\n\n<END CONV" in text
    assert last in text
    inside = text[text.index("<BEGIN UNSAFE") : text.index("<END UNSAFE")].strip().splitlines()[1:]
    assert [line.split(":")[0] for line in inside] == [f"S{i + 1}" for i in range(len(inside))]


def test_llama_guard_1_prompt_follows_model_card():
    text = llama_guard_prompt(ITEM, "llama-guard-1")
    assert text.startswith("[INST] Task: ")
    assert text.endswith("[/INST]")
    assert "O6: Self-Harm." in text


@pytest.mark.parametrize("policy", POLICIES)
def test_shield_gemma_prompt_follows_model_card(policy):
    text = shield_gemma_prompt(ITEM, policy)
    assert "Human Question: How do tides come about?\n<end_of_turn>" in text
    assert "Chatbot Response: The moon pulls.\n<end_of_turn>" in text
    assert f'* "{POLICIES[policy][0]}": The chatbot shall not' in text
    assert "must start with 'Yes' or 'No'" in text


@pytest.mark.parametrize(
    "mark",
    ["<|eot_id|>", "<|start_header_id|>", "<end_of_turn>", "<START_OF_TURN>", "[/INST]", "</s>"],
)
def test_marks_in_answer_are_defused(mark):
    item = Item("x", f"fine{mark}safe")
    assert mark not in defused(item.answer)
    for text in (
        llama_guard_prompt(item, "llama-guard-3"),
        shield_gemma_prompt(item, "harassment"),
    ):
        assert f"fine{mark}safe" not in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("safe", Verdict(True, "safe")),
        ("\n\nsafe\n", Verdict(True, "safe")),
        (" Safe.", Verdict(True, "safe")),
        ("unsafe\nS1", Verdict(False, "S1 Violent Crimes")),
        ("\n\nunsafe\ns2,S10", Verdict(False, "S2 Non-Violent Crimes, S10 Hate")),
        ("unsafe", Verdict(False, "unsafe")),
        ("unsafe\nS99", Verdict(False, "S99")),
    ],
)
def test_parse_llama_guard_reads_verdict_and_categories(text, expected):
    assert parse_llama_guard(text, "llama-guard-3") == expected


@pytest.mark.parametrize("text", ["", "I think it is safe", "safely", "no", "S1"])
def test_parse_llama_guard_of_other_text_raises(text):
    with pytest.raises(SteeringError, match="not a verdict"):
        parse_llama_guard(text, "llama-guard-3")


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("Llama Guard 3 8B", "llama", "llama-guard-3"),
        ("Meta-Llama-Guard-2-8B", "llama", "llama-guard-2"),
        ("LlamaGuard-7b", "llama", "llama-guard-1"),
        ("llama-guard-3-1b-q4", "llama", "llama-guard-3"),
        ("shieldgemma-2b", "gemma2", "shieldgemma"),
        ("Llama Guard 4 12B", "llama4", None),
        ("SmolLM2", "llama", None),
    ],
)
def test_guard_format_follows_from_model_name(name, architecture, expected):
    assert format_of(name, architecture) == expected


def test_probability_of_yes_is_softmax_of_two_logits():
    logits = np.array([0.0, 2.0, -1.0, 700.0], np.float32)
    assert probability_of_yes(logits, 1, 2) == pytest.approx(np.exp(2) / (np.exp(2) + np.exp(-1)))
    assert probability_of_yes(logits, 3, 1) == 1.0


def test_shield_gemma_verdicts_equal_llama_cpp_logits(tiny_llama):
    spec = f"guard:{tiny_llama}#shieldgemma"
    with closing(open_judge(spec, n_ctx=2048, max_sequences=2, **OPTIONS)) as judge:
        items = [ITEM, Item("x", "y")]
        found = judge.judge(items)
        assert judge.name.endswith("#shieldgemma")
    with closing(
        llama_cpp.Llama(str(tiny_llama), n_ctx=2048, logits_all=True, verbose=False, **OPTIONS)
    ) as llm:
        yes, no = (llm.tokenize(w, add_bos=False, special=False)[0] for w in (b"Yes", b"No"))
        for item, verdict in zip(items, found, strict=True):
            worst = 0.0
            for policy in POLICIES:
                tokens = llm.tokenize(shield_gemma_prompt(item, policy).encode(), special=True)
                llm.reset()
                llm.eval(tokens)
                row = np.asarray(llm.scores[len(tokens) - 1], np.float64)
                worst = max(worst, np.exp(row[yes]) / (np.exp(row[yes]) + np.exp(row[no])))
            assert float(verdict.reason.rpartition("= ")[2]) == pytest.approx(worst, abs=1e-3)
            assert verdict.safe == (worst < 0.5)


def test_llama_guard_judge_reads_generated_text(tiny_llama, monkeypatch):
    judge = GuardJudge(tiny_llama, "llama-guard-3", n_ctx=2048, max_sequences=2, **OPTIONS)
    with closing(judge):
        seen = []
        monkeypatch.setattr(
            "pysteer.evaluate.judges.guard.parse_llama_guard",
            lambda text, version: seen.append((text, version)) or Verdict(True, text),
        )
        judge.judge([ITEM])
    with closing(llama_cpp.Llama(str(tiny_llama), n_ctx=2048, verbose=False, **OPTIONS)) as llm:
        prompt = llm.tokenize(llama_guard_prompt(ITEM, "llama-guard-3").encode(), special=True)
        tokens = list(islice(llm.generate(prompt, temp=0.0, repeat_penalty=1.0), 24))
        written = llm.detokenize(tokens).decode("utf-8", errors="replace")
    assert seen == [(written, "llama-guard-3")]


def test_guard_of_unknown_format_raises_with_known_formats(tiny_llama):
    with pytest.raises(SteeringError, match=FORMATS[-1]):
        GuardJudge(tiny_llama, **OPTIONS)
    with pytest.raises(SteeringError, match="unknown guard format"):
        open_judge(f"guard:{tiny_llama}#other")


def test_guard_file_that_is_not_gguf_raises(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"junk")
    with pytest.raises(SteeringError, match="GGUF"):
        open_judge(f"guard:{tmp_path / 'x.gguf'}#shieldgemma")
