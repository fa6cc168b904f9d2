# %% [markdown]
# # What a picture of the loss shows, and what it hides
#
# A network has thousands of weights, a picture has two axes. Everything depends on which two. Here three copies of one
# network are trained, with SGD, SAM and MSAM, and seen on four kinds of planes:
#
# 1. through each minimum along *random* directions: how wide is it, for its size?
# 2. along the *top eigenvectors* of the Hessian: how steep is it where it is steepest?
# 3. through *all three minima*: what lies between them?
# 4. through the *trajectories* of the training: where did each turn, and how far is that from the picture?
#
# The data are those of the first notebook: scikit-learn's digits, with 40 % of the 1,000 training labels wrong.

# %%
import copy
import warnings
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma
from msam_analysis.studies import digits

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 40
POINTS = 51  # along each axis of a plane around one minimum
REFINE = 0.01  # largest error of the interpolation, as a share of the range
WIDE = 41  # of a plane through three minima or trajectories

# %% [markdown]
# ## Three networks and the way to them
#
# All three start at the same weights and see the same batches. A `TrajectoryRecorder` listens to the optimizer and
# writes the weights to a folder, here once an epoch. SAM and MSAM displace the weights while they train; the recorder
# writes the true ones.

# %%
OPTIMIZERS = {"SGD": (torch.optim.SGD, {}), "SAM": (msam.SAM, {"rho": 0.5}), "MSAM": (msam.MSAM, {"rho": 3.0})}
inputs, labels, test_inputs, test_labels = digits.load()


def train(name: str) -> nn.Module:
    """Train the digits network: batches of 64, a cosine schedule."""
    torch.manual_seed(0)
    model = digits.network()
    make_optimizer, options = OPTIMIZERS[name]
    optimizer = make_optimizer(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * 16)

    def gradient(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        loss.backward()
        return loss

    with ma.TrajectoryRecorder(f"trajectories/{name}", model, optimizer, every=16, label=name).attach():
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(inputs)).split(64):
                optimizer.step(partial(gradient, batch))
                schedule.step()
    if isinstance(optimizer, msam.PerturbedOptimizer):
        optimizer.eval()
    msam.update_batchnorm_statistics(model, digits.train_data())
    return model.eval()


models = {name: train(name) for name in OPTIMIZERS}
objectives = {name: ma.Objective(model, nn.CrossEntropyLoss(), digits.train_data()) for name, model in models.items()}

# %% [markdown]
# ## 1. Random directions
#
# Two Gaussian directions, each filter rescaled to the norm of the filter that it displaces (Li et al.,
# [arXiv 1712.09913](https://arxiv.org/abs/1712.09913)): at a distance of 1 every filter has moved by as much as there
# is of it. A step of one fixed length would be unfair: behind BatchNorm a network with larger filters computes the same
# function, and would look flatter. The same seeds give the same draws for all three.
#
# 51 × 51 points are 2,601 passes over the data. `refine=0.01` measures where interpolation was wrong, until the largest
# error is estimated below 1 % of the range.

# %%
across = {
    name: (ma.directions.random(objective, seed=0), ma.directions.random(objective, seed=1))
    for name, objective in objectives.items()
}
planes = {name: ma.slice_2d(objectives[name], across[name], points=POINTS, refine=REFINE) for name in models}
axes = ma.plots.slice_2d(planes)

# %% [markdown]
# The same as surfaces. The height is logarithmic here too, and a logarithm makes a funnel of every loss near 0.

# %%
axes = ma.plots.surface_3d(planes)

# %% [markdown]
# What was measured, and what only estimated? To check the estimate of the error, the loss is computed at 50 grid points
# drawn at random.


# %%
def true_error(name: str) -> float:
    """Return the largest error of a plane at 50 of its points."""
    plane, objective, (d1, d2) = planes[name], objectives[name], across[name]
    drawn = torch.randint(POINTS, (50, 2), generator=torch.Generator().manual_seed(0)).tolist()
    points = [objective.point() + float(plane.x[i]) * d1.vector + float(plane.y[j]) * d2.vector for i, j in drawn]
    return max(abs(float(objective.loss(w) - plane.loss[i, j])) for w, (i, j) in zip(points, drawn, strict=True))


