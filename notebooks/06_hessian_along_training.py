# %% [markdown]
# # The Hessian along a training run
#
# Curvature is not a property of a network but of a moment: it changes from step to step, and differs by orders of
# magnitude from one direction to another. This notebook follows it while SGD and Momentum-SAM (Becker, Altrock and
# Risse, [arXiv 2401.12033](https://arxiv.org/abs/2401.12033), figure A8 and table A1) train the digits network, 40 % of
# the labels wrong:
#
# 1. the *largest eigenvalue*, tracked through the run;
# 2. the curvature *along momentum, gradient and a random direction*;
# 3. the *whole spectrum*, at the start, half way and at the end;
# 4. the *five largest eigenvalues* of both networks, certified.

# %%
from contextlib import nullcontext

import pandas as pd
import torch
from torch import nn

import msam
import msam_analysis as ma
from msam_analysis.studies import digits, pictures

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 20
SAMPLES = 250  # of the 1,000: what curvatures are measured on
PERIOD = 16  # steps between two records, an epoch
PROBES = 2  # random starts of a spectral density

# %% [markdown]
# ## What is asked, and of whom
#
# For a unit vector $d$ the curvature along it is $d^\top H d$; the largest over all $d$ is $\lambda_1$, and the mean
# over all $d$ is $\operatorname{tr} H/n$. No Hessian is formed: a product $Hd$ costs about as much as two gradients.
#
# Two probes ask for these while the optimizer runs. `TopEigenvalues` starts each search from the last eigenvector, as
# the Hessian has changed only a little since; `Curvature` needs a product for each direction. Both look at the true
# weights, also where MSAM keeps displaced ones, and at 250 of the training samples, BatchNorm with the statistics of
# the batch, as in the training step.

# %%
CRITERION = nn.CrossEntropyLoss()
OPTIMIZERS = {"SGD": (torch.optim.SGD, {}), "MSAM": (msam.MSAM, {"rho": 3.0})}
inputs, labels, _, _ = digits.load()
measured_on = [(inputs[:SAMPLES], labels[:SAMPLES])]
STEPS = 16 * EPOCHS


