"""Pictures of a pack. They need matplotlib (the extra `plot`), which is imported on first use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pysteer.distribution import install_command
from pysteer.errors import SteeringError
from pysteer.files import check_replaceable, opened, replacing
from pysteer.inspect.compare import category_cosines, norms, separation
from pysteer.pack.pack import SteeringPack
from pysteer.pack.router import Router

if TYPE_CHECKING:
    import os

_MARK = "drawn by pysteer"
_MARKS = {  # by matplotlib's name of the type of picture; other types have no place for a mark
    "png": {"Software": _MARK},
    "svg": {"Creator": _MARK},
    "svgz": {"Creator": _MARK},
    "pdf": {"Creator": _MARK},
    "eps": {"Creator": _MARK},
    "ps": {"Creator": _MARK},
}
_PANEL = (6.4, 5.4)  # inches
_LONGEST_NAME = 28


def plot_pack(pack: SteeringPack, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Draw the tables of `pysteer inspect` in one picture.

    The panels, as far as the pack has data for them: norms of the directions by layer, with the
    typical norm of the residual stream; cosines between the categories, averaged over common
    layers; held-out separation (area under the ROC curve) by layer; held-out confusion of the
    router.

    Args:
        pack: any pack.
        path: file to write; its ending (.png, .svg, .pdf, ...) is the type of the picture.
        overwrite: replace any older file; otherwise pictures by pysteer alone.

    Raises:
        SteeringError: as `open_figure` and `save_figure`.
    """
    figure, path = open_figure(path, overwrite=overwrite)
    panels = [_draw_norms]
    if category_cosines(pack):
        panels.append(_draw_cosines)
    if separation(pack):
        panels.append(_draw_separation)
    if pack.router is not None:
        panels.append(_draw_confusion)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure.set_size_inches(_PANEL[0] * columns, _PANEL[1] * rows)
    for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
        draw(axes, pack)
    for axes in figure.axes:
        if not axes.has_data():
            axes.remove()
    save_figure(figure, path, overwrite=overwrite)


def open_figure(path: str | os.PathLike[str], *, overwrite: bool = False) -> tuple[Any, Path]:
    """Return an empty matplotlib figure and the path to write it to.

    Raises:
        SteeringError: matplotlib is not installed, or cannot write files with the path's ending; or
            a file must stay, as for `save_figure`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SteeringError(
            f"a plot needs matplotlib; install it with: {install_command('plot')}"
        ) from None
    path = Path(path)
    figure = Figure(layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise SteeringError(f"{path}: unknown type of picture; use one of .{', .'.join(known)}")
    check_replaceable(path, None if overwrite else _is_ours)
    return figure, path


def save_figure(figure: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write a figure.

    Args:
        figure: matplotlib's figure.
        path: the file; its ending is the type of the picture.
        overwrite: replace any older file; otherwise pictures by pysteer alone.

    Raises:
        SteeringError: the file cannot be written.
    """
    kind = path.suffix[1:].lower()
    with warnings.catch_warnings():
        # The font may lack the script of a category's name, and draw boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        with replacing(path, None if overwrite else _is_ours) as file:
            figure.savefig(file, dpi=120, format=kind, metadata=_MARKS.get(kind))


def _is_ours(path: Path) -> bool:
    with opened(path) as file:
        return _MARK.encode() in file.read()


def _draw_norms(axes: Any, pack: SteeringPack) -> None:
    values = {name: norms(vector) for name, vector in pack.categories.items()}
    layers = {layer for row in values.values() for layer in row}
    typical = {layer: norm for layer, norm in sorted(pack.residual_norm.items()) if layer in layers}
    lengths = [*typical.values(), *(norm for row in values.values() for norm in row.values())]
    positive = [value for value in lengths if value > 0]
    wide = bool(positive) and max(positive) > 20 * min(positive)
    title = "norm of each direction"
    if len(layers) == 1:
        _draw_bars(axes, values, title)
        for norm in typical.values():
            axes.axvline(norm, color="black", linestyle=":", label="typical residual")
        axes.set_xscale("log" if wide else "linear")
    else:
        _draw_lines(axes, values, title)
        if typical:
            axes.plot(
                list(typical),
                list(typical.values()),
                color="black",
                linestyle=":",
                marker="." if len(typical) == 1 else "",
                label="typical residual",
            )
        axes.set_yscale("log" if wide else "linear")
    _draw_legend(axes)


