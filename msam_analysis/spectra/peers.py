"""Other people's tools on the same objective: PyHessian, with this package's loss behind it.

PyHessian takes a model, a criterion and a loader, calls ``model.eval()`` and ``loss.backward(create_graph=True)``,
and draws from the global generator. Here it gets stand-ins: their batches have the objective's gradients and weights,
their parameters are private leaves, and its draws come from a private stream. So its answer is about the same function,
with the same BatchNorm policy and subset of parameters, and nothing that belongs to the user is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from msam_analysis.objective.evaluation import BatchLoss, Evaluation
from msam_analysis.objective.graphs import loss_gradients
from msam_analysis.objective.objective import Objective
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.objective.second_derivatives import (
    MissingDerivativeError,
    check_twice_differentiable,
    missing_derivatives,
)
from msam_analysis.objective.vectors import no_autocast

Backend = Literal["native", "pyhessian"]


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` for an unknown backend."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {get_args(Backend)}, got {backend!r}")


def pyhessian_eigenvalues(
    target: object, k: int, *, iterations: int | None, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Return the eigenpairs of PyHessian's power iteration: values in its order, unit vectors, number of products.

    Parameters
    ----------
    target
        An objective.
    k, iterations, tolerance
        PyHessian's ``top_n``, ``maxIter`` (``None``: its default) and ``tol``.
    seed
        Seed of PyHessian's random vectors.

    Returns
    -------
    values, vectors, products
        Shapes ``(k,)``, float64, and ``(size, k)``; a vector that PyHessian multiplied by zero is zero.
    """
    loss = _objective(target)
    limit = {} if iterations is None else {"maxIter": iterations}
    with _pyhessian(loss, seed) as (peer, batches):
        values, vectors = peer.eigenvalues(top_n=k, tol=tolerance, **limit)
    columns = torch.stack([loss.layout.flatten(pieces).detach() for pieces in vectors], dim=1)
    lengths = columns.norm(dim=0)
    unit = torch.where(lengths > 0, columns / lengths, torch.zeros_like(columns))
    return torch.tensor(values, dtype=torch.float64), unit, batches.passes


def pyhessian_trace(target: object, draws: int, *, seed: int) -> Tensor:
    """Return PyHessian's ``draws`` values of ``zᵀ H z``, float64; it is kept from stopping early."""
    with _pyhessian(_objective(target), seed) as (peer, _):
        return torch.tensor(peer.trace(maxIter=draws, tol=-torch.inf), dtype=torch.float64)


def _objective(target: object) -> Evaluation:
    if not isinstance(target, Objective):
        raise TypeError(
            f"backend='pyhessian' expected an Objective, got {type(target).__name__}: PyHessian takes a model and "
            "data; pass the objective, or use backend='native' for an operator"
        )
    if target.batches.ranks.count > 1:
        raise ValueError(
            "PyHessian reads all batches in one process, and the objective has them in several: expected ranks=False; "
            "use backend='native'"
        )
    loss = target.evaluation
    if loss.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"PyHessian works on the CPU or on CUDA, got an objective on {loss.device.type}: make it with device='cpu'"
        )
    return loss


@contextlib.contextmanager
def _pyhessian(loss: Evaluation, seed: int) -> Iterator[tuple[Any, _Batches]]:
    """Yield PyHessian on stand-ins for an objective, its draws behind a private stream."""
    try:
        from pyhessian import hessian
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "backend='pyhessian' needs PyHessian: install it with pip install PyHessian, or use backend='native'"
        ) from error
    model = _Model(loss)
    batches = _Batches(loss, model)
    cuda = loss.device.type == "cuda"
    on_device = torch.cuda.device(loss.device) if cuda else contextlib.nullcontext()
    try:
        with RandomStream(seed), torch.enable_grad(), on_device, missing_derivatives():
            yield hessian(model, lambda output, _: output, dataloader=batches, cuda=cuda), batches
    except MissingDerivativeError as missing:
        raise ValueError(
            f"PyHessian needs second derivatives, and {missing}: expected layers that have one; use backend='native'"
        ) from missing
    finally:
        model.zero_grad()


class _Model:
    """A stand-in for the model that PyHessian calls: batch in, batch out."""

    def __init__(self, loss: Evaluation) -> None:
        self.leaves = loss.leaves()

    def __call__(self, batch: _Batch) -> _Batch:
        return batch

    def eval(self) -> _Model:
        return self

    def parameters(self) -> Iterator[Tensor]:
        return iter(self.leaves.values())

    def zero_grad(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None


class _Batch:
    """A stand-in for inputs, output and loss: PyHessian moves it, asks for its weight and differentiates it."""

    def __init__(self, leaves: dict[str, Tensor], loss: BatchLoss) -> None:
        # PyHessian differentiates every gradient by its parameter, also one that does not depend on it.
        gradients = loss_gradients(loss.value, leaves, create_graph=True)
        self._gradients = [(leaf, g + 0.0 * leaf) for leaf, g in zip(leaves.values(), gradients, strict=True)]
        self._weight = loss.weight

    def to(self, _: object) -> _Batch:
        return self

    def size(self, _: int) -> float:
        return self._weight

    def backward(self, *, create_graph: bool) -> None:
        for leaf, gradient in self._gradients:
            leaf.grad = gradient


class _Batches:
    """A stand-in for the loader, which PyHessian reads once for every product."""

    def __init__(self, loss: Evaluation, model: _Model) -> None:
        self.loss = loss
        self.model = model
        self.constants = loss.constants()
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[_Batch, _Batch]]:
        self.passes += 1
        stream, leaves = RandomStream(self.loss.seed), self.model.leaves
        losses = self.loss.batch_losses(leaves, self.constants, stream)
        while True:
            with stream, no_autocast(self.loss.device), self.loss.kernels(twice=True):
                loss = next(losses, None)
                if loss is None:
                    return
                check_twice_differentiable([loss.value])
                batch = _Batch(leaves, loss)
            yield batch, batch
