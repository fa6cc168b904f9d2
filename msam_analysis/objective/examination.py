"""What an examination found: what was checked, on how much data, how far apart two numbers were, and what follows."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal

import pandas as pd

Verdict = Literal["holds", "adapted", "refused", "not checked"]


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes
    ----------
    question
        What was asked, in words.
    verdict
        ``"holds"``; ``"adapted"``: the evaluation was changed so that it holds; ``"refused"``: what needs it raises;
        ``"not checked"``: it could not be asked.
    apart
        Relative distance of the two numbers compared; NaN where there are no two numbers.
    follows
        What follows for results, in one sentence; empty where nothing does.
    """

    question: str
    verdict: Verdict
    apart: float = float("nan")
    follows: str = ""


@dataclass(frozen=True)
class Examination:
    """What was found out about a model, its loss and its data at an objective's first use.

    The five questions: is the loss a function of the weights, is it this model's, is it a mean over samples, are its
    derivatives right, and does evaluating it leave everything alone?

    Attributes
    ----------
    checks
        Every question with its answer.
    samples
        Samples of the first batch that the checks were made on.
    precision
        Data type in which derivatives were compared.
    resolution
        Relative difference of the loss in the objective's precision to that in float64: what rounding leaves of a
        digit. NaN where the model cannot be evaluated in float64.
    """

    checks: tuple[Check, ...]
    samples: int
    precision: str = "float64"
    resolution: float = float("nan")

    @property
    def verdict(self) -> str:
        """In one word or few: ``"passed"``, or what was adapted or refused."""
        other = [
            f"{check.question}: {check.verdict}" for check in self.checks if check.verdict in ("adapted", "refused")
        ]
        return "; ".join(other) or "passed"

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each check."""
        rows = [(c.question, c.verdict, c.apart, c.follows) for c in self.checks]
        frame: pd.DataFrame = pd.DataFrame(rows, columns=["question", "verdict", "apart", "follows"])
        return frame

    def __repr__(self) -> str:
        """Say the verdict and on how much it rests."""
        return f"Examination({self.verdict}; {len(self.checks)} checks on {self.samples} samples)"

    def _repr_html_(self) -> str:
        """Show the checks as a table in a notebook."""
        rows = "".join(
            f"<tr><td>{html.escape(c.question)}</td><td>{c.verdict}</td>"
            f"<td>{'' if c.apart != c.apart else f'{c.apart:.1e}'}</td><td>{html.escape(c.follows)}</td></tr>"
            for c in self.checks
        )
        head = "<tr><th>question</th><th>verdict</th><th>apart</th><th>what follows</th></tr>"
        return f"<table><caption>Examined on {self.samples} samples</caption>{head}{rows}</table>"


class ExaminationError(ValueError):
    """An examination found that a number would be wrong: the message says why and what to do."""
