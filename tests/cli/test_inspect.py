"""`pysteer inspect` of a pack with everything: cosines, separation, router, provenance, plot."""

import json
import re
import sys
from collections import Counter
from functools import partial

import numpy as np
import pytest

from pysteer import Policy, SteeringError, SteeringPack, SteeringVector, shipped
from pysteer.cli import console
from pysteer.inspect.plots import plot_pack
from pysteer.pack.router import GATES, Gate, Read, Router

WIDTH = 16
NAMES = ("hate", "mal_ware", "fraud")
PNG = b"\x89PNG\r\n"


def vector(seed, layers=range(3, 8), **site):
    rng = np.random.default_rng(seed)
    return SteeringVector({layer: rng.normal(size=WIDTH) for layer in layers}, **site)


def router(names=NAMES):
    k = len(names)
    rng = np.random.default_rng(0)
    confusion = 10 * np.eye(k + 1, dtype=int)
    confusion[0] = [97, 3] + [0] * (k - 1)
    confusion[1, 2] = 10
    gate = Gate(
        thresholds=np.linspace(0.123, 0.456, k),
        above=np.arange(k) > 0,
        true_positive_rates=np.linspace(0.7, 0.9, k),
        false_positive_rates=np.full(k, 0.0125),
        leak_rates=np.full(k, 0.25),
    )
    return Router(
        site="residual",
        reads=[Read(2, "user"), Read(5, "suffix"), Read(4, "user")],
        categories=names,
        margin_weight=rng.normal(size=(k + 1, 3 * WIDTH)),
        margin_bias=np.zeros(k + 1),
        allowances=np.zeros(k),
        weight=rng.normal(size=(k + 1, 3 * WIDTH)),
        bias=np.zeros(k + 1),
        probe_weight=rng.normal(size=(k, 3 * WIDTH)),
        probe_bias=np.zeros(k),
        centroids=rng.normal(size=(k + 1, 3 * WIDTH)),
        conditions=rng.normal(size=(k, 3 * WIDTH)),
        gates=dict.fromkeys(GATES, gate),
        confusion=confusion,
        threshold_rule="fpr=0.01",
        train_counts=np.arange(k + 1),
    )


SEPARATION = {"hate": {"3": 0.625, "4": 0.875}, "fraud": {"7": 0.999}}
PROVENANCE = {
    "method": "contrast",
    "parameters": {"k": 8, "mask": True, "seed": None, "layers": [1, 2], "nothing": {}},
    "data": [{"file": "[b]u.jsonl", "sha256": "abc"}, {"file": "s.jsonl"}],
    "separation": SEPARATION,
}


def full_pack(**changes):
    settings = {
        "residual_norm": dict.fromkeys(range(3, 8), 10.0),
        "provenance": PROVENANCE,
        "router": router(),
    }
    return SteeringPack({name: vector(i) for i, name in enumerate(NAMES)}, **settings | changes)


@pytest.fixture
def cli(cli):
    """A function that runs `inspect` and returns its exit code, standard output and error."""
    return partial(cli, "inspect")


@pytest.fixture
def pack_file(tmp_path):
    path = tmp_path / "pack.gguf"
    full_pack().save(path)
    return path


def inspected(cli, *arguments):
    """The output with --verbose."""
    return summarised(cli, *arguments, "--verbose")


def summarised(cli, *arguments):
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    return out


# ---- JSON ------------------------------------------------------------------------------------


def test_json_has_the_cosines_between_categories(cli, pack_file):
    found = json.loads(inspected(cli, pack_file, "--json"))["cosines"]
    assert {name: list(others) for name, others in found.items()} == {
        "hate": ["mal_ware", "fraud"],
        "mal_ware": ["fraud"],
    }
    expected = {}
    for layer in range(3, 8):
        a, b = (np.float64(vector(i).direction(layer)) for i in (0, 2))
        expected[str(layer)] = a @ b / np.sqrt((a @ a) * (b @ b))
    assert found["hate"]["fraud"]["layers"] == pytest.approx(expected)
    assert found["hate"]["fraud"]["mean"] == pytest.approx(sum(expected.values()) / 5)


