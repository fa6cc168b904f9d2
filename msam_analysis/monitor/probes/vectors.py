"""Probes of weights, gradient, momentum and step, without gradients of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from msam_analysis.measures.alignment import Products, cosine, inner_products, total_products
from msam_analysis.measures.momentum import momentum_buffers, present_gradients, true_weights
from msam_analysis.monitor.probes.base import By, Finish, check_by, layers_of

Vector = Literal["weights", "gradient", "momentum", "step"]


@dataclass(frozen=True)
class MomentumGradientCosine:
    """``cosine``: cosine between momentum and gradient, ``cos(v_{t−1}, g_t)`` (exhibits F2C and A3 to A7).

    See :func:`~msam_analysis.momentum_gradient_cosine`. For SAM, ``g_t`` is the first of its two gradients. It costs no
    further gradient.

    Parameters
    ----------
    after
        Whether to record ``cosine_after`` as well: ``cos(v_t, g_t)``, with the buffer after the step and the gradient
        of the step (SAM: the second one).
    model
        Model that is trained: the cosines of its layers are recorded as well, in the space of each layer's parameters,
        as ``cosine/<layer>`` and ``cosine_after/<layer>``. Default: no layers.
    by
        Kind of layer: ``"parameter"`` (default), or ``"module"``, which takes weight and bias together.

    Raises
    ------
    ValueError
        ``by`` is unknown; at the first record, none of the model's parameters belongs to the optimizer.

    Notes
    -----
    The gradient is that of the step, before the optimizer adds weight decay to it. Clipping by the global norm and loss
    scales do not change a global cosine. Clipping single values or parameters does; the clipped gradient is recorded,
    as it enters the buffer. Momentum is the buffer itself; for torch's SGD and Adam, but not AdamW, it contains weight
    decay.
    """

    after: bool = False
    model: nn.Module | None = None
    by: By = "parameter"

    def __post_init__(self) -> None:
        """Check the kind of layer."""
        check_by(self.by)

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return ``cosine``; NaN at the first step, and where there is no gradient."""
        return self._cosines("cosine", optimizer, present_gradients(optimizer))

    def across(self, optimizer: torch.optim.Optimizer, step: int) -> Finish | None:
        """Return the function for ``cosine_after``, if it is wanted."""
        return (lambda grads: self._cosines("cosine_after", optimizer, grads)) if self.after else None

    def _cosines(
        self, name: str, optimizer: torch.optim.Optimizer, grads: Mapping[Tensor, Tensor]
    ) -> Mapping[str, float]:
        buffers = momentum_buffers(optimizer)
        return _numbers(name, (buffers, grads), cosine, self.model, self.by, optimizer)


@dataclass(frozen=True)
class Norms:
    """L2 norms of ``weights``, ``gradient``, ``momentum`` and ``step``, as ``weights_norm`` and so on.

    Weights and momentum are those before the step: ``‖w_t‖`` for the true weights, and ``‖v_{t−1}‖``, NaN before there
    is a momentum. The gradient is that of the step, without a loss scale, after clipping and before weight decay (SAM:
    the second one). The step is ``‖w_{t+1} − w_t‖`` for the true weights, weight decay included.

    Parameters
    ----------
    of
        Names of the vectors; default: all four. ``"step"`` keeps a copy of the weights during a recorded step.
    model
        Model that is trained: the norms of its layers are recorded as well, as ``weights_norm/<layer>`` and so on.
        Default: no layers.
    by
        Kind of layer: ``"parameter"`` (default), or ``"module"``, which takes weight and bias together.

    Raises
    ------
    ValueError
        ``of`` is empty or has an unknown name, ``by`` is unknown; at the first record, none of the model's parameters
        belongs to the optimizer.
    """

    of: Sequence[Vector] = get_args(Vector)
    model: nn.Module | None = None
    by: By = "parameter"

    def __post_init__(self) -> None:
        """Check the arguments."""
        check_by(self.by)
        unknown = [name for name in self.of if name not in get_args(Vector)]
        if unknown or not self.of or isinstance(self.of, str):
            raise ValueError(f"of must be some of {get_args(Vector)}, got {self.of!r}: name the vectors in a list")

    def __call__(self, optimizer: torch.optim.Optimizer, step: int) -> Mapping[str, float]:
        """Return the norms of weights and momentum."""
        found: dict[str, float] = {}
        if "weights" in self.of and "step" not in self.of:  # otherwise `across` copies them anyway
            found |= self._norms("weights_norm", optimizer, true_weights(optimizer))
        if "momentum" in self.of:
            try:
                buffers = momentum_buffers(optimizer)
            except RuntimeError:  # an optimizer without momentum has no such norm
                buffers = {}
            found |= self._norms("momentum_norm", optimizer, buffers)
        return found

    def across(self, optimizer: torch.optim.Optimizer, step: int) -> Finish | None:
        """Return the function for the norms of gradient and step, if they are wanted."""
        if not {"gradient", "step"} & {*self.of}:
            return None
        before = {}
        if "step" in self.of:
            before = {
                parameter: weights.clone() if weights.data_ptr() == parameter.data_ptr() else weights
                for parameter, weights in true_weights(optimizer).items()
            }

        def finish(grads: Mapping[Tensor, Tensor]) -> Mapping[str, float]:
            found: dict[str, float] = {}
            if "gradient" in self.of:
                found |= self._norms("gradient_norm", optimizer, grads)
            if "step" in self.of:
                if "weights" in self.of:
                    found |= self._norms("weights_norm", optimizer, before)
                for parameter, weights in true_weights(optimizer).items():
                    before[parameter].sub_(weights)
                found |= self._norms("step_norm", optimizer, before)
            return found

        return finish

    def _norms(
        self, name: str, optimizer: torch.optim.Optimizer, vectors: Mapping[Tensor, Tensor]
    ) -> Mapping[str, float]:
        return _numbers(name, (vectors, {}), _norm, self.model, self.by, optimizer)


def _norm(products: Iterable[Products]) -> float:
    return math.sqrt(sum(aa for _, aa, _ in products))


def _numbers(
    name: str,
    vectors: tuple[Mapping[Tensor, Tensor], Mapping[Tensor, Tensor]],
    number: Callable[[Iterable[Products]], float],
    model: nn.Module | None,
    by: By,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """Return a number from the inner products of two vectors, with a model also for every layer; NaN without any."""
    if model is None:
        return {name: number([total_products(*vectors)]) if any(vectors) else math.nan}
    products = inner_products(*vectors)
    found = {name: number(products.values()) if products else math.nan}
    for layer, parameters in layers_of(model, by, optimizer).items():
        rows = [products[parameter] for parameter in parameters if parameter in products]
        found[f"{name}/{layer}"] = number(rows) if rows else math.nan
    return found
