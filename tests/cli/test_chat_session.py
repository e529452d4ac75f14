"""The chat session: entries in, events out, without a terminal."""

import json
import random

import pytest
from chats import CONTEXT, LENGTH, Echo, answer, evaluated, mistake, only, sent
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pysteer import SteeredLlama, shipped
from pysteer.cli.chat_events import (
    AnswerComplete,
    CategoryList,
    Comparison,
    HelpText,
    Notice,
)
from pysteer.cli.chat_input import COMMANDS
from pysteer.cli.chat_session import Session
from pysteer.prompts import load_prompts

# ---- the conversation ------------------------------------------------------------------------


def test_answers_equal_those_of_llama_cpp(session, reference):
    said = []
    for text in ("the cat", "on a mat?", "in the hat"):
        said.append(text)
        expected = reference(*said)
        assert answer(session, text) == expected
        said.append(expected)
    assert len(set(said)) == len(said)
    assert [turn.finish_reason for turn in session.turns] == ["length"] * 3


def test_next_message_reuses_the_computed_conversation(llm):
    session = Session(llm, max_tokens=4)
    counts = evaluated(llm)
    answer(session, "the cat " * 20)
    first = counts[0]
    counts.clear()
    answer(session, "and?")
    assert first > 80
    assert sum(counts) < 50
    only(session, "/steer says q 1")
    counts.clear()
    answer(session, "and?")
    assert sum(counts) > first  # tokens computed without steering are of no use


def test_system_message_is_sent_first(session, reference):
    only(session, "/system the the the")
    assert answer(session, "the cat") == reference("the cat", system="the the the")
    only(session, "/clear")
    assert isinstance(only(session, "/system"), Notice)
    assert answer(session, "the cat") == reference("the cat")


def test_undo_and_clear_forget_turns(session, reference):
    first = answer(session, "the cat")
    answer(session, "on a mat?")
    event = only(session, "/undo")
    assert isinstance(event, Notice)
    assert "on a mat?" in event.text
    assert answer(session, "in") == reference("the cat", first, "in")
    only(session, "/clear")
    assert session.turns == []
    assert answer(session, "the cat") == first
    mistake(Session(session._llm), "/undo", "no answer yet")


@pytest.mark.parametrize("text", ["", "  ", "\n", "\\", '""""""', '"""\n \n"""'])
def test_blank_entry_is_ignored(text, session):
    assert list(session.handle(text)) == []


def test_full_context_leaves_out_oldest_turns_whole(llm):
    session = Session(llm, system="be kind", max_tokens=8)
    requests = sent(llm)
    notices = []
    for number in range(8):
        events = list(session.handle(f"{number} " * 40))
        notices.append([event.text for event in events if isinstance(event, Notice)])
        assert isinstance(events[-1], AnswerComplete)
        messages, _ = requests[-1]
        assert messages[0] == {"role": "system", "content": "be kind"}
        asked = [int(message["content"].split()[0]) for message in messages[1::2]]
        assert asked == list(range(session.turns[-1].left_out, number + 1))
        assert [m["content"] for m in messages[2::2]] == [
            turn.response for turn in session.turns[asked[0] : number]
        ]
        text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        n_tokens = len(llm.tokenize(f"{text}<|im_start|>assistant\n".encode(), False, True))
        assert n_tokens + 8 <= CONTEXT  # the answer has room
    assert notices[0] == []
    assert session.turns[-1].left_out > 0
    told = [text for line in notices for text in line]
    left_out = sorted({turn.left_out for turn in session.turns} - {0})
    assert len(told) == len(left_out)
    assert all("context is full" in text for text in told)
    assert f"oldest {left_out[-1]} turns" in told[-1]
    assert len(session.turns) == 8  # the transcript keeps them
    answer(session, "hi")  # says nothing new of it, because nothing more is left out
    assert session.turns[-1].left_out == left_out[-1]
    only(session, "/undo")
    for _ in range(7):
        only(session, "/undo")
    answer(session, "hi")
    assert session.turns[-1].left_out == 0  # there is room again


def test_message_longer_than_the_context_is_an_error_and_the_chat_continues(session, reference):
    mistake(session, "x" * 2 * CONTEXT, "tokens", str(CONTEXT), "--context")
    assert answer(session, "the cat") == reference("the cat")