def test_json_has_separation_provenance_and_router(cli, pack_file):
    found = json.loads(inspected(cli, pack_file, "--json"))
    assert found["separation"] == SEPARATION
    assert found["provenance"] == PROVENANCE
    shown = found["router"]
    assert shown["site"] == "residual"
    assert shown["reads"] == [
        {"layer": 2, "pooling": "user"},
        {"layer": 5, "pooling": "suffix"},
        {"layer": 4, "pooling": "user"},
    ]
    assert shown["categories"] == list(NAMES)
    assert shown["threshold_rule"] == "fpr=0.01"
    assert shown["benign_false_positive_rate"] == pytest.approx(0.03)
    assert shown["category_accuracy"] == pytest.approx(30 / 40)
    assert shown["confusion"][0] == [97, 3, 0, 0]
    assert shown["train_counts"] == [0, 1, 2, 3]
    assert set(shown["gates"]) == set(GATES)
    assert shown["gates"]["cast"]["hate"] == {
        "thresholds": pytest.approx(0.123),
        "above": False,
        "true_positive_rates": pytest.approx(0.7),
        "false_positive_rates": pytest.approx(0.0125),
        "leak_rates": 0.25,
    }


def test_json_of_a_control_vector_leaves_out_empty_parts(cli, tmp_path):
    vector(1).save(tmp_path / "v.gguf")
    found = json.loads(inspected(cli, tmp_path / "v.gguf", "--json"))
    assert not {"cosines", "separation", "router"} & found.keys()


# ---- summary ---------------------------------------------------------------------------------


