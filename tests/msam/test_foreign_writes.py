"""Somebody else writes to weights that are displaced: what was written counts as the true weights.

The rule: the parameters written are at their true weights where the writer left them; the others are taken back as
usual. Or the optimizer refuses, in one line that says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, vector_to_parameters

import msam

from .cases import pairwise
from .foreign import (
    LENGTH,
    LR,
    MU,
    STEPS,
    THEN,
    WRITES,
    Trained,
    Weights,
    average,
    clip,
    draws,
    give,
    initialise,
    one_element,
    then_everything,
)  # fmt: skip
from .workloads import furthest, same, saved_state, snapshot, true_weights

pytestmark = pytest.mark.filterwarnings("ignore:expected writes to weights in eval")  # test_writes.py looks at these

DISPLACED = list(msam.PRESETS)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
POLICIES = ["auto", "subtract", "copy"]
HOW: list[dict[str, Any]] = [{}, dict(foreach=True), dict(foreach=False), dict(fused=True)]


def labelled(value: Any) -> str:
    return value.__name__ if callable(value) else str(value).replace("torch.", "")


ROWS = [
    *pairwise(DISPLACED, POLICIES, DTYPES, HOW, WRITES, THEN),
    *(("msam", policy, torch.float32, how, write, then_everything)
      for policy in POLICIES for how in HOW for write in WRITES),
]  # fmt: skip


each_row = pytest.mark.parametrize(("name", "restore", "dtype", "how", "write", "then"), ROWS, ids=labelled)


def trained(name: str, dtype: torch.dtype, restore: str, how: dict[str, Any]) -> Trained:
    """A run; in bfloat16 torch's fused kernel itself goes astray, so that it is left out there."""
    return Trained(name, dtype, restore, **({} if dtype is torch.bfloat16 and how.get("fused") else how))


def right_or_refused(act: Callable[[], None]) -> None:
    """Let it assert what is right, unless the optimizer refuses and says in one line that weights were written."""
    try:
        act()
    except RuntimeError as refusal:
        if not re.fullmatch(r".*(written|wrote|changed|replaced|converted).*", str(refusal)):
            raise


@each_row
def test_what_was_written_counts(name: str, restore: str, dtype: Any, how: Any, write: Any, then: Any) -> None:
    run = trained(name, dtype, restore, how)
    changed = run.written(write)
    assert any(changed)
    right_or_refused(lambda: then(run, changed))


CONTROLS = pairwise(DISPLACED, POLICIES, DTYPES, HOW, THEN)


@pytest.mark.parametrize(("name", "restore", "dtype", "how", "then"), CONTROLS, ids=labelled)
def test_where_nobody_wrote_all_is_taken_back(name: str, restore: str, dtype: Any, how: Any, then: Any) -> None:
    """And the weights stand far from the true ones beforehand."""
    run = trained(name, dtype, restore, how)
    far = furthest(run.weights[:1], run.twin[:1])
    assert run.opt.perturbed
    assert far > 0.2
    then(run, [False, False])


def test_two_writes_and_a_step_between() -> None:
    """The second one meets weights that are displaced anew."""
    run = Trained("msam")
    for step, write in enumerate([clip, average, one_element, initialise]):
        run.written(write)
        run.step(STEPS + step)
        assert run.opt.perturbed
        gap = run.gap()
        assert gap < run.tolerance


@pytest.mark.parametrize("name", ["sam", "asam", "adamw_sam"])
@pytest.mark.parametrize("write", WRITES, ids=labelled)
def test_between_the_steps_of_sam_nothing_is_displaced(name: str, write: Any) -> None:
    run = Trained(name)
    run.last_pass(STEPS)
    run.written(write)
    run.step(STEPS + 1)
    gap = run.gap()
    assert gap < run.tolerance


# ------------------------------------------------------------------------------------------------ averages in and out


@torch.no_grad()
def swapped(run: Trained, look: Callable[[], None]) -> None:
    """Put the average in the weights' place, look, and put back what was there."""
    kept = snapshot(run.weights)
    average(run.model)
    look()
    for p, was in zip(run.weights, kept, strict=True):
        p.copy_(was)


@pytest.mark.parametrize("name", ["msam", "nag", "adaptive_msam", "random", "last_gradient", "adamw_msam"])
@pytest.mark.parametrize("restore", POLICIES)
def test_average_swapped_at_the_true_weights(name: str, restore: str) -> None:
    """The advice: inside ``unperturbed()`` a swap leaves no trace."""
    run, other = Trained(name, restore=restore), Trained(name, restore=restore)
    with run.opt.unperturbed():
        swapped(run, lambda: None)
    assert same(run.weights, other.weights)
    for step in (STEPS, STEPS + 1):
        run.step(step)
        other.step(step)
        assert same(run.weights, other.weights)


@pytest.mark.parametrize("name", ["msam", "nag", "adaptive_msam", "random", "last_gradient", "adamw_msam"])
@pytest.mark.parametrize("restore", POLICIES)
def test_average_swapped_while_displaced(name: str, restore: str) -> None:
    """What was put back counts as true; or as it stood, if the optimizer sees that it is what was there."""
    run = Trained(name, restore=restore)
    stood = snapshot(run.weights)
    swapped(run, lambda: None)

    def look() -> None:
        found = true_weights(run.opt)
        written, taken_back = furthest(found, stood), furthest(found, run.twin)
        assert min(written, taken_back) < run.tolerance

    right_or_refused(look)


