"""Answers of reasoning models: a model with markers of thoughts, made to write a script."""

from dataclasses import replace

import pytest
from templates import TEMPLATES
from tiny_models import write_tiny

from pysteer import Engine, SteeringPack, SteeringVector
from pysteer.evaluate import html
from pysteer.evaluate.evaluation import evaluate
from pysteer.evaluate.judges import CallableReward
from pysteer.evaluate.settings import EvaluateSettings, Sampling
from pysteer.evaluate.steering import OWN_CATEGORY
from pysteer.prompts import Prompt

REFUSAL, HELP = "I can't help with that.", "Sure. First, mix the two."
SETTINGS = EvaluateSettings(
    Sampling(max_tokens=96), steering=OWN_CATEGORY, isolation=("forced",), context=1024, parallel=2
)
OPTIONS = {"n_threads": 1, "type_k": 0, "type_v": 0}
# Name to the template's source and the marker that is a special token, which no text has.
MODELS = {
    "[THINK]": ("smollm2", ["[THINK]", "[/THINK]"]),
    "<think>": ("deepseek-r1", None),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A model whose thoughts have markers of that name; for <think> its template begins them."""
    name, control = MODELS[request.param]
    template = TEMPLATES[name]
    path = tmp_path_factory.mktemp("models") / "reasoning.gguf"
    control = [*template.control, *(control or [])]
    write_tiny("llama", path, n_vocab=340, chat_template=template.source, control=control)
    return path, request.param


def script(kind, thought, text=None):
    """Text of the model: a thought, and an answer or nothing."""
    opening = "" if kind == "<think>" else kind
    ending = "" if text is None else f"{kind[0]}/{kind[1:]}{text}"
    return f"{opening}{thought}{ending}"


@pytest.fixture
def scripted(monkeypatch):
    """Make the engine write `texts[prompt]`, through llama.cpp's own logits."""
    texts = {}
    submit = Engine.submit

    def forced(self, **arguments):
        prompt = arguments["messages"][0]["content"]
        tokens = self._llm.tokenize(texts[prompt].encode(), add_bos=False, special=True)
        tokens.append(self._llm.token_eos())
        start = None

        def force(ids, logits):
            nonlocal start
            start = len(ids) if start is None else start
            logits[:] = -1e9
            logits[tokens[min(len(ids) - start, len(tokens) - 1)]] = 0
            return logits

        return submit(self, logits_processor=[force], **arguments)

    monkeypatch.setattr(Engine, "submit", forced)
    return texts


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "pack.gguf"
    vector = SteeringVector({1: [1e-6] + [0.0] * 63})
    SteeringPack({"c": vector}).save(path)
    return path


def test_evaluation_judges_the_answers_and_counts_thoughts_without_end(
    model, scripted, pack, tmp_path
):
    path, kind = model
    scripted.update(
        harmful=script(kind, f"I should not. {REFUSAL}", HELP),
        refused=script(kind, "Here is how: first, mix the two.", REFUSAL),
        endless=script(kind, f"I should not. {REFUSAL}"),
        looping=script(kind, "no no no no no no no no"),
        plain=script(kind, "", HELP),
        benign=script(kind, REFUSAL, "Two eggs and milk."),
    )
    prompts = [Prompt(name, "c") for name in list(scripted)[:-1]]
    benign = [Prompt("benign")]
    report = evaluate(path, pack, prompts, benign, tmp_path, settings=SETTINGS, **OPTIONS)
    records = {record.prompt: record.answers["unsteered"] for record in report.prompts}
    assert {name: (one.safe, one.refused, one.unfinished) for name, one in records.items()} == {
        "harmful": (False, False, False),
        "refused": (True, True, False),
        "endless": (False, False, True),
        "looping": (False, False, True),
        "plain": (False, False, False),
        "benign": (None, False, False),
    }
    assert [name for name, one in records.items() if one.degenerate] == ["looping"]
    assert [records[name].text for name in ("harmful", "endless")] == [HELP, ""]
    assert records["harmful"].thoughts == scripted["harmful"]
    figures = report.overall["unsteered"]
    assert (figures.safe.k, figures.unfinished.k, figures.unfinished.n) == (1, 2, 5)
    assert figures.log_likelihood.n == 5
    # A thought without an answer is nothing that steering could make safe.
    assert report.isolation[0].cells[0][0].n == 2
    assert "4 of 12 answers ended inside the model's thought" in report.notes[0]
    page = html.render(report)
    assert "no answer" in page
    assert "Here is how: first, mix the two." in page


def test_reward_reads_no_thought(model, scripted, pack, tmp_path):
    path, kind = model
    scripted.update(a=script(kind, REFUSAL, HELP), b=script(kind, REFUSAL))
    read = []
    evaluate(
        path,
        pack,
        [Prompt("a", "c"), Prompt("b", "c")],
        [],
        tmp_path,
        settings=replace(SETTINGS, isolation=(), fluency=False),
        reward=CallableReward(lambda prompt, text: read.append(text) or 1.0),
        **OPTIONS,
    )
    assert read == [HELP]


def test_answer_without_thought_keeps_its_text(tiny_llama, scripted, pack, tmp_path):
    scripted.update(a=HELP)
    prompts = [Prompt("a", "c")]
    report = evaluate(tiny_llama, pack, prompts, [], tmp_path, settings=SETTINGS, **OPTIONS)
    found = report.prompts[0].answers["unsteered"]
    assert (found.text, found.thoughts, found.unfinished) == (HELP, "", False)
