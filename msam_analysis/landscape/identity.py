"""What decides the numbers of a slice, as content hashes: two slices that agree in all of them are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from msam.shards import here
from msam_analysis.objective.direction import Direction
from msam_analysis.objective.objective import Objective
from msam_analysis.results.fingerprint import fingerprint, of_tensors


def identity(
    objective: Objective, directions: Sequence[Direction], axes: Mapping[str, Tensor], settings: Mapping[str, object]
) -> dict[str, str]:
    """Return what decides the numbers of a slice, by a name that a person understands.

    Parameters
    ----------
    objective
        The loss: its weights, its other tensors, its code and its data are read.
    directions, axes
        Where the points are.
    settings
        What else was chosen, in plain values.

    Returns
    -------
    dict
        Name to the value where it is short, else to the beginning of its SHA-256.
    """
    selected = set(objective.layout.names)
    with objective.evaluation.held():
        frozen = here(tensor for name, tensor in objective.model.named_parameters() if name not in selected)

    def hashed(*tensors: Tensor) -> str:
        """Return a hash of tensors of which processes may have parts."""
        own = of_tensors(tensors)
        return own if objective.evaluation.shards is None else fingerprint(objective.batches.ranks.everyone(own))

    buffers = objective.batches.ranks.tensors_of_first(dict(objective.model.named_buffers()))
    criterion = objective.loss_fn
    tensors = [*criterion.parameters(), *criterion.buffers()] if isinstance(criterion, nn.Module) else []
    return {
        "kind of slice": f"{len(axes)}-D",
        "weights": hashed(objective.point()),
        "frozen parameters and buffers": hashed(*frozen, *buffers.values(), *tensors),
        "parameter names": fingerprint(objective.layout.names),
        "network": fingerprint(objective.model),
        "loss function": fingerprint(criterion),
        "data": objective.batches.fingerprint(),
        **{f"direction {name}": hashed(line.vector) for name, line in zip(axes, directions, strict=True)},
        **{f"coordinates of {name}": of_tensors([axis]) for name, axis in axes.items()},
        **{n: str(value) for n, value in {**objective.settings, **settings}.items() if n != "examination"},
    }
