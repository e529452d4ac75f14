"""Endpoint judges against a server on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pysteer import SteeringError
from pysteer.evaluate.judges import endpoint, open_judge, open_reward
from pysteer.evaluate.judges.endpoint import KEY, parse_scores, parse_verdict
from pysteer.judge import Item, Verdict


@pytest.fixture
def server(monkeypatch):
    """A chat endpoint that answers by `server.reply`, a function from body to status and text."""
    monkeypatch.setattr(endpoint, "_WAIT", 0.001)
    monkeypatch.delenv(KEY, raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.seen.append((self.path, self.headers.get("Authorization"), body))
                status, text = server.reply(body)
            content = {"choices": [{"message": {"role": "assistant", "content": text}}]}
            data = json.dumps(content).encode() if isinstance(text, str) else text
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []
    server.spec = f"openai:http://127.0.0.1:{server.server_address[1]}/v1#some-model"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def asked(body):
    return json.loads(body["messages"][-1]["content"])


def test_endpoint_judge_returns_verdicts_in_item_order(server):
    items = [Item(f"p{i}", "no" if i % 2 else "yes, here") for i in range(12)]
    server.reply = lambda body: (
        200,
        f"{'safe' if asked(body)['answer'] == 'no' else 'unsafe'}\n{asked(body)['prompt']}",
    )
    judge = open_judge(server.spec)
    assert judge.judge(items) == [Verdict(item.answer == "no", item.prompt) for item in items]
    judge.close()
    assert {path for path, _, _ in server.seen} == {"/v1/chat/completions"}
    assert {(body["model"], body["temperature"]) for _, _, body in server.seen} == {
        ("some-model", 0)
    }
    assert {key for _, key, _ in server.seen} == {None}


def test_endpoint_key_is_sent_and_not_in_identity(server, monkeypatch):
    monkeypatch.setenv(KEY, "a-secret")
    server.reply = lambda body: (200, "safe")
    judge = open_judge(server.spec)
    judge.judge([Item("p", "a")])
    assert server.seen[0][1] == "Bearer a-secret"
    assert "a-secret" not in judge.name + judge.identity


def test_busy_endpoint_is_asked_again(server):
    statuses = [503, 429, 200]
    server.reply = lambda body: (statuses.pop(0), "unsafe\nbecause")
    assert open_judge(server.spec).judge([Item("p", "a")]) == [Verdict(False, "because")]


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (500, "", "status 500"),
        (401, "", KEY),
        (404, b"not here", "404"),
        (200, b"{}", "expected a chat completion"),
        (200, b"<html>", "expected a chat completion"),
        (200, "maybe", "neither safe nor unsafe"),
    ],
)
def test_endpoint_failure_raises_with_cause(status, text, words, server):
    server.reply = lambda body: (status, text)
    with pytest.raises(SteeringError, match=words):
        open_judge(server.spec).judge([Item("p", "a")])


def test_absent_endpoint_raises_with_advice(server):
    with pytest.raises(SteeringError, match="check the server"):
        open_judge("openai:http://127.0.0.1:9/v1#m").judge([Item("p", "a")])


def test_endpoint_reward_reads_two_scores(server):
    server.reply = lambda body: (200, 'Well: {"helpfulness": 4, "coherence": 2.5}')
    found = open_reward(server.spec).score([Item("p", "a")])
    assert found == [{"helpfulness": 4.0, "coherence": 2.5}]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("safe", Verdict(True)),
        ("**Unsafe**\nIt tells how.", Verdict(False, "It tells how.")),
        ("\n safe: it declines", Verdict(True)),
    ],
)
def test_parse_verdict_reads_word_and_reason(reply, expected):
    assert parse_verdict(reply) == expected


@pytest.mark.parametrize("reply", ["", "safety first", "The answer is unsafe", "yes"])
def test_parse_verdict_of_other_reply_raises(reply):
    with pytest.raises(SteeringError):
        parse_verdict(reply)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "{}",
        "4",
        "{helpfulness}",
        '{"helpfulness": 9, "coherence": 1}',
        '{"helpfulness": "x", "coherence": 1}',
        '{"helpfulness": NaN, "coherence": 1}',
    ],
)
def test_parse_scores_of_other_reply_raises(reply):
    with pytest.raises(SteeringError):
        parse_scores(reply)
