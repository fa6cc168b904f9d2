"""The words of a study's pages. They lie in ``templates``; Python hands them the numbers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from msam_analysis.studies.claims import Compare, PaperClaim

_FOLDER = Path(__file__).resolve().parent / "templates"
_CLAIM = re.compile(
    r"^\* (\w+), (\w+)(, control)?: (.*?)^  paper: (.*?)(?:^  note: (.*?))?(?=^\* |\Z)", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Prose:
    """The words of an exhibit: jinja2 templates, which name numbers as in ``{{ samples }}``.

    Tags such as ``{% if found %}`` stand on lines of their own.

    ``title``: Heading of its section.
    ``caption``: What its picture shows.
    ``note``: What a reader must know to read it.
    ``claims``: Name of a claim to the paper's exhibit, the sentence, the paper's number, the note on the test, and
        whether it is a control.
    """

    title: str
    caption: str
    note: str
    claims: Mapping[str, tuple[str, str, str, str, bool]]

    def claimed(self, comparisons: Mapping[str, Compare], facts: Mapping[str, object]) -> tuple[PaperClaim, ...]:
        """Return the claims with their tests, in the order of the words.

        Raises ValueError: The comparisons have other names than the claims.
        """
        if comparisons.keys() != self.claims.keys():
            raise ValueError(
                f"{self.title!r} needs a comparison for every claim, {sorted(self.claims)}, got {sorted(comparisons)}"
            )
        return tuple(
            PaperClaim(
                exhibit, fill(sentence, facts), fill(paper, facts), comparisons[name], fill(note, facts), control
            )
            for name, (exhibit, sentence, paper, note, control) in self.claims.items()
        )


def read(text: str, preamble: str = "") -> Prose:
    """Read the words of an exhibit.

    ``text``: The title on a line, the caption, and any paragraphs of the note, with empty lines between them. Then the
        claims: ``* name, T1: sentence`` (``* name, T1, control: sentence`` for a control), ``paper: number`` and, where
        there is something to say about the test, ``note: words``, the last two indented by two spaces.
    ``preamble``: What jinja2 reads before the note and before every claim.
    Raises ValueError: The caption is missing, or a claim does not follow the form.
    """
    head, *claims = re.split(r"^(?=\* )", text.strip() + "\n", flags=re.MULTILINE)
    title, *paragraphs = head.strip().split("\n\n", 2)
    found = {}
    for claim in claims:
        match = _CLAIM.fullmatch(claim)
        if match is None:
            raise ValueError(
                f"a claim must be '* name, ID: sentence', '  paper: number', '  note: words', got {claim!r}"
            )
        name, exhibit, control, *words = match.groups(default="")
        sentence, paper, note = (preamble + part if "{" in part else part for part in words)
        found[name] = exhibit, sentence, paper, note, bool(control)
    if not paragraphs:
        raise ValueError(f"the words of an exhibit need a title, an empty line and a caption, got {text!r}")
    return Prose(title, fill(paragraphs[0], {}), preamble + "".join(paragraphs[1:]), found)


@functools.cache
def of_exhibits() -> dict[str, Prose]:
    """Return the words of the exhibits by name: ``templates/exhibits.md.j2``, where each begins ``# name: title``."""
    text = (_FOLDER / "exhibits.md.j2").read_text(encoding="utf-8")
    preamble, *parts = re.split(r"^# (\w+): ", text, flags=re.MULTILINE)
    return {name: read(part, preamble) for name, part in zip(parts[::2], parts[1::2], strict=True)}


def render(template: str, facts: Mapping[str, object]) -> str:
    """Return the text of a template of this folder; see :func:`fill`."""
    return _lines(_environment().get_template(template).render(facts))


def fill(text: str, facts: Mapping[str, object]) -> str:
    """Return a text with its numbers, each paragraph on one line.

    Raises jinja2.UndefinedError: The text names a number that is not given.
    """
    return _lines(_environment().from_string(text).render(facts) if "{" in text else text)


def _lines(text: str) -> str:
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
