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
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import quote

import jinja2
import numpy as np
import pandas as pd

from msam_analysis.results.files import write_text
from msam_analysis.results.text import printable

Verdict = Literal["holds", "does not hold", "cannot tell at this scale"]
"""What a claim can come to."""

_MEDIA = {".png": "image/png", ".svg": "image/svg+xml", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_SCREEN_SCALE = 0.66  # of the dots of a picture: a page of 6.8 in fills the column of text, on fine screens sharply
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_CSS = {"holds": "holds", "does not hold": "does-not-hold", "cannot tell at this scale": "cannot-tell"}
_PLURAL = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "cannot tell at this scale": ("cannot be told at this scale",) * 2,
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture from a PNG, SVG or JPEG file; ``alt`` tells it to somebody who cannot see it, default the caption."""

    path: str | os.PathLike[str]
    caption: str
    alt: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A table of a few rows, without its index.

    A column ``q`` with its interval in ``q_half_width``, as of :func:`msam_analysis.results.statistics.summarise`,
    becomes one column with ``mean ± half width``; other floats have ``digits`` significant digits, and NaN a dash.
    """

    frame: pd.DataFrame
    caption: str
    digits: int = 4


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the paper about the exhibit of an id, beside what was measured.

    ``paper``, ``measured``: The two numbers, ours with its interval (see :func:`plus_minus`).
    ``note``: Why, where the numbers do not say it.
    ``control``: Whether it is no claim of the paper, and not counted as one.
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
    """A part of the report: a heading, plain text whose paragraphs empty lines part, and figures and tables below."""

    title: str
    text: str = ""
    items: Sequence[Figure | Table] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`write` writes: title, summary (plain text), the table of claims if there are some, the sections."""

    title: str
    summary: str
    sections: Sequence[Section] = ()
    claims: Sequence[Claim] = ()


def plus_minus(mean: float, half_width: float, *, digits: int = 2, unit: str = "") -> str:
    """Return ``"15.19 ± 0.34 unit"``, both rounded to the leading digits of the half width; a dash for NaN.

    Without a half width (NaN, for one seed) the mean alone gets two digits more.
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
    """Write ``report.html`` and ``report.md`` into a directory, each whole or not at all, and return the two files.

    All text is taken literally: nothing in it is read as HTML or Markdown. Where a figure's file is missing, or neither
    PNG, SVG nor JPEG, nothing is written.
    """
    path = Path(directory) / "report.html"
    _write("report.html.j2", path, report=report, images={figure: _embedded(figure) for figure in _figures(report)})
    return path, write_markdown(report, directory)


def write_markdown(report: Report, directory: str | os.PathLike[str]) -> Path:
    """Write ``report.md`` alone into a directory, with relative links to the figures, and return the file."""
    path = Path(directory) / "report.md"
    here = path.parent.resolve()
    links = {f: quote(Path(os.path.relpath(Path(f.path).resolve(), here)).as_posix()) for f in _figures(report)}
    _write("report.md.j2", path, report=report, links=links)
    return path


def _figures(report: Report) -> list[Figure]:
    return [item for section in report.sections for item in section.items if isinstance(item, Figure)]


def _write(template: str, path: Path, **facts: Any) -> None:
    text = _environment().get_template(template).render(facts)
    write_text(path, text.rstrip("\n") + "\n")


def _embedded(figure: Figure) -> dict[str, Any]:
    """Return the source of an image, and its size in CSS pixels, unknown for formats other than PNG."""
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
    return {"source": f"data:{media};base64,{base64.b64encode(content).decode('ascii')}", "size": size}


def _cells(table: Table) -> dict[str, list[Any]]:
    """Return the columns, each with its name and whether it has numbers, and the rows of text."""
    frame = table.frame
    halves = {f"{name}_half_width" for name in frame.columns}
    columns: list[dict[str, Any]] = []
    texts: list[list[str]] = []
    for name in (column for column in frame.columns if column not in halves):
        values, half = frame[name], f"{name}_half_width"
        numeric = pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)
        columns.append({"name": str(name).replace("_", " "), "numeric": bool(numeric)})
        if half in frame.columns:
            texts.append([plus_minus(float(a), float(b)) for a, b in zip(values, frame[half], strict=True)])
        else:
            texts.append([_text(value, table.digits) for value in values])
    return {"columns": columns, "rows": list(zip(*texts, strict=True))}


def _text(value: object, digits: int) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return _number(float(value), digits)
    return str(value).replace("-", "−") if isinstance(value, int | np.integer) else str(value)


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


def markdown(text: str) -> str:
    """Escape what GitHub's Markdown would read as markup, in one line of text."""
    line = " ".join(str(text).split())
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
    line = re.sub(r"([\\`*_\[\]|~$!])", r"\\\1", line)
    line = re.sub(r"^(#|>|[-+=](?=[\s=-]|$))", r"\\\1", line)
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _tight(text: str) -> str:
    """Keep a number with its interval and its unit on one line."""
    return re.sub(r"(?<=\d) (?=%)", "\u00a0", text.replace(" ± ", "\u00a0±\u00a0"))


def _tally(claims: Sequence[Claim], *, control: bool = False) -> list[tuple[Verdict, int]]:
    """Return how many claims, or controls, came to each verdict that any of them came to."""
    found = Counter(claim.verdict for claim in claims if claim.control is control)
    return [(verdict, found[verdict]) for verdict in get_args(Verdict) if found[verdict]]


def counted(claims: Sequence[Claim]) -> str:
    """Return how many claims came to what: ``"3 claims: 2 hold, 1 does not hold; 1 control: 1 holds"``."""
    parts = []
    for noun, tally in (("claim", _tally(claims)), ("control", _tally(claims, control=True))):
        total = sum(count for _, count in tally)
        verdicts = ", ".join(f"{count} {_PLURAL[verdict][count > 1]}" for verdict, count in tally)
        parts += [f"{total} {noun}{'s' * (total > 1)}: {verdicts}"] if tally else []
    return "; ".join(parts)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates"),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        finalize=lambda value: printable(value, None) if isinstance(value, str) else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"paragraphs": _paragraphs, "md": markdown, "cells": _cells, "tally": _tally}
    filters |= {"counted": counted, "tight": _tight, "css": _CSS.__getitem__}
    environment.filters.update(filters, is_figure=lambda item: isinstance(item, Figure))
    return environment
