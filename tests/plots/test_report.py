import base64
import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from msam_analysis.report.page import Claim, Figure, Report, Section, Table, Verdict, counted, plus_minus, write
from msam_analysis.results.statistics import summarise

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
HOSTILE = "a<b> & 'c' \"d\" </style><script>alert(1)</script> *e* _f_ `g` [h](i) | j $k$ &lt;"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page, its text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    picture = tmp_path / "figures" / "a picture.png"
    picture.parent.mkdir()
    picture.write_bytes(PIXEL)
    frame = pd.DataFrame(
        {"optimizer": ["SGD", "MSAM"], "loss": [0.123456, np.nan], "steps": [10, -2], "ok": [True, False]}
    )
    return Report(
        "Title",
        "First paragraph.\n\nSecond\nparagraph.",
        [
            Section("Pictures", "Text.", [Figure(picture, "What it shows.", alt="Seen differently.")]),
            Section("Numbers", items=[Table(frame, "What the rows are."), Figure(picture, "Again.")]),
        ],
        [
            Claim("TA1", "Largest for SGD.", "15 > 4", "14.0 ± 0.3", "holds", "A note."),
            Claim("F4C", "Lowest for MSAM.", "", "", "cannot tell at this scale"),
            Claim("T1", "Better than NAG.", "79", "70", "does not hold"),
        ],
    )


def written(report: Report, directory: Path) -> tuple[str, str]:
    html, markdown = write(report, directory)
    assert (html, markdown) == (directory / "report.html", directory / "report.md")
    assert sorted(path.name for path in directory.iterdir() if path.is_file()) == ["report.html", "report.md"]
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def test_html_stands_alone_and_is_accessible(report: Report, tmp_path: Path) -> None:
    html, _ = written(report, tmp_path)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import|https?:", html)
    images = page.all("img")
    assert [image["alt"] for image in images] == ["Seen differently.", "Again."]
    assert all(image["src"] == f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}" for image in images)
    assert len(page.all("caption")) == len(page.all("table")) == 2
    assert page.all("html")[0]["lang"] == "en"
    assert any(item.get("name") == "viewport" for item in page.all("meta"))
    assert "prefers-color-scheme: dark" in html
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in ids}


def test_both_say_everything(report: Report, tmp_path: Path) -> None:
    html, markdown = written(report, tmp_path)
    text = Page(html).text.replace("\xa0", " ")
    for phrase in (
        "First paragraph.", "Second paragraph.", "Pictures", "What it shows.", "What the rows are.", "0.1235", "−2",
        "yes", "Largest for SGD.", "15 > 4", "14.0 ± 0.3", "A note.", "Holds", "Does not hold",
        "Cannot tell at this scale",
    ):  # fmt: skip
        assert phrase in text
        assert phrase in markdown


def test_verdicts_are_coloured_and_worded(report: Report, tmp_path: Path) -> None:
    html, _ = written(report, tmp_path)
    for css, word in (
        ("holds", "Holds"),
        ("does-not-hold", "Does not hold"),
        ("cannot-tell", "Cannot tell at this scale"),
    ):
        assert f'<span class="verdict {css}">{word}</span>' in html
        assert f".{css} {{ color:" in html


def test_markdown_links_images_relative_to_itself(report: Report, tmp_path: Path) -> None:
    _, markdown = written(report, tmp_path / "out" / "deeper")
    assert "![Seen differently.](../../figures/a%20picture.png)" in markdown


def test_markdown_tables_are_githubs(report: Report, tmp_path: Path) -> None:
    _, markdown = written(report, tmp_path)
    lines = markdown.split("\n")
    start = lines.index("| optimizer | loss | steps | ok |")
    assert lines[start - 1] == ""
    assert lines[start + 1 : start + 4] == [
        "| --- | ---: | ---: | --- |",
        "| SGD | 0.1235 | 10 | yes |",
        "| MSAM | – | −2 | no |",
    ]
    assert lines[start + 4] == ""
    start = lines.index("| Exhibit | Claim | Paper | Measured | Verdict |")
    assert lines[start - 1] == lines[start + 5] == ""
    assert lines[start + 2] == "| TA1 | Largest for SGD. | 15 > 4 | 14.0 ± 0.3 | **Holds**<br>A note. |"
    assert "\n\n\n" not in markdown


def test_means_and_half_widths_share_a_column(tmp_path: Path) -> None:
    runs = pd.DataFrame({"optimizer": ["SGD"] * 3, "seed": [0, 1, 2], "test_loss": [1.0, 1.1, 1.3]})
    table = Table(summarise(runs, "optimizer", "test_loss"), "Means.")
    _, markdown = written(Report("T", "", [Section("S", items=[table])]), tmp_path)
    assert "| optimizer | test loss | count |\n| --- | ---: | ---: |\n| SGD | 1.13 ± 0.12 | 3 |\n" in markdown


def test_everything_is_escaped(tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    picture.write_bytes(PIXEL)
    frame = pd.DataFrame({HOSTILE: [HOSTILE]})
    report = Report(
        HOSTILE,
        HOSTILE,
        [
            Section(HOSTILE, HOSTILE, [Figure(picture, HOSTILE, HOSTILE), Table(frame, HOSTILE)]),
            Section("2"),
            Section("3"),
        ],
        [Claim(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "holds", HOSTILE)],
    )
    html, markdown = written(report, tmp_path / "out")
    page = Page(html)
    assert not page.all("script")
    assert page.all("img")[0]["alt"] == HOSTILE
    assert page.text.count(HOSTILE) == 14
    assert "<script" not in markdown
    assert "<b>" not in markdown
    assert not re.search(r"(?<!\\)[*_`$\[](?=[e-k])", markdown)
    assert r"\| j" in markdown
    assert r"\[h\](i)" in markdown
    assert "&amp;lt;" in markdown
    cells = [line for line in markdown.split("\n") if line.startswith("|") and "---" not in line]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (2, 6) for line in cells)


