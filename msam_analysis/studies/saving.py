"""The state of a run under way, in one file: written whole or not at all, read without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from msam_analysis.results import atomic_path


class Stateful(Protocol):
    """What can be saved and gone on from."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        ...


def save(run: Stateful, path: Path) -> None:
    """Write a run's state in place of an earlier one."""
    with atomic_path(path) as partial:
        torch.save(run.state_dict(), partial)


def resume(run: Stateful, path: Path, device: torch.device) -> None:
    """Go on from the state in a file, if there is one.

    Raises ValueError: It cannot be read.
    """
    if not path.is_file():
        return
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # noqa: BLE001 - of half a dozen kinds, by where the damage is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"the state of a run in {path} cannot be read ({reason}): remove it, and the run begins anew"
        ) from None
    run.load_state_dict(state)
