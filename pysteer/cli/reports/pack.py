"""Printed report of a pack: a summary of one screen, or everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from pysteer.cli import console, tables
from pysteer.inspect.compare import category_cosines, norms, separation
from pysteer.pack.operators import ADD
from pysteer.pack.pack import SteeringPack
from pysteer.pack.policy import Policy
from pysteer.pack.router import Router
from pysteer.pack.vector import SteeringVector

SUMMARY_ROWS = 20
"""Most categories in a summary, so that it fits one screen."""


def print_summary(file: Path, pack: SteeringPack) -> None:
    """Print a pack on one screen: a row for each category, and a line for each other part.

    Args:
        file: the pack's file.
        pack: the pack.
    """
    _print_head(file, pack)
    tables.say(_category_rows(pack))
    if len(pack.categories) > SUMMARY_ROWS:
        console.say(f"and {len(pack.categories) - SUMMARY_ROWS} more categories")
    cosines = [fmean(layers.values()) for layers in category_cosines(pack).values()]
    if cosines:
        console.say(f"cosine between categories: {tables.span(cosines, '.2f')}")
    separated = [max(layers.values()) for layers in separation(pack).values()]
    if separated:
        console.say(
            f"separation of held-out prompts, best layer: AUC {tables.span(separated, '.2f')}"
        )
    if pack.router is not None:
        console.say(
            f"router, held out: category accuracy {pack.router.category_accuracy:.1%}, benign "
            f"false positives {pack.router.benign_false_positive_rate:.1%}"
        )
        console.say("gate opens, benign: for so many of the category's own and of benign prompts")
    if pack.policy is not None:
        for line in _policy_lines(pack.policy):
            console.say(console.plain(line))
    made = _made(pack.provenance)
    if made:
        console.say(console.plain(made))
    console.say("more: --verbose, --plot FILE, --json")


def _print_head(file: Path, pack: SteeringPack) -> None:
    model = pack.base_model
    made_for = (
        f"{model.name or 'unnamed'} ({model.architecture}, {model.n_layer} layers, "
        f"n_embd {model.n_embd}, {model.n_vocab} tokens)"
        if model
        else f"not stated; any model with n_embd {pack.n_embd}"
    )
    console.say(f"[bold]{console.plain(str(file))}[/]")
    console.say(f"base model: {console.plain(made_for)}")


def _category_rows(pack: SteeringPack) -> Table:
    """Return a table with a row for each category: steering, and gate."""
    router = pack.router
    gate = None
    if router is not None:
        kind = (pack.policy or Policy()).gate_kind(router.gates)
        gate = router.gates.get(kind)
    columns = ["category", "site", "layers", "of residual"]
    rows = tables.table(*columns, *([] if gate is None else ["gate opens", "benign"]))
    rows.columns[0].no_wrap = True
    for name, vector in list(pack.categories.items())[:SUMMARY_ROWS]:
        cells = [
            console.plain(name),
            vector.site if vector.operator == ADD else f"{vector.site} ({_operator(vector)})",
            tables.ranges(vector.layers),
            _scale(pack, vector),
        ]
        if router is not None and gate is not None and name in router.categories:
            at = router.categories.index(name)
            cells += [
                f"{gate.true_positive_rates[at]:.0%}",
                f"{gate.false_positive_rates[at]:.1%}",
            ]
        rows.add_row(*cells)
    return rows


def _scale(pack: SteeringPack, vector: SteeringVector) -> str:
    """Return the norms of the directions over the typical norm of the residual stream."""
    if vector.operator.kind != "add":
        return ""  # the length of such a direction has no meaning
    lengths = norms(vector)
    relative = [
        lengths[layer] / typical
        for layer, typical in pack.residual_norm.items()
        if layer in lengths and typical > 0
    ]
    return tables.span(relative) if relative else "not stated"


def _policy_lines(policy: Policy) -> Iterator[str]:
    """Yield a policy in the words of its file; categories with equal settings share a line."""
    content = policy.content()
    categories = content.pop("categories", {})
    yield f"policy: {_settings(content, policy.scope)}"
    alike: dict[str, list[str]] = {}
    for name, settings in categories.items():
        alike.setdefault(_settings(settings, policy.categories[name].scope), []).append(name)
    for text, names in alike.items():
        who = f"all {len(names)} categories" if len(names) == len(categories) > 1 else None
        yield f"  {who or ', '.join(names)}: {text}"


def _made(provenance: Mapping[str, Any]) -> str:
    """Return the origin of a pack in a line: method, date, judge; "" if it is not stated."""
    calibration = provenance.get("calibration")
    record = calibration if isinstance(calibration, Mapping) else provenance
    facts = [
        f"{key} {record[key]}"
        for key in ("method", "date", "judge", "pysteer")
        if isinstance(record.get(key), str)
    ]
    method = provenance.get("method")
    if record is not provenance and isinstance(method, str):
        facts.insert(0, f"method {method}")
    return f"made: {', '.join(facts)}" if facts else ""


def print_pack(file: Path, pack: SteeringPack, data: dict[str, Any]) -> None:
    """Print a pack as tables.

    Args:
        file: the pack's file.
        pack: the pack.
        data: its description by `describe`.
    """
    _print_head(file, pack)
    short = tables.numbers(list(pack.categories))
    with_operators = any(vector.operator != ADD for vector in pack.categories.values())
    operator = ["operator"] if with_operators else []
    summary = tables.table("", "category", "site", *operator, "layers", "norm", "of residual")
    summary.columns[1].no_wrap = True
    for name, vector in pack.categories.items():
        summary.add_row(
            short[name],
            console.plain(name),
            vector.site,
            *([_operator(vector)] if with_operators else []),
            tables.ranges(vector.layers),
            tables.span(list(norms(vector).values())),
            _scale(pack, vector),
        )
    tables.say(summary, names=2)
    _print_by_layer(pack, short)
    if pack.router is not None:
        _print_router(pack.router)
    if pack.policy is not None:
        for line in _policy_lines(pack.policy):
            console.say(console.plain(line))
    # The separation has been printed as a table.
    skip = ("separation",) if "separation" in data else ()
    for line in _lines({k: v for k, v in data["provenance"].items() if k not in skip}):
        console.say(console.plain(line))


def _operator(vector: SteeringVector) -> str:
    rank = f", rank {vector.prepared.shape[1] // 2}" if vector.operator.kind == "low_rank" else ""
    return f"{vector.operator}{rank}"


def _print_by_layer(pack: SteeringPack, short: Mapping[str, str]) -> None:
    lengths = {name: norms(vector) for name, vector in pack.categories.items()}
    if any(len(by_layer) > 1 for by_layer in lengths.values()):
        tables.say_by_layer("norm of each direction", short, lengths, ".3g")
    cosines = category_cosines(pack)
    if cosines:
        means = {pair: fmean(layers.values()) for pair, layers in cosines.items()}
        means |= {(other, name): value for (name, other), value in means.items()}
        tables.say_square(
            "cosine between categories, mean over common layers",
            {
                name: [
                    ""
                    if name == other or (name, other) not in means
                    else f"{means[name, other]:.2f}"
                    for other in pack.categories
                ]
                for name in pack.categories
            },
        )
    separated = separation(pack)
    if separated:
        title = "separation: AUC of the projection on held-out prompts"
        tables.say_by_layer(title, short, separated, ".3f")


def _print_router(router: Router) -> None:
    console.say(
        f"router: site {router.site}, {_reads(router)}, "
        f"thresholds by {console.plain(router.threshold_rule)}\n"
        f"held out: category accuracy {router.category_accuracy:.1%}, "
        f"benign false positives {router.benign_false_positive_rate:.1%}"
    )
    rates = tables.table("gate", "category", "threshold", "opens for", "benign", "others")
    rates.columns[1].no_wrap = True
    for kind, gate in router.gates.items():
        for i, name in enumerate(router.categories):
            rates.add_row(
                kind if i == 0 else "",
                console.plain(name),
                f"{'>=' if gate.above[i] else '<='} {gate.thresholds[i]:.3g}",
                f"{gate.true_positive_rates[i]:.1%}",
                f"{gate.false_positive_rates[i]:.1%}",
                f"{gate.leak_rates[i]:.1%}",
            )
    tables.say(rates, names=2)
    names = ["benign", *router.categories]
    rows = zip(names, router.confusion, strict=True)
    counts = {name: [str(count) if count else "" for count in row] for name, row in rows}
    tables.say_square("confusion of held-out prompts: is (row), taken for", counts, first=0)


def _reads(router: Router) -> str:
    """Return a router's reads, such as "user at layers 0, 4; suffix at layer 8"."""
    layers: dict[str, list[str]] = {}
    for read in router.reads:
        layers.setdefault(read.pooling, []).append(str(read.layer))
    return "; ".join(
        f"{pooling} at layer{'s' if len(at) > 1 else ''} {', '.join(at)}"
        for pooling, at in layers.items()
    )


def _settings(content: Mapping[str, Any], scope: object) -> str:
    words = {key: scope if key == "scope" else value for key, value in content.items()}
    given = [f"{key} {value}" for key, value in words.items() if value is not None]
    return ", ".join(given) or "defaults"


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    """Yield nested data line by line, inner data indented."""
    items = value.items() if isinstance(value, dict) else (("-", item) for item in value)
    for key, item in items:
        start = f"{indent}{key}" + ("" if isinstance(value, list) else ":")
        if _is_nested(item):
            yield start
            yield from _lines(item, indent + "  ")
        elif isinstance(item, list):
            yield f"{start} {', '.join(_text(part) for part in item) or 'none'}"
        else:
            yield f"{start} {_text(item)}"


def _is_nested(value: Any) -> bool:
    """Return True for data of several lines: a dict, or a list with dicts or lists in it."""
    if isinstance(value, list):
        return any(isinstance(item, (dict, list)) for item in value)
    return isinstance(value, dict) and bool(value)


def _text(value: Any) -> str:
    """Return the text of a plain JSON value, or of an empty dict."""
    if value is None or isinstance(value, dict):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
