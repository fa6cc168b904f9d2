"""Which parameters a perturbation moves."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

__all__ = ["NamedSubset", "ParameterFilter", "Subset", "normalization_layers"]

_NORMALIZATION = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_NORMALIZATION_NAME = re.compile(r"Norm(\d+d)?$")


@runtime_checkable
class ParameterFilter(Protocol):
    """A question about one parameter, asked once when its group is added to the optimizer."""

    def __call__(self, name: str | None, parameter: Tensor) -> bool:
        """Return whether the parameter is displaced; ``name`` is None unless the optimizer was given named ones."""
        ...


Subset = Literal["all"] | ParameterFilter
"""Which parameters move: all of them, or those that a filter chooses."""


@dataclass(frozen=True)
class NamedSubset:
    """A fixed set of a model's parameters, known by identity and by name.

    Identity serves optimizers built on ``model.parameters()``. A copied or unpickled filter keeps the names alone,
    which serve optimizers built on ``model.named_parameters()``.

    Parameters
    ----------
    names : frozenset of str
        Qualified names of the members.
    parameters : tuple of Tensor
        The members themselves.
    """

    names: frozenset[str]
    parameters: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def __call__(self, name: str | None, parameter: Tensor) -> bool:
        """Return whether the parameter is a member.

        Raises
        ------
        ValueError
            If there is neither a name nor a remembered identity to go by.
        """
        if any(parameter is member for member in self.parameters):
            return True
        if name is None and not self.parameters:
            raise ValueError(
                "a copied or unpickled filter knows parameters by name, got parameters without names; give the "
                "optimizer model.named_parameters(), or build the filter from the model anew."
            )
        return name in self.names

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "parameters": ()}


def normalization_layers(model: nn.Module, also: Iterable[type[nn.Module]] = ()) -> NamedSubset:
    """Return the filter that picks the parameters of normalisation layers (the paper's BN-only variant, table T3).

    A layer counts if it is one of torch's batch, instance, group, layer or RMS norms, if its class name ends in "Norm"
    (as in ``LlamaRMSNorm``; a trailing "2d" is allowed), or if ``also`` names its class. Only a layer's own parameters
    count, not those of layers inside it.

    Parameters
    ----------
    model : Module
        The model to be trained.
    also : iterable of type
        Further classes that count.

    Returns
    -------
    NamedSubset
        For ``Perturbation(subset=...)``, and wherever else a function ``(name, parameter) -> bool`` chooses parameters.

    Raises
    ------
    ValueError
        If the model has no such parameter.
    """
    kinds = (*_NORMALIZATION, *also)
    members = {
        f"{prefix}.{name}" if prefix else name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, kinds) or _NORMALIZATION_NAME.search(type(module).__name__)
        for name, parameter in module.named_parameters(recurse=False)
    }
    if not members:
        raise ValueError(
            f"expected a model with parameters in normalisation layers, got {type(model).__name__} without any; "
            "name their classes with also=(...), or choose all parameters."
        )
    return NamedSubset(frozenset(members), tuple(members.values()))
