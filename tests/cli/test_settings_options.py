"""Options made from dataclasses: names, defaults, help, ranges, spellings, and the values."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import typer

from pysteer import SteeringError
from pysteer.cli.settings_options import with_options
from pysteer.cli.spellings import INTERVAL, Spelling, items, words
from pysteer.settings import check, setting


@dataclass(frozen=True)
class Sampling:
    max_tokens: int = setting(40, "Longest answer.", 1)
    seed: int | None = setting(None, "Seed.", 0)


@dataclass(frozen=True)
class SearchSettings:
    sampling: Sampling = field(default_factory=Sampling)
    rate: float = setting(0.5, "Rate of learning.", above=0, below=1)
    held_out: Literal["prompts", "all"] = setting("prompts", "Part.", choices=("prompts", "all"))
    site: str = setting("a", "Where.", choices=[10 * letter for letter in "abc"] + ["a"])
    methods: tuple[str, ...] = setting(("x", "y"), "Methods.")
    interval: tuple[float, float] = setting((0.5, 2.0), "Strengths.")
    matched: bool | None = setting(None, "Match.")
    mask: float | None = setting(10.0, "Ratio above which dimensions are masked.")
    router: bool = setting(True, "Fit a router.")
    unit: bool = setting(False, "Norm 1.")
    hidden: int = setting(7, "No option.")

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class Files:
    source: Annotated[str, typer.Option("--source", "-s", help="Input.")]
    target: Annotated[str | None, typer.Option(help="Output.")] = None


def application(function):
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    return typer.main.get_command(app)


@pytest.fixture
def search():
    """A command made from the classes above, and the list of its calls."""
    calls = []

    @with_options(
        leave_out=("hidden",),
        held_out=Spelling(("--hold-out",)),
        methods=items("x,y"),
        interval=INTERVAL,
        matched=words({"auto": None, "yes": True, "no": False}, "--match"),
        mask=Spelling(
            read=lambda on: 10.0 if on else None,
            write=lambda ratio: ratio is not None,
            type=bool,
            help="Mask dimensions.",
        ),
    )
    def search(files: Files, settings: SearchSettings, extra: Annotated[int, typer.Option()] = 3):
        """Search."""
        calls.append((files, settings, extra))

    return application(search), calls


def called(search, *arguments):
    command, calls = search
    calls.clear()
    command.main([*arguments], prog_name="x", standalone_mode=False)()
    [call] = calls
    return call


def test_defaults_equal_those_of_the_classes(search):
    assert called(search, "-s", "a") == (Files("a"), SearchSettings(), 3)


def test_every_option_sets_its_field(search):
    given = """--source a --target b --max-tokens 9 --seed 4 --rate 0.25 --hold-out all --site a
        --methods p,q --interval 1:3 --match no --no-mask --no-router --unit --extra 5"""
    assert called(search, *given.split()) == (
        Files("a", "b"),
        SearchSettings(
            Sampling(9, 4), 0.25, "all", "a", ("p", "q"), (1.0, 3.0), False, None, False, True
        ),
        5,
    )


def test_help_has_text_default_and_range_of_each_setting(search, capsys):
    search[0].main(["--help"], prog_name="x", standalone_mode=False)
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "-n, --max-tokens N Longest answer. [default: 40; x>=1]",
        "--hold-out [prompts|all] Part. [default: prompts]",
        "--methods A,B,... Methods. [default: x,y]",
        "--interval LEAST:MOST Strengths. [default: 0.5:2.0]",
        "--match [auto|yes|no] Match. [default: auto]",
        "--mask / --no-mask Mask dimensions. [default: mask]",
        "--router / --no-router Fit a router. [default: router]",
        "--unit Norm 1.",
        f"--site NAME Where. Known: {10 * 'a'}, {10 * 'b'}",
        "--debug",
    ):
        assert part in text
    assert "hidden" not in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "1"], "--rate must be above 0 and below 1, not 1.0"),
        (["--rate", "nan"], "--rate must be a finite number, not nan"),
        (["--hold-out", "x"], "unknown --hold-out 'x'; use one of prompts, all"),
        (["--interval", "3"], "--interval 3: write LEAST:MOST, as in 0.6:1.6"),
        (["--interval", "1:nan"], "--interval 1:nan: write LEAST:MOST"),
        (["--match", "maybe"], r"--match maybe: write \[auto\|yes\|no\]"),
    ],
)
def test_bad_value_is_an_error_that_names_the_option(arguments, words, search):
    with pytest.raises(SteeringError, match=words):
        called(search, "-s", "a", *arguments)


def test_default_instance_replaces_the_defaults_of_the_fields():
    calls = []
    given = Sampling(max_tokens=7, seed=1)

    @with_options(leave_out=("seed",))
    def command(sampling: Sampling = given):
        calls.append(sampling)

    assert called((application(command), calls)) == given
    assert called((application(command), calls), "-n", "8") == Sampling(8, 1)


def test_unknown_setting_in_the_decorator_raises():
    with pytest.raises(TypeError, match="no settings neither, nowhere"):

        @with_options(leave_out=("nowhere",), neither=INTERVAL)
        def command(sampling: Sampling):
            pass


def test_two_options_of_one_name_are_refused():
    with pytest.raises(TypeError, match="two options seed"):

        @with_options()
        def command(sampling: Sampling, seed: int = 0):
            pass
