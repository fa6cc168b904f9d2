# %% [markdown]
# # Which perturbation helps the training, which the test set?
#
# Nesterov's method (NAG) and Momentum-SAM (MSAM; Becker, Altrock and Risse, [arXiv
# 2401.12033](https://arxiv.org/abs/2401.12033)) take their gradient at a point further along the last step, and differ
# in one switch: how far.
#
# $$\varepsilon_\text{NAG} = -\eta\,\rho\, v, \quad \rho = \mu, \qquad\qquad
# \varepsilon_\text{MSAM} = -\rho\, \frac{v}{\lVert v \rVert} .$$
#
# One was invented to train faster, the other to generalise better. This notebook asks both of both: first on a
# parabola, then on a table with two rows and two columns, NAG and MSAM against training loss and test accuracy, with
# right and with wrong labels.

# %%
import dataclasses
from collections.abc import Callable
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

import msam_analysis as ma
from msam import Perturbation
from msam_analysis.studies import pictures
from msam_analysis.studies.runs import variant
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import DIGITS

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 20
SEEDS = 2

# %% [markdown]
# ## 1. A parabola, by hand
#
# On $L(w) = h w^2/2$ the displaced gradient is $h(w + \varepsilon)$. With NAG's $\varepsilon$,
#
# $$v_t = \mu v_{t-1} + h (w_t - \eta\rho v_{t-1}) = (\mu - \eta\rho h)\, v_{t-1} + h w_t :$$
#
# the momentum factor gets smaller where the curvature is large. In a direction that swings, a step shrinks the swing by
# $\sqrt{\mu - \eta\rho h}$ instead of $\sqrt\mu$: **a brake on overshooting, and on nothing else.** It lets go as the
# weights come to rest, since $\varepsilon \to 0$ with $v$.
#
# MSAM's $\varepsilon$ keeps its length. The gradient is $hw - h\rho\,\operatorname{sign} v$, and however small the step
# was, it is pushed on with the strength $h\rho$: the weights never come to rest, and what is left of the swing is the
# larger the sharper the valley is.

# %%
KINDS: dict[str, Callable[[float], float]] = {
    "SGD": lambda v: 0.0 * v,
    "NAG": lambda v: -0.1 * 0.9 * v,
    "MSAM": lambda v: -0.1 * (v > 0) + 0.1 * (v < 0),
}
rows = []
for h in (0.5, 2.0):
    for name, displacement in KINDS.items():
        w, v = 1.0, 0.0
        for step in range(201):
            rows.append({"optimizer": name, "seed": 0, "step": step, "h": h, "distance": abs(w)})
            v = 0.9 * v + h * (w + displacement(v))
            w -= 0.1 * v
parabola = pd.DataFrame(rows)
envelope = parabola.assign(
    distance=parabola.groupby(["h", "optimizer"])["distance"].transform(lambda d: d.rolling(12, 1).max())
)
figure, axes = ma.plots.panels(2, share_y=True)
for ax, (h, table) in zip(axes, envelope.groupby("h"), strict=True):
    pictures.over_training(table, "distance", ax, x="step", log=True, label="largest |w| of 12 steps")
    with ma.plots.style():
        ax.set_title(f"h = {h}, η = 0.1, μ = 0.9")

# %% [markdown]
# *What to see.* SGD goes down at one pace in both valleys, $\sqrt\mu$ a step. NAG is faster, and far more so in the
# sharp one. MSAM, here with ρ = 0.1, is as fast at first, and then goes on swinging: in the sharp valley four times as
# far as in the flat one, in proportion to $h$.
#
# *How far to trust it.* One dimension, no noise, a constant rate. In many dimensions $\lVert v \rVert$ is that of all
# directions together, and each gets its part of ρ.

# %%
rest = parabola[parabola["step"] > 180].groupby(["h", "optimizer"])["distance"].max().unstack()
assert (rest["NAG"] < 0.1 * rest["SGD"]).all()
assert (rest["MSAM"] > 10 * rest["SGD"]).all()
assert 3 < rest.loc[2.0, "MSAM"] / rest.loc[0.5, "MSAM"] < 5

# %% [markdown]
# ## 2. Two kinds of labels
#
# The digits again: 1,000 images to train on, 797 to test on. With the right labels, to train well and to generalise are
# nearly the same thing. With 40 % wrong ones they part: whoever fits all of them has learnt mistakes.


