"""The words of a study's pages. They lie in ``templates``; Python hands them the numbers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

_FOLDER = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Prose:
    """The words of an exhibit.

    Attributes
    ----------
    title
        Heading of its section.
    caption
        What its picture shows.
    note
        What a reader must know to read it. It may name facts, as in ``{{ samples }}``: it is a jinja2 template.
    """

    title: str
    caption: str
    note: str = ""

    def noted(self, facts: Mapping[str, object]) -> str:
        """Return the note with its facts, each paragraph on one line.

        Raises
        ------
        jinja2.UndefinedError
            The note names a fact that is not given.
        """
        return _lines(_environment().from_string(self.note).render(facts))


@functools.cache
def of_exhibits() -> dict[str, Prose]:
    """Return the words of the exhibits by name, from ``templates/exhibits.md.j2``.

    A part begins with ``# name: title``. Its first paragraph is the caption, all others are the note.
    """
    text = (_FOLDER / "exhibits.md.j2").read_text(encoding="utf-8")
    _, *parts = re.split(r"^# (\w+): ", text, flags=re.MULTILINE)
    return {name: _prose(part) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def _prose(part: str) -> Prose:
    title, caption, *note = part.strip().split("\n\n", 2)
    return Prose(title, _lines(caption), "".join(note))


def render(template: str, facts: Mapping[str, object]) -> str:
    """Return the text of a template of this folder, each paragraph on one line; see :meth:`Prose.noted`."""
    return _lines(_environment().get_template(template).render(facts))


def _lines(text: str) -> str:
    """Join the lines of every paragraph."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=False,  # noqa: S701 - plain text; the report escapes what it writes
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