economy = pd.DataFrame(
    {
        name: {
            "points": plane.loss.numel(),
            "measured": plane.evaluations,
            "loss at the centre": plane.center_loss,
            "largest loss": float(plane.loss.max()),
            "estimated error": plane.error,
            "error at 50 points": true_error(name),
        }
        for name, plane in planes.items()
    }
).T
economy.round(3)

# %% [markdown]
# *What to see.* SGD's minimum is a narrow pit, those of SAM and MSAM are shallow basins: for the same relative
# displacement SGD's loss rises to more than ten times as much. A few points in a hundred were enough.
#
# *How far to trust it.* As a picture of these two directions, to the error in the table. As a picture of the minimum
# less: two of 14,458 directions were drawn, and the next section shows what they miss.

# %%
assert (economy["measured"] < 0.1 * 51**2).all()
assert (economy["error at 50 points"] <= economy["estimated error"]).all()
rises = {name: float((plane.loss - plane.center_loss).max()) for name, plane in planes.items()}
assert rises["SGD"] > 5 * max(rises["SAM"], rises["MSAM"])

# %% [markdown]
# ## 2. The steepest directions
#
# MSAM's panel hardly changes colour. Is its minimum flat? The two directions of largest curvature are the top
# eigenvectors of the Hessian. Beside them two random ones, all four of length 1.

# %%
flat = objectives["MSAM"]
pairs = ma.top_eigenvalues(flat, k=2)
steep = (ma.Direction(pairs.vectors[:, 0], "eigenvector 1"), ma.Direction(pairs.vectors[:, 1], "eigenvector 2"))
drawn = (ma.directions.random(flat, 0, normalize="l2"), ma.directions.random(flat, 1, normalize="l2"))
two = {
    "top eigenvectors": ma.slice_2d(flat, steep, points=POINTS, refine=REFINE),
    "random": ma.slice_2d(flat, drawn, points=POINTS, refine=REFINE),
}
axes = ma.plots.slice_2d(two)

# %%
curvatures = pd.DataFrame(
    {
        direction.name: {
            "curvature": ma.curvature_along(flat, direction),
            "rise at distance 1": float(flat.loss(flat.point() + direction.vector) - flat.loss()),
        }
        for direction in (*steep, *drawn)
    }
).T
curvatures.map("{:.4f}".format)

# %% [markdown]
# *What to see.* Along the eigenvectors the loss rises by about 1 within a distance of 1. The random plane has one
# colour: its curvatures are hundreds of times smaller. The curvature along a random direction is on average the mean of
# all eigenvalues, trace/n = 0.002, and nearly all of the 14,458 are close to 0.
#
# *How far to trust it.* Both pictures are right. A random plane shows the average, an eigenvector plane the worst case;
# neither stands for the other, so say with a picture which one it is.

# %%
assert pairs.converged
assert abs(curvatures.loc["eigenvector 1", "curvature"] - float(pairs.values[0])) < 1e-3
assert curvatures["curvature"].iloc[:2].min() > 100 * curvatures["curvature"].iloc[2:].abs().max()
trace = ma.trace(flat)
assert curvatures["curvature"].iloc[2:].max() < 10 * trace.value / flat.size

# %% [markdown]
# ## 3. Between the minima
#
# First straight lines, from one minimum (0) to another (1). BatchNorm is a trap here: weights in between have running
# statistics of their own, and those of either end are wrong for them. The policy `"recalibrate"` estimates them at
# every point from the training data. Without it, `interpolation` warns.

# %%
anew = {
    name: ma.Objective(model, nn.CrossEntropyLoss(), digits.train_data(), batchnorm="recalibrate")
    for name, model in models.items()
}


def lines(those: dict[str, ma.Objective]) -> dict[str, ma.results.Slice1D]:
    """Return the loss along the straight lines between the three minima."""
    found = {}
    for start, end in (("SGD", "SAM"), ("SGD", "MSAM"), ("SAM", "MSAM")):
        along = ma.directions.interpolation(those[start], those[end].point())
        found[f"{start} to {end}"] = ma.slice_1d(those[start], along, coordinates=torch.linspace(0, 1, 26).tolist())
    return found


