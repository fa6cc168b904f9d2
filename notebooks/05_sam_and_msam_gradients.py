# %% [markdown]
# # Is MSAM's gradient SAM's?
#
# SAM takes its gradient at $w + \rho\, g/\lVert g\rVert$, up the gradient of this very batch, and pays for it with a
# second gradient. Momentum-SAM takes it at $w - \rho\, v/\lVert v\rVert$, further along the last step, which is free.
# Both say that they climb before they look. Do they come back with the same gradient?
#
# Becker, Altrock and Risse ([arXiv 2401.12033](https://arxiv.org/abs/2401.12033), figure 3) ask it in one plane, and
# find a strength $\rho_0$ at which MSAM does there what SAM does. Here is the plane, the angle, and $\rho_0$ through a
# training run; then the question that the plane leaves out.

# %%
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import msam
import msam_analysis as ma
from msam_analysis.studies import digits, pictures

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 20
SEEDS = 2

# %% [markdown]
# ## 1. The angle, by formula
#
# Three gradients of one batch at the true weights $w$:
#
# $$g_\text{SGD} = \nabla L(w), \qquad g_\text{SAM} = \nabla L\Bigl(w + \rho_\text{SAM}\, \frac{g_\text{SGD}}{\lVert
# g_\text{SGD} \rVert}\Bigr), \qquad g_\text{MSAM}(\rho) = \nabla L\Bigl(w - \rho\, \frac{v}{\lVert v \rVert}\Bigr).$$
#
# The first two span a plane. Lay the first axis along $g_\text{SAM}$, the second along what of $g_\text{SGD}$ is at a
# right angle to it, and project the third: with coordinates $(x, y)$ its angle is $\operatorname{atan2}(y, x)$. At
# $\rho = 0$ MSAM's gradient *is* the plain one, and the angle is that from SAM to SGD, positive. Where it is 0, at
# $\rho_0$, MSAM's gradient points in this plane where SAM's does.
#
# `sam_msam_angle` computes this from an objective and a momentum, for any optimizer. Beside the angles it returns
# `shares`: the length of the projection over that of the gradient, so how much of it is in the plane at all.
#
# ## 2. At three steps
#
# SGD trains on the digits, with 40 % of the labels wrong. In the first epoch, half way and near the end it stops for a
# moment, and the batch that comes next is asked.

# %%
CRITERION = nn.CrossEntropyLoss()
RHO_SAM = 0.5  # what SAM is run with in the second notebook
RHOS = [0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0]
STEPS = 16 * EPOCHS
inputs, labels, _, _ = digits.load()


