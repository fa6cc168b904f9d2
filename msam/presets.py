"""The paper's methods and ablations as rows of one table: a name, and the perturbation that it stands for.

The four rows ``msam``, ``msam_unnormalized``, ``msam_lr``, ``nag`` are the steps of figure A1, from MSAM to NAG: drop
the normalisation, then tie the displacement to the learning rate, then take ρ = μ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from .filters import ParameterFilter
from .perturbation import Direction, Normalization, Perturbation, Scale
from .schedules import Schedule

__all__ = ["PRESETS", "Preset", "presets_table"]


@dataclass(frozen=True)
class Preset:
    """One row of the table: the switches of a :class:`Perturbation` without its strength.

    Parameters
    ----------
    equation : str
        Equation of ε, as the table in the documentation prints it.
    source : str
        Exhibit of the paper, or the paper, that has the method.
    rho : float
        Default strength ρ, from the source.
    direction, normalize, scale, sign
        Switches of :class:`Perturbation`.
    normalization_only : bool
        Whether a filter for the normalisation layers must be given.
    optimizer : {"sgd", "adamw"}
        Base step for which the method is meant.
    weight_decay_at : {"true", "perturbed"}
        Point of weight decay for which the method is meant.
    """

    equation: str
    source: str
    rho: float
    direction: Direction
    normalize: Normalization = "l2"
    scale: Scale = "none"
    sign: int = 1
    normalization_only: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay_at: Literal["true", "perturbed"] = "true"

    def __call__(
        self, rho: float | Schedule | None = None, *, subset: ParameterFilter | None = None, **options: Any
    ) -> Perturbation:
        """Build the perturbation.

        Parameters
        ----------
        rho : float or Schedule, optional
            Strength ρ. The default is the row's own.
        subset : ParameterFilter, optional
            Filter of the parameters that move. A row with ``normalization_only`` needs one.
        **options
            Further fields of :class:`Perturbation`, such as ``seed``.

        Returns
        -------
        Perturbation
            The rule for ε, for :class:`PerturbedSGD` or :class:`PerturbedAdamW`.

        Raises
        ------
        ValueError
            If the row wants a filter and got none.
        """
        if self.normalization_only and subset is None:
            raise ValueError(
                "this preset moves normalisation layers only, got no filter; "
                "pass subset=msam.normalization_layers(model)."
            )
        return Perturbation(
            direction=self.direction,
            rho=self.rho if rho is None else rho,
            sign=self.sign,
            normalize=self.normalize,
            scale=self.scale,
            subset="all" if subset is None else subset,
            **options,
        )


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "msam": Preset("−ρ v/‖v‖", "Algorithm 1, A15", 3.0, "momentum"),
        "msam_negative": Preset("+ρ v/‖v‖", "F2AB", 3.0, "momentum", sign=-1),
        "msam_unnormalized": Preset("−ρ v", "A1", 1.0, "momentum", normalize="none"),
        "msam_lr": Preset("−ρ η v", "A1", 1.0, "momentum", normalize="lr"),
        "nag": Preset("−η μ v", "A1", 0.9, "momentum", normalize="lr", weight_decay_at="perturbed"),
        "adaptive_msam": Preset("−ρ T² v/‖T v‖", "T3", 3.0, "momentum", scale="adaptive"),
        "relative_msam": Preset("−ρ T v/‖T v‖", "appendix A.7", 3.0, "momentum", scale="relative"),
        "bn_only_msam": Preset("−ρ v/‖v‖, normalisation layers only", "T3", 3.0, "momentum", normalization_only=True),
        "sam": Preset("+ρ g/‖g‖", "Foret et al. 2021", 0.05, "gradient"),
        "asam": Preset("+ρ T² g/‖T g‖", "Kwon et al. 2021", 0.5, "gradient", scale="adaptive"),
        "relative_sam": Preset("+ρ T g/‖T g‖", "appendix A.7", 0.05, "gradient", scale="relative"),
        "bn_only_sam": Preset("+ρ g/‖g‖, normalisation layers only", "T3", 0.05, "gradient", normalization_only=True),
        "random": Preset("+ρ z/‖z‖, z Gaussian", "A9", 3.0, "random"),
        "relative_random": Preset("+ρ T z/‖T z‖, z Gaussian", "A9", 3.0, "random", scale="relative"),
        "last_gradient": Preset("+ρ g₋/‖g₋‖", "A9", 0.3, "last_gradient"),
        "last_gradient_negative": Preset("−ρ g₋/‖g₋‖", "A9", 0.3, "last_gradient", sign=-1),
        "relative_last_gradient": Preset("+ρ T g₋/‖T g₋‖", "A9", 0.3, "last_gradient", scale="relative"),
        "relative_last_gradient_negative": Preset(
            "−ρ T g₋/‖T g₋‖", "A9", 0.3, "last_gradient", scale="relative", sign=-1
        ),
        "adamw_msam": Preset("−ρ m/‖m‖", "T2", 3.0, "momentum", optimizer="adamw"),
        "adamw_sam": Preset("+ρ g/‖g‖", "T2", 0.05, "gradient", optimizer="adamw"),
    }
)
"""Name to row; ``PRESETS["msam"](rho=2.0)`` builds a perturbation."""


def presets_table() -> str:
    """Return the presets as a Markdown table, the one in ``docs/optimizers.md``."""
    head = ["preset", "base", "ε", "ρ", "weight decay at", "source"]
    points = {"true": "w", "perturbed": "w + ε"}
    rows = [
        [f"`{name}`", row.optimizer, row.equation, f"{row.rho:g}", points[row.weight_decay_at], row.source]
        for name, row in PRESETS.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
