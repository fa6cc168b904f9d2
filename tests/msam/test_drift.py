"""What is removed is what was applied: the true weights do not drift, and the page's table says how little."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import msam

from . import reference
from .cases import MU
from .workloads import true_weights

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")

STEPS = 2000
SHAPES = ((119,),)


class Line:
    """Gradients fixed in advance, zero on average: nothing pulls an error back, so every lost digit stays."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.w0 = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]
        noise = [torch.randn(STEPS, *s, generator=generator, dtype=torch.float64) for s in SHAPES]
        self.gradients = [n.to(dtype) for n in noise]

    def __call__(self, weights: Any, step: int) -> list[torch.Tensor]:
        return [g[step].to(w.dtype) for g, w in zip(self.gradients, weights, strict=True)]


def walk(
    dtype: torch.dtype, make: Callable[[Any], Any], before: Callable[[Any, int], None] | None = None
) -> tuple[Any, Line]:
    """An optimizer after 2,000 steps along the line."""
    line = Line(dtype)
    weights = [nn.Parameter(w.clone()) for w in line.w0]
    opt = make(weights)
    for step in range(STEPS):
        if before:
            before(opt, step)
        for p, g in zip(weights, line(weights, step), strict=True):
            p.grad = g
        opt.step()
    return opt, line


def rms(weights: Any, exact: Any) -> float:
    """Root mean square error over all weights."""
    gaps = torch.cat([(w.detach().double() - e).flatten() for w, e in zip(weights, exact, strict=True)])
    return float(gaps.square().mean().sqrt())


def strength(t: int) -> float:
    """A ρ that is never twice the same."""
    return 1 + math.sin(t)


def drift(dtype: torch.dtype, base: str, lr: float, **more: Any) -> tuple[float, float]:
    """Error of the true weights after 2,000 steps against float64: ours with ρ changing each step, and torch's own."""
    options: dict[str, Any] = dict(lr=lr, weight_decay=0.0, **({"momentum": MU} if base == "sgd" else {}))

    def set_rho(opt: Any, step: int) -> None:
        opt.param_groups[0]["rho"] = strength(step + 1)

    ours: Any = msam.MSAM if base == "sgd" else msam.AdamWMSAM
    theirs: Any = torch.optim.SGD if base == "sgd" else torch.optim.AdamW
    opt, line = walk(dtype, lambda p: ours(p, rho=0.0, **options, **more), set_rho)
    assert opt.perturbed
    plain, _ = walk(dtype, lambda p: theirs(p, **options))
    twin: dict[str, Any] = dict(base=base, direction="momentum", rho=strength)
    exact = reference.trajectory(line, [w.double() for w in line.w0], STEPS, **twin, **options)[-1].weights
    return rms(true_weights(opt), exact), rms(plain.param_groups[0]["params"], exact)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_no_drift_in_float32(base: str, lr: float) -> None:
    """2,000 roundings of weights near one: no more than a few times what torch's own step loses."""
    ours, plain = drift(torch.float32, base, lr)
    assert ours < 4 * plain + 5e-6


@pytest.mark.parametrize("lr", [1e-5, 1e-3])
def test_no_drift_of_the_fused_step(lr: float) -> None:
    """It never returns to the true weights; at the smaller learning rate ``|c| / lr`` passes 1e4 now and then."""
    ours, plain = drift(torch.float32, "sgd", lr, fused=True)
    assert ours < 4 * plain + 5e-6


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.0, 1e-2])
def test_no_drift_in_bfloat16(base: str, lr: float) -> None:
    """Perturbing adds no error that grows: torch's own step is met up to one rounding of a weight (2⁻⁸ of it)."""
    ours, plain = drift(torch.bfloat16, base, lr)
    assert ours < 1.5 * plain + 2**-8


def test_adding_and_subtracting_drifts_in_bfloat16() -> None:
    """The measurement sees what the default avoids."""
    ours, plain = drift(torch.bfloat16, "sgd", 0.0, restore="subtract")
    assert plain == 0
    assert ours > 4 * 2**-8


@pytest.mark.parametrize("defect", [False, True])
def test_drift_of_removing_with_the_present_rho(defect: bool) -> None:
    """The defect this guards against, written out at learning rate zero: it is found by the same numbers."""
    line = Line(torch.float64)
    w, v = [x.clone() for x in line.w0], [torch.zeros_like(x) for x in line.w0]

    def add(rho: float) -> None:
        norm = torch.cat([x.flatten() for x in v]).norm().clamp(min=1e-30)
        w[:] = [a + rho * b / norm for a, b in zip(w, v, strict=True)]

    for step in range(STEPS):
        add(strength(step + 1) if defect else strength(step))
        v[:] = [MU * b + g for b, g in zip(v, line(w, step), strict=True)]
        add(-strength(step + 1))
    add(strength(STEPS))
    assert (rms(w, line.w0) > 0.1) if defect else (rms(w, line.w0) < 1e-12)


# The page's table: what its columns are, and its lines as they stand there.

SECTION = PAGE.split("## No drift")[1].split("\n## ")[0]
OWN = "`torch.optim.SGD`"
COLUMNS: dict[str, dict[str, Any]] = {
    "MSAM, default": {},
    "fused": dict(fused=True),
    'MSAM, `restore="subtract"`': dict(restore="subtract"),
    'MSAM, `restore="copy"`': dict(restore="copy"),
}


def table() -> list[dict[str, str]]:
    """The rows, by column; a number in brackets is a column of its own."""
    heads, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", SECTION, re.MULTILINE)
    ]
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    for row in found:
        for head, cell in list(row.items()):
            if bracket := re.fullmatch(r"(\S+) \((\w+) (\S+)\)", cell):
                row[head], row[bracket[2]] = bracket[1], bracket[3]
    return found


TABLE = table()


def test_table_of_drift_is_whole() -> None:
    assert f"{STEPS:,} steps" in SECTION
    assert [(row["weights"], float(row["learning rate"])) for row in TABLE] == [
        ("float32", 1e-3),
        ("float32", 0.0),
        ("bfloat16", 1e-2),
        ("bfloat16", 0.0),
    ]
    assert {head for row in TABLE for head in row} == {"weights", "learning rate", OWN, *COLUMNS}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['weights']}-{row['learning rate']}")
def test_table_of_drift(row: dict[str, str]) -> None:
    """A factor of 1.5: these are sums of roundings, which other machines may order differently. Zero is zero."""
    dtype, lr = getattr(torch, row["weights"]), float(row["learning rate"])
    measured = {head: drift(dtype, "sgd", lr, **more) for head, more in COLUMNS.items() if head in row}
    errors = {head: ours for head, (ours, _) in measured.items()} | {OWN: measured["MSAM, default"][1]}
    wrong = {
        head: (row[head], error)
        for head, error in errors.items()
        if not (float(row[head]) / 1.5 <= error <= float(row[head]) * 1.5)
    }
    assert not wrong, "the page's number, and what was measured"