def test_average_is_what_eval_shows() -> None:
    """In, a look at it in eval mode, out, and on: at every look what was written last."""
    run = Trained("msam")
    stood = snapshot(run.weights)

    def act() -> None:
        def look() -> None:
            run.opt.eval()
            gap = furthest(run.weights, draws(51))
            assert gap == 0
            run.opt.train()

        swapped(run, look)
        run.opt.eval()
        gap = min(furthest(run.weights, stood), furthest(run.weights, run.twin))
        assert gap < run.tolerance

    right_or_refused(act)


# ----------------------------------------------------------------------------------- tensors put in the weights' place


@pytest.mark.parametrize("name", ["msam", "adaptive_msam", "random", "last_gradient", "sam", "adamw_msam"])
@pytest.mark.parametrize("restore", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=labelled)
def test_a_model_of_another_precision_is_no_other_model(name: str, restore: str, dtype: torch.dtype) -> None:
    """Rounding is no writing: the true weights are those of before, rounded, and so is the next step."""
    run = Trained(name, torch.float32, restore)
    run.model.to(dtype)
    tolerance = {torch.float64: 2e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]

    def act() -> None:
        gap = run.gap()
        assert gap < tolerance
        if run.base == "sgd":  # torch's own AdamW refuses weights of another precision than its buffers
            run.last_pass(STEPS)
            gap = run.gap()
            assert gap < 2 * tolerance
        assert all(p.dtype == dtype for p in run.weights)

    right_or_refused(act)


@pytest.mark.parametrize("restore", POLICIES)
def test_a_model_in_another_memory_format_is_no_other_model(restore: str) -> None:
    """The values are those that stood there: nobody wrote."""
    layer = nn.Conv2d(3, 2, 3).double()
    start = snapshot(layer.parameters())
    opt = msam.MSAM(layer.parameters(), lr=0.0, rho=LENGTH, restore=restore)  # type: ignore[arg-type]
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def act() -> None:
        gap = furthest(true_weights(opt), start)
        assert gap < 1e-12

    right_or_refused(act)


@pytest.mark.parametrize("name", ["msam", "adaptive_msam", "random", "last_gradient", "sam", "adamw_msam"])
@pytest.mark.parametrize("restore", POLICIES)
def test_weights_replaced_by_a_vector(name: str, restore: str) -> None:
    """``vector_to_parameters`` gives each parameter new memory, which no version counter tells."""
    run = Trained(name, restore=restore)
    run.written(lambda model: vector_to_parameters(torch.linspace(-1, 1, 13).double(), model.parameters()))
    right_or_refused(lambda: then_everything(run, [True, True]))


@pytest.mark.parametrize("restore", POLICIES)
def test_pruned_for_good(restore: str) -> None:
    """``prune.remove`` puts the masked weights in the parameter's place; zeros stay zeros."""
    run = Trained("msam", restore=restore)
    zeros = torch.eye(3, dtype=torch.float64)

    def write(model: nn.Module) -> None:
        prune.custom_from_mask(model, "first", zeros)
        prune.remove(model, "first")

    weights = run.weights  # pruning changes their order
    write(run.model)
    run.twin[0].data.copy_(weights[0].detach())

    def act() -> None:
        with run.opt.unperturbed():
            assert not weights[0].detach()[zeros == 0].any()
        gap = run.gap()
        assert gap < run.tolerance

    right_or_refused(act)


# -------------------------------------------------------------------------------------------------------- two of ours


@pytest.mark.parametrize("restore", POLICIES)
def test_two_optimizers_of_ours_on_the_same_weights(restore: str) -> None:
    """Each finds what the other left, and counts it as true: written out by hand."""
    model = Weights()
    weights = list(model.parameters())
    opts = [msam.MSAM(weights, lr=LR, momentum=MU, rho=rho, restore=restore) for rho in (1.0, 2.0)]  # type: ignore[arg-type]
    stored = draws(0)
    velocities = [[torch.zeros_like(w) for w in stored] for _ in opts]

    def act() -> None:
        for step in range(6):
            which, rho = step % 2, 1.0 + step % 2
            give(weights, step, torch.float64)
            opts[which].step()
            v = velocities[which]
            v[:] = [MU * x + g for x, g in zip(v, draws(10 + step), strict=True)]
            norm = torch.cat([x.flatten() for x in v]).norm()
            stored[:] = [w - LR * x - rho * x / norm for w, x in zip(stored, v, strict=True)]
            gap = furthest(weights, stored)
            assert gap < 1e-12

    right_or_refused(act)


# ------------------------------------------------------------------------------- weights and state loaded over a run


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["msam", "adaptive_msam", "random", "last_gradient", "adamw_msam"])
def test_a_run_that_goes_back_to_a_checkpoint(name: str, mode: str, first: str) -> None:
    """Weights and state belong together, whichever is loaded first, also where weights stand displaced already."""
    run = Trained(name)
    getattr(run.opt, mode)()
    weights, state = saved_state(run.model), saved_state(run.opt)
    run.opt.train()
    expected = true_weights(run.opt)
    for step in (STEPS, STEPS + 1):
        run.step(step)

    def act() -> None:
        loads = [lambda: run.model.load_state_dict(weights), lambda: run.opt.load_state_dict(state)]
        for load in loads if first == "model" else reversed(loads):
            load()
        gap = furthest(true_weights(run.opt), expected)
        assert gap < run.tolerance

    right_or_refused(act)
