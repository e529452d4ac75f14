"""The tokens of a prompt that a router reads."""

from contextlib import ExitStack, closing
from functools import partial

import pytest
from chat_cases import marked
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from templates import TEMPLATES, message_tokens

from pysteer.chat.conversation import Conversation
from pysteer.chat.messages import user_message
from pysteer.chat.spans import message_span, pooled_span, template_ends
from pysteer.extract.inputs import Tokenizer
from pysteer.extract.llama_capture import LlamaCapture
from pysteer.prompts import Prompt

WORDS = ["<user>", "<end>", "  ", "\n\n", " the", "the", "?!"]


def tokens_of(text):
    """Greedy tokens: the longest word that fits, else a character."""
    tokens, at = [], 0
    while at < len(text):
        word = max((w for w in WORDS if text.startswith(w, at)), key=len, default=text[at])
        tokens.append(hash(word))
        at += len(word)
    return tuple(tokens)


def renderer(template):
    def render(messages):
        return tokens_of(template(messages[-1]["content"]))

    return render


def span_in(template, text):
    render = renderer(template)
    messages = [user_message(text)]
    return message_span(render(messages), template_ends(render, messages))


@given(
    head=st.text(st.sampled_from("<>use \n"), max_size=12),
    tail=st.text(st.sampled_from("<>nd\n"), max_size=12),
    text=st.text(st.sampled_from("<>usend the?!\n"), min_size=1, max_size=12),
)
def test_span_under_any_template_holds_the_message_and_joined_characters(head, tail, text):
    start, stop = span_in(lambda message: f"<user>{head}|{message}|{tail}<end>", text)
    before, after = tokens_of(f"<user>{head}|"), tokens_of(f"|{tail}<end>")
    whole = tokens_of(f"<user>{head}|{text}|{tail}<end>")
    assert (start, stop) == (len(before), len(whole) - len(after))
    start, stop = span_in(lambda message: f"{head}{message}{tail}", text)
    whole = tokens_of(f"{head}{text}{tail}")
    assert whole[:start] == tokens_of(f"{head}0")[:start]
    assert whole[stop:] == tokens_of(f"0{tail}")[len(tokens_of(f"0{tail}")) + stop - len(whole) :]


@pytest.mark.parametrize(
    ("template", "text", "expected"),
    [
        (lambda m: f"<user>\n{m}<end>", "abc", (2, 5)),
        (lambda m: f"<user>\n{m}<end>", "\nab", (1, 4)),  # one token of two line breaks
        (lambda m: f"<user>\n{m}\n<end>", "\n", (1, 2)),
        (lambda m: f"<user>\n{m}\n\n<end>", "a\n", (2, 5)),
        (lambda m: f"<user> {m}<end>", "the", (1, 2)),  # one token of space and message
        (lambda m: f"<user>{m}<end>", "<end>", (1, 2)),
        (lambda m: f"<user>{m}<end><user>{m}<end>", "a", (1, 5)),  # rendered twice
        (lambda m: f"<user>{m.strip()}<end>", "  a ", (1, 2)),
        (lambda m: f"<user>{m.strip()}<end>", "  ", (0, 2)),  # nothing is left of it
        (lambda m: "<user><end>", "a", (0, 2)),  # not rendered
        (lambda m: m, "abc", (0, 3)),
    ],
)
def test_message_span_lies_between_the_template_s_ends(template, text, expected):
    assert span_in(template, text) == expected


@pytest.mark.parametrize("messages", [[], [user_message("")], [{"role": "tool", "content": "a"}]])
def test_span_without_a_user_message_is_the_whole_prompt(messages):
    assert template_ends(renderer(str), messages) is None
    assert message_span((1, 2, 3), None) == (0, 3)


def test_span_of_unknown_words_includes_them():
    known = {"<user>": 1, "<end>": 2, "sea": 3}

    def render(messages):
        return [known.get(word, 0) for word in f"<user> {messages[0]['content']} <end>".split()]

    messages = [user_message("sea x sea")]
    assert message_span(render(messages), template_ends(render, messages)) == (1, 4)


