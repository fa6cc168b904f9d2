"""What an examination found: what was checked, on how much data, how far apart two numbers were, and what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

Topic = Literal["value", "copy", "mean", "gradient", "Hessian", "no writes"]
Verdict = Literal["holds", "adapted", "refused", "not checked"]

NOT_EXAMINED = "not examined"


@dataclass(frozen=True)
class Check:
    """One question and its answer.

    Attributes
    ----------
    topic
        What it is about, in one word or two.
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

    topic: Topic
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
        Samples of the first batch that the checks were made on; derivatives on half of them.
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
        """The verdict in few words: ``"passed"``, or what was adapted or refused."""
        other = [f"{c.question}: {c.verdict}" for c in self.checks if c.verdict in ("adapted", "refused")]
        return "; ".join(other) or "passed"

    @property
    def largest(self) -> float:
        """Largest relative distance of two numbers in the checks that hold; NaN where there is none."""
        return max((c.apart for c in self.checks if c.verdict == "holds" and c.apart == c.apart), default=float("nan"))

    @property
    def line(self) -> str:
        """One line for tables and reports: the questions that hold, and what follows from the others."""
        others = [check for check in self.checks if check.verdict != "holds"]
        topics = dict.fromkeys(check.topic for check in self.checks)
        held = [topic for topic in topics if topic not in {check.topic for check in others}]
        found = f"largest difference {self.largest:.0e}" if self.largest else "no difference beyond rounding"
        apart = "" if self.largest != self.largest else f" ({found})"
        said = [f"{c.topic} {c.verdict}" + f": {c.follows}" * bool(c.follows) for c in others]
        return "; ".join([f"examined: {', '.join(held)}{apart}", *dict.fromkeys(said)])

    def to_frame(self) -> pd.DataFrame:
        """Return one row for each check: ``question``, ``verdict``, ``apart``, ``follows``."""
        rows = [(c.question, c.verdict, c.apart, c.follows) for c in self.checks]
        frame: pd.DataFrame = pd.DataFrame(rows, columns=["question", "verdict", "apart", "follows"])
        return frame

    def __repr__(self) -> str:
        """Say the verdict and on how much it rests."""
        return f"Examination({self.verdict}; {len(self.checks)} checks on {self.samples} samples)"

    def _repr_html_(self) -> str:
        """Show the checks as a table in a notebook."""
        shown = self.to_frame().to_html(index=False, na_rep="", border=0, float_format="{:.1e}".format)
        return f"<p>Examined on {self.samples} samples</p>{shown}"


class ExaminationError(ValueError):
    """An examination found that a number would be wrong: the message says why and what to do."""