# %%
def load(wrong: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return train inputs, train labels of which a share is wrong, test inputs, test labels."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    inputs = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    targets = torch.tensor(labels)[order]
    inputs = (inputs - inputs[:1000].mean()) / inputs[:1000].std()
    mistaken = torch.rand(1000, generator=generator) < wrong
    others = (targets[:1000] + torch.randint(1, 10, (1000,), generator=generator)) % 10
    return inputs[:1000], torch.where(mistaken, others, targets[:1000]), inputs[1000:], targets[1000:]


def train_data(wrong: float) -> list[tuple[Tensor, Tensor]]:
    """Return all of the training set as one batch."""
    return [load(wrong)[:2]]


def correct(output: Tensor, target: Tensor) -> Tensor:
    """Return the share of right predictions."""
    return (output.argmax(dim=1) == target).float().mean()


# %% [markdown]
# `studies` trains what is given by value: a workload, an optimizer's perturbation, a recipe. The probe `rise` records
# the loss of the next batch at the true weights. That is what has to be compared: what NAG and MSAM see while they
# train is the loss at displaced ones.

# %%
METHODS = {
    "SGD": None,
    "NAG": Perturbation(direction="momentum", normalize="lr", rho=0.9),
    "MSAM": Perturbation(direction="momentum", rho=3.0),
}
LABELS = {"right labels": 0.0, "40 % wrong labels": 0.4}


def outcome(kind: str, name: str, seed: int) -> tuple[pd.DataFrame, dict[str, object]]:
    """Train one network; return the course of its training loss, and a row of what came of it."""
    wrong = LABELS[kind]
    problem = dataclasses.replace(DIGITS, train=partial(train_data, wrong))
    trained = train(variant(problem, name, METHODS[name], epochs=EPOCHS), name, seed, every=4, watched=["rise"])
    who = {"labels": kind, "optimizer": name, "seed": seed}
    course = trained.steps.groupby("epoch", as_index=False)["loss_before"].mean().assign(**who)
    inputs, targets, test_inputs, test_targets = load(wrong)
    with torch.no_grad():
        output, test_output = trained.model(inputs), trained.model(test_inputs)
    return course, {
        **who,
        "first_loss": float(course["loss_before"][:3].mean()),
        "last_loss": float(nn.functional.cross_entropy(output, targets)),
        "train_accuracy": float(correct(output, targets)),
        "test_accuracy": float(correct(test_output, test_targets)),
    }


found = [outcome(kind, name, seed) for kind in LABELS for name in METHODS for seed in range(SEEDS)]
courses = pd.concat(course for course, _ in found)
outcomes = pd.DataFrame([row for _, row in found])

# %% [markdown]
# ### The training loss

# %%
figure, axes = ma.plots.panels(2)
for ax, kind in zip(axes, LABELS, strict=True):
    table = courses[courses["labels"] == kind]
    pictures.over_training(table, "loss_before", ax, log=kind == "right labels", label="training loss")
    with ma.plots.style():
        ax.set_title(kind)

# %% [markdown]
# ### The test set

# %%
figure, axes = ma.plots.panels(2)
for ax, kind in zip(axes, LABELS, strict=True):
    pictures.accuracy(outcomes[outcomes["labels"] == kind], ax, legend=False)
    ax.set_xlabel("accuracy (%), filled: test, open: train")
    with ma.plots.style():
        ax.set_title(kind)

# %% [markdown]
# ## 3. The table

# %%
# NAG and MSAM beside SGD: right or wrong labels, training or test.
means = outcomes.groupby(["labels", "optimizer"])[["first_loss", "last_loss", "train_accuracy", "test_accuracy"]].mean()
against = means - means.xs("SGD", level="optimizer")
order = [(kind, name) for kind in LABELS for name in METHODS]
words = {
    "first_loss": "training loss, epochs 1 to 3",
    "last_loss": "training loss, end",
    "train_accuracy": "training accuracy",
    "test_accuracy": "test accuracy",
}
means.loc[order].rename(columns=words).round(3)

# %%
against.loc[[pair for pair in order if pair[1] != "SGD"]].rename(columns=words).round(3)

# %% [markdown]
# *What to see.* Each method does what it was made for, and not the other's work. **NAG lowers the training loss**, in
# the first epochs and with either kind of labels, and does nothing for the test set: the wrong labels it learns by
# heart the sooner. **MSAM raises the training loss**, and where labels are wrong it raises the test accuracy by twenty
# points. With the right labels there is little to gain, and all three agree to half a point.
#
# So a short displacement along the momentum is an accelerator, and a long one a regulariser. NAG's ε is about 0.1 long
# on this problem and vanishes with the rate, MSAM's is 3 to the last step.
#
# *How far to trust it.* Two seeds of one small network. And "generalises better" is here largely "does not learn the
# wrong labels": SGD that is stopped early does not, either. What the table cannot tell is whether MSAM is more than a
# way of stopping early; `make study` has more seeds, and SAM beside them.

# %%
for kind in LABELS:
    assert against.loc[(kind, "NAG"), "first_loss"] < 0 < against.loc[(kind, "MSAM"), "first_loss"]
wrong = "40 % wrong labels"
assert against.loc[(wrong, "MSAM"), "test_accuracy"] > 0.03 + against.loc[(wrong, "NAG"), "test_accuracy"]
assert against.loc[(wrong, "MSAM"), "test_accuracy"] > 0.02
assert abs(against.loc[("right labels", "MSAM"), "test_accuracy"]) < 0.02

# %% [markdown]
# **Exercise.** Is it the length of ε, or that it stays? Add `"long NAG"` to `METHODS`, with `normalize="lr"` and ρ =
# 32, which looks far ahead early in the run and nowhere at its end. To which of the two does it belong, by training
# loss and by test accuracy? Notebook 4 has half of the answer.
