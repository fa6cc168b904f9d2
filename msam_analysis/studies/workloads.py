"""What a study trains: a network, data, a recipe and the optimizers to compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from msam import Perturbation, PerturbedAdamW, PerturbedOptimizer, PerturbedSGD
from msam_analysis.objective.randomness import RandomStream
from msam_analysis.results.fingerprint import fingerprint
from msam_analysis.studies import cifar100, digits, relatives
from msam_analysis.studies.cifar import Checksum
from msam_analysis.studies.networks import mlp, vit

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters that all optimizers of a workload share.

    Attributes
    ----------
    epochs, batch_size
        The last batch of an epoch may be smaller.
    lr
        Peak learning rate.
    momentum, weight_decay
        Of SGD, or β₁ of AdamW and its decoupled decay; weight decay acts at the true weights.
    base
        Which of the two makes the step.
    schedule
        What the learning rate does after the warm-up: ``"cosine"`` to 0 over the steps left, or ``"constant"``.
    warmup
        Epochs in which the learning rate rises linearly to its peak.
    clip
        Largest norm of the gradient, over all parameters together; infinite for no clipping.
    label_smoothing
        Share of the target that is spread over all classes, in training and in every measured loss.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    base: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    clip: float = math.inf
    label_smoothing: float = 0.0

    def steps(self, samples: int, epochs: int | None = None) -> int:
        """Return the optimizer steps of so many epochs (default: of a whole run) over so many training samples."""
        return (self.epochs if epochs is None else epochs) * math.ceil(samples / self.batch_size)

    def lr_factor(self, step: int, samples: int) -> float:
        """Return the learning rate of a step, counted from 0, over its peak."""
        warm, total = self.steps(samples, self.warmup), self.steps(samples)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


@dataclass(frozen=True)
class Workload:
    """A network, its data and recipe, and the optimizers compared on them.

    Attributes
    ----------
    name, description
        For files and for the report.
    network
        Makes an untrained network from torch's global generator.
    train, test
        Fixed batches: what is measured, and trained on unless ``augmented`` says otherwise.
    recipe
        See :class:`Recipe`.
    perturbations
        Optimizer name to its perturbation; ``None`` is plain SGD. The optimizers differ in nothing else.
    controls
        Optimizers that are also trained on batches drawn with replacement, to tell what in the momentum-gradient cosine
        comes from showing every sample once an epoch.
    relatives
        Other workloads, for exhibits that compare several, by what they are: ``"perceptron"``,
        ``"transformer"``, ``"text"``, ``"table"``. Not part of what decides a run of this one.
    augmented
        Images that are changed at random whenever they are trained on; default none.
    samples
        Training samples that curvatures and landscapes are measured on unless a study asks for another number; default
        all.
    save_every
        Epochs between two states of a run that an interrupted study goes on from, unless a study asks for another
        number; default none, and the run begins anew.
    departures
        In what the set-up is not that of its source, in words, for the report.
    """

    name: str
    description: str
    network: Callable[[], nn.Module]
    train: Callable[[], Batches]
    test: Callable[[], Batches]
    recipe: Recipe
    perturbations: Mapping[str, Perturbation | None]
    controls: tuple[str, ...] = ()
    relatives: Mapping[str, Workload] = field(default_factory=dict, compare=False)
    augmented: Callable[[], cifar100.Augmented] | None = None
    samples: int | None = None
    save_every: int | None = None
    departures: tuple[str, ...] = field(default=(), compare=False)

    @property
    def training_samples(self) -> int:
        """How many there are."""
        return sum(len(labels) for _, labels in self.train())

    def optimizer(self, name: str, model: nn.Module) -> PerturbedOptimizer:
        """Return the named optimizer for a model."""
        if name not in self.perturbations:
            raise ValueError(f"unknown optimizer {name!r}: expected one of {list(self.perturbations)}")
        recipe = self.recipe
        # With names, by which a filter of parameters knows them.
        parameters = list(model.named_parameters())
        same: Any = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "perturbation": self.perturbations[name]}
        if recipe.base == "adamw":
            return PerturbedAdamW(parameters, betas=(recipe.momentum, 0.999), **same)
        return PerturbedSGD(parameters, momentum=recipe.momentum, **same)

    def criterion(self) -> nn.Module:
        """Return the loss that is trained on and measured: mean cross-entropy, in nats."""
        return nn.CrossEntropyLoss(label_smoothing=self.recipe.label_smoothing)

    def fingerprint(self, optimizer: str, *extra: object) -> str:
        """Return a hash of all that decides a run, by value: recipe, perturbation, network, data and ``extra``."""
        contents = _contents(self.network, self.train, self.test, self.augmented)
        return fingerprint(self.name, self.recipe, self.perturbations[optimizer], contents, *extra)


# Most of a study's hundreds of runs share these, and hashing them takes longer than the rest of a plan.
@lru_cache
def _contents(
    network: Callable[[], nn.Module],
    train: Callable[[], Batches],
    test: Callable[[], Batches],
    augmented: Callable[[], cifar100.Augmented] | None,
) -> str:
    with RandomStream(0):
        model = network()
    return fingerprint(model, model.state_dict(), train(), test(), None if augmented is None else augmented())


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


def _optimizers(sam: float, msam: float, *, base: str = "SGD", nag: bool = False) -> dict[str, Perturbation | None]:
    """Return the base optimizer, NAG where it is wanted, and SAM and MSAM with these ρ."""
    also = {"NAG": Perturbation(direction="momentum", normalize="lr", rho=_MOMENTUM)} if nag else {}
    perturbed = {
        "SAM": Perturbation(direction="gradient", rho=sam),
        "MSAM": Perturbation(direction="momentum", rho=msam),
    }
    return {base: None, **also, **perturbed}


_SGD = Recipe(epochs=40, batch_size=64, lr=0.1, momentum=_MOMENTUM, weight_decay=5e-4)
_ADAMW = Recipe(epochs=40, batch_size=64, lr=0.01, momentum=_MOMENTUM, weight_decay=0.01, base="adamw", clip=1.0)

# Learning rates and ρ were chosen by the test accuracy of seeds 100 and 101, on grids of factors from 1.5 to 3.
RELATIVES: Mapping[str, Workload] = {
    "perceptron": Workload(
        "digits-perceptron",
        "the digits with 40 % wrong labels; a perceptron without normalisation, 17,226 parameters",
        partial(mlp, [64, 128, 64, 10]),
        digits.train_data,
        digits.test_data,
        _SGD,
        _optimizers(0.2, 2.0),
    ),
    "transformer": Workload(
        "digits-transformer",
        "the digits with 40 % wrong labels; a vision transformer of 2x2 patches, 26,538 parameters, with AdamW",
        partial(vit, 8, 2, 32, 2, 4, mlp=128, in_channels=1),
        digits.train_data,
        digits.test_data,
        dataclasses.replace(_ADAMW, warmup=5),
        _optimizers(0.1, 1.0, base="AdamW"),
    ),
    "text": Workload(
        "text",
        "the next character of scikit-learn's pages on twelve data sets, 29 characters; a causal transformer of 28,352 "
        "parameters, with AdamW",
        relatives.reader,
        relatives.text_train,
        relatives.text_test,
        dataclasses.replace(_ADAMW, epochs=16, batch_size=16, weight_decay=0.1, warmup=1),
        _optimizers(0.02, 0.1, base="AdamW"),
    ),
    "table": Workload(
        "table",
        "breast cancer by 30 measurements, 300 tumours to train on, 30 % of their labels wrong, 269 to test on; a "
        "perceptron of 6,274 parameters",
        partial(mlp, [30, 64, 64, 2]),
        relatives.table_train,
        relatives.table_test,
        dataclasses.replace(_SGD, batch_size=32, lr=0.05),
        _optimizers(0.2, 1.0),
    ),
}
"""Small workloads of other kinds, see :mod:`~msam_analysis.studies.relatives`."""

DIGITS = Workload(
    name="digits",
    description=(
        "scikit-learn's digits: 1,000 real 8x8 images to train on, 40 % of their labels replaced by a wrong one, "
        "797 clean images to test on; a convolutional BatchNorm network of 14,458 parameters"
    ),
    network=digits.network,
    train=digits.train_data,
    test=digits.test_data,
    recipe=_SGD,
    perturbations=_optimizers(0.5, 3.0, nag=True),
    controls=("SGD", "MSAM"),
    relatives=RELATIVES,
)

WORKLOADS: Mapping[str, Workload] = {"digits": DIGITS}
"""Those that come with their data."""

_WIDE = Recipe(epochs=200, batch_size=256, lr=0.5, momentum=_MOMENTUM, weight_decay=5e-4, label_smoothing=0.1)

CIFAR100: Mapping[str, tuple[str, Recipe]] = {
    "cifar100": ("WRN-16-4", _WIDE),
    "cifar100-wrn28-10": ("WRN-28-10", _WIDE),
    "cifar100-resnet50": ("ResNet-50", dataclasses.replace(_WIDE, lr=0.1, weight_decay=1e-3)),
}
"""Those of the paper's table 1 on CIFAR-100: network, one of :data:`.cifar100.NETWORKS`, and recipe."""


