"""Terminal input of a chat: prompts with editing, history and completion, and Ctrl-C.

Imported only where standard input is a terminal, because prompt_toolkit loads slowly.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.defaults import create_output

from pysteer.cli.chat_events import ChatSteering, describe_steering
from pysteer.cli.chat_input import unfinished
from pysteer.cli.chat_session import Session

_LONGEST_STEERING = 30


class _Completer(Completer):
    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        for line in self._session.completions(text):
            yield Completion(line, start_position=-len(text))


class Terminal:
    """Reads entries from a terminal. The history of the input is kept in memory only.

    Args:
        session: the prompt shows its steering, and Tab completes its commands.
        input: source of keys; the terminal by default.
        output: the prompt's display; by default the terminal, even if standard output is a file.
    """

    def __init__(
        self, session: Session, *, input: Input | None = None, output: Output | None = None
    ) -> None:
        self._session = session
        self._prompt: PromptSession[str] = PromptSession(
            multiline=True,
            key_bindings=_keys(),
            completer=_Completer(session),
            complete_while_typing=False,
            prompt_continuation=lambda width, line, wraps: " " * width,
            input=input,
            output=output or create_output(always_prefer_tty=True),
        )

    def read(self) -> str | None:
        """Return the next entry, which may have several lines, or None at the end of the input."""
        while True:
            try:
                return self._prompt.prompt([("bold", prompt_text(self._session.requested))])
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


def prompt_text(requested: ChatSteering) -> str:
    """Return the prompt, which shows the steering in force in few columns."""
    steering = describe_steering(requested)
    if isinstance(requested, dict) and len(steering) > _LONGEST_STEERING:
        n = len(requested)
        steering = f"{n} {'category' if n == 1 else 'categories'}"
    return f"[steering: {steering}] > "


def _keys() -> KeyBindings:
    keys = KeyBindings()

    # While the history is searched, these keys have another meaning.
    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion:
            buffer.complete_state = None  # the completion is chosen
        elif unfinished(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    # The terminal sends the second form if the keys are pressed while an answer is written.
    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


@contextmanager
def interrupting(session: Session) -> Iterator[None]:
    """Let Ctrl-C stop the answer while the block runs.

    The first Ctrl-C during the text of an answer ends the answer after the next token. Before the
    first token, and for the second Ctrl-C, KeyboardInterrupt is raised; Python delivers that
    exception once llama.cpp has processed its batch.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        wait = session.writing and not session.stopping
        session.stop()
        if not wait:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
