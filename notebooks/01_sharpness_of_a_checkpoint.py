# %% [markdown]
# # How flat is this minimum?
#
# Two copies of one network, trained on the same data: one with SGD, one with Momentum-SAM (MSAM; Becker, Altrock and
# Risse, [arXiv 2401.12033](https://arxiv.org/abs/2401.12033)). Both are saved, loaded again as a stranger's checkpoint
# would be, and asked the same five questions:
#
# 1. How low is the loss, and how good are the predictions?
# 2. How curved is the loss at its steepest, and is that number right?
# 3. How far can the loss rise within a given distance?
# 4. How far does it rise on average?
# 5. What does it look like along a line, and on a plane?
#
# The data are scikit-learn's digits, real 8×8 images, with 40 % of the 1,000 training labels replaced by wrong ones. A
# network that fits all of them has memorised mistakes, so that a low training loss and a good network part ways.

# %%
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma
from msam_analysis.studies import digits

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 40
ITERATIONS = 200  # at most, of each climb in a ball
POINTS = 15  # along each axis of a plane

# %% [markdown]
# ## Two checkpoints
#
# From SGD to MSAM is a change of one line: the optimizer. MSAM takes its gradient a distance ρ further along the
# last step, where the loss of the next batch is mostly higher; like SGD, it needs one gradient a step.
#
# While it trains, the parameters *are* the displaced ones. `optimizer.eval()` brings the true weights back, for
# evaluating and saving. BatchNorm's running statistics were collected at displaced weights too;
# `update_batchnorm_statistics` estimates them anew.


# %%
def train(make_optimizer: Callable[..., torch.optim.Optimizer], **options: float) -> nn.Module:
    """Train the digits network: batches of 64, a cosine schedule."""
    torch.manual_seed(0)
    inputs, labels, _, _ = digits.load()
    model = digits.network()
    optimizer = make_optimizer(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * 16)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(inputs)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    if isinstance(optimizer, msam.PerturbedOptimizer):
        optimizer.eval()
    msam.update_batchnorm_statistics(model, digits.train_data())
    return model


trained = {"SGD": train(torch.optim.SGD), "MSAM": train(msam.MSAM, rho=3.0)}

# %%
folder = Path("checkpoints")
folder.mkdir(exist_ok=True)
for name, model in trained.items():
    torch.save(model.state_dict(), folder / f"{name}.pt")

# %% [markdown]
# A checkpoint from elsewhere is a file that somebody made, and a pickle can run code when it is opened. `load_model`
# reads tensors only, and wants every name and shape to fit the network.

# %%
models = {name: ma.checkpoints.load_model(folder / f"{name}.pt", digits.network) for name in trained}

# %% [markdown]
# ## The loss as a function of the weights
#
# An `Objective` is the mean loss over all samples as a function of one flat vector, the weights. It never changes the
# network it was made from, and says what every number made from it is conditional on: which data, and how BatchNorm is
# treated (`"eval"`: by its running statistics).

# %%
criterion = nn.CrossEntropyLoss()
objectives = {name: ma.Objective(model, criterion, digits.train_data()) for name, model in models.items()}
objectives["MSAM"].settings

# %% [markdown]
# ## 1. Loss and accuracy
#
# Whatever is a mean over samples is an objective, the accuracy too.


# %%
def correct(output: Tensor, target: Tensor) -> Tensor:
    """Return the fraction of right predictions."""
    return (output.argmax(dim=1) == target).float().mean()


scores = pd.DataFrame(
    {
        name: {
            "train loss": float(objectives[name].loss()),
            "train accuracy": float(ma.Objective(model, correct, digits.train_data()).loss()),
            "test loss": float(ma.Objective(model, criterion, digits.test_data()).loss()),
            "test accuracy": float(ma.Objective(model, correct, digits.test_data()).loss()),
            "norm of the weights": float(objectives[name].point().norm()),
        }
        for name, model in models.items()
    }
).T
scores.round(3)