def workload(
    name: str,
    *,
    data: Path | str | None = None,
    checksum: Checksum = "published",
    limit: int | None = None,
    epochs: int | None = None,
) -> Workload:
    """Return a workload by name.

    Parameters
    ----------
    name
        ``"digits"``; ``"cifar100"`` (WRN-16-4), ``"cifar100-wrn28-10"`` or ``"cifar100-resnet50"``.
    data
        For CIFAR-100: its archive or folder, see :func:`msam_analysis.studies.cifar.load`.
    checksum
        For CIFAR-100: ``"any"`` reads files of its format that are not the published ones.
    limit
        For CIFAR-100: only so many of the first training and of the first test images.
    epochs
        In place of the workload's own number.

    Raises
    ------
    ValueError
        There is none of that name; it needs ``data``, or has data of its own; the number of epochs is not positive; or
        what :func:`msam_analysis.studies.cifar.load` finds wrong.
    FileNotFoundError
        The data is not there.
    """
    if name in CIFAR100:
        if data is None:
            raise ValueError(
                f"the workload {name!r} needs its images: pass the folder or archive of CIFAR-100's binary version "
                "with --data"
            )
        found = _cifar100(name, cifar100.Source(Path(data), checksum, limit))
    elif name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}: expected one of {[*sorted(WORKLOADS), *CIFAR100]}")
    elif data is not None or checksum != "published" or limit is not None:
        raise ValueError(f"the workload {name!r} comes with its data: leave --data, --checksum and --limit out")
    else:
        found = WORKLOADS[name]
    if epochs is None or epochs == found.recipe.epochs:
        return found
    if epochs < 1:
        raise ValueError(f"expected 1 or more epochs, got {epochs}")
    shorter = f"{epochs} epoch{'s' * (epochs > 1)} instead of {found.recipe.epochs}"
    if found.relatives:
        shorter += ", other problems in proportion"
    share = epochs / found.recipe.epochs
    relatives = {name: _trained_for(relative, share) for name, relative in found.relatives.items()}
    departures = (*found.departures, shorter)
    return dataclasses.replace(_trained_for(found, share), relatives=relatives, departures=departures)