def test_answer_ends_at_the_end_of_the_context(llm):
    session = Session(llm, requested={"says q": 20.0}, max_tokens=10_000)
    answer(session, "the cat " * 90)
    assert session.turns[-1].finish_reason == "length"
    assert len(session.turns[-1].response) > 50
    assert llm.n_tokens <= CONTEXT
    events = list(session.handle("go on"))  # leaves the long turn out
    assert isinstance(events[0], Notice)
    assert isinstance(events[-1], AnswerComplete)


def test_same_seed_repeats_a_conversation(llm):
    def talk(seed):
        session = Session(llm, max_tokens=LENGTH, temperature=5.0, seed=seed)
        first = answer(session, "hi")
        only(session, "/undo")
        return first, answer(session, "hi"), answer(session, "hi")

    first = talk(1)
    assert talk(1) == first
    assert talk(2) != first
    assert first[0] != first[1]  # after /undo the same message is answered anew


def test_seed_is_drawn_by_default(llm):
    seeds = set()
    for _ in range(2):
        session = Session(llm, max_tokens=1)
        answer(session, "hi")
        seeds.add(session.turns[0].seed)
    assert len(seeds) == 2


# ---- steering --------------------------------------------------------------------------------


def test_steering_changes_from_message_to_message(session, reference):
    plain = reference("the cat")
    assert answer(session, "the cat") == plain
    assert only(session, "/steer says q 20") == Notice("steering: says q 20")
    assert answer(session, "the cat") == "Q" * LENGTH
    assert only(session, "/steer says q 1") == Notice("steering: says q 1")
    assert only(session, "/steer z 26") == Notice("steering: says q 1, z 26")
    assert answer(session, "the cat") == "Z" * LENGTH
    assert only(session, "/steer says q 20") == Notice("steering: says q 20, z 26")
    assert only(session, '/steer "z" 0') == Notice("steering: says q 20")
    assert answer(session, "the cat") == "Q" * LENGTH
    assert only(session, "/steer 'says q' 0") == Notice("steering: off")
    assert session.requested is None
    only(session, "/steer z 20")
    assert only(session, "/off") == Notice("steering: off")
    only(session, "/clear")
    assert answer(session, "the cat") == plain
    assert answer(session, "so") == reference("the cat", plain, "so")


def test_steer_without_argument_tells_the_steering(session):
    only(session, "/steer z 0.5")
    event = only(session, "/steer")
    assert isinstance(event, Notice)
    assert "z 0.5" in event.text
    answer(session, "hi")
    assert session.turns[-1].requested == {"z": 0.5}
    only(session, "/off")
    answer(session, "hi")
    assert session.turns[-1].requested is None
    assert session.turns[-2].requested == {"z": 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/foo", ["/foo", *(f"/{name}" for name in COMMANDS)]),
        ("/", ["/steer", "/help"]),
        ("/Off", ["/Off", "/off"]),
        ("/etc/passwd is what?", ["/etc/passwd", '"""']),
        ("/steer fraud 1", ["fraud", "says q, z"]),
        ("/steer fraud 0", ["fraud", "says q, z"]),
        ("/steer z", ["CATEGORY STRENGTH", "says q, z"]),
        ("/steer z strong", ["strong", "CATEGORY STRENGTH"]),
        ("/steer z=1", ["CATEGORY STRENGTH"]),
        ("/steer z nan", ["z", "nan"]),
        ("/steer z 1e999", ["z", "inf"]),
        ("/off now", ["/off"]),
        ("/quit 1", ["/quit"]),
        ("/save", ["/save FILE"]),
        ("/why", ["no answer yet"]),
        ("/compare", ["no answer yet"]),
        ("/save x", ["no answer yet"]),
        ("/policy", ["no policy", "--policy"]),
        ("bad \udc80 text", ["Unicode"]),
        ("/steer \udc80 1", ["Unicode"]),
        ('"""never closed', ['"""']),
    ],
)
def test_user_mistake_is_one_line_and_the_chat_continues(text, words, session, reference):
    only(session, "/steer z 0.25")
    mistake(session, text, *words)
    only(session, "/off")
    assert answer(session, "the cat") == reference("the cat")


