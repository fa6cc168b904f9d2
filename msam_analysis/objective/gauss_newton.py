"""The generalised Gauss-Newton matrix of a loss over batches, as an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msam_analysis.objective.evaluation import BatchLoss, Evaluation
from msam_analysis.objective.graphs import GraphOperator, Product, loss_gradients, pull_back
from msam_analysis.objective.memory import Memory
from msam_analysis.objective.second_derivatives import MissingDerivativeError, missing_derivatives
from msam_analysis.results import Settings

Bend = Callable[[list[Tensor], bool], list[Tensor]]
"""``J v`` of the outputs that the loss uses, of many vectors or not, to ``H J v``."""


class GaussNewtonOperator(GraphOperator):
    """``G = Σ_b n_b J_bᵀ H_b J_b / Σ_b n_b``, the Hessian without the curvature of the model itself.

    ``J_b`` is the derivative of the model's output on batch ``b`` with respect to the parameters, ``H_b`` the Hessian
    of the batch's mean loss in that output (Schraudolph 2002; Martens 2010, section 4). The matrix is positive
    semi-definite for losses that are convex in the output. It is the Hessian itself for models that are linear in their
    parameters, and the Fisher information for cross-entropy of logits and, up to a factor, for squared errors.

    ``J v`` is the derivative of ``Jᵀ u`` with respect to ``u``; its graph is kept as that of a Hessian is. Where a
    layer of the model has no second derivative, ``J v`` is a central difference of the output instead.

    Raises
    ------
    ValueError
        At the first product, if the loss is no function of what the model puts out: because the model computes it
        itself, because ``loss_fn`` does not call the model, or because it uses the parameters beside it.
    """

    _cut = True

    def __init__(self, loss: Evaluation, w: Tensor | None, *, memory: Memory, settings: Settings) -> None:
        super().__init__(loss, w, memory=memory, settings=settings)
        self.settings["matrix"] = "Gauss-Newton"

    def _product(self, loss: BatchLoss) -> Product:
        leaves = list(self._leaves.values())
        used, bend = self._middle(loss)
        outputs = [loss.outputs[index] for index in used]
        # Jᵀu is linear in u, so that its derivative is J at any u.
        cotangents = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = torch.autograd.grad(outputs, [*leaves, *loss.cuts], cotangents, create_graph=True, allow_unused=True)
        if any(piece is not None for piece in pulled[len(leaves) :]):
            raise ValueError(
                "the model is called on its own output: expected a loss of independent calls; put the loop into the "
                "model's forward"
            )
        weight = _own_weight(loss)  # alone: the loss itself would stay as long as the product
        ends = [torch.zeros_like(leaf) if end is None else end for end, leaf in zip(pulled, leaves, strict=False)]

        def product(pieces: list[Tensor], together: bool, keep: bool) -> list[Tensor]:
            pushed = pull_back(ends, cotangents, pieces, together=together)
            bent = _weighed(bend(pushed, together), weight)
            return pull_back(outputs, leaves, bent, together=together, keep=keep)

        return product

    def _middle(self, loss: BatchLoss) -> tuple[list[int], Bend]:
        """Return which outputs the loss uses, and products with its Hessian in them."""
        slopes = self._opened(loss)
        cuts = [loss.cuts[index] for index in slopes]

        def bend(pushed: list[Tensor], together: bool) -> list[Tensor]:
            return pull_back(list(slopes.values()), cuts, pushed, together=together)

        return list(slopes), bend

    def _difference(self, ahead: Tensor, behind: Tensor) -> Tensor:
        leaves = list(self._leaves.values())
        total, weight_sum = torch.zeros_like(ahead), 0.0
        with self._loss.apart("a Gauss-Newton product by differences") as alike, self._loss.deriving() as stream:
            alike.extend((ahead, behind))
            # The point itself comes last: a checkpointed part that is run again must find its tensors in place.
            first, second, here = (
                self._loss.batch_losses(point, self._constants, stream, cut=True)
                for point in (self._loss.leaves(ahead), self._loss.leaves(behind), self._leaves)
            )
            for plus, minus, loss in zip(first, second, here, strict=True):
                used, bend = self._middle(loss)
                pushed = [(plus.outputs[index] - minus.outputs[index]).detach() for index in used]
                outputs = [loss.outputs[index] for index in used]
                bent = _weighed(self._bent(bend, pushed), _own_weight(loss))
                pulled = pull_back(outputs, leaves, bent, together=False)
                total.add_(self._loss.layout.flatten(pulled), alpha=loss.scale)
                weight_sum += loss.weight
        (mean,) = self._loss.mean(weight_sum, total)
        return mean

    def _opened(self, loss: BatchLoss, *, curved: bool = True) -> dict[int, Tensor]:
        """Return the derivatives of the loss in the outputs that it uses; ``ValueError`` if it uses anything else.

        ``curved``: they can be differentiated again, and ``ValueError`` where there is nothing to differentiate.
        """
        if not loss.value.requires_grad:
            loss_gradients(loss.value, self._leaves)  # raises and says why
        inputs = [*loss.cuts, *self._leaves.values()]
        found = torch.autograd.grad(loss.value, inputs, create_graph=curved, retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found[len(loss.cuts) :]):
            raise ValueError(
                "the loss uses the parameters beside the model's output: expected loss_fn to call the model itself, "
                "not its layers or methods, and to use nothing but tensors that it puts out; leave out penalties on "
                "the weights, whose curvature is known"
            )
        slopes = {index: slope for index, slope in enumerate(found[: len(loss.cuts)]) if slope is not None}
        linear = [loss.cuts[index].ndim for index, slope in slopes.items() if not slope.requires_grad]
        if curved and (0 in linear or len(linear) == len(slopes)):
            raise ValueError(
                "the loss is linear in what the model puts out, so that the Gauss-Newton matrix says nothing: expected "
                "predictions and a loss_fn that compares them with targets; if the model computes the loss itself, "
                "compute it in loss_fn from its logits"
            )
        return slopes

    def _bent(self, bend: Bend, pushed: list[Tensor]) -> list[Tensor]:
        try:
            with missing_derivatives():
                return bend(pushed, False)
        except MissingDerivativeError as missing:
            raise ValueError(
                f"the loss has no second derivative in the model's output ({missing}): expected one that has; use "
                "another version of it, or the Hessian, which can do with differences of the gradient"
            ) from missing


def _own_weight(loss: BatchLoss) -> float | None:
    """Return the weight that a batch has on the way back to the parameters, where processes add up; else ``None``."""
    return None if loss.scale == loss.weight else loss.weight


def _weighed(bent: list[Tensor], weight: float | None) -> list[Tensor]:
    return bent if weight is None else [piece * weight for piece in bent]