def _trained_for(workload: Workload, share: float) -> Workload:
    """Return a workload that is trained for a share of its epochs, or several times as long."""
    recipe = workload.recipe
    epochs, warmup = max(1, round(share * recipe.epochs)), round(share * recipe.warmup)
    return dataclasses.replace(workload, recipe=dataclasses.replace(recipe, epochs=epochs, warmup=warmup))


def _cifar100(name: str, source: cifar100.Source) -> Workload:
    network, recipe = CIFAR100[name]
    train, test, _ = cifar100.load(source)
    augmentation = train.augmentation
    departures = []
    if source.checksum != "published":
        departures.append("files that were not checked to be the published CIFAR-100")
    if source.limit is not None:
        departures.append(f"the first {len(train.images):,} training and {len(test):,} test images only")
    return Workload(
        name=name,
        description=(
            f"CIFAR-100: {len(train.images):,} colour images of 32x32 pixels to train on, standardised, cropped "
            f"at random with {augmentation.padding} pixels of padding, mirrored, and with a square of "
            f"{augmentation.cutout} pixels cut out; {len(test):,} to test on; {network}"
        ),
        network=cifar100.NETWORKS[network],
        train=partial(cifar100.train_data, source),
        test=partial(cifar100.test_data, source),
        recipe=recipe,
        # The paper's A15 has its optima at ρ of 0.2-0.3 for SAM and 2-3 for MSAM, and A10 fixes 2.2.
        perturbations=_optimizers(0.22, 2.2, nag=True),
        augmented=partial(cifar100.augmented, source),
        samples=10_000,  # of the 50,000: a gradient over all of them takes as long as 200 steps
        save_every=10,
        departures=tuple(departures),
    )
