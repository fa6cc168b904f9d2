"""What a study trains: a network, data, a recipe and the optimizers to compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from msam import Perturbation, PerturbedSGD
from msam_analysis.studies import digits
from msam_analysis.studies.fingerprint import fingerprint, untrained

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters that all optimizers of a workload share.

    Attributes
    ----------
    epochs, batch_size
        The last batch of an epoch may be smaller.
    lr
        Peak learning rate; decays to 0 by a cosine over all steps.
    momentum, weight_decay
        Of SGD; weight decay acts at the true weights.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float

    def steps(self, samples: int) -> int:
        """Return the optimizer steps of a whole run over so many training samples."""
        return self.epochs * math.ceil(samples / self.batch_size)


@dataclass(frozen=True)
class Workload:
    """A learning problem and the optimizers compared on it.

    Attributes
    ----------
    name, description
        For files and for the report.
    network
        Makes an untrained network from torch's global generator.
    train, test
        Fixed batches.
    recipe
        See :class:`Recipe`.
    perturbations
        Optimizer name to its perturbation; ``None`` is plain SGD. The optimizers differ in nothing else.
    controls
        Optimizers that are also trained on batches drawn with replacement, to tell what in the momentum-gradient cosine
        comes from showing every sample once an epoch.
    """

    name: str
    description: str
    network: Callable[[], nn.Module]
    train: Callable[[], Batches]
    test: Callable[[], Batches]
    recipe: Recipe
    perturbations: Mapping[str, Perturbation | None]
    controls: tuple[str, ...] = ()

    def optimizer(self, name: str, model: nn.Module) -> PerturbedSGD:
        """Return the named optimizer for a model.

        Raises
        ------
        ValueError
            There is no optimizer of that name.
        """
        if name not in self.perturbations:
            raise ValueError(f"unknown optimizer {name!r}: expected one of {list(self.perturbations)}")
        recipe = self.recipe
        return PerturbedSGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            perturbation=self.perturbations[name],
        )

    def fingerprint(self, optimizer: str, *extra: object) -> str:
        """Return a hash of all that decides a run: recipe, perturbation, network, data, ``extra``, and our code."""
        return fingerprint(
            self.name,
            self.recipe,
            self.perturbations[optimizer],
            untrained(self.network),
            self.train(),
            self.test(),
            *extra,
        )


def formula(perturbation: Perturbation) -> str:
    """Return a perturbation's displacement as a line of text, for example ``ε = −ρ v/‖v‖, ρ = 3``."""
    vector = {"momentum": "v", "gradient": "g", "last_gradient": "g₋₁", "random": "ξ"}[perturbation.direction]
    factor, scaled = {
        "none": ("", vector),
        "adaptive": ("w² ", f"|w| {vector}"),
        "relative": ("|w| ", f"|w| {vector}"),
    }[perturbation.scale]
    tail = {"l2": f"ρ {factor}{vector}/‖{scaled}‖", "none": f"ρ {factor}{vector}", "lr": f"ρ η {factor}{vector}"}
    sign = "−" if perturbation.toward < 0 else "+"
    return f"ε = {sign}{tail[perturbation.normalize]}, ρ = {perturbation.rho}"


_MOMENTUM = 0.9

DIGITS = Workload(
    name="digits",
    description=(
        "scikit-learn's digits: 1,000 real 8x8 images to train on, 40 % of their labels replaced by a wrong one, "
        "797 clean images to test on; a convolutional BatchNorm network of 14,458 parameters"
    ),
    network=digits.network,
    train=digits.train_data,
    test=digits.test_data,
    recipe=Recipe(epochs=40, batch_size=64, lr=0.1, momentum=_MOMENTUM, weight_decay=5e-4),
    perturbations={
        "SGD": None,
        "NAG": Perturbation(direction="momentum", normalize="lr", rho=_MOMENTUM),
        "SAM": Perturbation(direction="gradient", rho=0.5),
        "MSAM": Perturbation(direction="momentum", rho=3.0),
    },
    controls=("SGD", "MSAM"),
)

WORKLOADS: Mapping[str, Workload] = {"digits": DIGITS}


def workload(name: str) -> Workload:
    """Return a workload by name.

    Raises
    ------
    ValueError
        There is none of that name.
    """
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}: expected one of {sorted(WORKLOADS)}")
    return WORKLOADS[name]
