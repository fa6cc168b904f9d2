"""The Fisher matrix of a loss over batches, empirical or sampled, as an operator."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msam_analysis.objective.evaluation import BatchLoss, Evaluation
from msam_analysis.objective.gauss_newton import Bend, GaussNewtonOperator
from msam_analysis.objective.memory import Memory
from msam_analysis.objective.nested import count_samples
from msam_analysis.objective.private import is_pair
from msam_analysis.objective.vectors import widest
from msam_analysis.objective.weighing import IGNORED
from msam_analysis.results import Settings

Kind = Literal["empirical", "sampled"]
DrawLabels = Callable[[Tensor, Any, torch.Generator], Any]
"""``draw(output, target, generator)`` returns a target drawn from what the model predicts, on the output's device."""


class FisherOperator(GaussNewtonOperator):
    r"""``F = Σ_i ∇ℓ_i ∇ℓ_iᵀ / Σ_b n_b``, the second moment of the gradients of single samples.

    ``ℓ_i`` is what sample ``i`` adds to the sum ``n_b ℓ_b`` of its batch, a row of the model's output: for a mean over
    samples its loss, for a mean over tokens the sum over its tokens.

    - ``"empirical"``: the losses are those of the data's own labels. At a minimum of every ``ℓ_i`` the matrix is zero,
      whatever the curvature is (Kunstner, Balles & Hennig 2019).
    - ``"sampled"``: the labels are drawn from what the model predicts, ``draws`` times each. The expectation is the
      Fisher information, which is the Gauss-Newton matrix for the criteria that are known here. If a sample has several
      predictions, of which the criterion takes the mean, the matrix is scaled to this expectation.

    A product costs what a Gauss-Newton product costs, whatever the number of draws: ``J v``, a product with one number
    for each sample, and ``Jᵀ`` of it. No gradient of a single sample is formed.

    Parameters
    ----------
    loss, w, memory, settings
        As for the Gauss-Newton matrix.
    kind
        ``"empirical"`` or ``"sampled"``.
    draws
        Labels drawn for each sample.
    draw
        ``draw(output, target, generator)`` returns drawn targets. Default: known for cross-entropy, binary
        cross-entropy with logits and squared error.
    seed
        Seed of the labels; they are the same at every product.

    Raises
    ------
    ValueError
        An argument is out of range. At the first product: the model's output has no row for each sample, or the loss
        is no function of it; for ``"sampled"`` also if it is not known what the model predicts.
    """

    def __init__(
        self,
        loss: Evaluation,
        w: Tensor | None,
        *,
        kind: Kind,
        draws: int,
        draw: DrawLabels | None,
        seed: int,
        memory: Memory,
        settings: Settings,
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}")
        if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
            raise ValueError(f"draws must be a positive integer, got {draws!r}: labels drawn for each sample")
        if kind == "empirical" and (draw is not None or draws != 1):
            raise ValueError("the empirical Fisher matrix draws no labels: expected draws and draw with kind='sampled'")
        super().__init__(loss, w, memory=memory, settings=settings)
        self._kind, self._draws, self._seed = kind, draws, seed
        self._known = draw is None
        self._draw = draw or (drawing(loss.copy.loss_fn) if kind == "sampled" else None)
        self.settings["matrix"] = f"{kind} Fisher" + (f", {draws} drawn labels a sample" if kind == "sampled" else "")

    def _middle(self, loss: BatchLoss) -> tuple[list[int], Bend]:
        slopes = [self._opened(loss, curved=False)]
        used = list(slopes[0])
        scale = loss.weight
        if self._draw is not None:
            slopes, used = [self._drawn(loss, self._draw, count) for count in range(self._draws)], [0]
            scale = self._scale(loss) / self._draws
        samples = count_samples(loss.batch)
        for index in used:
            shape = tuple(loss.outputs[index].shape)
            if shape[:1] != (samples,):
                raise ValueError(
                    f"the model puts out a tensor of shape {shape} for a batch of {samples} samples: expected one row "
                    "for each sample, whose gradients the Fisher matrix is made of"
                )

        def bend(pushed: list[Tensor], together: bool) -> list[Tensor]:
            total = [torch.zeros_like(piece) for piece in pushed]
            for row in slopes:
                own = [row[index].to(piece.dtype) for index, piece in zip(used, pushed, strict=True)]
                products = [piece * slope for piece, slope in zip(pushed, own, strict=True)]
                rises = torch.stack([p.reshape(*p.shape[: 1 + together], -1).sum(-1) for p in products]).sum(0)
                for into, slope in zip(total, own, strict=True):
                    into.add_(slope * rises.reshape(rises.shape + (1,) * (slope.ndim - 1)), alpha=scale)
            return total

        return used, bend

    def _drawn(self, loss: BatchLoss, draw: DrawLabels, count: int) -> dict[int, Tensor]:
        """Return the derivative, in the model's only output, of the batch's loss with labels that are drawn."""
        if len(loss.cuts) != 1 or not is_pair(loss.batch):
            raise ValueError(
                "labels cannot be drawn for this loss: expected batches (input, target), a model with one output and "
                "criterion(output, target); use kind='empirical' or the Gauss-Newton matrix"
            )
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} labels {loss.number} {count}".encode()))
        cut = loss.cuts[0].detach().requires_grad_()
        target = draw(cut.detach(), loss.batch[1], generator)
        with torch.enable_grad():
            # A criterion may work in place, which a leaf forbids.
            criterion = self._loss.copy.loss_fn
            # A batch that does not count weighs nothing, by which a sum must not be divided.
            value, _ = self._loss.evaluate((cut.clone(), target), loss.weight or 1.0, lambda pair: criterion(*pair))
            return {0: torch.autograd.grad(value, cut)[0]}

    def _scale(self, loss: BatchLoss) -> float:
        """Return the factor that makes the Gauss-Newton matrix the expectation, where the predictions are known."""
        if not self._known or self._loss.findings.weighing.sums:
            return loss.weight
        target, ignored = loss.batch[1], getattr(self._loss.copy.loss_fn, "ignore_index", IGNORED)
        shape = loss.outputs[0].shape
        if _criterion(self._loss.copy.loss_fn) != "labels":
            return float(math.prod(shape))
        if target.is_floating_point():
            return float(math.prod(shape) / shape[1])
        return float((target != ignored).sum())


