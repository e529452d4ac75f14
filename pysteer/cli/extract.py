"""`pysteer extract`: learn a pack from prompts."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any

import typer

from pysteer.cli import console, options
from pysteer.cli.bars import Announced, bars
from pysteer.cli.capturing import (
    CaptureOptions,
    check_output,
    choose_engine,
    choose_threads,
    layers_of,
    let_waiting_threads_sleep,
    open_capture,
    parse_layers,
)
from pysteer.cli.loading import require
from pysteer.cli.settings_options import with_options
from pysteer.cli.spellings import Spelling, items, words
from pysteer.errors import SteeringError
from pysteer.extract.methods import METHODS
from pysteer.extract.settings import MASSIVE_RATIO, ExtractSettings
from pysteer.prompts import Prompt, load_prompts
from pysteer.settings import check, described, setting
from pysteer.shipped import everyday_prompts

NO_BENIGN = Path("none")


@dataclass(frozen=True)
class Files:
    """Files of an extraction."""

    unsafe: options.UnsafePrompts
    safe: Annotated[Path, typer.Option(metavar="FILE", help="Harmless prompts, for contrast.")]
    output: options.PackOutput
    benign: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|none",
            help="Everyday prompts, which no gate of the router should open for; by default a set "
            "of pysteer's own. none: no such prompts.",
        ),
    ] = None
    answers: options.SafeAnswers = None
    cache: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder of activations; by default temporary, beside the output."
        ),
    ] = None

    @property
    def inputs(self) -> tuple[Path | None, ...]:
        """The files that the command reads."""
        benign = None if self.benign == NO_BENIGN else self.benign
        return self.unsafe, self.safe, benign, self.answers

    def load_benign(self, *, router: bool) -> list[Prompt]:
        """Return the everyday prompts that the router learns from."""
        if self.benign is None:
            return everyday_prompts() if router else []
        return [] if self.benign == NO_BENIGN else load_prompts(self.benign)


def _method_setting(method: str, name: str, default: Any = None) -> Any:
    """Return the setting of a method's option; None leaves the method's default."""
    option = described(METHODS[method].options)[name]
    help = f"{method}: {option.help[0].lower()}{option.help[1:]}"
    return setting(default, help, option.minimum, choices=option.choices)


@dataclass(frozen=True)
class MethodOptions:
    """Options of single methods. `option` reaches all numeric options."""

    variant: str | None = _method_setting("pca", "variant")
    paired: bool = _method_setting("pruned", "paired", False)
    response_tokens: int | None = _method_setting("contrast", "response_tokens")
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="Option of the method, such as C=0.1 of logistic. Repeatable.",
        ),
    ] = None

    def __post_init__(self) -> None:
        check(self)

    def given(self) -> dict[str, Any]:
        """Return the options that were given, by name.

        Raises:
            SteeringError: an --option in another form.
        """
        named = {"variant": self.variant, "response_tokens": self.response_tokens}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.paired:
            given["paired"] = True
        return given | dict(map(_numeric_option, self.option or ()))


def _read_pooling(text: str) -> Any:
    start, colon, stop = text.partition(":")
    if not colon:
        return text
    if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
        raise ValueError
    return int(start), int(stop)


def _methods() -> str:
    """Return the methods as a paragraph of help whose lines typer leaves as they are."""
    lines = [f"  {name:<9} {method.summary}" for name, method in METHODS.items()]
    return "\n".join(["\b", "Methods:", *lines])


@with_options(
    leave_out=("options", "layers"),
    method=Spelling(metavar="NAME", help="Method that finds directions; see above."),
    pooling=Spelling(
        read=_read_pooling,
        metavar="TOKENS",
        example="3:10",
        help="Tokens whose activations are averaged: last, prompt, user, response, or a range such "
        "as 3:10.",
    ),
    matched=words(
        {"auto": None, "matched": True, "generic": False},
        "--safe-data",
        help="Safe prompts for a category: of the same category (matched), or all (generic).",
    ),
    mask_massive=Spelling(
        read=lambda mask: MASSIVE_RATIO if mask else None,
        write=lambda ratio: ratio is not None,
        type=bool,
        help="Leave out dimensions that dwarf the rest.",
    ),
    orthogonalise=words({"none": "", "categories": "categories", "benign": "benign"}),
    gates=items("margin,probe"),
)
def extract(
    files: Files,
    capture_options: CaptureOptions,
    settings: ExtractSettings,
    method_options: MethodOptions,
    layers: options.Layers = None,
    judge: Annotated[
        str,
        typer.Option(
            metavar="JUDGE",
            help="guided: judge of answers; labels (in the data), or a judge of evaluate. With "
            "refusal, anything that is not a refusal counts as unsafe.",
        ),
    ] = "labels",
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Learn steering vectors and a router from prompts.

    After Ctrl-C the same command resumes.
    """
    source = options.model_source(capture_options.model)
    engine = choose_engine(capture_options, source, [settings.method])
    for name in ("gpu_layers", "rpc"):
        if getattr(capture_options, name) and engine == "torch":
            option = name.replace("_", "-")
            raise SteeringError(f"--{option} is for --engine llama; --device-map is for torch")
    require("sklearn", "extract" if engine == "torch" else "extract-gguf")
    let_waiting_threads_sleep()
    from pysteer.cli.reports.extract import describe, print_pack
    from pysteer.evaluate.judges import open_judge
    from pysteer.extract.cache import clear
    from pysteer.extract.data import Data
    from pysteer.extract.extraction import extract as run_extraction
    from pysteer.extract.inputs import fitting
    from pysteer.extract.threads import limited_threads

    console.show_warnings()
    started = time.monotonic()
    data = Data(
        load_prompts(files.unsafe),
        load_prompts(files.safe),
        files.load_benign(router=settings.router),
        [] if files.answers is None else load_prompts(files.answers, answers=True),
    )
    settings = replace(settings, options=method_options.given())
    layer_ranges = None if layers is None else parse_layers(layers)
    check_output(files.output, (Path(source), *files.inputs), force=force)
    folder = files.cache or files.output.with_name(f"{files.output.name}.cache")
    threads = choose_threads(capture_options.threads)
    capture_options = replace(capture_options, threads=threads)
    hardware = options.hardware(threads, capture_options.gpu_layers, capture_options.rpc)
    with ExitStack() as stack:
        opened = None
        if judge != "labels":
            opened = stack.enter_context(closing(open_judge(judge, **hardware)))
        capture = open_capture(capture_options, source, engine)
        stack.enter_context(limited_threads(threads))
        if files.benign is None:
            data = replace(data, benign=fitting(capture, data.benign))
        if layers is not None:
            settings = replace(settings, layers=layers_of(layer_ranges, settings.site, capture))
        stack.enter_context(console.resumable(folder, mention_in_errors=True))
        headline = (
            f"{Path(source).stem}, engine {engine}, method {settings.method}: "
            f"{len(data.unsafe)} unsafe and {len(data.safe)} safe prompts"
        )
        progress = Announced(stack.enter_context(bars()), "" if json else headline)
        pack = run_extraction(
            capture, data, settings, cache=folder, judge=opened, progress=progress
        )
    pack.save(files.output, overwrite=force)
    if files.cache is None:
        clear(folder)
    seconds = time.monotonic() - started
    if json:
        console.print_json(describe(pack, files.output, seconds))
    else:
        print_pack(pack, files.output, seconds)


extract.__doc__ = f"{cleandoc(extract.__doc__ or '')}\n\n{_methods()}"


def _numeric_option(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    for kind in (int, float):
        with suppress(ValueError):
            return name, kind(number)
    raise SteeringError(f"--option {text}: write NAME=NUMBER, as in kl_weight=2")
