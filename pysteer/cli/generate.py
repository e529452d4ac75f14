"""`pysteer generate`: one answer, steered or not."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.loading import load_policy, load_steered
from pysteer.errors import SteeringError
from pysteer.pack.pack import SteeringPack
from pysteer.pack.resolved import ResolvedPolicy
from pysteer.runtime.report import SteeringReport
from pysteer.shipped import default_pack_path


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to say; - reads it.")],
    model: options.Model = None,
    pack: options.Pack = None,
    steer: options.Steer = None,
    policy: options.Policy = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt; no template.")] = False,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    context: options.Context = 2048,
    threads: options.Threads = None,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer a prompt, steered by the categories named, or by those the pack's router finds."""
    options.check_temperature(temperature)
    if raw and system is not None:
        raise SteeringError("--system needs the chat template; leave out --raw")
    if pack is None and model is None and (steer or policy):
        pack = default_pack_path()
    if steer and pack is None:
        raise SteeringError("--steer needs --pack: a pack for this model")
    loaded = SteeringPack.load(pack) if pack is not None else None
    request: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    # What is wrong with these is said before the model is loaded, which may take long.
    if policy is not None:
        request["policy"] = load_policy(policy, loaded)
    if loaded is not None and not steer and loaded.router is None and policy is None:
        raise SteeringError(
            "--pack does nothing by itself: it has no router; add --steer CATEGORY=STRENGTH, with "
            f"one of {', '.join(loaded.categories)}"
        )
    if loaded is not None and steer:
        request["steering"] = options.parse_steering(steer)
        ResolvedPolicy(loaded, request.get("policy")).requested(request["steering"])
    path = options.model_path(model)
    text = _read_prompt(prompt)
    pieces: list[str] = []
    finish_reason = None
    with closing(load_steered(path, loaded, n_ctx=context, n_threads=threads)) as llm:
        start = time.perf_counter()
        try:
            if raw:
                stream = llm.create_completion(text, stream=True, **request)
            else:
                messages = [{"role": "system", "content": system}] if system is not None else []
                messages.append({"role": "user", "content": text})
                stream = llm.create_chat_completion(messages, stream=True, **request)
            for piece, reason in _pieces(stream):
                finish_reason = reason
                pieces.append(piece)
                if not json:
                    print(piece, end="", flush=True)
        except SteeringError:
            raise
        except (ValueError, RuntimeError) as error:  # llama_cpp's: too long, or the context is full
            raise SteeringError(f"{error}; --context {context} may be too small") from None
        seconds = time.perf_counter() - start
        done = llm.last_steering
    if not json:
        print()
        _tell(done)
        return
    console.print_json(
        {
            "model": path,
            "pack": str(pack) if pack else None,
            "steering": done.to_dict(),
            "prompt": text,
            "text": "".join(pieces),
            "finish_reason": finish_reason,
            "seconds": seconds,
        }
    )


def _tell(done: SteeringReport) -> None:
    """What the router decided, on standard error."""
    if done.mode not in ("auto", "mixed"):
        return
    fired = ", ".join(done.fired) or "nothing"
    console.err.print(console.plain(f"the router found: {fired}"), style="dim")


def _read_prompt(prompt: str) -> str:
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode("utf-8")
    except UnicodeError:
        raise SteeringError("--prompt: not UTF-8 text") from None
    return text


def _pieces(stream: Any) -> Iterator[tuple[str, str | None]]:
    """Pairs of text and finish reason from completion and chat chunks alike."""
    for chunk in stream:
        choice = chunk["choices"][0]
        text = choice["text"] if "text" in choice else choice["delta"].get("content")
        yield text or "", choice["finish_reason"]
