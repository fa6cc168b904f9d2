"""One measure for every layer, block or tensor of a network, with all others fixed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, get_args

from msam_analysis.objective.objective import Objective
from msam_analysis.objective.vectors import ParameterFilter, Selection
from msam_analysis.results import ByLayer, Result

Grouping = Literal["tensor", "layer", "block"]
Measured = TypeVar("Measured", bound=Result)


def by_layer(
    objective: Objective,
    measure: Callable[[Objective], Measured],
    *,
    groups: Grouping | Mapping[str, Selection] = "layer",
) -> ByLayer[Measured]:
    """Measure the loss as a function of one group of parameters at a time, the others at their current values.

    The Hessian of a group is a diagonal block of the Hessian. So its largest eigenvalue is at most that of the whole
    Hessian, and the traces of groups that cover every parameter once add up to the whole trace.

    Parameters
    ----------
    objective
        The loss, whose parameters are grouped; its data is not copied.
    measure
        A function from objective to result: for example ``lambda part: ma.top_eigenvalues(part, k=1)``, ``ma.trace``,
        ``ma.spectral_density`` or ``lambda part: ma.ball_sharpness(part, rho=0.05)``. A group may have fewer parameters
        than eigenvalues are wanted: ask for ``min(k, part.size)``.
    groups
        ``"tensor"``: every parameter by itself. ``"layer"`` (default): the parameters that one module holds itself,
        such as weight and bias. ``"block"``: parameters whose names agree up to their first number (``layer1.0`` in a
        ResNet, ``encoder.layers.3``); without a number, in the first part after the common beginning of all names. Or a
        mapping of names to selections as in :class:`~msam_analysis.Objective`, which may overlap and leave out some.

    Returns
    -------
    ByLayer
        A mapping from the name of the group to its result, in the order of the parameters or of the mapping.

    Raises
    ------
    ValueError
        ``groups`` is unknown or empty, or ``measure`` raises a ``ValueError``, for example because the loss does not
        depend on the group; the message then names the group.

    Examples
    --------
    >>> import torch, msam_analysis as ma
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    >>> data = (torch.eye(2).double(), torch.ones(2, 1).double())
    >>> objective = ma.Objective(model, torch.nn.functional.mse_loss, data)
    >>> traces = ma.by_layer(objective, ma.trace)
    >>> traces.to_frame()[["layer", "quantity"]].values.tolist()
    [['0', 'trace'], ['2', 'trace']]
    """
    results = {}
    for name, selection in _selections(objective, groups).items():
        part = objective.with_parameters(selection)
        try:
            results[name] = measure(part)
        except ValueError as error:
            raise ValueError(f"in the group {name!r}: {error}") from error
    return ByLayer(results=results, settings=objective.settings)


def _selections(objective: Objective, groups: Grouping | Mapping[str, Selection]) -> dict[str, Selection]:
    if isinstance(groups, Mapping):
        if not groups:
            raise ValueError("groups is empty: expected at least one name with a selection of parameters")
        return dict(groups)
    if groups not in get_args(Grouping):
        raise ValueError(
            f"groups must be one of {get_args(Grouping)} or a mapping of names to selections, got {groups!r}"
        )
    names = objective.layout.names
    members: dict[str, set[str]] = {}
    shared = _shared_parts(names)
    for name in names:
        members.setdefault(_group(name, groups, shared), set()).add(name)
    return {group: _only(inside) for group, inside in members.items()}


def _only(names: set[str]) -> ParameterFilter:
    # Not by patterns: a name may hold a character with a meaning there.
    return lambda name, _: name in names


def _group(name: str, grouping: Grouping, shared: int) -> str:
    module = name.split(".")[:-1]
    if grouping == "tensor" or not module:
        return name
    if grouping == "block":
        number = next((index for index, part in enumerate(module) if part.isdigit()), shared)
        module = module[: number + 1]
    return ".".join(module)


def _shared_parts(names: tuple[str, ...]) -> int:
    """Return the number of leading parts that all names share."""
    parts = zip(*(name.split(".") for name in names), strict=False)
    return next((index for index, part in enumerate(parts) if len(set(part)) > 1), 0)
