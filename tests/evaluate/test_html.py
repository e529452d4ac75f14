"""The HTML report: structure, external resources, and hostile text."""

import re
from html.parser import HTMLParser

import pytest

from pysteer.evaluate import html
from pysteer.evaluate.estimates import Mean, share
from pysteer.evaluate.report import (
    AnswerRecord,
    ArmFigures,
    BenignFigures,
    CategoryFigures,
    Cell,
    CurvePoint,
    Isolation,
    NoiseFloor,
    PromptRecord,
    Report,
    RouterFigures,
)

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;{{ 7*7 }}"
VOID = {"meta", "link", "input", "img", "br", "hr"}


class Page(HTMLParser):
    """Check nesting, and collect tags, attributes, and the text of table cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.cells = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def answer(text, **more):
    given = {"degenerate": False, "refused": False, "fired": [], "active": {}, **more}
    return AnswerRecord(text=text, finish_reason="stop", n_tokens=3, **given)


@pytest.fixture
def report():
    third = share([True, False, False])
    arm = ArmFigures(
        safe=third,
        degenerate=share([False]),
        refused=third,
        log_likelihood=Mean(n=2, value=-1.25, low=-2.0, high=-0.5),
        n_tokens=Mean(n=1, value=3.0),
        rewards={HOSTILE: Mean(n=1, value=4.5)},
        unfinished=share([False]),
    )
    benign = BenignFigures(
        unchanged=third,
        refused=third,
        degenerate=third,
        fired=third,
        first_token_kl=Mean(n=1, value=0.5),
        rewards={},
        unfinished=third,
    )
    arms = {"unsteered": arm, "steered": arm}
    return Report(
        pysteer="0",
        model={"name": HOSTILE, "file": HOSTILE},
        pack={"file": HOSTILE},
        settings={
            "judge": HOSTILE,
            "reward": None,
            "max_tokens": 8,
            "temperature": 0.0,
            "seed": 0,
            "fluency": True,
        },
        arms={"unsteered": "not steered", "steered": HOSTILE},
        categories=[CategoryFigures(category=HOSTILE, in_pack=False, n=3, arms=arms)],
        overall=arms,
        benign={"unsteered": benign, "steered": benign},
        benign_by_category={HOSTILE: {"unsteered": benign, "steered": benign}},
        router=RouterFigures(
            rows=[HOSTILE, "benign"],
            columns=[HOSTILE, "nothing"],
            confusion=[[3, 1], [0, 2]],
            macro_f1=0.5,
            f1={HOSTILE: 0.5},
            caught={},
            false_positives=third,
            false_positives_of={},
        ),
        isolation=[
            Isolation(
                mode="gated",
                rows=[HOSTILE],
                columns=[HOSTILE, "other"],
                cells=[[Cell(changed=2, n=3, ran=3), Cell(changed=0, n=2, ran=0)]],
                diagonal=third,
                rest=share([False]),
                checked=share([False] * 4),
            )
        ],
        curve=[
            CurvePoint(
                strength=s,
                arm="steered",
                safe=share([s > 0.5, False]),
                degenerate=share([False]),
                unchanged=share([]),
                benign_refused=share([]),
                benign_degenerate=share([]),
            )
            for s in (0.0, 0.5, 2.0)
        ],
        noise=NoiseFloor(differs=third, prompts="benign"),
        notes=[HOSTILE],
        prompts=[
            PromptRecord(
                prompt=HOSTILE,
                category=HOSTILE,
                benign=False,
                scores={},
                answers={
                    "unsteered": answer(HOSTILE, safe=False, reason=HOSTILE),
                    "steered": answer(
                        "No.", safe=True, active={HOSTILE: 1.0}, log_likelihood=-3.456
                    ),
                    HOSTILE: answer("third arm", safe=True, rewards={HOSTILE: 1.0}),
                },
            ),
            PromptRecord(
                prompt="hello",
                category="",
                benign=True,
                scores={},
                answers={
                    "unsteered": answer("hi"),
                    "steered": answer("hi", unchanged=True, first_token_kl=0.0),
                },
            ),
        ],
    )


def test_hostile_text_is_escaped(report):
    text = html.render(report)
    page = Page(text)
    scripts = [tag for tag, _ in page.tags if tag == "script"]
    assert len(scripts) == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert "49" not in [cell.strip() for cell in page.cells]
    shown = [cell for cell in page.cells if HOSTILE in cell]
    assert len(shown) >= 5  # table of categories, matrix, confusion, prompt, answer


def test_page_loads_nothing_from_elsewhere(report):
    text = html.render(report)
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "action", "srcset", "xlink:href"} & set(attributes)
    assert not re.search(r"https?://|//[a-z]|url\(|@import", text)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy


def test_table_cells_show_figures_of_report(report):
    page = Page(html.render(report))
    cells = [" ".join(cell.split()) for cell in page.cells]
    assert "2/3" in cells  # in the matrix
    assert "0/2" in cells
    assert "third arm" in " ".join(cells)
    assert any(cell.startswith("33% → 33%") for cell in cells)
    assert "now safe" in cells
    assert "-3.46" in cells
    assert "unchanged" in cells


def test_chart_places_points_by_strength_and_share(report):
    found = html.chart(report.curve)
    assert [line.name for line in found.lines] == ["safe", "degenerate"]  # no benign prompts
    safe = found.lines[0]
    assert [x for x, _, _ in safe.marks] == [0.0, found.width / 4, found.width]
    assert [y for _, y, _ in safe.marks] == [found.height, found.height, found.height / 2]
    assert safe.points == f"0,{found.height:g} {found.width / 4:g},{found.height:g} 640,150"
    assert "strength 2: 50%" in safe.marks[2][2]
    assert html.chart(report.curve[:1]) is None


@pytest.mark.parametrize(
    ("before", "after", "benign", "expected"),
    [
        ({"safe": False}, {"safe": True}, False, "now safe"),
        ({"safe": True}, {"safe": True}, False, "safe before"),
        ({"safe": True}, {"safe": False}, False, "now unsafe"),
        ({"safe": False}, {"safe": False}, False, "still unsafe"),
        ({"safe": False}, {"safe": False, "degenerate": True}, False, "degenerate"),
        ({}, {"unchanged": True}, True, "unchanged"),
        ({}, {"unchanged": False, "refused": True}, True, "refused"),
        ({}, {"unchanged": False}, True, "changed"),
    ],
)
def test_outcome_names_change_of_safety(before, after, benign, expected):
    answers = {"unsteered": answer("a", **before), "steered": answer("b", **after)}
    one = PromptRecord(prompt="p", category="c", benign=benign, scores={}, answers=answers)
    assert html.outcome(one) == expected


def test_shade_is_visible_for_every_count():
    assert html.shade(0, 5) == 0 == html.shade(0, 0)
    assert 5 < html.shade(1, 1000) < html.shade(500, 1000) < html.shade(1000, 1000) <= 100


def test_page_without_benign_prompts_router_and_matrix_renders(report):
    bare = report.model_copy(
        update={
            "benign": {},
            "benign_by_category": {},
            "router": None,
            "isolation": [],
            "noise": None,
            "curve": [],
            "prompts": report.prompts[:1],
        }
    )
    text = html.render(bare)
    assert Page(text)
    for heading in ("Isolation", "Benign prompts", "Router", "Trade-off"):
        assert f"<h2>{heading}" not in text


class Layout(HTMLParser):
    """The tables that stand in no scroll container, and the style sheet."""

    def __init__(self, text):
        super().__init__()
        self.open, self.bare, self.style = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in VOID:
            return
        wide = "wide" in (dict(attributes).get("class") or "").split()
        self.open.append((tag, wide))
        if tag == "table" and not any(wide for _, wide in self.open):
            self.bare.append(dict(attributes))

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.style += data


def test_page_fits_a_narrow_screen(report):
    page = Layout(html.render(report))
    assert page.bare == []
    assert re.search(r"\.wide \{[^}]*overflow-x: auto", page.style)
    assert re.search(r"body \{[^}]*overflow-wrap: anywhere", page.style)
    assert re.search(r"svg \{[^}]*max-width: 100%", page.style)
    for unit, limit in (("rem", 24), ("px", 380)):
        for name, size in re.findall(rf"(?<!max-)((?:min-)?width): ([\d.]+){unit}", page.style):
            assert float(size) <= limit, f"{name}: {size}{unit}"
    # The table of answers has a cell for each column below each other, with the column's name.
    narrow = page.style[page.style.index("@media (max-width") :]
    assert "#answers td { display: block; }" in narrow
    headings = re.findall(r"<th[^>]*><button[^>]*>([^<]+)</button>", html.render(report))
    assert len(headings) == 7
    for heading in headings:
        assert html.render(report).count(f'data-name="{heading}"') == len(report.prompts)


def test_page_speaks_in_the_words_of_the_judge(report):
    words = {"good": "pirate", "bad": "plain", "prompts": "target", "others": "other"}
    plain = {"settings": {**report.settings, "judge": "python:style", "words": words}}
    text = html.render(report.model_copy(update=plain))
    body = text[text.index("<body>") : text.index("<script>\n")]
    assert "now pirate" in body
    assert "1 target prompts" in body
    assert "Other prompts" in body
    # "benign" is the data's word for the filter of answers, which nobody sees.
    visible = re.sub(r'value="benign"|data-category="benign"', "", body)
    for word in ("safe", "harm", "benign"):
        assert word not in visible.lower(), word


def test_page_replaces_older_file_in_one_step(report, tmp_path):
    html.save(report, tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == html.render(report)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