def test_span_under_a_template_with_another_date_stays():
    dates = iter("1234")
    filler = "abcdefghij"
    render = renderer(lambda message: f"{next(dates)}{filler}{message}<end>")
    messages = [user_message("why")]
    ends = template_ends(renderer(lambda message: f"1{filler}{message}<end>"), messages)
    assert message_span(render(messages), ends) == (11, 14)
    assert message_span(render(messages), ends) == (11, 14)


@pytest.mark.parametrize(
    ("pooling", "message", "expected"),
    [
        ("user", (2, 5), (2, 5)),
        ("prompt", (2, 5), (0, 8)),
        ("last", (2, 5), (7, 8)),
        ("suffix", (2, 5), (5, 8)),
        ("suffix", (0, 8), (7, 8)),  # nothing follows it
    ],
)
def test_pooled_span_follows_the_pooling(pooling, message, expected):
    assert pooled_span(pooling, message, 8) == expected


# ---- real tokenizers -----------------------------------------------------------------------------


FRAGMENTS = [
    *["the", "sea", "User", "assistant", "a", "Z", "7", "12", "e\u0301", "\U0001f642", "日本"],
    *[" ", "  ", "\n", "\n\n", "\t", "\u00a0", ":", "?", "<", ">", "[/INST]", "###", "|"],
    *["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<end_of_turn>", "<|eot_id|>", "<image>"],
]
messages_of_fragments = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)
NAMES = ["smollm2", "llama-3", "mistral", "llama-2", "gemma", "zephyr", "deepseek-llm", "alpaca"]


@pytest.fixture(scope="module")
def captures(chat_model):
    with ExitStack() as stack:
        yield {
            (name, vocabulary): stack.enter_context(
                closing(LlamaCapture(chat_model(name, vocabulary), n_ctx=512, n_threads=1))
            )
            for name in NAMES
            for vocabulary in ("sentencepiece", "byte-level")
        }


@settings(max_examples=300)
@given(
    name=st.sampled_from(NAMES),
    vocabulary=st.sampled_from(["sentencepiece", "byte-level"]),
    message=messages_of_fragments,
    earlier=st.none() | messages_of_fragments,
)
@example(name="smollm2", vocabulary="byte-level", message="user", earlier="user")
def test_span_of_any_message_covers_its_text(name, vocabulary, message, earlier, captures):
    assume(message.strip())
    capture, source = captures[name, vocabulary], TEMPLATES[name].source
    messages = [user_message(message)]
    expected = message_tokens(capture.llm, source, messages, partial(marked, messages))
    row = Tokenizer(capture)(Prompt(message)).row("user")
    assert (row.tokens, (row.start, row.stop)) == expected
    assert Conversation(capture.llm, {"messages": messages}).message_span(row.tokens) == expected[1]
    if earlier is not None:
        messages = [
            user_message(earlier),
            {"role": "assistant", "content": message},
            user_message(message),
        ]
        tokens, span = message_tokens(capture.llm, source, messages, partial(marked, messages))
        conversation = Conversation(capture.llm, {"messages": messages})
        assert conversation.message_span(tokens) == span


def test_message_that_shortens_an_earlier_turn_is_read_whole():
    """As reasoning is left out of a turn, or kept, because of what the user writes."""

    def render(messages):
        *earlier, last = [message["content"] for message in messages]
        if "short" in last:
            earlier = [text[-2:] for text in earlier]
        return list(map(ord, "".join(f"<{text}>" for text in [*earlier, last, "answer"])))

    messages = [user_message("hi"), user_message("x" * 60), user_message("short " + "y" * 90)]
    prompt = render(messages)
    start, stop = message_span(prompt, template_ends(render, messages))
    assert "short " + "y" * 90 in "".join(map(chr, prompt[start:stop]))
    assert stop == len(prompt) - len("><answer>")
