"""F1: one step of every optimizer from the same state, on a loss of two weights; made by the optimizers themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from msam import Jump, Perturbation, PerturbedSGD
from msam_analysis.results.statistics import Interval
from msam_analysis.studies import pictures
from msam_analysis.studies.claims import Comparison
from msam_analysis.studies.exhibits.base import Exhibit
from msam_analysis.studies.tables import as_table, rows

LR, MOMENTUM, BEFORE = 0.12, 0.8, 4
"""Recipe of the schematic, and how many plain steps lead to the state that all optimizers share."""

LENGTH = 0.45
"""ρ of SAM and of MSAM, chosen to be seen."""
EXACT = 1e-3
"""A cosine or a ratio of lengths this close to 1 is 1."""

PERTURBATIONS = {
    "SGD": None,
    "NAG": Perturbation(direction="momentum", normalize="lr", rho=Jump(MOMENTUM, BEFORE)),
    "SAM": Perturbation(direction="gradient", rho=Jump(LENGTH, BEFORE)),
    "MSAM": Perturbation(direction="momentum", rho=Jump(LENGTH, BEFORE)),
}
"""Before the step that is drawn their strengths are 0."""

_START = (-1.55, 1.1)
_POINTS = ("from", "at", "gradient_at", "to")


def loss(w: Tensor) -> Tensor:
    """Return a bent valley, ``(w₂ − 0.5 w₁²)²·2 + 0.25 (w₁ − 0.6)²``, of weights in the last dimension."""
    x, y = w[..., 0], w[..., 1]
    return 2.0 * (y - 0.5 * x**2) ** 2 + 0.25 * (x - 0.6) ** 2


def one_step(name: str) -> dict[str, float | str]:
    """Return where an optimizer comes from, is, takes its gradient and goes to."""
    w = torch.nn.Parameter(torch.tensor(_START, dtype=torch.float64))
    optimizer = PerturbedSGD([w], lr=LR, momentum=MOMENTUM, perturbation=PERTURBATIONS[name])
    weights, seen = [w.detach().clone()], []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        value = loss(w)
        value.backward()
        return value

    for _ in range(BEFORE + 1):
        optimizer.step(closure)
        # The true weights, also where the optimizer holds perturbed ones.
        shift = optimizer.displacement().get(w) if optimizer.perturbed else None
        weights.append(w.detach().clone() if shift is None else w.detach() - shift)
    places = zip(_POINTS, (*weights[-3:-1], seen[-1], weights[-1]), strict=True)
    return {"optimizer": name, **{f"{point}_{xy}": float(at[i]) for point, at in places for i, xy in enumerate("xy")}}


def surface(steps: pd.DataFrame, points: int = 61) -> pd.DataFrame:
    """Return the loss on a grid around all that is drawn: ``x``, ``y``, ``loss``."""
    axes = []
    for xy in "xy":
        values = steps[[f"{point}_{xy}" for point in _POINTS]].to_numpy()
        margin = 0.18 * (values.max() - values.min())
        axes.append(np.linspace(values.min() - margin, values.max() + margin, points))
    x, y = (values.ravel() for values in np.meshgrid(*axes))
    at = torch.tensor(np.stack([x, y], axis=1))
    return as_table({"x": x, "y": y, "loss": loss(at).numpy()})


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else math.nan


def _where(steps: pd.DataFrame) -> list[Comparison]:
    """Compare in what direction and how far from the weights each optimizer takes its gradient."""
    last, moved, gradient, length = {}, {}, {}, {}
    for name in PERTURBATIONS:
        row = rows(steps, optimizer=name).iloc[0]
        before, at, point = (row[[f"{key}_x", f"{key}_y"]].to_numpy(dtype=np.float64) for key in _POINTS[:3])
        w = torch.tensor(at, requires_grad=True)
        last[name], moved[name], length[name] = at - before, point - at, float(np.linalg.norm(point - at))
        gradient[name] = torch.autograd.grad(loss(w), w)[0].numpy()
    step = MOMENTUM * float(np.linalg.norm(last["NAG"]))
    along, one = {"above": 1 - EXACT}, {"above": 1 - EXACT, "below": 1 + EXACT}
    found: list[tuple[str, float, dict[str, Any]]] = [
        ("SGD, ‖ε‖", length["SGD"], {"above": -EXACT, "below": EXACT}),
        ("NAG, cosine of ε with the last step", _cosine(moved["NAG"], last["NAG"]), along),
        ("NAG, ‖ε‖ over μ times the last step's length", length["NAG"] / step, one),
        ("SAM, cosine of ε with the gradient", _cosine(moved["SAM"], gradient["SAM"]), along),
        ("SAM, ‖ε‖/ρ", length["SAM"] / LENGTH, one),
        ("MSAM, cosine of ε with the last step", _cosine(moved["MSAM"], last["MSAM"]), along),
        ("MSAM, ‖ε‖/ρ", length["MSAM"] / LENGTH, one),
    ]
    # No luck is in them: intervals without a width.
    return [
        Comparison(label, Interval(value, 0.0 if math.isfinite(value) else math.nan, 1), **region)
        for label, value, region in found
    ]


SCHEMATIC = Exhibit(
    "one_step",
    wants=lambda *_: [],
    table=lambda _: pd.DataFrame([one_step(name) for name in PERTURBATIONS]),
    draw=lambda steps, _: pictures.one_step(steps, surface(steps)),
    constants={"before": BEFORE, "momentum": MOMENTUM},
    comparisons={"where": _where},
)