# %% [markdown]
# *What to see.* SGD reaches a training accuracy near 1, which it can only do by memorising the 400 wrong labels; MSAM
# stays near 0.6, the share of right ones, and is far better on the clean test images.
#
# *How far to trust it.* The means are exact for these images. But 797 images determine an accuracy to one or two
# points, and another initialisation moves it by as much; the two networks are more than twenty points apart.

# %%
assert scores.loc["MSAM", "test accuracy"] > scores.loc["SGD", "test accuracy"] + 0.1
assert scores.loc["SGD", "train accuracy"] > scores.loc["MSAM", "train accuracy"] + 0.1

# %% [markdown]
# ## 2. Curvature: the Hessian's five largest eigenvalues
#
# The Hessian has 14,458² entries; Lanczos's method only ever multiplies it by vectors. Each eigenvalue comes with its
# residual ‖Hv − λv‖, computed against the Hessian itself: an exact eigenvalue lies within that distance.

# %%
pairs = {name: ma.top_eigenvalues(objective, k=5) for name, objective in objectives.items()}
tables = {name: pair.to_frame().set_index("index")[["value", "residual"]] for name, pair in pairs.items()}
pd.concat(tables, axis=1)

# %% [markdown]
# *What to see.* SGD's λ₁ is about three times MSAM's, and the next four are larger by as much: the minimum that SGD
# found is more sharply curved, although its loss is lower.
#
# *How far to trust it.* As numbers, to four digits and more: that is what the residuals say. As a statement about the
# network less far: a Hessian describes the immediate neighbourhood only, of this loss on these data.

# %%
for pair in pairs.values():
    assert pair.converged
    assert (pair.residuals <= 1e-4 * pair.values).all()
assert pairs["SGD"].values[0] > 1.5 * pairs["MSAM"].values[0]

# %% [markdown]
# ## 3. The worst case: the largest rise in a ball
#
# SAM asks by how much the loss can rise within a distance ρ, and answers with one step up the gradient.
# `ball_sharpness` climbs on: from the gradient, from the maximum of the quadratic model, and from the top eigenvector
# both ways. `spread` is the share of the best start's rise by which the worst start falls short.

# %%
radii = (0.1, 0.5)
balls = {
    (name, rho): ma.ball_sharpness(objectives[name], rho, iterations=ITERATIONS) for name in models for rho in radii
}
worst = pd.concat({key: ball.to_frame() for key, ball in balls.items()}, names=["network", "rho"])
worst.droplevel(2)[["one_step", "sharpness", "spread", "converged"]].round(4)

# %% [markdown]
# *What to see.* At ρ = 0.1, SAM's one step finds nearly the same rise for both networks; the largest rise is several
# times higher for SGD. At ρ = 0.5 the networks differ by an order of magnitude, and one step shows a small part of it.
#
# *How far to trust it.* Every value was found at a displacement that is returned with it, so it is a lower bound that
# anyone can check; a higher point may exist. Where the starts differ (`spread`), compare factors, not digits.

# %%
for rho in radii:
    assert balls["SGD", rho].sharpness > 2 * balls["MSAM", rho].sharpness
    assert balls["SGD", rho].sharpness > 2 * balls["SGD", rho].one_step
found = balls["SGD", 0.5]
assert found.displacement.norm() <= found.rho * (1 + 1e-6)
there = objectives["SGD"].loss(objectives["SGD"].point() + found.displacement)
assert abs(float(there) - found.loss - found.sharpness) <= 1e-6 * found.sharpness

# %% [markdown]
# ## 4. The average case
#
# One radius for both networks is unfair if one has larger weights, as SGD's has. Here the noise on every weight is in
# proportion to it: its standard deviation is 10 % of the weight's magnitude.

# %%
averages = {name: ma.average_sharpness(objectives[name], sigma=0.1, adaptive=True) for name in models}
means = pd.concat({name: estimate.to_frame() for name, estimate in averages.items()})
means.droplevel(1)[["value", "standard_error", "draws"]].round(4)