def lines_at_80_columns(out):
    return sum(max(1, -(-len(line) // 80)) for line in out.splitlines())


def test_summary_fits_a_screen(cli, tmp_path):
    names = [f"category_{i}_of_many" for i in range(40)]
    pack = SteeringPack(
        {name: vector(i) for i, name in enumerate(names)},
        router=router(tuple(names)),
        provenance={"method": "mean", "settings": {str(i): [{"a": i}] for i in range(300)}},
        policy=Policy(categories={name: {"scope": "first 8"} for name in names}),
    )
    pack.save(tmp_path / "p.gguf")
    shown = summarised(cli, tmp_path / "p.gguf")
    assert lines_at_80_columns(shown) <= 40
    assert names[19] in shown
    assert names[20] not in shown
    assert "and 20 more categories\n" in shown
    assert "all 40 categories: scope first 8\n" in shown
    assert lines_at_80_columns(summarised(cli)) <= 30  # the shipped pack
    assert lines_at_80_columns(inspected(cli)) > 500


@pytest.mark.parametrize("flags", [(), ("--verbose",)])
@pytest.mark.parametrize("width", [40, 60])
def test_narrow_terminal_gets_every_cell_whole(width, flags, cli, monkeypatch):
    """The shipped pack's rows of a wide terminal, cell by cell, in as many parts as needed."""

    def cells(columns):
        monkeypatch.setattr(console.out, "width", columns)
        out = summarised(cli, *flags)
        return out, Counter(
            cell
            for line in out.splitlines()
            if any(name in line for name in shipped.default_pack().categories)
            for cell in line.split()
        )

    wide, expected = cells(200)
    narrow, found = cells(width)
    assert "…" not in narrow + wide
    assert found >= expected
    if not flags:  # the provenance has lines of any length
        assert max(len(line) for line in narrow.splitlines() if line.startswith(" ")) <= width


def test_summary_has_each_part_in_a_line(cli, pack_file):
    out = summarised(cli, pack_file)
    rows = rows_after(out, "category", 3)
    assert [row[0] for row in rows] == list(NAMES)
    sizes = [np.linalg.norm(vector(0).direction(layer)) / 10 for layer in range(3, 8)]
    assert rows[0][1:3] == ["residual", "3-7"]
    assert rows[0][3:6] == [f"{min(sizes):.3g}", "to", f"{max(sizes):.3g}"]
    assert rows[0][-2:] == ["70%", "1.2%"]
    assert rows[2][-2:] == ["90%", "1.2%"]
    cosines = json.loads(inspected(cli, pack_file, "--json"))["cosines"]
    means = [found["mean"] for others in cosines.values() for found in others.values()]
    assert f"cosine between categories: {min(means):.2f} to {max(means):.2f}\n" in out
    assert "AUC 0.88 to 1.00\n" in out
    assert "category accuracy 75.0%, benign false positives 3.0%\n" in out
    assert "made: method contrast\n" in out
    assert "--verbose" in out


def test_summary_of_a_control_vector_names_no_absent_part(cli, tmp_path):
    vector(1).save(tmp_path / "v.gguf")
    out = summarised(cli, tmp_path / "v.gguf")
    for words in ("router", "policy", "cosine", "AUC", "made:", "gate"):
        assert words not in out
    assert "not stated" in out


# ---- tables ----------------------------------------------------------------------------------


def rows_after(out, title, count):
    """The cells of the first rows below the heading of the table with that title."""
    table = out[out.index(title) :]
    return [line.split() for line in table[table.index("─") :].splitlines()[1 : count + 1]]


def test_norms_are_shown_by_layer(cli, pack_file):
    rows = rows_after(inspected(cli, pack_file), "norm of each direction", 5)
    by_layer = {row[0]: row[1:] for row in rows[:5]}
    for layer in range(3, 8):
        assert by_layer[str(layer)] == [
            f"{np.linalg.norm(vector(i).direction(layer)):.3g}" for i in range(3)
        ]


def test_cosines_are_shown_as_a_symmetric_matrix(cli, pack_file):
    out = inspected(cli, pack_file)
    rows = rows_after(out, "cosine between categories", 3)
    assert [row[1] for row in rows] == list(NAMES)
    found = json.loads(inspected(cli, pack_file, "--json"))["cosines"]
    one = f"{found['hate']['mal_ware']['mean']:.2f}"
    assert rows[0][2] == one == rows[1][2]
    assert rows[1][3] == f"{found['mal_ware']['fraud']['mean']:.2f}" == rows[2][3]


def test_separation_is_shown_by_layer(cli, pack_file):
    rows = rows_after(inspected(cli, pack_file), "separation: AUC", 3)
    assert rows == [["3", "0.625"], ["4", "0.875"], ["7", "0.999"]]


def test_router_is_shown(cli, pack_file):
    out = inspected(cli, pack_file)
    assert (
        "router: site residual, user at layers 2, 4; suffix at layer 5, thresholds by fpr=0.01\n"
        in out
    )
    assert "category accuracy 75.0%, benign false positives 3.0%\n" in out
    for cell in ("<= 0.123", ">= 0.456", "70.0%", "1.2%", "25.0%", *GATES):
        assert cell in out
    rows = rows_after(out, "confusion", 4)
    assert rows[0] == ["0", "benign", "97", "3"]
    assert rows[1] == ["1", "hate", "10", "10"]


def test_nested_provenance_is_indented(cli, pack_file):
    out = inspected(cli, pack_file)
    for lines in (
        "method: contrast\n",
        "parameters:\n",
        "  k: 8\n",
        "  mask: yes\n",
        "  seed: none\n",
        "  layers: 1, 2\n",
        "  nothing: none\n",
        "    file: [b]u.jsonl\n    sha256: abc\n",
    ):
        assert lines in out
    assert "separation:" not in out[out.index("method: contrast") :]


def test_separation_of_another_shape_is_shown_as_provenance(cli, tmp_path):
    full_pack(provenance={"separation": {"unknown": 3}}).save(tmp_path / "p.gguf")
    assert "separation:\n  unknown: 3\n" in inspected(cli, tmp_path / "p.gguf")


def test_wide_tables_are_split_to_fit_the_terminal(cli, tmp_path):
    names = [f"category_{i}_of_many" for i in range(40)]
    SteeringPack({name: vector(i) for i, name in enumerate(names)}).save(tmp_path / "p.gguf")
    out = inspected(cli, tmp_path / "p.gguf")
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    assert "…" not in out
    norms = out[out.index("norm of each direction") : out.index("cosine between")]
    widths = [len(line.split()) - 1 for line in norms.splitlines() if line.startswith(" 3 ")]
    assert len(widths) > 1
    assert sum(widths) == 40


def test_single_layer_has_no_table_by_layer(cli, tmp_path):
    vector(1, layers=[2]).save(tmp_path / "v.gguf")
    out = inspected(cli, tmp_path / "v.gguf")
    assert "norm of each direction" not in out
    assert f"{np.linalg.norm(vector(1, layers=[2]).direction(2)):.3g}" in out


# ---- plots -----------------------------------------------------------------------------------


def test_plot_writes_a_picture_and_keeps_the_output(cli, pack_file, tmp_path):
    picture = tmp_path / "out.png"
    plain = summarised(cli, pack_file)
    assert summarised(cli, pack_file, "--plot", picture) == f"{plain}plot: {picture}\n"
    assert picture.read_bytes().startswith(PNG)
    picture.unlink()
    with_json = inspected(cli, pack_file, "--plot", picture, "--json")
    assert with_json == inspected(cli, pack_file, "--json")
    assert picture.read_bytes().startswith(PNG)


def test_picture_of_others_is_replaced_only_with_force(cli, pack_file, tmp_path):
    picture = tmp_path / "holiday.png"
    picture.write_bytes(PNG + b"of the sea")
    code, out, err = cli(pack_file, "--plot", picture)
    assert (code, out) == (2, "")
    assert "--force" in err
    assert picture.read_bytes() == PNG + b"of the sea"
    inspected(cli, pack_file, "--plot", picture, "--force")
    inspected(cli, pack_file, "--plot", picture)
    assert b"of the sea" not in picture.read_bytes()


def titles(pack, path):
    """The text of a picture, from an SVG with its text as text."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_pack(pack, path)
    return path.read_text()


def test_picture_has_a_panel_for_each_part_of_the_pack(tmp_path):
    svg = titles(full_pack(), tmp_path / "a.svg")
    panels = {
        "norm of each direction": {},
        "cosine between categories": {},
        "separation on held-out": {"provenance": {}},
        "router: held-out prompts": {"router": None},
    }
    for panel, without in panels.items():
        assert panel in svg
        if without:
            assert panel not in titles(full_pack(**without), tmp_path / "b.svg")
    for text in (*NAMES, "typical residual", ">97<"):
        assert text in svg
    alone = titles(SteeringPack({"a": vector(1)}), tmp_path / "c.svg")
    assert "norm of each direction" in alone
    assert "cosine" not in alone
    assert "typical" not in alone


def test_picture_shows_the_cosines(tmp_path):
    svg = titles(full_pack(), tmp_path / "a.svg")
    a, b = (np.stack([vector(i).direction(n) for n in range(3, 8)]) for i in (0, 1))
    mean = ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()
    assert svg.count(f">{mean:.2f}<") >= 2


@pytest.mark.filterwarnings("error")
def test_picture_shows_names_verbatim(tmp_path):
    names = ["_hidden", "$\\frac{$", "x" * 200, "日本語", "100% & <b>"]
    pack = SteeringPack({name: vector(i) for i, name in enumerate(names)})
    svg = titles(pack, tmp_path / "a.svg")
    for text in ("_hidden", "$\\frac{$", "日本語", "100% &amp; &lt;b&gt;", "x" * 25 + "..."):
        assert svg.count(text) >= 3, text  # the legend, and both axes of the matrix
    assert "x" * 26 not in svg


def test_picture_of_zero_and_huge_directions_is_drawn(tmp_path):
    pack = SteeringPack(
        {"a": 0 * vector(1), "b": SteeringVector({3: np.full(WIDTH, 3e38)}), "c": vector(2)},
        residual_norm={3: 0.0},
    )
    plot_pack(pack, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("name", ["picture", "picture.docx", "x.png/", "."])
def test_unknown_picture_type_is_an_error(name, cli, pack_file, tmp_path):
    code, out, err = cli(pack_file, "--plot", f"{tmp_path}/no/{name}")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_unwritable_picture_is_an_error(cli, pack_file, tmp_path):
    for path in (tmp_path / "missing" / "x.png", tmp_path / ("x" * 300 + ".png")):
        code, out, err = cli(pack_file, "--plot", path)
        assert (code, out) == (2, "")
        assert err.startswith("pysteer: cannot write")


def test_invalid_path_is_an_error():
    with pytest.raises(SteeringError, match="cannot write"):
        plot_pack(full_pack(), "a\0.png")


def test_missing_matplotlib_is_an_error_with_its_extra(cli, pack_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SteeringError, match=r"pysteer-llama\[plot\]"):
        plot_pack(full_pack(), tmp_path / "x.png")
    code, out, err = cli(pack_file, "--plot", tmp_path / "x.png")
    assert (code, out) == (2, "")
    assert "pip install 'pysteer-llama[plot]'" in err
    assert inspected(cli, pack_file)  # all else goes without


def tick_labels(svg):
    """The texts of a picture that are numbers."""
    return [float(text) for text in re.findall(r">(-?\d+(?:\.\d+)?)</text>", svg)]


def test_picture_of_one_layer_has_a_bar_for_each_category(tmp_path):
    vectors = {name: vector(i, layers=[5]) for i, name in enumerate(NAMES)}
    provenance = {"separation": {name: {"5": 0.75} for name in NAMES}}
    pack = SteeringPack(vectors, residual_norm={5: 10.0}, provenance=provenance)
    svg = titles(pack, tmp_path / "a.svg")
    for text in ("norm of each direction, layer 5", "(AUC), layer 5", "typical residual"):
        assert text in svg
    for name in NAMES:
        assert svg.count(f">{name}</text>") == 4  # two panels of bars, both axes of the cosines
    alone = titles(SteeringPack({"a": vector(1, layers=[5])}), tmp_path / "b.svg")
    assert ">a</text>" in alone


def test_picture_of_few_layers_numbers_whole_layers(tmp_path):
    pack = SteeringPack({"a": vector(1, layers=[50, 51])})
    ticks = tick_labels(titles(pack, tmp_path / "a.svg"))
    assert {tick for tick in ticks if tick > 20} == {50.0, 51.0}  # norms are below
