"""Printed report of a pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pysteer.cli import console, tables
from pysteer.inspect.compare import category_cosines, norms, separation
from pysteer.pack.operators import ADD
from pysteer.pack.pack import SteeringPack
from pysteer.pack.router import Gate, Router
from pysteer.pack.vector import SteeringVector

if TYPE_CHECKING:
    from pysteer.pack.policy import Policy


def describe(pack: SteeringPack) -> dict[str, Any]:
    """Return a pack as JSON data: categories, layers, L2 norm of each direction, provenance.

    Some keys are there only if they apply: a category's "operator" (kind and options; absent for
    plain addition) and "rows" per layer; "cosines" (category to each later category to the mean
    over common layers and the layers), "separation" (category to layer to AUC), "router", "policy"
    (as in a policy file).
    """
    data = {
        "base_model": asdict(pack.base_model) if pack.base_model else None,
        "n_embd": pack.n_embd,
        "categories": {
            name: {
                "site": vector.site,
                "layers": list(vector.layers),
                "norms": {str(layer): norm for layer, norm in norms(vector).items()},
            }
            | _describe_operator(vector)
            for name, vector in pack.categories.items()
        },
        "residual_norm": {str(layer): norm for layer, norm in pack.residual_norm.items()},
        "provenance": _plain_data(pack.provenance),
    }
    cosines: dict[str, Any] = {}
    for (name, other), layers in category_cosines(pack).items():
        cosines.setdefault(name, {})[other] = {
            "mean": fmean(layers.values()),
            "layers": {str(layer): value for layer, value in layers.items()},
        }
    separated = {
        name: {str(layer): auc for layer, auc in layers.items()}
        for name, layers in separation(pack).items()
    }
    router = _describe_router(pack.router) if pack.router is not None else None
    policy = {"policy": pack.policy.content()} if pack.policy is not None else {}
    more = {"cosines": cosines, "separation": separated, "router": router}
    return data | {key: value for key, value in more.items() if value} | policy


def _describe_operator(vector: SteeringVector) -> dict[str, Any]:
    if vector.operator == ADD:
        return {}
    operator = {"kind": vector.operator.kind} | vector.operator.content()
    return {"operator": operator, "rows": vector.prepared.shape[1]}


def _describe_router(router: Router) -> dict[str, Any]:
    def rates(gate: Gate) -> dict[str, Any]:
        columns = {part.name: getattr(gate, part.name).tolist() for part in fields(gate)}
        return {
            name: {key: column[i] for key, column in columns.items()}
            for i, name in enumerate(router.categories)
        }

    return {
        "site": router.site,
        "reads": [asdict(read) for read in router.reads],
        "categories": list(router.categories),
        "threshold_rule": router.threshold_rule,
        "category_accuracy": router.category_accuracy,
        "benign_false_positive_rate": router.benign_false_positive_rate,
        "confusion": router.confusion.tolist(),
        "train_counts": router.train_counts.tolist(),
        "gates": {kind: rates(gate) for kind, gate in router.gates.items()},
    }


def print_pack(file: Path, pack: SteeringPack, data: dict[str, Any]) -> None:
    """Print a pack as tables.

    Args:
        file: the pack's file.
        pack: the pack.
        data: its description by `describe`.
    """
    model = pack.base_model
    made_for = (
        f"{model.name or 'unnamed'} ({model.architecture}, {model.n_layer} layers, "
        f"n_embd {model.n_embd}, {model.n_vocab} tokens)"
        if model
        else f"not stated; any model with n_embd {pack.n_embd}"
    )
    console.say(f"[bold]{console.plain(str(file))}[/]")
    console.say(f"base model: {console.plain(made_for)}")
    short = tables.numbers(list(pack.categories))
    with_operators = any(vector.operator != ADD for vector in pack.categories.values())
    operator = ["operator"] if with_operators else []
    summary = tables.table("", "category", "site", *operator, "layers", "norm", "of residual")
    summary.columns[1].no_wrap = True
    for name, vector in pack.categories.items():
        lengths = norms(vector)
        relative = [
            lengths[layer] / typical
            for layer, typical in pack.residual_norm.items()
            if layer in lengths and typical > 0
        ]
        # For other operators the length of a direction has no meaning.
        scale = "not stated" if vector.operator.kind == "add" else ""
        if relative and scale:
            scale = tables.span(relative)
        summary.add_row(
            short[name],
            console.plain(name),
            vector.site,
            *([_operator(vector)] if with_operators else []),
            tables.ranges(vector.layers),
            tables.span(list(lengths.values())),
            scale,
        )
    console.out.print(summary)
    _print_by_layer(pack, short)
    if pack.router is not None:
        _print_router(pack.router)
    if pack.policy is not None:
        _print_policy(pack.policy)
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
    console.out.print(rates)
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


def _print_policy(policy: Policy) -> None:
    """Print a policy in the words of its file: common settings, then a line for each category."""
    content = policy.content()
    categories = content.pop("categories", {})
    console.say(f"policy: {console.plain(_settings(content, policy.scope))}")
    for name, settings in categories.items():
        text = _settings(settings, policy.categories[name].scope)
        console.say(f"  {console.plain(name)}: {console.plain(text)}")


def _settings(content: Mapping[str, Any], scope: object) -> str:
    words = {key: scope if key == "scope" else value for key, value in content.items()}
    given = [f"{key} {value}" for key, value in words.items() if value is not None]
    return ", ".join(given) or "defaults"


def _plain_data(value: Any) -> Any:
    """Return read-only nested data as dicts and lists."""
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_data(item) for item in value]
    return value


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
