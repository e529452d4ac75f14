"""Models without a template: no router decides by a guessed form, and other forms are noticed."""

import logging
import pickle
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial

import llama_cpp
import pytest
from states import reading_pack
from tiny_models import write_tiny

from pysteer import Engine, HookedLlama, SteeredLlama, SteeringError, shipped
from pysteer.calibrate.settings import CalibrateSettings
from pysteer.chat.form import form_content, form_of, is_other_form
from pysteer.chat.handler import user_prompt
from pysteer.chat.messages import user_message
from pysteer.chat.spans import TemplateEnds
from pysteer.chat.template import renders_chats
from pysteer.cli.options import Llama
from pysteer.cli.reports.calibrate import evaluate_command
from pysteer.evaluate.answers import Answerer, Query
from pysteer.evaluate.likelihood import Likelihood
from pysteer.evaluate.settings import Sampling
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.journal import Journal

ARGUMENTS = {"n_ctx": 256, "verbose": False, "n_threads": 1, "n_threads_batch": 1}
MESSAGES = [user_message("Which sea is the saltiest?")]
KEY = b"tokenizer.chat_template"


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Iterator[str]:
    """The default model without its chat template: the key renamed, all else the same."""
    data = shipped.default_model().read_bytes()
    assert data.count(KEY) == 1
    path = tmp_path_factory.mktemp("bare") / "bare.gguf"
    path.write_bytes(data.replace(KEY, KEY[:-4] + b"XXXX"))
    yield str(path)
    path.unlink()


@pytest.fixture(scope="module")
def routed(bare):
    with closing(SteeredLlama(bare, pack=shipped.default_pack(), **ARGUMENTS)) as llm:
        yield llm


def text_of(result):
    return result["choices"][0]["message"]["content"]


def test_router_on_a_guessed_form_raises_with_the_way_out(routed):
    message = r"no chat template.*chat_format=.*--chat-format.*create_completion"
    with pytest.raises(SteeringError, match=message):
        routed.create_chat_completion(MESSAGES, max_tokens=1)
    for steering in ("auto", {"malware": "auto"}):
        with pytest.raises(SteeringError, match=message):
            list(routed.create_chat_completion(MESSAGES, steering=steering, stream=True))
    with pytest.raises(SteeringError, match=message), routed.steering("auto"):
        routed.create_chat_completion(MESSAGES, max_tokens=1)


def test_router_on_a_guessed_form_raises_in_the_engine(bare):
    with Engine(bare, pack=shipped.default_pack(), max_sequences=1, **ARGUMENTS) as engine:
        with pytest.raises(SteeringError, match="no chat template"):
            engine.submit(messages=MESSAGES)
        result = engine.submit(messages=MESSAGES, steering=None, max_tokens=2).result()
        assert result["steering"]["mode"] == "off"
        result = engine.submit(prompt="The sea is", max_tokens=2).result()
        assert result["steering"]["mode"] == "auto"


def test_unrouted_chats_on_a_guessed_form_stay_llama_cpp_python_s(routed, bare):
    arguments = {"max_tokens": 8, "temperature": 0.0}
    with closing(llama_cpp.Llama(bare, **ARGUMENTS)) as plain:
        expected = text_of(plain.create_chat_completion(MESSAGES, **arguments))
    off = routed.create_chat_completion(MESSAGES, steering=None, **arguments)
    assert text_of(off) == expected
    forced = routed.create_chat_completion(MESSAGES, steering={"malware": 1.0}, **arguments)
    assert forced["steering"]["mode"] == "forced"


def test_completions_without_a_template_are_routed(routed):
    result = routed.create_completion("The sea is", max_tokens=2)
    assert result["steering"]["mode"] == "auto"


def test_guess_stays_a_guess_in_a_copy_of_the_model(tmp_path):
    path = write_tiny("llama", tmp_path / "bare.gguf", n_layer=2, n_embd=32, chat_template="")
    with closing(HookedLlama(path, **ARGUMENTS)) as llm:
        assert not renders_chats(llm)
        with closing(pickle.loads(pickle.dumps(llm))) as again:
            assert again.chat_format == "llama-2"
            assert not renders_chats(again)
    with closing(HookedLlama(path, chat_format="llama-2", **ARGUMENTS)) as chosen:
        assert renders_chats(chosen)


def test_router_decides_in_a_chosen_form(bare):
    pack = shipped.default_pack()
    with closing(SteeredLlama(bare, pack=pack, chat_format="chatml", **ARGUMENTS)) as llm:
        result = llm.create_chat_completion(MESSAGES, max_tokens=1)
    assert result["steering"]["mode"] == "auto"
    assert result["steering"]["scores"]


def test_unknown_chat_format_raises_with_known_ones(tiny_llama):
    with pytest.raises(SteeringError, match=r"unknown chat_format 'chatmal'.*chatml.*of this file"):
        HookedLlama(tiny_llama, chat_format="chatmal", **ARGUMENTS)
    with closing(HookedLlama(tiny_llama, chat_format="chat_template.default", **ARGUMENTS)) as llm:
        assert renders_chats(llm)