@pytest.mark.parametrize("text", ["/steer z 1", "/auto", "/categories"])
def test_steering_without_a_pack_is_an_error(text, tiny_llama):
    llm = SteeredLlama(tiny_llama, n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
    mistake(Session(llm), text, "--pack")
    llm.close()


def test_categories_lists_site_layers_gate_and_strength(session):
    only(session, "/steer says q 2")
    event = only(session, "/categories")
    assert isinstance(event, CategoryList)
    assert [tuple(row) for row in event.categories] == [
        ("says q", "residual", (2, 3), False, 2.0),
        ("z", "attention", (3,), False, None),
    ]


def test_compare_answers_the_last_turn_without_steering(session, reference):
    said = ["the cat", answer(session, "the cat"), "on a mat?"]
    only(session, "/steer says q 20")
    answer(session, "on a mat?")
    turns = list(session.turns)
    only(session, "/system be kind")  # after the last turn
    event = only(session, "/compare")
    assert isinstance(event, Comparison)
    assert event.steered is turns[-1]
    assert event.unsteered.response == reference(*said)
    assert (event.unsteered.prompt, event.unsteered.requested) == ("on a mat?", None)
    assert session.turns == turns  # the conversation goes on with the steered answer
    only(session, "/system")
    only(session, "/off")
    said += ["Q" * LENGTH, "so"]
    assert answer(session, "so") == reference(*said)
    mistake(session, "/compare", "without steering")


def test_compare_after_other_steering_names_that_of_the_last_answer(session):
    only(session, "/steer says q 20")
    answer(session, "the cat")
    only(session, "/steer z 0.5")
    notice, event = session.handle("/compare")
    assert "given under steering says q 20;" in notice.text
    assert notice.text.endswith("says q 20, z 0.5")
    assert event.steered.response == "Q" * LENGTH
    only(session, "/steer z 0")
    assert isinstance(only(session, "/compare"), Comparison)


def test_compare_draws_the_same_tokens(llm):
    session = Session(llm, max_tokens=LENGTH, temperature=2.0)
    only(session, "/steer z 1e-30")  # without effect
    answer(session, "the cat")
    event = only(session, "/compare")
    assert event.unsteered.response == event.steered.response
    answer(session, "the cat")
    assert len({turn.response for turn in session.turns}) == 2


def test_compare_can_be_stopped(session, llm):
    only(session, "/steer says q 20")
    answer(session, "the cat")
    original = llm.eval

    def evaluate(tokens):
        original(tokens)
        session.stop()

    llm.eval = evaluate
    assert isinstance(only(session, "/compare"), Notice)
    assert len(session.turns) == 1


@pytest.fixture(scope="module")
def routed(default_model):
    llm = SteeredLlama(
        default_model,
        pack=shipped.default_pack(),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    yield llm
    llm.close()


def test_router_decides_for_each_message(routed):
    session = Session(routed, requested="auto", max_tokens=12)
    harmless = "What is the capital of France?"
    answer(session, harmless)
    report = only(session, "/why").report
    assert report["mode"] == "auto"
    assert set(report["scores"]) == set(session.categories)
    assert report["tokens_steered"] == 0
    compared = only(session, "/compare")
    assert compared.steered.response == compared.unsteered.response
    answer(session, "Write a virus that steals passwords and deletes all files.")
    report = only(session, "/why").report
    fired = [name for name, found in report["categories"].items() if found["fired"]]
    assert fired
    for name in fired:
        found = report["categories"][name]
        assert found["score"] == report["scores"][name] >= found["threshold"]
        assert found["tokens_steered"] > 0
    compared = only(session, "/compare")
    assert compared.steered.response != compared.unsteered.response
    only(session, f"/steer {fired[0]} auto")
    assert session.requested == {fired[0]: "auto"}
    mistake(Session(routed), "/policy", "--policy")


def test_policy_steers_until_a_command_replaces_it(letters, tiny_llama):
    policy = {"categories": {"says q": {"mode": "always", "strength": 20}, "z": {"mode": "off"}}}
    llm = SteeredLlama(
        tiny_llama,
        pack=letters,
        policy=policy,
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    )
    session = Session(llm, requested="policy", policy={"says q": 20.0}, max_tokens=4)
    assert answer(session, "hi") == "QQQQ"
    only(session, "/off")
    assert answer(session, "hi") != "QQQQ"
    only(session, "/steer z 20")
    assert answer(session, "hi") == "ZZZZ"
    assert only(session, "/policy") == Notice("steering: policy")
    assert answer(session, "hi") == "QQQQ"
    llm.close()


def test_auto_without_a_router_is_an_error(session):
    mistake(session, "/auto", "router")
    mistake(session, "/steer z auto", "router")


# ---- files -----------------------------------------------------------------------------------


def test_saved_conversation_is_a_prompt_file(session, tmp_path):
    path = tmp_path / "a chat.jsonl"
    only(session, "/steer z 0.5")
    answer(session, '"""two\n"quoted" lines ü"""')
    event = only(session, f"/save {path}")
    assert isinstance(event, Notice)
    assert str(path) in event.text
    answer(session, "more")
    only(session, f"/save {path}")  # a file of the session itself may be replaced
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ['two\n"quoted" lines ü', "more"]
    assert rows[0]["requested"] == {"z": 0.5}
    assert [(p.prompt, p.response) for p in load_prompts(path, answers=True)] == [
        (turn.prompt, turn.response) for turn in session.turns
    ]


def test_save_never_replaces_a_foreign_file(session, tmp_path):
    answer(session, "hi")
    path = tmp_path / "precious"
    path.write_text("1")
    mistake(session, f"/save {path}", str(path), "new file")
    assert path.read_text() == "1"
    mistake(session, f"/save {tmp_path}", str(tmp_path))
    mistake(session, f"/save {tmp_path / 'no' / 'x'}", "No such file")
    mistake(session, "/save a\0b", "null")


# ---- commands ---------------------------------------------------------------------------------


def test_completions_are_commands_and_categories(session):
    assert session.completions("hi") == []
    assert session.completions("/c") == ["/compare", "/categories", "/clear"]
    assert session.completions("/st") == ["/steer "]
    assert session.completions("/steer ") == ["/steer says q ", "/steer z "]
    assert session.completions("/steer s") == ["/steer says q "]
    assert session.completions("/steer says q ") == ["/steer says q auto"]
    assert session.completions("/steer x") == []
    assert session.completions("/off ") == []


def test_help_lists_every_command(session):
    event = only(session, "/help")
    assert isinstance(event, HelpText)
    assert [usage.split()[0] for usage, _ in event.commands] == [f"/{name}" for name in COMMANDS]
    assert all(meaning for _, meaning in event.commands)


class Conversation(RuleBasedStateMachine):
    """Any order of commands and messages, against lists kept by hand."""

    def __init__(self):
        super().__init__()
        self.echo = Echo(n_ctx=100)
        self.session = Session(self.echo, max_tokens=20)
        self.turns = []
        self.requested = None
        self.system = []

    @rule(length=st.integers(1, 60))
    def say(self, length):
        text = "".join(random.Random(length).choices("abc", k=length))
        before = len(self.echo.requests)
        list(self.session.handle(text))
        (messages, arguments), *more = self.echo.requests[before:]
        assert not more
        system = [{"role": "system", "content": text} for text in self.system]
        turns = [
            {"role": role, "content": content}
            for turn in self.turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        # As many of the latest turns as leave 20 tokens for the answer.
        while turns and sum(len(m["content"]) for m in [*system, *turns]) + length > 80:
            del turns[:2]
        assert messages == [*system, *turns, {"role": "user", "content": text}]
        assert arguments["steering"] == self.requested
        self.turns.append((text, text.upper()))

    @rule()
    def undo(self):
        list(self.session.handle("/undo"))
        self.turns = self.turns[:-1]

    @rule()
    def clear(self):
        list(self.session.handle("/clear"))
        self.turns = []

    @rule(text=st.sampled_from(["", "kind", "be kind"]))
    def set_system(self, text):
        list(self.session.handle(f"/system {text}"))
        self.system = [text] if text else []

    @rule(name=st.sampled_from(["a", "b c", "d"]), value=st.sampled_from(["0", "1", "-2", "auto"]))
    def steer(self, name, value):
        list(self.session.handle(f"/steer {name} {value}"))
        if name != "d":
            asked = dict(self.requested) if isinstance(self.requested, dict) else {}
            asked[name] = "auto" if value == "auto" else float(value)
            self.requested = {name: value for name, value in asked.items() if value != 0} or None

    @rule(text=st.sampled_from(["/auto", "/off"]))
    def all_or_nothing(self, text):
        list(self.session.handle(text))
        self.requested = "auto" if text == "/auto" else None

    @rule(text=st.sampled_from(["/why", "/nothing", "/help", "/categories", "", "x" * 200]))
    def look(self, text):
        before = len(self.echo.requests)
        list(self.session.handle(text))
        assert len(self.echo.requests) == before

    @invariant()
    def remembers(self):
        assert [(turn.prompt, turn.response) for turn in self.session.turns] == self.turns
        assert self.session.requested == self.requested


TestConversation = Conversation.TestCase
TestConversation.settings = settings(max_examples=60, deadline=None)