def _draw_cosines(axes: Any, pack: SteeringPack) -> None:
    names = list(pack.categories)
    matrix = np.eye(len(names))
    matrix[~np.eye(len(names), dtype=bool)] = np.nan
    for (one, other), layers in category_cosines(pack).items():
        i, j = names.index(one), names.index(other)
        matrix[i, j] = matrix[j, i] = fmean(layers.values())
    _draw_matrix(axes, matrix, names, "coolwarm", (-1.0, 1.0), [f"{v:.2f}" for v in matrix.flat])
    axes.set_title("cosine between categories, mean over layers")


def _draw_separation(axes: Any, pack: SteeringPack) -> None:
    found = separation(pack)
    values = {name: found.get(name, {}) for name in pack.categories}
    limits = (min(0.45, *(auc for row in values.values() for auc in row.values())) - 0.02, 1.02)
    title = "separation on held-out prompts (AUC)"
    if len({layer for row in values.values() for layer in row}) == 1:
        _draw_bars(axes, values, title)
        axes.axvline(0.5, color="black", linestyle=":", label="chance")
        axes.set_xlim(*limits)
    else:
        _draw_lines(axes, values, title)
        axes.axhline(0.5, color="black", linestyle=":", label="chance")
        axes.set_ylim(*limits)
    _draw_legend(axes)


def _draw_confusion(axes: Any, pack: SteeringPack) -> None:
    router = pack.router
    assert isinstance(router, Router)
    counts = np.asarray(router.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = ["benign", *router.categories]
    cells = [str(count) if count else "" for count in counts.flat]
    _draw_matrix(axes, shares, names, "Blues", (0.0, 1.0), cells)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    axes.set_title("router: held-out prompts")


def _draw_bars(axes: Any, values: Mapping[str, Mapping[int, float]], title: str) -> None:
    """Draw a bar for each category, of values at one layer."""
    (layer,) = {layer for row in values.values() for layer in row}
    size = 8 if len(values) <= 14 else 5
    axes.barh(range(len(values)), [row.get(layer, 0.0) for row in values.values()], height=0.6)
    axes.set_yticks(range(len(values)), [_label(name) for name in values], fontsize=size)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    axes.set_title(f"{title}, layer {layer}")


def _draw_lines(axes: Any, values: Mapping[str, Mapping[int, float]], title: str) -> None:
    """Draw a line over the layers for each category; categories without a layer keep a colour."""
    from matplotlib import colormaps

    pairs = colormaps["tab20"].colors  # type: ignore[attr-defined]
    colours = [*pairs[::2], *pairs[1::2]]  # strong colours first, then pale ones
    for number, (name, row) in enumerate(values.items()):
        if row:
            axes.plot(
                list(row),
                list(row.values()),
                color=colours[number % len(colours)],
                linestyle=("-", "--", "-.")[number // len(colours) % 3],
                marker="o",
                markersize=3,
                linewidth=1.2,
                label=_label(name),
            )
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.set_title(title)


def _draw_legend(axes: Any) -> None:
    """Draw the legend of the named lines or bars, beside them."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_matrix(
    axes: Any,
    matrix: npt.NDArray[np.float64],
    names: Sequence[str],
    colours: str,
    limits: tuple[float, float],
    cells: Sequence[str],
) -> None:
    axes.imshow(matrix, cmap=colours, vmin=limits[0], vmax=limits[1])
    labels = [_label(name) for name in names]
    size = 8 if len(names) <= 14 else 5
    axes.set_xticks(range(len(names)), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(labelsize=size)
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    diverging = limits[0] < 0
    for index, text in enumerate(cells):
        row, column = divmod(index, len(names))
        value = matrix[row, column]
        if np.isfinite(value):
            # White on dark colours: at both ends of a diverging map, at the upper end of others.
            distance = abs(value - middle) / half if diverging else value
            colour = "white" if distance > 0.65 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size - 1, color=colour)


def _label(name: str) -> str:
    """Return a name for matplotlib: short, on one line, and without formulas."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 3] + "..."
    # matplotlib leaves names with a leading underscore out of the legend.
    return ("\N{ZERO WIDTH SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")
