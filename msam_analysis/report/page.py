"""One page a person reads: figures, tables and claims with their verdicts, as HTML and as Markdown.

A :class:`Report` is put together from frozen parts and written by :func:`write`. The HTML is one file without scripts
or outside resources, its images embedded; the Markdown links them. Both hold only what they were given, no date and no
duration, so that the same report gives the same bytes.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd

from msam_analysis.results import atomic_path

Verdict = Literal["holds", "does not hold", "cannot tell at this scale"]
"""What a claim can come to."""

_MEDIA = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_SCREEN_SCALE = 0.66  # of the dots of a picture: a page of 6.8 in fills the column of text, on fine screens sharply
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLURAL: Mapping[Verdict, tuple[str, str]] = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "cannot tell at this scale": ("cannot be told at this scale",) * 2,
}
_CSS = {"holds": "holds", "does not hold": "does-not-hold", "cannot tell at this scale": "cannot-tell"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture from a file.

    ``path``: A PNG, SVG or JPEG file. A relative path starts, like any other, at the working directory.
    ``caption``: What the picture shows, as a sentence.
    ``alt``: The same for somebody who cannot see it; by default the caption.
    """

    path: str | os.PathLike[str]
    caption: str
    alt: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table of a few rows.

    ``frame``: The table. Its index is not shown; underscores in names of columns become spaces. A column ``q`` that has
        its interval in ``q_half_width``, as :func:`msam_analysis.results.statistics.summarise` gives it, becomes one
        column with ``mean ± half width``.
    ``caption``: Meaning of the rows, as a sentence.
    ``digits``: Significant digits of floating-point numbers that stand alone, default 4. NaN is shown as a dash.
    """

    frame: pd.DataFrame
    caption: str
    digits: int = 4


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper beside what was measured.

    ``exhibit``: Id of the figure or table it comes from, for example ``"TA1"``.
    ``claim``: The claim, as a sentence.
    ``paper``: The paper's number.
    ``measured``: The number measured, with its interval (see :func:`plus_minus`).
    ``verdict``: ``"holds"``, ``"does not hold"`` or ``"cannot tell at this scale"``.
    ``note``: Why, where the numbers do not say it.
    ``control``: Whether it is no claim of the paper, and not counted as one.
    Raises ValueError: The verdict is none of the three.
    """

    exhibit: str
    claim: str
    paper: str
    measured: str
    verdict: Verdict
    note: str = ""
    control: bool = False

    def __post_init__(self) -> None:
        """Refuse a verdict that readers could not compare."""
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"the verdict on {self.exhibit} must be one of {get_args(Verdict)}, got {self.verdict!r}")


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the report.

    ``title``: Heading of the part.
    ``text``: Plain text; empty lines part the paragraphs.
    ``items``: Figures and tables, in the order they appear below the text.
    """

    title: str
    text: str = ""
    items: Sequence[Figure | Table] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`write` writes: title, summary, the claims, then the sections.

    ``title``: Heading of the page.
    ``summary``: Plain text; empty lines part the paragraphs.
    ``sections``: Parts, in the order in which they appear.
    ``claims``: Rows of the table of claims, which comes before the sections; none, no table.
    """

    title: str
    summary: str
    sections: Sequence[Section] = ()
    claims: Sequence[Claim] = ()


def plus_minus(mean: float, half_width: float, *, digits: int = 2, unit: str = "") -> str:
    """Return ``mean ± half width`` as text, both rounded to where the half width has its leading digits.

    ``mean``, ``half_width``: Two numbers, for example those of :func:`msam_analysis.results.statistics.mean_interval`.
    ``digits``: Significant digits of the half width, default 2. Without a half width (NaN, for one seed) the mean alone
        gets two digits more.
    ``unit``: Appended after a space.
    Returns: For example ``"15.19 ± 0.34"``; ``"–"`` when the mean is NaN.
    """
    if math.isnan(mean):
        return "–"
    if half_width < 1e-12 * abs(mean):  # values that agree, up to rounding
        half_width = 0.0
    if not (math.isfinite(mean) and math.isfinite(half_width)):
        text = _number(mean, digits + 2)
    else:
        scale = half_width if half_width > 0 else abs(mean)
        extra = digits if half_width > 0 else digits + 2
        decimals = extra - 1 - math.floor(math.log10(scale)) if scale > 0 else 0
        if scale > 0 and round(scale, decimals) >= 10.0 ** (extra - decimals):  # 0.0996 is 0.10, not 0.100
            decimals -= 1
        exponent = math.floor(math.log10(max(abs(mean), half_width))) if scale > 0 else 0
        if exponent and not -4 <= decimals <= 6:
            inner = plus_minus(mean / 10.0**exponent, half_width / 10.0**exponent, digits=digits)
            text = f"({inner}) · 10{str(exponent).translate(_SUPERSCRIPT)}"
        else:
            shown = max(decimals, 0)
            text = f"{round(mean, decimals):.{shown}f} ± {round(half_width, decimals):.{shown}f}"
    return f"{text.replace('-', '−')} {unit}".rstrip()


