"""How far a long work is: what solvers tell, what the line says, and what a budget ends."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msam_analysis as ma
from msam_analysis.checkpoints import comparing
from msam_analysis.measures.summary import METRICS, measure
from msam_analysis.objective import progress
from msam_analysis.objective.progress import Bar, Step, listening, told
from msam_analysis.results import ConvergenceWarning, Measurement

from .cases import MLP

RUNS: dict[str, tuple[Callable[[ma.Objective], Any], str]] = {
    "eigenvalues": (lambda one: ma.top_eigenvalues(one, 3), "products"),
    "power": (lambda one: ma.top_eigenvalues(one, 3, method="power"), "products"),
    "trace": (ma.trace, "products"),
    "hutch++": (lambda one: ma.trace(one, method="hutch++", draws=60), "products"),
    "density": (lambda one: ma.spectral_density(one, probes=2, steps=4), "products"),
    "average": (lambda one: ma.average_sharpness(one, 0.01), "draws"),
    "ball": (lambda one: ma.ball_sharpness(one, 0.3), "gradients"),
    "batches": (lambda one: ma.m_sharpness(one, 0.3, 8), "batches"),
    "flatness": (lambda one: ma.relative_flatness(one, "3.weight"), "products"),
    "fisher-rao": (ma.fisher_rao_norm, "samples"),
}


@pytest.fixture(scope="module")
def objective() -> ma.Objective:
    return ma.Objective(MLP.model(), MLP.loss_fn, MLP.data())


@pytest.fixture(autouse=True)
def unconverged() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


class Ear:
    """Hears the steps of solvers, and ends them from the ``end``-th on."""

    def __init__(self, end: float = math.inf) -> None:
        self.steps: list[Step] = []
        self._end = end

    def __call__(self, step: Step) -> bool:
        self.steps.append(step)
        return len(self.steps) >= self._end


# --- steps


@pytest.mark.parametrize("name", RUNS)
def test_solvers_tell_how_far_they_are_and_their_numbers_stay(name: str, objective: ma.Objective) -> None:
    run, unit = RUNS[name]
    alone, ear = run(objective), Ear()
    with listening(ear):
        heard = run(objective)
    assert repr(heard) == repr(alone)
    own = [step for step in ear.steps if step.unit == unit]
    counts = [step.done for step in own]
    assert len(counts) > 1
    assert own[-1].of is not None
    assert own[-1].done <= own[-1].of
    if name != "ball":  # its curvature has a count of its own
        assert counts == sorted(counts)


def test_the_last_residual_that_is_told_is_the_result(objective: ma.Objective) -> None:
    """The residual told before the last product is larger than what it leaves; the error of a trace is its own."""
    ear = Ear()
    with listening(ear):
        pairs, traced = ma.top_eigenvalues(objective, 1, confirm=False), ma.trace(objective, draws=20)
    residuals = [step.error for step in ear.steps if step.name == "residual" and not math.isnan(step.error)]
    assert residuals[-1] > pairs.tolerance >= float(pairs.residuals[0] / pairs.values[0])
    assert max(residuals) > 100 * residuals[-1]
    assert ear.steps[-1].error == traced.standard_error


def test_nobody_listens_outside() -> None:
    assert not told("products", 1, 2)
    ears = Ear(), Ear(2)
    with listening(ears[0]), listening(ears[1]):
        assert [told("products", 1, None) for _ in range(2)] == [False, True]
    assert not told("products", 1, 2)
    assert ears[0].steps == ears[1].steps == 2 * [Step("products", 1, None)]


@pytest.mark.parametrize("end", [1, 7])
@pytest.mark.parametrize("name", [name for name in RUNS if name != "density"])
def test_a_solver_ends_with_what_it_has(name: str, end: int, objective: ma.Objective) -> None:
    """A result of less work than the whole, whose numbers are those of the solver with as little to spend."""
    run, _ = RUNS[name]
    with listening(Ear(1 if name in ("trace", "hutch++") else end)):
        short = run(objective)
    whole = run(objective)
    if name in ("eigenvalues", "power"):
        assert not short.converged
        least = 3 if name == "eigenvalues" else 7
        assert short.hvps == max(end, least) if name == "eigenvalues" else short.hvps < whole.hvps
        assert torch.isfinite(short.residuals).all()
        if name == "eigenvalues":
            assert torch.equal(short.values, ma.top_eigenvalues(objective, 3, max_hvps=short.hvps).values)
    elif name == "ball":
        assert short.gradients < whole.gradients
        assert short.one_step == whole.one_step
        assert not short.converged
    elif name == "batches":
        assert torch.equal(short.rises[:0], whole.rises[:0])
        assert 1 <= len(short.rises) < len(whole.rises)
    else:
        assert 2 <= short.draws < whole.draws
        assert short.standard_error > 0
        if whole.values is not None:
            assert torch.equal(short.values, whole.values[: short.draws])


# --- a budget


class Clock:
    """A second for each step that a solver tells."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(
            sys.modules["msam_analysis.measures.summary"], "time", SimpleNamespace(perf_counter=lambda: self.now)
        )

    def __call__(self, _: Step) -> bool:
        self.now += 1.0
        return False