def drawing(loss_fn: Any) -> DrawLabels:
    """Return how labels are drawn for a criterion; ``ValueError`` for one whose predictions are not known."""
    kind = _criterion(loss_fn)
    options = ("weight", "pos_weight")
    weighted = any(getattr(loss_fn, name, None) is not None for name in options)
    if kind is None or weighted or getattr(loss_fn, "label_smoothing", None):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise ValueError(
            f"it is not known how labels are drawn for {name}: expected CrossEntropyLoss, BCEWithLogitsLoss or MSELoss "
            "without weights and label smoothing, or draw=f(output, target, generator)"
        )
    if kind == "labels":
        return functools.partial(_classes, getattr(loss_fn, "ignore_index", IGNORED))
    return _bits if kind == "bits" else _values


def _criterion(loss_fn: Any) -> str | None:
    known = (
        ("labels", nn.CrossEntropyLoss, F.cross_entropy),
        ("bits", nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
        ("values", nn.MSELoss, F.mse_loss),
    )
    return next((kind for kind, module, function in known if isinstance(loss_fn, module) or loss_fn is function), None)


def _classes(ignored: int, output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """Draw classes, whose dimension is the second one; labels that are left out stay so."""
    levels = output.to(widest(output.device)).softmax(1).cumsum(1)
    uniform = torch.rand(output[:, 0].shape, generator=generator, dtype=torch.float64).to(levels)
    labels = (levels < uniform.unsqueeze(1)).sum(1).clamp_max(output.shape[1] - 1)
    return labels if target.is_floating_point() else torch.where(target == ignored, target, labels)


def _bits(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    wide = output.to(widest(output.device))  # in half precision a likely one would be certain
    uniform = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(wide)
    return (uniform < wide.sigmoid()).to(target.dtype)


def _values(output: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from the Gaussian whose negative logarithm is the squared error: its variance is 1/2."""
    return output + math.sqrt(0.5) * torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
