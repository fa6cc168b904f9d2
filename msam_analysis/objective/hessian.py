"""The Hessian of a loss over batches, as an operator."""

from __future__ import annotations

from torch import Tensor

from msam_analysis.objective.evaluation import BatchLoss
from msam_analysis.objective.graphs import GraphOperator, Product, loss_gradients, mean_gradient, pull_back


class HessianOperator(GraphOperator):
    """``∇²L(w)``: products are the derivative of ``∇L · v`` along the gradient's graph (Pearlmutter 1994).

    A product costs about 2.1 gradients for every batch whose graph is kept, and 3.5 for the others (medians over ten
    small networks on a CPU, ``benchmarks/curvature.py``). Several vectors at once share what is rebuilt, and go through
    small graphs together.

    Where a layer has no second derivative, products are central differences of the gradient,
    ``(∇L(w + h v) - ∇L(w - h v)) / 2h`` with ``h ‖v‖ = 0.03 eps^(1/3) (1 + ‖w‖)``, for 2 gradients each; BatchNorm's
    recalibrated statistics stay those at ``w``. On trained networks of smooth layers their relative error was 1e-4 to
    4e-3 in float32 and below 1e-8 in float64; settings state that of the first vector. To this order the operator is
    neither symmetric nor linear. Kinks, as those of ReLU, have no part in an exact Hessian, but a difference sees those
    that lie within its step: in float32 it was off by 15 % on a trained ReLU network. Measure such networks in float64,
    whose step is too short to meet many.

    Raises
    ------
    ValueError
        At the first product, if the loss depends on none of the parameters, or cannot be differentiated as asked for.
    """

    def _product(self, loss: BatchLoss) -> Product:
        leaves = list(self._leaves.values())
        gradients = loss_gradients(loss.term, self._leaves, create_graph=True)
        return lambda pieces, together, keep: pull_back(gradients, leaves, pieces, together=together, keep=keep)

    def _difference(self, ahead: Tensor, behind: Tensor) -> Tensor:
        first, second = (mean_gradient(self._loss, self._loss.leaves(w), self._constants)[1] for w in (ahead, behind))
        return first - second