with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    wrong = lines(objectives)
assert len(said) == 3
assert all("do not belong to the weights of another network" in str(warning.message) for warning in said)
right = lines(anew)
axes = ma.plots.slice_1d_panels(
    {"the first network's statistics": wrong, "recalibrated": right}, relative=False, share_y=False
)

# %%
between = pd.DataFrame(
    {
        way: {
            "at 0": line.center_loss,
            "highest in between": float(line.loss.max()),
            "at 1": float(line.loss[-1]),
            "at 1, wrong statistics": float(wrong[way].loss[-1]),
        }
        for way, line in right.items()
    }
).T
between.round(3)

# %% [markdown]
# *What to see.* With the wrong statistics a line does not even end at the loss that the second network has. With those
# estimated anew, every line has a barrier, higher than both of its ends: SAM and MSAM, which look alike in section 1,
# have not found the same minimum.
#
# *How far to trust it.* The barriers are on straight lines. A curved way may be lower (Garipov et al.,
# [arXiv 1802.10026](https://arxiv.org/abs/1802.10026)), and so may a straight one after the channels of one network
# have been put in the order of the other's.

# %%
ends = pd.Series({way: float(objectives[way.split()[-1]].loss()) for way in between.index})
assert (between["at 1"] - ends).abs().max() < 1e-5
assert (between["at 1, wrong statistics"] > 1.03 * ends).all()
barriers = between["highest in between"] / between[["at 0", "at 1"]].max(axis=1)
assert barriers["SAM to MSAM"] > 1.02
assert barriers.min() > 1.02 or EPOCHS < 40

# %% [markdown]
# Three points make a plane. Its two directions have length 1 and a right angle, so that distances in the picture are
# distances between weights. Whatever is a function of the weights can be measured at the same points: here the accuracy
# on the test images, by a network whose statistics are estimated from the training images as usual.

# %%
scratch = copy.deepcopy(models["SGD"])


def on_test_images(_: ma.Objective, weights: Tensor) -> float:
    """Return the accuracy on the test images, in per cent."""
    nn.utils.vector_to_parameters(weights, scratch.parameters())
    msam.update_batchnorm_statistics(scratch, digits.train_data())
    with torch.no_grad():
        hits = scratch.eval()(test_inputs).argmax(1) == test_labels
    return 100 * float(hits.float().mean())


through = ma.directions.plane_through(anew["SGD"], anew["SAM"].point(), anew["MSAM"].point())
surface = ma.slice_2d(
    anew["SGD"],
    through.directions,
    coordinates=through.coordinates(points=WIDE),
    refine=2 * REFINE,
    metrics={"test accuracy": on_test_images},
)
print(f"{surface.evaluations} of {surface.loss.numel()} points were measured; the others are off by an estimated")
print(f"{surface.error:.3f} in the loss and {surface.metric_errors['test accuracy']:.1f} in the accuracy, at most")

# %%
figure, axes = ma.plots.panels(2, panel_height=2.3)
ma.plots.slice_2d(surface, axes[0], label="training loss")
ma.plots.slice_2d(surface, axes[1], values="test accuracy", label="test accuracy, %", log=False)
for ax in axes:
    ax.set(xlabel="distance, from SGD to SAM", ylabel="distance, toward MSAM")
    for (name, look), place in zip(ma.plots.look(models).items(), through.points.tolist(), strict=True):
        ax.plot(*place, look.marker, color=look.color, markeredgecolor="white")
        color = "white" if name == "SGD" else "black"
        ax.annotate(name, place, (0, 6), textcoords="offset points", ha="center", color=color, fontsize=8)

# %% [markdown]
# *What to see.* The two pictures disagree: the pit of the training loss is where the network predicts badly, since
# there it has memorised the wrong labels. From SGD to SAM and to MSAM the training loss and the test accuracy rise
# together. The lowest loss is not at SGD's weights but a little beyond: weight decay pulls back, as strongly as the
# gradient pulls on.
#
# *How far to trust it.* The accuracy of 797 images moves in steps, and interpolates worse than the loss: read the error
# above before the small print of the right picture.