@pytest.mark.parametrize("start", ["# a", "- a", "+ a", "1. a", "12) a", "> a", "===", "---"])
def test_a_paragraph_stays_one(start: str, tmp_path: Path) -> None:
    _, markdown = written(Report("T", start), tmp_path)
    assert f"\n\n{start}" not in markdown
    assert re.sub(r"\\(?=[#\-+.)>=])", "", markdown).endswith(f"\n\n{start}\n")


def test_same_report_same_bytes(report: Report, tmp_path: Path) -> None:
    first = written(report, tmp_path / "a")
    assert written(report, tmp_path / "a") == first
    assert written(report, tmp_path / "b") == first


def test_nothing_is_written_without_the_figures(report: Report, tmp_path: Path) -> None:
    missing = Report("T", "", [Section("S", items=[Figure(tmp_path / "none.png", "None.")])])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write(missing, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    before = written(report, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        write(missing, tmp_path / "out")
    assert written(report, tmp_path / "out") == before


def test_refuses_a_figure_it_cannot_embed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 'figure\.pdf'"):
        write(Report("T", "", [Section("S", items=[Figure(tmp_path / "figure.pdf", "")])]), tmp_path)


def test_svg_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")
    write(Report("T", "", [Section("S", items=[Figure(tmp_path / "a.svg", "c")])]), tmp_path)
    assert 'src="data:image/svg+xml;base64,' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_refuses_another_verdict() -> None:
    with pytest.raises(ValueError, match="verdict on T1 must be one of"):
        Claim("T1", "", "", "", "maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (15.1934, "15.19"), (-0.5, "−0.5000"), (1234567.8, "1235000"), (1.234e-9, "1.234e−09"), (3e12, "3.000e+12"),
        (0.0, "0"), (np.inf, "∞"), (-np.inf, "−∞"), (np.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_in_tables(value: float, text: str, tmp_path: Path) -> None:
    report = Report("T", "", [Section("S", items=[Table(pd.DataFrame({"q": [value]}), "C.")])])
    assert f"| {text} |" in written(report, tmp_path)[1]


@pytest.mark.parametrize("value", [None, pd.NA, pd.NaT])
def test_missing_values_in_tables(value: object, tmp_path: Path) -> None:
    report = Report("T", "", [Section("S", items=[Table(pd.DataFrame({"q": pd.Series([value], dtype=object)}), "C.")])])
    assert "| – |" in written(report, tmp_path)[1]


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (15.1934, 0.3418, "15.19 ± 0.34"),
        (15.1934, 0.0996, "15.19 ± 0.10"),
        (1234.6, 67.8, "1235 ± 68"),
        (123456.0, 7890.0, "123500 ± 7900"),
        (-3.21, 0.5, "−3.21 ± 0.50"),
        (1e-9, 2e-10, "(1.00 ± 0.20) · 10⁻⁹"),
        (0.5, np.nan, "0.5000"),
        (np.nan, 1.0, "–"),
        (np.inf, np.nan, "∞"),
        (5.0, 0.0, "5.000 ± 0.000"),
        (0.0, 0.0, "0 ± 0"),
    ],
)
def test_plus_minus(mean: float, half_width: float, text: str) -> None:
    assert plus_minus(mean, half_width) == text


def test_plus_minus_with_unit_and_digits() -> None:
    assert plus_minus(95.123, 1.26, digits=1, unit="%") == "95 ± 1 %"


@pytest.mark.parametrize(
    ("mean", "half_width", "text"),
    [
        (0.1, 1.2e-17, "0.1000 ± 0.0000"),
        (1.0, 1e-16, "1.000 ± 0.000"),
        (3.0, 1e-9, "3.0000000000 ± 0.0000000010"),
        (1e9, 1e-8, "(1.000 ± 0.000) · 10⁹"),
        (-2e-9, 1e-20, "(−2.000000000000 ± 0.000000000010) · 10⁻⁹"),
    ],
)
def test_half_widths_that_are_rounding_noise(mean: float, half_width: float, text: str) -> None:
    assert plus_minus(mean, half_width) == text


def test_claims_are_counted() -> None:
    def claims(**verdicts: int) -> list[Claim]:
        words: dict[str, Verdict] = {"yes": "holds", "no": "does not hold", "open": "cannot tell at this scale"}
        return [Claim("T1", "", "", "", words[key]) for key, count in verdicts.items() for _ in range(count)]

    control = dataclasses.replace(claims(yes=1)[0], control=True)
    thirteen = claims(open=1, no=2, yes=10)
    assert counted(thirteen) == "13 claims: 10 hold, 2 do not hold, 1 cannot be told at this scale"
    assert counted(claims(yes=1)) == "1 claim: 1 holds"
    assert counted([*claims(no=1, open=2), control]) == (
        "3 claims: 1 does not hold, 2 cannot be told at this scale; 1 control: 1 holds"
    )
    assert counted([control, control]) == "2 controls: 2 hold"
    assert counted([]) == ""


def test_controls_are_not_in_the_tally(report: Report, tmp_path: Path) -> None:
    report = dataclasses.replace(report, claims=[*report.claims, dataclasses.replace(report.claims[0], control=True)])
    html, markdown = written(report, tmp_path)
    assert "Holds: 1<" in html
    assert "3 claims: 1 holds, 1 does not hold, 1 cannot be told at this scale; 1 control: 1 holds." in markdown