def train(
    make_optimizer: Callable[..., torch.optim.Optimizer], seed: int, pauses: tuple[int, ...] = (), **options: float
) -> tuple[pd.DataFrame, dict[int, ma.results.SamMsamAngle]]:
    """Train as in the first notebook; return what the monitor recorded, and the full answer at the pauses."""
    torch.manual_seed(seed)
    model = digits.network()
    optimizer: Any = make_optimizer(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    answers = {}
    batch: list[tuple[Tensor, Tensor]] = []

    def batch_loss() -> ma.Objective:
        return ma.Objective(model, CRITERION, batch, batchnorm="batch")

    def loss(index: Tensor) -> Tensor:
        optimizer.zero_grad()
        value: Tensor = CRITERION(model(inputs[index]), labels[index])
        value.backward()
        return value

    with ma.Monitor(optimizer, [ma.probes.SamAngle(batch_loss, RHOS, RHO_SAM)], every=13) as monitor:
        for step in range(STEPS):
            if step % 16 == 0:
                order = torch.randperm(len(inputs)).split(64)
            index = order[step % 16]
            batch[:] = [(inputs[index], labels[index])]
            if step in pauses:
                objective = batch_loss()
                momentum = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
                vector = nn.utils.parameters_to_vector(momentum)
                answers[step] = ma.sam_msam_angle(objective, vector, RHOS, rho_sam=RHO_SAM)
            optimizer.step(partial(loss, index))
            schedule.step()
    return monitor.frame().assign(seed=seed, epoch=lambda table: table["step"] // 16), answers


pauses = (8, STEPS // 2 + 8, STEPS - 24)
first, answers = train(torch.optim.SGD, 0, pauses)

# %%
figure, (left, right) = ma.plots.panels(2)
with ma.plots.style():
    for (name, look), found in zip(
        ma.plots.look(f"step {step}" for step in answers).items(), answers.values(), strict=True
    ):
        for ax, values in ((left, found.angles), (right, 100 * found.shares)):
            ax.plot(found.rhos, values, color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=3)
        left.lines[-1].set_label(name)
    left.axhline(0, color="#4d4d4d", linewidth=0.7)
    left.set(xlabel="ρ of MSAM", ylabel="angle from SAM's gradient, degrees")
    right.set(xlabel="ρ of MSAM", ylabel="share in the plane, %", ylim=(0, 105))
    left.legend()

# %%
seen = pd.DataFrame(
    {
        f"step {step}": {
            "angle of the plain gradient": float(found.angles[0]),
            "ρ₀": found.rho_0,
            "known to lie above": found.bracket[0],
            "known to lie below": found.bracket[1],
        }
        for step, found in answers.items()
    }
).T
seen.round(2)

# %% [markdown]
# *What to see.* On the left every curve starts some 40 degrees from SAM's gradient and turns towards it as ρ grows: in
# this plane, to go further along the last step does rotate the gradient the way SAM does. On the right the price: the
# further MSAM goes, the less of its gradient is in the plane. At ρ = 3 a third of it is left, or less.
#
# *How far to trust it.* Each curve is one batch of 64 at one step, and wiggles. ρ₀ is interpolated between two of the
# strengths asked; what is *known* is the bracket. Where a curve does not cross zero there is no ρ₀, and the table says
# NaN, not the nearest value.

# %%
for found in answers.values():
    assert found.angles[0] > 10
    assert found.angles[found.rhos == 3.0] < found.angles[0]
    assert found.shares[found.rhos == 3.0] < 0.6

# %% [markdown]
# ## 3. Through the training
#
# The same question at every 13th step, put by a `Monitor` with the probe `SamAngle`. It does not need MSAM to be what
# trains: the momentum of SGD and of SAM can be asked as well.

# %%
runs = {
    "SGD": [train(torch.optim.SGD, seed)[0] for seed in range(SEEDS)],
    "SAM": [train(msam.SAM, seed, rho=RHO_SAM)[0] for seed in range(SEEDS)],
    "MSAM": [train(msam.MSAM, seed, rho=3.0)[0] for seed in range(SEEDS)],
}
asked = pd.concat(pd.concat(tables).assign(optimizer=name) for name, tables in runs.items())
columns = {f"sam_angle/{rho:g}": rho for rho in (0.0, *RHOS)}
medians = asked.groupby(["optimizer", "seed"])[list(columns)].median().rename(columns=columns)
angles = medians.melt(var_name="rho", value_name="angle", ignore_index=False).reset_index()

# %%
asked["fifth"] = 1 + asked["epoch"] * 5 // EPOCHS
roots = asked.groupby(["optimizer", "seed", "fifth"], as_index=False)["rho_0"].mean()
figure, (left, right) = ma.plots.panels(2)
turned = pictures.Sweep(
    angles, "rho", "angle", "ρ of MSAM", "angle from SAM's gradient, degrees", log=False, zero_line=True
)
pictures.sweep(turned, left)
pictures.over_training(roots, "rho_0", right, x="fifth", label="ρ₀, where there is one", legend=False)
with ma.plots.style():
    right.set_xlabel("fifth of the run")

# %%
exists = asked.assign(found=asked["rho_0"].notna()).groupby("optimizer")["found"].mean()
pd.DataFrame(
    {
        "share of steps with a ρ₀ up to 8": exists,
        "median ρ₀": asked.groupby("optimizer")["rho_0"].median(),
        "median angle at ρ = 0": asked.groupby("optimizer")["sam_angle/0"].median(),
        "median angle at ρ = 3": asked.groupby("optimizer")["sam_angle/3"].median(),
    }
).loc[list(runs)].round(2)

# %% [markdown]
# *What to see.* Along all three ways the angle falls with ρ and passes zero. On SGD's and on SAM's way ρ₀ is about the
# ρ = 3 that MSAM is run with here. On MSAM's own way it is larger, about 5: MSAM has made the loss flat along its
# momentum, so that the gradient turns more slowly there.
#
# *How far to trust it.* The band is over two seeds. Not every step has a ρ₀: means of those that have one leave out the
# steps at which MSAM's gradient never turns as far as SAM's.

# %%
typical = angles.groupby(["optimizer", "rho"])["angle"].mean().unstack()
assert (typical[0.0] > typical[1.0]).all()
assert (typical[1.0] > typical[3.0]).all()

# %% [markdown]
# ## 4. What the plane leaves out
#
# In the plane MSAM's gradient may point where SAM's does, and be elsewhere all the same. The cosine of the two in all
# 14,458 dimensions is the share times the cosine of the angle.

# %%
full = pd.concat(
    pd.DataFrame(
        {
            "optimizer": f"step {step}",
            "seed": 0,
            "rho": found.rhos,
            "cosine": found.shares * torch.cos(torch.deg2rad(found.angles)),
        }
    )
    for step, found in answers.items()
)
whole = pictures.Sweep(full, "rho", "cosine", "ρ of MSAM", "cosine with SAM's gradient", log=False, zero_line=True)
axes = pictures.sweep(whole)

# %% [markdown]
# *What to see.* The cosine falls with ρ from the start. The plain gradient, 40 degrees away, is *nearer* to SAM's than
# MSAM's is at any ρ; at ρ₀ the agreement in the plane is that of a small shadow.
#
# *How far to trust it.* It is the same data as above, read in full. It does not say that MSAM is no SAM: the directions
# of a single batch's gradients are mostly noise, and what the two do *on average over steps* may agree better than any
# two gradients. That both end at flat minima is in the first and second notebook.

# %%
cosines = full.set_index(["optimizer", "rho"])["cosine"].unstack()
assert (cosines[0.0] > cosines[3.0]).all()
assert (cosines[3.0] < 0.5).all()

# %% [markdown]
# **Exercise.** A batch of 64 has a noisy gradient. Give `SamAngle` the loss of all 1,000 samples in place of
# `batch_loss` (`every=64` keeps it quick). Does the angle at ρ = 0 get smaller or larger, and what becomes of the share
# at ρ = 3?