# %%
at_minima = {name: on_test_images(anew[name], anew[name].point()) for name in models}
lowest = surface.loss == surface.loss.min()
assert min(at_minima["SAM"], at_minima["MSAM"]) > at_minima["SGD"] + 8
assert float(surface.metrics["test accuracy"][lowest]) < at_minima["SAM"] - 8
trained = ma.Objective(models["SGD"], nn.CrossEntropyLoss(), digits.train_data(), batchnorm="batch")
slope, pull = (float(v @ through.directions[0].vector) for v in (trained.gradient(), 5e-4 * trained.point()))
assert slope > 0 > pull
assert abs(slope + pull) < 0.3 * slope or EPOCHS < 40  # nearly in balance, where it has converged

# %% [markdown]
# ## 4. The way there
#
# The plane that stays closest to all recorded weights is spanned by their first two principal components. Its share of
# the squared distances is what such pictures are usually praised for.

# %%
trajectories = {name: ma.trajectory.load(f"trajectories/{name}") for name in models}
principal = ma.pca_plane(trajectories)
principal.to_frame().head(4).round(3)

# %% [markdown]
# `project` also says how far from the plane every point is, and measures the loss twice: at the weights, and at their
# picture on the plane. The circles grow with the distance from the plane.

# %%
projections = {name: ma.project(way, principal, objective=anew["SGD"]) for name, way in trajectories.items()}
plane = ma.slice_2d(
    anew["SGD"].with_weights(principal.center),
    principal.directions,
    coordinates=ma.trajectory.grid(projections, points=WIDE),
    refine=REFINE,
)
axes = ma.plots.trajectory_panels(plane, projections)

# %%
columns = ["loss", "projected_loss", "off_plane", "distance"]
seen = pd.concat({name: item.to_frame().set_index("step")[columns].iloc[[0, -1]] for name, item in projections.items()})
seen.round(3)

# %% [markdown]
# *What to see.* All three start at one point. SGD turns to one side, SAM and MSAM to two others, and they part in the
# first epochs: so far the picture is right. But do not be misled by it. It has 85 % of the squared distances, and yet
# the start is 7 away from the plane, nearly nine tenths of its distance from the plane's centre; its loss is 2.3, and
# the picture shows 1.4. Where SGD ends, the picture shows more than twice the loss that it has.
#
# *How far to trust it.* The directions of the turns, yes; heights, only together with the dashed lines. Even a random
# walk gives its first two components about three quarters of its variance, and a smooth curve (Antognini and
# Sohl-Dickstein, [arXiv 1806.08805](https://arxiv.org/abs/1806.08805)): a large share is no proof that training happens
# on a plane.

# %%
assert principal.shares[:2].sum() > 0.75
start, end = seen.loc["SGD"].iloc[0], seen.loc["SGD"].iloc[-1]
assert start["off_plane"] > 0.7 * start["distance"]
assert start["loss"] > 1.3 * start["projected_loss"]
assert end["projected_loss"] > 1.2 * end["loss"]

# %% [markdown]
# ## In short
#
# | plane | shows | hides |
# | ----- | ----- | ----- |
# | two random directions | how far the loss rises on average, for the size of the network | the steep directions |
# | top eigenvectors | the worst case nearby | how rare it is |
# | through three minima | barriers on straight lines | curved ways around |
# | principal components of trajectories | where the ways part | the loss on the way |
#
# One colour scale for what is compared, the name of the directions on the axes, and beside the picture the numbers: the
# eigenvalues, the error of the interpolation, the distance from the plane. The page `docs/landscapes.md` has the
# options: large networks, several processes, interrupted runs, animations, and files for other programs.
#
# **Exercise.** Draw the plane of SGD's minimum again with `ma.directions.random(..., seed=2)` and `seed=3`, and with
# `normalize="l2"` instead of filters: what stays of "a narrow pit", and what of its being narrower than MSAM's?
