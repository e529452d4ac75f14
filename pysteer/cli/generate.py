"""`pysteer generate`: one answer, steered or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.answer_text import answer_printer
from pysteer.cli.chat_events import describe_steering
from pysteer.cli.loading import load_setup, read_setup
from pysteer.cli.settings_options import with_options
from pysteer.cli.streams import read_input, unicode_text
from pysteer.errors import SteeringError
from pysteer.evaluate.settings import Sampling

if TYPE_CHECKING:
    from pysteer.runtime.report import SteeringReport
    from pysteer.runtime.steered import SteeredLlama

_RUNNING = options.Running(context=2048)
_SAMPLING = Sampling(max_tokens=256)


@with_options()
def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; - reads standard input.")
    ],
    running: options.Running = _RUNNING,
    pack: options.Packs = None,
    steer: options.Steer = None,
    policy: options.Policy = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt, without chat template.")
    ] = False,
    sampling: Sampling = _SAMPLING,
    json: options.Json = False,
) -> None:
    """Answer a prompt, with or without steering.

    --steer names the categories; without --steer the policy decides, by default with the pack's
    router. --steer off is the unsteered answer.
    """
    if raw and system is not None:
        raise SteeringError("--system needs the chat template; leave out --raw")
    # Checked before the model is loaded, which may take long.
    setup = read_setup(running.model, pack, policy)
    steering = setup.steering(steer)
    if setup.pack is not None and not steering and not setup.decided:
        raise SteeringError(
            "the pack has no router and does nothing by itself; add --steer CATEGORY=STRENGTH, "
            f"with a category of {', '.join(setup.pack.categories)}"
        )
    text = _text("--prompt", prompt)
    arguments: dict[str, Any] = {"prompt": text}
    if not raw:
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": _text("--system", system)})
        arguments = {"messages": messages}
    written = answer_printer(json)
    finish_reason: str | None = None
    with closing(load_setup(setup, **running.arguments)) as llm:
        _check_length(llm, arguments)
        if steering:
            with llm.steering(steering["steering"]):  # raises if the model cannot be steered so
                pass
        mode = describe_steering(steering["steering"]) if steering else setup.policy_words
        console.headline(setup.headline(mode), beside_result=True)
        start = time.perf_counter()
        for piece, reason in _stream(llm, {**arguments, **vars(sampling), **steering}):
            written.add(piece)
            finish_reason = reason
        seconds = time.perf_counter() - start
        report = llm.last_steering
    written.end()
    if not json:
        _print_router(report)
        return
    console.print_json(
        {
            "model": setup.model,
            "packs": [str(file) for file in setup.files],
            "steering": report.to_dict(),
            "prompt": text,
            "text": written.text,
            "finish_reason": finish_reason,
            "seconds": seconds,
        }
    )


def _print_router(report: SteeringReport) -> None:
    """Print the router's decision on standard error."""
    if report.mode in ("auto", "mixed"):
        fired = ", ".join(report.fired) or "nothing"
        console.err.print(console.plain(f"the router found: {fired}"), style="dim")


def _text(option: str, given: str) -> str:
    """Return the text of an option, or standard input for -."""
    try:
        text = read_input() if given == "-" and option == "--prompt" else unicode_text(given)
    except UnicodeError:
        raise SteeringError(f"{option}: not UTF-8 text") from None
    if option == "--prompt" and not text.strip():
        raise SteeringError("--prompt is empty; write a text")
    return text


def _check_length(llm: SteeredLlama, arguments: dict[str, Any]) -> None:
    """Raise SteeringError if the template refuses the messages, or the context is too small."""
    from pysteer.chat.handler import prompt_tokens, rendered_prompt

    if "prompt" in arguments:
        tokens = prompt_tokens(llm, arguments["prompt"])
    else:
        try:
            tokens = rendered_prompt(llm, arguments)
        except SteeringError:
            raise
        except ValueError as error:
            raise SteeringError(
                f"the model's chat template refuses the messages: {error}"
            ) from None
    if len(tokens) >= llm.n_ctx():
        raise SteeringError(
            f"the prompt has {len(tokens)} tokens and the context {llm.n_ctx()}; shorten the "
            "prompt, or give a larger --context"
        )


def _stream(llm: SteeredLlama, arguments: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Yield pieces of the answer, each with the finish reason if the answer ends there."""
    complete = llm.create_completion if "prompt" in arguments else llm.create_chat_completion
    stream: Any = complete(**arguments, stream=True)
    for chunk in stream:
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        yield piece or "", choice["finish_reason"]