def train(name: str) -> tuple[pd.DataFrame, dict[str, ma.Objective]]:
    """Train as in the first notebook; return what the monitor recorded, and the losses around three moments."""
    torch.manual_seed(0)
    model = digits.network()
    make_optimizer, options = OPTIMIZERS[name]
    optimizer = make_optimizer(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    loss = ma.Objective(model, CRITERION, measured_on, batchnorm="batch")
    moments = {"start": loss.with_weights(loss.point().clone())}
    probes: list[ma.probes.Probe | ma.probes.Every] = [
        ma.probes.TopEigenvalues(loss, confirm=False),
        ma.probes.Curvature(loss),
    ]
    with ma.Monitor(optimizer, probes, every=PERIOD) as monitor:
        for epoch in range(EPOCHS):
            for index in torch.randperm(len(inputs)).split(64):
                optimizer.zero_grad()
                CRITERION(model(inputs[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
            if epoch + 1 in (EPOCHS // 2, EPOCHS):
                with optimizer.unperturbed() if name == "MSAM" else nullcontext():
                    weights = loss.point().clone()
                moments["half way" if "half way" not in moments else "end"] = loss.with_weights(weights)
    table = monitor.frame().assign(optimizer=name, seed=0, epoch=lambda rows: rows["step"] / 16)
    return table, moments


trained = {name: train(name) for name in OPTIMIZERS}
recorded = pd.concat(table for table, _ in trained.values())

# %% [markdown]
# ## 1. The largest eigenvalue

# %%
ax = pictures.over_training(recorded, "lambda_1", log=True, label="λ₁ of the training loss")

# %% [markdown]
# *What to see.* Both optimizers leave the sharply curved place where they began within an epoch. Then they part: SGD's
# λ₁ rises again as it learns more and more labels by heart, to about twice of where it began; MSAM's goes on falling,
# to a tenth.
#
# *How far to trust it.* Each value comes with a residual (`lambda_residual`), within which there is an eigenvalue. With
# `confirm=False` nobody has looked whether another one has overtaken the one that is followed; that is three times
# cheaper, and section 4 looks again, without.

# %%
last = recorded[recorded["step"] == recorded["step"].max()].set_index("optimizer")
assert (recorded["lambda_converged"] == 1).all()
assert last.loc["SGD", "lambda_1"] > 1.5 * last.loc["MSAM", "lambda_1"]

# %% [markdown]
# ## 2. Along momentum, gradient and a random direction

# %%
directions = {"curvature_momentum": "momentum", "curvature_gradient": "gradient", "curvature_random": "random"}
axes = pictures.over_training(recorded, directions, log=True, label="curvature d'Hd/d'd")

# %% [markdown]
# *What to see.* A random direction is flat: its curvature is the mean of 14,458 eigenvalues, nearly all of them close
# to
# 0. Gradient and momentum are no random directions; both lie largely where the Hessian is curved, the gradient because
# it is steep there, the momentum because it is made of gradients. This is why a step of MSAM's, along the momentum,
# meets curvature at all, and noise of the same length does not.
#
# *How far to trust it.* Each point is one product with one vector, exact to rounding; but the vectors are those of one
# batch. A missing point is a curvature below 0.

# %%
middle = recorded[recorded["step"] > 0].groupby("optimizer")[list(directions)].median()
assert (middle["curvature_gradient"] > 5 * middle["curvature_random"]).all()
assert (middle["curvature_momentum"] > 5 * middle["curvature_random"]).all()

# %% [markdown]
# ## 3. The whole spectrum
#
# How many eigenvalues are how large? `spectral_density` finds the outliers one by one, and what lies between them by
# random starts (stochastic Lanczos quadrature). The scale is logarithmic: a single eigenvalue is a bump of
# $1/14{,}458$.

# %%
densities = {
    moment: {
        name: ma.spectral_density(moments[moment], probes=PROBES, steps=40, extremes=2, tolerance=1e-2)
        for name, (_, moments) in trained.items()
        if moment != "start" or name == "SGD"  # one network, untrained
    }
    for moment in ("start", "half way", "end")
}
figure, axes = ma.plots.panels(3, share_x=True, share_y=True)
for ax, (moment, those) in zip(axes, densities.items(), strict=True):
    ma.plots.spectral_density(those, ax, legend=False)
    with ma.plots.style():
        ax.set_title("start, both" if moment == "start" else moment)
with ma.plots.style():
    handles, names = axes[-1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))

# %% [markdown]
# *What to see.* At the start the spectrum reaches about as far to the left as to the right: the untrained network sits
# on a saddle. Training does away with the left side, the directions in which the loss would fall further, whatever the
# optimizer. On the right they differ: MSAM draws the spectrum together around 0, where nearly all of the eigenvalues
# are; SGD pulls a few of them out, beyond where the longest began.
#
# *How far to trust it.* The ticks are certified eigenvalues, the rest is smoothed with a standard deviation of 0.1; the
# width of the peak at 0 is that of the smoothing.

# %%
left = {moment: {name: -float(d.bottom[0]) for name, d in those.items()} for moment, those in densities.items()}
right = {moment: {name: float(d.top[0]) for name, d in those.items()} for moment, those in densities.items()}
assert left["start"]["SGD"] > 0.5 * right["start"]["SGD"]
assert all(left["end"][name] < 0.5 * left["start"]["SGD"] for name in OPTIMIZERS)
assert right["end"]["MSAM"] < 0.5 * min(right["end"]["SGD"], right["start"]["SGD"])

# %% [markdown]
# ## 4. The five largest at the end, certified

# %%
pairs = {name: ma.top_eigenvalues(moments["end"], k=5) for name, (_, moments) in trained.items()}
top = pd.concat({name: found.to_frame() for name, found in pairs.items()}, names=["optimizer"]).reset_index(level=0)
ax = pictures.eigenvalues(top.assign(seed=0))
top.set_index(["optimizer", "index"])[["value", "residual"]]

# %% [markdown]
# *What to see.* Not only the first: all five are larger for SGD. And the first agrees with what was tracked through the
# run.
#
# *How far to trust it.* To the residuals, and as a statement about these 250 samples: those left out would move λ₁ by
# some per cent. One seed, one network: `make study` has three seeds, and `make figures` other networks.

# %%
for name, pair in pairs.items():
    assert pair.converged
    assert float(pair.values[0]) > 0.8 * last.loc[name, "lambda_1"]
assert (pairs["SGD"].values > pairs["MSAM"].values).all()

# %% [markdown]
# ## In short
#
# Curvature lives in a handful of directions. Momentum and gradient lie partly in them, random vectors do not; and on
# the way to a minimum that knows the wrong labels by heart these few get steeper, while MSAM flattens them.
#
# **Exercise.** On a parabola, gradient descent with a rate η is stable along a direction while the curvature there is
# below $2/\eta$. Train on the whole training set as one batch, without momentum, for 200 steps with `lr=0.5` and with
# `lr=1.0`, and record λ₁ at every tenth: where does it stop to rise, and what does the rate have to do with it? It gets
# above $2/\eta$: ask `Curvature` along the gradient whether the steps meet what λ₁ says.
