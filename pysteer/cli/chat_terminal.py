"""Where a person types: prompts with editing, history and completion, and Ctrl-C.

Imported by the chat only where standard input is a terminal, because prompt_toolkit takes a while.
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

from pysteer.cli.chat_session import Session, unfinished


class _Completer(Completer):
    def __init__(self, session: Session) -> None:
        self._session = session

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        for line in self._session.completions(text):
            yield Completion(line, start_position=-len(text))


class Terminal:
    """Reads what a person types.

    Nothing is written to disk: the history of the input ends with the program.

    Args:
        session: whose steering the prompt shows, and whose commands are completed.
        input: where keys come from; the terminal.
        output: where the prompt is drawn; the terminal, also where standard output is a file.
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
        """The next entry, which may have several lines; None once the user has left."""
        while True:
            try:
                return self._prompt.prompt([("bold", f"[{self._session.steering}] > ")])
            except KeyboardInterrupt:
                continue
            except EOFError:
                return None


def _keys() -> KeyBindings:
    keys = KeyBindings()

    # While history is searched, these keys mean something else.
    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state is not None and buffer.complete_state.current_completion:
            buffer.complete_state = None  # it is chosen
        elif unfinished(buffer.text):
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    # The second is what the terminal makes of it if it is typed while an answer is written.
    @keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))
    @keys.add("escape", "c-j", filter=has_focus(DEFAULT_BUFFER))
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


@contextmanager
def interrupting(session: Session) -> Iterator[None]:
    """Let Ctrl-C stop the answer.

    After the next token, if it comes while the answer is written. A long prompt has none to wait
    for: there, and where waiting for the token takes too long, KeyboardInterrupt is raised, which
    Python does once llama.cpp has processed its batch.
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
