"""Tables that several commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text

from pysteer.cli import console


def table(*headings: str) -> Table:
    """Return an empty table in the house style."""
    return Table(*headings, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def say(rows: Table, *, names: int = 1) -> None:
    """Print a table, in parts if the terminal is too narrow for its words.

    Args:
        rows: the table, whose cells may have rich's markup.
        names: number of first columns, which name a row and come with every part.
    """
    for column in rows.columns:
        column.min_width = _least_width(column)
    least = [(column.min_width or 0) + 2 for column in rows.columns]  # blanks between columns
    room = console.out.width - 1 - sum(least[:names])
    parts: list[list[Column]] = []
    left = -1
    for column, width in zip(rows.columns[names:], least[names:], strict=True):
        if width > left:
            parts.append([])
            left = room
        parts[-1].append(column)
        left -= width
    if len(parts) < 2:
        console.out.print(rows)
        return
    for part in parts:
        console.out.print(_part(rows, [*rows.columns[:names], *part]))


def _least_width(column: Column) -> int:
    """Return the width in which no word of a column is cut, or no line if lines stay whole."""
    texts = (Text.from_markup(str(cell)) for cell in (column.header, *column.cells))
    pieces = (
        piece for text in texts for piece in text.plain.split("\n" if column.no_wrap else None)
    )
    return max(map(cell_len, pieces), default=0)


def _part(rows: Table, columns: Sequence[Column]) -> Table:
    """Return a table of some of the columns of another."""
    part = Table(title=rows.title, box=rows.box, padding=rows.padding)
    for column in columns:
        part.add_column(
            column.header,
            justify=column.justify,
            no_wrap=column.no_wrap,
            min_width=column.min_width,
        )
    cells = zip(*(column.cells for column in columns), strict=True)
    for row, texts in zip(rows.rows, cells, strict=True):
        part.add_row(*texts, end_section=row.end_section)
    return part


def numbers(names: Sequence[str]) -> dict[str, str]:
    """Return short column headings for long names: 1, 2, 3, ..."""
    return {name: str(number) for number, name in enumerate(names, 1)}


def say_by_layer(
    title: str, headings: Mapping[str, str], values: Mapping[str, Mapping[int, float]], form: str
) -> None:
    """Print a row for each layer and a column for each category.

    Args:
        title: of the table.
        headings: category to the heading of its column.
        values: category to layer to number.
        form: format of a number, such as ".2f".
    """
    layers = sorted({layer for row in values.values() for layer in row})
    cells = {
        str(layer): [
            format(row[layer], form) if layer in (row := values.get(name, {})) else ""
            for name in headings
        ]
        for layer in layers
    }
    say_cells(title, "layer", [console.plain(heading) for heading in headings.values()], cells)


def say_square(title: str, rows: Mapping[str, Sequence[str]], *, first: int = 1) -> None:
    """Print a matrix whose columns are in the order of its rows, numbered from `first`.

    Args:
        title: of the table.
        rows: name of a row to its cells.
        first: number of the first row and column.
    """
    short = [str(first + i) for i in range(len(rows))]
    names = [f"{i} {console.plain(name)}" for i, name in zip(short, rows, strict=True)]
    say_cells(title, "", short, dict(zip(names, rows.values(), strict=True)))


def say_cells(
    title: str, corner: str, headings: Sequence[str], cells: Mapping[str, Sequence[str]]
) -> None:
    """Print a title and a table, in parts if the terminal is too narrow.

    Names, headings and cells may have rich's markup.

    Args:
        title: of the table.
        corner: heading of the rows' names.
        headings: of the columns.
        cells: name of a row to its cells.
    """

    def width(text: str) -> int:
        return Text.from_markup(text).cell_len

    wide = max((width(text) for row in [headings, *cells.values()] for text in row), default=1)
    left = max(width(text) for text in [corner, *cells])
    fit = max(1, (console.out.width - left - 3) // (wide + 1))
    console.say(title)
    for start in range(0, len(headings), fit):
        part = Table(corner, box=SIMPLE_HEAD, padding=0)
        part.columns[0].no_wrap = True
        for heading in headings[start : start + fit]:
            part.add_column(heading, justify="right", no_wrap=True)
        for name, row in cells.items():
            part.add_row(name, *row[start : start + fit])
        console.out.print(part)


def ranges(layers: Sequence[int]) -> str:
    """Return ascending layers as text: "1-3, 7" for 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], layer]
        else:
            parts.append([layer])
    return ", ".join("-".join(str(end) for end in part) for part in parts)


def span(values: Sequence[float], form: str = ".3g") -> str:
    """Return the smallest and the largest number as text: "0.1 to 2"."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