# %% [markdown]
# *What to see.* Relative to its weights, too, SGD's minimum is the sharper one, by several times. The displacement,
# about 0.1 ‖w‖ or 2, is longer than both radii above, and yet the rise is small: of 14,458 dimensions, nearly all are
# flat.
#
# *How far to trust it.* The mean is over 50 pairs of random draws; the standard error is that of these draws alone. The
# two means are many standard errors apart, so that more draws would not change the order.

# %%
gap = averages["SGD"].value - averages["MSAM"].value
assert gap > 5 * (averages["SGD"].standard_error + averages["MSAM"].standard_error)

# %% [markdown]
# ## 5. A line and a plane
#
# Random directions, each filter rescaled to the length of the filter it displaces (Li et al., 2018), so that a step of
# 1 changes either network by as much as there is of it. The same seed draws the same direction for both.

# %%
across = {name: ma.directions.random(objectives[name], seed=0) for name in models}
lines = {name: ma.slice_1d(objectives[name], across[name]) for name in models}
ax = ma.plots.slice_1d(lines, relative=True)

# %%
along = {name: ma.directions.random(objectives[name], seed=1) for name in models}
planes = {name: ma.slice_2d(objectives[name], (across[name], along[name]), points=POINTS) for name in models}
axes = ma.plots.slice_2d(planes)

# %% [markdown]
# *What to see.* SGD's minimum is a deep and narrow pit, MSAM's a wide and shallow basin: within the same relative
# distance the loss of SGD's network rises to many times that of MSAM's. On the planes, which share one logarithmic
# colour scale, MSAM's panel hardly changes colour.
#
# *How far to trust it.* Every point is the full loss at that displacement, not a fit. But these are two random
# directions of 14,458, and the steep ones of section 2 are hardly among them: a flat picture does not prove a flat
# minimum, so read it next to the eigenvalues and the ball.

# %%
for name, line in lines.items():
    assert line.loss[25] == line.center_loss == float(objectives[name].loss())
rises = {name: float((plane.loss - plane.center_loss).mean()) for name, plane in planes.items()}
assert rises["SGD"] > 3 * rises["MSAM"]

# %% [markdown]
# ## In short

# %%
summary = pd.DataFrame(
    {
        name: {
            "λ₁": float(pairs[name].values[0]),
            "largest rise, ρ = 0.1": balls[name, 0.1].sharpness,
            "largest rise, ρ = 0.5": balls[name, 0.5].sharpness,
            "average rise, 10 % noise": averages[name].value,
            "mean rise on the plane": rises[name],
            "test error": 1 - scores.loc[name, "test accuracy"],
        }
        for name in models
    }
)
assert (summary["MSAM"] < summary["SGD"]).all()
summary.round(3)

# %% [markdown]
# By every measure MSAM's minimum is flatter here, and it generalises better. That the two go together in one pair of
# networks does not show that one causes the other: `make study` repeats the comparison with NAG and SAM and over
# several seeds, and gives every claim an interval.
#
# ## The same from the command line
#
# The command needs the checkpoint and the names of two functions, one that makes the network and one that returns the
# data. Functions of your own work alike, from the folder that their module is in.

# %%
command = f"""msam-analysis measure {(folder / "MSAM.pt").as_posix()}
  --model msam_analysis.studies.digits:network
  --data msam_analysis.studies.digits:train_data
  --rho 0.5 --out {(folder / "measured").as_posix()}"""
arguments = [sys.executable, "-m", "msam_analysis", *shlex.split(command)[1:]]
ended = subprocess.run(arguments, check=True, capture_output=True, encoding="utf-8")  # noqa: S603 - ours
print(ended.stdout)

# %%
metrics = pd.read_csv(next(folder.glob("measured/**/metrics.csv"))).set_index("metric")
assert abs(metrics.loc["lambda_1", "value"] - float(pairs["MSAM"].values[0])) < 1e-3

# %% [markdown]
# **Exercise.** Multiply the weights of the first convolution by 10. The BatchNorm behind it undoes that: with
# `batchnorm="recalibrate"` the network computes the same function. Measure it so before and after: which of the numbers
# change, and which would you report?
