"""`pysteer generate`: one answer, steered or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.loading import load_policy, load_steered
from pysteer.cli.settings_options import with_options
from pysteer.cli.streams import read_input, unicode_text
from pysteer.errors import SteeringError
from pysteer.evaluate.settings import Sampling
from pysteer.shipped import default_pack_path

if TYPE_CHECKING:
    from pysteer.pack.pack import SteeringPack
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

    --steer names the categories; without --steer, the pack's router decides.
    """
    from pysteer.runtime.arguments import read_pack

    if raw and system is not None:
        raise SteeringError("--system needs the chat template; leave out --raw")
    if not pack and running.model is None and (steer or policy):
        pack = [default_pack_path()]
    if steer and not pack:
        raise SteeringError("--steer needs --pack: a pack for this model")
    loaded = read_pack(pack) if pack else None
    # Checked before the model is loaded, which may take long.
    request: dict[str, Any] = vars(sampling) | _steering(loaded, steer, policy)
    path = options.model_path(running.model)
    text = _read_prompt(prompt)
    pieces: list[str] = []
    finish_reason = None
    llm = load_steered(path, loaded, n_ctx=running.context, n_threads=running.threads)
    with closing(llm):
        start = time.perf_counter()
        try:
            for piece, reason in _stream(llm, text, system, raw=raw, request=request):
                finish_reason = reason
                pieces.append(piece)
                if not json:
                    print(piece, end="", flush=True)
        except SteeringError:
            raise
        except (ValueError, RuntimeError) as error:  # of llama_cpp: the context is full
            hint = f"--context {running.context} may be too small"
            raise SteeringError(f"{error}; {hint}") from None
        seconds = time.perf_counter() - start
        report = llm.last_steering
    if not json:
        print()
        _print_router(report)
        return
    console.print_json(
        {
            "model": path,
            "packs": [str(path) for path in pack or ()],
            "steering": report.to_dict(),
            "prompt": text,
            "text": "".join(pieces),
            "finish_reason": finish_reason,
            "seconds": seconds,
        }
    )


def _steering(
    pack: SteeringPack | None, steer: list[str] | None, policy: Path | None
) -> dict[str, Any]:
    """Return the arguments of a request from --steer and --policy.

    Raises:
        SteeringError: the options do not fit the pack, or the pack alone steers nothing.
    """
    request: dict[str, Any] = {}
    if policy is not None:
        request["policy"] = load_policy(policy, pack)
    if pack is not None and not steer and pack.router is None and policy is None:
        raise SteeringError(
            "the pack has no router and does nothing by itself; add --steer CATEGORY=STRENGTH, "
            f"with a category of {', '.join(pack.categories)}"
        )
    if pack is not None and steer:
        from pysteer.pack.resolved import ResolvedPolicy

        request["steering"] = options.parse_steering(steer)
        ResolvedPolicy(pack, request.get("policy")).requested(request["steering"])
    return request


def _print_router(report: SteeringReport) -> None:
    """Print the router's decision on standard error."""
    if report.mode in ("auto", "mixed"):
        fired = ", ".join(report.fired) or "nothing"
        console.err.print(console.plain(f"the router found: {fired}"), style="dim")


def _read_prompt(prompt: str) -> str:
    try:
        text = read_input() if prompt == "-" else unicode_text(prompt)
    except UnicodeError:
        raise SteeringError("--prompt: not UTF-8 text") from None
    if not text.strip():
        raise SteeringError("--prompt is empty; write a text")
    return text


def _stream(
    llm: SteeredLlama, text: str, system: str | None, *, raw: bool, request: dict[str, Any]
) -> Iterator[tuple[str, str | None]]:
    """Yield pieces of the answer, each with the finish reason if the answer ends there."""
    stream: Any
    if raw:
        stream = llm.create_completion(text, stream=True, **request)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        stream = llm.create_chat_completion(messages, stream=True, **request)
    for chunk in stream:
        choice = chunk["choices"][0]
        piece = choice["text"] if "text" in choice else choice["delta"].get("content")
        yield piece or "", choice["finish_reason"]