def write(report: Report, directory: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a directory, each at once or not at all.

    ``report``: The report. All text is taken literally: nothing in it is read as HTML or Markdown.
    ``directory``: Folder of the files; it is made if it does not exist. Links in the Markdown are relative to it.
    Returns: The two files.
    Raises FileNotFoundError: A figure's file does not exist; nothing is written then.
    Raises ValueError: A figure is not a PNG, SVG or JPEG file.
    """
    directory = Path(directory)
    images = {figure: _embedded(figure) for figure in _figures(report)}
    html = _environment().get_template("report.html.j2").render(report=report, images=images)
    path = directory / "report.html"
    _put(path, html)
    return path, write_markdown(report, directory)


def write_markdown(report: Report, directory: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` alone into a directory, which is made if it does not exist; see :func:`write`.

    Returns: The file. Its links to the figures are relative.
    """
    path = Path(directory) / "report.md"
    links = {figure: _link(Path(figure.path), path.parent) for figure in _figures(report)}
    _put(path, _environment().get_template("report.md.j2").render(report=report, links=links))
    return path


def _figures(report: Report) -> list[Figure]:
    return [item for section in report.sections for item in section.items if isinstance(item, Figure)]


def _put(path: Path, text: str) -> None:
    with atomic_path(path) as partial:
        partial.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


class _Image(NamedTuple):
    source: str
    size: tuple[int, int] | None  # in CSS pixels; unknown for formats other than PNG


def _embedded(figure: Figure) -> _Image:
    path = Path(figure.path)
    media = _MEDIA.get(path.suffix.lower())
    if media is None:
        raise ValueError(f"a figure must be one of {sorted(_MEDIA)}, got {path.name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no figure at {path}: save it before the report is written")
    content = path.read_bytes()
    size = None
    if content[12:16] == b"IHDR":  # all pictures of this package have 200 dots per inch: the same scale for all
        width, height = struct.unpack(">II", content[16:24])
        size = round(width * _SCREEN_SCALE), round(height * _SCREEN_SCALE)
    return _Image(f"data:{media};base64,{base64.b64encode(content).decode('ascii')}", size)


def _link(path: Path, directory: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix())


# ------------------------------------------------------------------------------------------------------ text and cells


class _Column(NamedTuple):
    name: str
    numeric: bool


class _Cells(NamedTuple):
    columns: list[_Column]
    rows: list[list[str]]


def _cells(table: Table) -> _Cells:
    frame = table.frame
    halves = {f"{name}_half_width": name for name in frame.columns}
    columns: list[_Column] = []
    texts: list[list[str]] = []
    for name in frame.columns:
        if name in halves and halves[name] in frame.columns:
            continue
        values, half = frame[name], f"{name}_half_width"
        numeric = pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)
        columns.append(_Column(str(name).replace("_", " "), bool(numeric)))
        if half in frame.columns:
            texts.append([plus_minus(float(a), float(b)) for a, b in zip(values, frame[half], strict=True)])
        else:
            texts.append([_text(value, table.digits) for value in values])
    return _Cells(columns, [list(row) for row in zip(*texts, strict=True)])


def _text(value: object, digits: int) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return _number(float(value), digits)
    if isinstance(value, int | np.integer):
        return str(value).replace("-", "−")
    return str(value)


def _number(value: float, digits: int) -> str:
    """Return a number with significant digits: 15.19, 0.0213, 1.2e−07, ∞; a dash for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -5 < exponent < 7:
        decimals = max(digits - 1 - exponent, 0)
        return f"{round(value, digits - 1 - exponent):.{decimals}f}".replace("-", "−")
    return f"{value:.{digits - 1}e}".replace("-", "−")


def _paragraphs(text: str) -> list[str]:
    parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in parts if part]


def _markdown(text: str) -> str:
    """Escape what GitHub's Markdown would read as markup, in one line of text."""
    line = " ".join(str(text).split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~$!])", r"\\\1", line)
    line = re.sub(r"^(#|>|[-+=](?=[\s=-]|$))", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _tight(text: str) -> str:
    """Keep a number with its interval and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text.replace(" ± ", "\u00a0±\u00a0"))


def _tally(claims: Sequence[Claim]) -> list[tuple[Verdict, int]]:
    counts = [(verdict, sum(claim.verdict == verdict for claim in claims)) for verdict in get_args(Verdict)]
    return [(verdict, count) for verdict, count in counts if count]


def counted(claims: Sequence[Claim]) -> str:
    """Return how many claims came to what: ``"3 claims: 2 hold, 1 does not hold; 1 control: 1 holds"``."""
    parts = []
    for noun, control in (("claim", False), ("control", True)):
        chosen = [claim for claim in claims if claim.control is control]
        if chosen:
            verdicts = ", ".join(f"{count} {_PLURAL[verdict][count > 1]}" for verdict, count in _tally(chosen))
            parts.append(f"{len(chosen)} {noun}{'s' * (len(chosen) > 1)}: {verdicts}")
    return "; ".join(parts)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: Mapping[str, Any] = {
        "paragraphs": _paragraphs,
        "md": _markdown,
        "cells": _cells,
        "css": _CSS.__getitem__,
        "is_figure": lambda item: isinstance(item, Figure),
        "tally": lambda claims: _tally([claim for claim in claims if not claim.control]),
        "counted": counted,
        "tight": _tight,
    }
    environment.filters.update(filters)
    return environment
