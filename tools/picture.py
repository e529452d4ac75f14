"""Draw the picture in the README: a terminal session with the default model, run as it is drawn.

The session answers two held-out prompts of the shipped pack, a harmful one and its harmless twin,
each without and with steering. The picture shows the commands that ran and everything that they
printed. Nothing is drawn unless the harmful prompt is refused and the harmless one is answered as
without steering.

usage: python tools/picture.py [OUT.svg]
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pysteer import shipped
from pysteer.evaluate.judges.refusal import is_refusal

PAIR = "mw-08"  # the pair_id of the two prompts
WIDTH = 96  # columns of the terminal
DEFAULT_OUT = Path(__file__).parents[1] / "docs" / "picture.svg"


@dataclass(frozen=True)
class Run:
    """One command and what it printed."""

    command: str
    answer: str
    notes: str  # standard error


def main(out: Annotated[Path, typer.Argument(help="The SVG file.")] = DEFAULT_OUT) -> None:
    """Run the session and draw it."""
    harmful, harmless = (
        next(row.prompt for row in rows if row.pair_id == PAIR) for rows in shipped.demo_prompts()
    )
    session = [
        generate(prompt, *steer) for prompt in (harmful, harmless) for steer in ((), ("auto",))
    ]
    _, refused, before, after = (run.answer for run in session)
    if not is_refusal(refused):
        raise typer.BadParameter(f"{harmful!r} is not refused with steering: {refused!r}")
    if after != before:
        raise typer.BadParameter(f"steering changes the answer to {harmless!r}")
    out.write_text(draw(session), encoding="utf-8")


def generate(prompt: str, *steer: str) -> Run:
    """Run `pysteer generate` with the default model."""
    options = [word for value in steer for word in ("--steer", value)]
    arguments = ["generate", "-n", "32", *options, "-p", prompt]
    program = Path(sys.executable).with_name("pysteer")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    shown = " ".join(["pysteer", *arguments[:-1], f'"{prompt}"'])
    return Run(shown, result.stdout.strip(), result.stderr.strip())


def draw(session: Iterable[Run]) -> str:
    """Return an SVG of a terminal in which the session ran, without references to the network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for number, run in enumerate(session):
        if number:
            console.print()
        console.print(Text.assemble(("$ ", "bold green"), (run.command, "bold")))
        console.print(Text(run.answer))
        if run.notes:
            console.print(Text(run.notes, "yellow"))
    svg = console.export_svg(title="SmolLM2-135M-Instruct", unique_id="s")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


if __name__ == "__main__":
    typer.run(main)