# ---- learning and measuring -----------------------------------------------------------------


@pytest.mark.parametrize("chat_format", [None, "chatml"])
def test_every_part_gives_a_model_without_a_template_the_same_prompt(
    tmp_path, chat_format, monkeypatch
):
    path = write_tiny("llama", tmp_path / "bare.gguf", n_layer=2, n_embd=32, chat_template="")
    text = "the stone <|im_end|>"
    arguments = {**ARGUMENTS, "chat_format": chat_format}
    with closing(LlamaCapture(path, **arguments)) as capture:
        expected = capture.prompt_tokens(text)
    with Engine(path, max_sequences=1, **arguments) as engine:
        prompts = []
        submit = engine.submit

        def recorded(**request):
            handle = submit(**request)
            prompts.append(handle.prompt_tokens)
            return handle

        monkeypatch.setattr(engine, "submit", recorded)
        answerer = Answerer(engine, Sampling(max_tokens=3), Journal(tmp_path / "j"), {})
        (answer,) = answerer.ask([Query(text)])
    assert prompts == [expected]
    assert answer.n_tokens == 3
    with Likelihood(path, **arguments) as likelihood:
        assert tuple(likelihood._prompt(text)) == expected
    with closing(SteeredLlama(path, **arguments)) as llm:
        if chat_format is None:
            llm.create_completion(text, max_tokens=1)
        else:
            llm.create_chat_completion([user_message(text)], max_tokens=1)
        assert tuple(llm.input_ids[: len(expected)]) == expected


def test_calibration_s_evaluate_command_keeps_the_chat_format(tmp_path):
    command = evaluate_command(
        None,
        tmp_path / "p.gguf",
        {"unsafe": tmp_path / "u.jsonl"},
        settings=CalibrateSettings(),
        judge="refusal",
        llama=Llama(threads=2, chat_format="chatml"),
    )
    assert "--threads 2 --chat-format chatml" in command


# ---- the form of a fit ----------------------------------------------------------------------


def with_form(path, **arguments):
    """A routed pack whose provenance has the form of a model's prompts."""
    with closing(LlamaCapture(path, **{**ARGUMENTS, **arguments})) as capture:
        form = form_content(form_of(capture.prompt_tokens))
    return replace(reading_pack(32, poolings=("last", "user")), provenance={"form": form})


@pytest.mark.parametrize(
    ("fitted", "served", "warns"),
    [
        (None, None, False),
        (None, "chatml", True),
        ("llama-2", None, True),
        ("llama-2", "llama-2", False),
    ],
)
@pytest.mark.parametrize("template", ["own", ""])
def test_other_form_than_that_of_the_fit_is_logged(
    tmp_path, caplog, fitted, served, warns, template
):
    more = {} if template else {"chat_template": ""}
    path = write_tiny("llama", tmp_path / "model.gguf", n_layer=3, n_embd=32, **more)
    pack = with_form(path, chat_format=fitted)
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        SteeredLlama(path, pack=pack, chat_format=served, **ARGUMENTS).close()
        Engine(path, pack=pack, max_sequences=1, chat_format=served, **ARGUMENTS).close()
    texts = [record.message for record in caplog.records if "another form" in record.message]
    assert len(texts) == (2 if warns else 0)


@pytest.mark.torch
def test_form_of_torch_equals_that_of_llama_cpp(tiny_llama):
    from pysteer.extract.torch_capture import TorchCapture
    from pysteer.extract.torch_model import TorchModel

    torch_form = form_of(TorchCapture(TorchModel(str(tiny_llama))).prompt_tokens)
    with closing(HookedLlama(tiny_llama, **ARGUMENTS)) as llm:
        own = form_of(partial(user_prompt, llm))
        assert not is_other_form({"form": form_content(torch_form)}, own)


@pytest.mark.parametrize(
    ("before", "after", "other"),
    [
        ([1, 2, 3, 4, 5], [9], False),
        ([1, 2, 33, 44, 5], [9], False),  # a date
        ([1, 2, 5], [9], False),  # a shorter date
        ([0, 1, 2, 3, 4, 5], [9], True),  # a token in front
        ([1, 2, *range(20, 30), 5], [9], True),  # a system turn
        ([1, 2, 3, 4, 5], [9, 9], True),
        ([], [], True),
    ],
)
def test_forms_differ_by_more_than_a_date(before, after, other):
    form = TemplateEnds((1, 2, 3, 4, 5), (9,))
    assert is_other_form({"form": {"before": before, "after": after}}, form) is other


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        [],
        {},
        {"before": [1]},
        {"before": "ab", "after": []},
        {"before": [1.5], "after": [True]},
        {"before": [[1]], "after": []},
    ],
)
def test_form_of_another_shape_in_a_file_is_none(value):
    assert not is_other_form({"form": value}, TemplateEnds((1,), (2,)))