def row(metrics: Measurement, name: str) -> dict[str, Any]:
    (found,) = [dict(one) for one in metrics.rows if one["metric"] == name]
    return found


@pytest.mark.parametrize(
    ("metric", "name", "said"),
    [
        ("average", "average_sharpness@0.01", "3 of 50 draws"),
        ("trace", "trace", "16 of 30 products"),
        ("ball", "ball_sharpness@0.3", r"\d+ of 40 gradients"),
        ("adaptive", "adaptive_ball_sharpness@0.3", r"\d+ of 40 gradients"),
        ("eigenvalues", "lambda_1", r"\d of 200 products"),
        ("batches", "m_sharpness@0.3", "1 of 3 batches"),
        ("flatness", "relative_flatness", "3 of 30 products"),
        ("fisher-rao", "fisher_rao_norm", "3 of 19 samples"),
    ],
)
def test_a_budget_ends_every_metric_on_the_way(
    metric: str, name: str, said: str, objective: ma.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prices promise everything, and each step then takes a second of three."""
    monkeypatch.setattr(sys.modules["msam_analysis.measures.summary"], "BATCH", 8)
    with listening(clock := Clock(monkeypatch)):
        cut = measure(objective, metrics=(metric,), radii=(0.3,), budget=1.0 if metric in ("trace", "batches") else 3.0)
    found = row(cut, name)
    assert re.search(f"; the budget ended it after {said}$", found["meaning"]), found
    assert math.isfinite(found["value"])
    if metric == "batches":
        assert math.isnan(found["uncertainty"]), "one batch has no standard error"
    elif metric not in ("ball", "adaptive"):
        assert found["uncertainty"] > 0
    assert cut.settings["cut"] == metric
    assert clock.now < 30


def test_what_is_over_before_the_budget_is_whole(objective: ma.Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(Clock(monkeypatch)):
        whole = measure(objective, metrics=METRICS, radii=(0.3,), budget=1e6)
    alone = measure(objective, metrics=METRICS, radii=(0.3,))
    assert whole.rows == alone.rows or repr(whole.rows) == repr(alone.rows)
    assert "cut" not in whole.settings


# --- the line


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_a_log_has_a_line_now_and_then(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """After 20 seconds the first, and then when a quarter more has passed: a week has some 40."""
    at = []
    with Bar(7 * 86400, "work", "s") as bar:
        while seconds[0] < 7 * 86400:
            seconds[0] += 10
            bar.advance(10)
            if capsys.readouterr().err:
                at.append(seconds[0])
    assert at[:6] == [20, 40, 60, 80, 110, 150]
    assert len(at) < 60
    assert re.match(r"work: 100%.* 604800/604800 ", capsys.readouterr().err), "and one at the end"


def test_a_line_says_what_the_solvers_inside_tell(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(None, "eigenvalues", form="{desc}{postfix}", leave=False) as bar:
        seconds[0] = 30.0
        told("products", 34, 200, 2.1e-3)
        seconds[0] = 60.0
        told("draws", 3, None)
        seconds[0] = 90.0
        bar.say("trace", "more")
    assert (
        capsys.readouterr().err == "eigenvalues, 34/200 products, residual 2e-03\neigenvalues, 3 draws\ntrace, more\n"
    )


def test_nothing_is_shown_where_nobody_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar(3, "work", shown=False) as bar:
        bar.advance()
        bar.say("more")
        assert not told("products", 1, 2)
    assert capsys.readouterr() == ("", "")


class Terminal:
    """A terminal that keeps what is written to it."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""

    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error, each look at which comes when it is time to draw."""
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    return found


@pytest.mark.parametrize("how", ["measure", "compare", "progress"])
def test_a_terminal_shows_products_and_residual(
    how: str, objective: ma.Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the table of one, for that of many, and for any solver alone; nothing of it stays."""
    terminal = on_terminal(monkeypatch)
    if how == "measure":
        ma.measure(objective, metrics=("loss", "eigenvalues"), progress=True)
    elif how == "compare":
        model = MLP.model()
        ma.compare({"net": model}, None, MLP.loss_fn, MLP.data(), metrics=("eigenvalues",), progress=True)
    else:
        with ma.progress("eigenvalues"):
            ma.top_eigenvalues(objective)
    begin = "net 1/1: eigenvalues" if how == "compare" else "eigenvalues"
    assert re.search(rf"\r{re.escape(begin)}, \d+/\d+ products, residual \de[-+]\d\d \[00:00\]", terminal.text)
    assert "looking beyond" in terminal.text
    assert not terminal.text.rpartition("\r")[2].strip(), "the line is cleared"


def test_the_time_left_counts_only_what_is_measured_now(
    capsys: pytest.CaptureFixture[str], seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five were kept before: they say nothing about the time of the others."""
    monkeypatch.setattr(comparing, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    heard: list[tuple[str, str]] = []
    with Bar(5, "measuring", form="{desc}{postfix}", leave=False) as bar:
        line = comparing._Line(["a", "b", "c" * 30, "d[/b]", "e"], bar, lambda *one: heard.append(one))
        for label, at in (("c" * 30, 100.0), ("d[/b]", 140.0), ("e", 200.0)):
            seconds[0] = at
            line.tick(label, "loss")
    assert capsys.readouterr().err.splitlines() == [
        f"{'c' * 30} 3/5: loss",
        "d[/b] 4/5: loss, 80 s left",
        "e 5/5: loss, 50 s left",
    ]
    assert heard == [("c" * 30, "loss"), ("d[/b]", "loss"), ("e", "loss")]


def test_a_label_is_cut_where_a_terminal_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end tells checkpoints apart; what the solver says stays on the line."""
    monkeypatch.setenv("COLUMNS", "80")
    terminal = on_terminal(monkeypatch)
    with Bar(20, "measuring", form=progress.LINE, leave=False) as bar:
        line = comparing._Line([f"checkpoints-epoch=0-step={number}" for number in range(20)], bar, None)
        line.tick("checkpoints-epoch=0-step=15", "eigenvalues")
        told("products", 100, 200, 1e-3)
    assert "\r…0-step=15 16/20: eigenvalues, 100/200 products, residual 1e-03 [00:00]" in terminal.text


def test_the_line_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with contextlib.suppress(RuntimeError), ma.progress():
        raise RuntimeError
    assert not terminal.text.rpartition("\r")[2].strip()
    assert not told("products", 1, 2)
