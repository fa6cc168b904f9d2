# %% [markdown]
# # From MSAM to Nesterov's method in three switches
#
# Momentum-SAM and Nesterov's accelerated gradient (NAG) do the same thing in the same place: before the gradient is
# taken, the weights are moved further along the last step. Becker, Altrock and Risse ([arXiv
# 2401.12033](https://arxiv.org/abs/2401.12033), figure A1) go from one to the other in small steps, to see which of
# them matters:
#
# $$-\rho \frac{v}{\lVert v \rVert} \;\longrightarrow\; -\rho\, v \;\longrightarrow\; -\eta\rho\, v
# \;\longrightarrow\; -\eta\mu\, v .$$
#
# First the length is no longer fixed, then it shrinks with the learning rate η, and then ρ is the momentum factor μ. In
# this package the four are one optimizer and one dataclass with switches. The notebook turns them one by one, shows
# that the last is *exactly* torch's Nesterov, and asks which switch costs the accuracy.

# %%
from collections.abc import Callable

import pandas as pd
import torch
from torch import nn

import msam
from msam import PRESETS, Perturbation
from msam_analysis.studies import digits, pictures
from msam_analysis.studies.runs import variant
from msam_analysis.studies.training import train
from msam_analysis.studies.workloads import DIGITS

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 20
SEEDS = 1
STRENGTHS = 4  # values of ρ for each kind

# %% [markdown]
# ## 1. The switches

# %%
stages = ["msam", "msam_unnormalized", "msam_lr", "nag"]
pd.DataFrame(
    {
        name: {
            "ε": PRESETS[name].equation,
            "direction": PRESETS[name].direction,
            "normalize": PRESETS[name].normalize,
            "ρ": PRESETS[name].rho,
        }
        for name in stages
    }
).T

# %% [markdown]
# A preset is a `Perturbation` with a name. Every optimizer of the package takes one, so that a way that has no name is
# only another line: `Perturbation(direction="momentum", normalize="none", rho=0.2)`.
#
# ## 2. The end of the way is torch's Nesterov
#
# `torch.optim.SGD(nesterov=True)` has no perturbation in its code. It stores the *displaced* weights and adds $g + \mu
# v$. That both are one method is a line of algebra: with $u = w - \eta\mu v$ for what torch stores,
#
# $$u_{t+1} = w_{t+1} - \eta\mu v_t = w_t - \eta v_t - \eta\mu v_t = u_t + \eta\mu v_{t-1} - \eta v_t - \eta\mu v_t
# = u_t - \eta\,(g_t + \mu v_t),$$
#
# as $v_t = \mu v_{t-1} + g_t$. Here are 100 steps of both in double precision. While it trains, our optimizer too keeps
# the displaced weights in the model; `eval()` brings the true ones back.


# %%
def steps_of(
    make_optimizer: Callable[..., torch.optim.Optimizer], **options: bool
) -> tuple[list[torch.Tensor], nn.Module]:
    """Return the parameters that the model holds after each of 100 steps, and the model."""
    torch.manual_seed(0)
    model = digits.network().double()
    inputs, labels, _, _ = digits.load()
    optimizer = make_optimizer(model.parameters(), lr=0.05, momentum=0.9, **options)
    held = []
    for step in range(100):
        index = torch.arange(64 * step, 64 * step + 64) % len(inputs)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[index].double()), labels[index]).backward()
        optimizer.step()
        held.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return held, model


ours, _ = steps_of(msam.NAG)
torchs, _ = steps_of(torch.optim.SGD, nesterov=True)
plain, _ = steps_of(torch.optim.SGD)
apart = [float((a - b).norm() / b.norm()) for a, b in zip(ours, torchs, strict=True)]
print(f"after 100 steps: {apart[-1]:.0e} of the weights' norm between NAG and torch's Nesterov,")
print(f"{float((plain[-1] - torchs[-1]).norm() / torchs[-1].norm()):.1f} between SGD and Nesterov")

# %%
assert max(apart) < 1e-9
assert float((plain[-1] - torchs[-1]).norm()) > 0.01 * float(torchs[-1].norm())

# %% [markdown]
# *How far to trust it.* The equality is exact where the learning rate is constant, with weight decay as well, which
# `msam.NAG` lets act at the displaced weights, as torch does. A schedule changes η between the two moments at which
# torch uses it; the difference is small.
#
# ## 3. How far is ε from the weights?
#
# The three kinds differ in when they look far ahead. The probe `rise` records the length of ε; the data are the digits
# with 40 % of the labels wrong, and the rate falls to 0 along a cosine. For each kind there are some strengths, so that
# the lengths overlap.

# %%
KINDS = {
    "normalised": ("l2", (0.75, 1.5, 3.0, 6.0)),
    "not normalised": ("none", (0.2, 0.4, 0.8, 1.6)),
    "times η": ("lr", (0.9, 4.0, 16.0, 32.0)),
}
inputs, labels, test_inputs, test_labels = digits.load()


def outcome(name: str, perturbation: Perturbation | None, seed: int) -> tuple[pd.DataFrame, dict[str, object]]:
    """Train one network; return the course of ε, and a row of what came of it."""
    trained = train(variant(DIGITS, name, perturbation, epochs=EPOCHS), name, seed, every=8, watched=["rise"])
    with torch.no_grad():
        hits = trained.model(test_inputs).argmax(dim=1) == test_labels
    course = trained.steps.dropna(subset="epsilon_norm").groupby("epoch", as_index=False)["epsilon_norm"].mean()
    row = {
        "optimizer": name,
        "seed": seed,
        "ρ": perturbation.rho if perturbation is not None else 0.0,
        "mean length of ε": float(course["epsilon_norm"].mean()),
        "length of ε at the end": float(course["epsilon_norm"].iloc[-1]),
        "test_accuracy": float(hits.float().mean()),
    }
    return course.assign(optimizer=name, seed=seed, rho=row["ρ"]), row


made = [
    outcome(name, Perturbation(direction="momentum", normalize=normalize, rho=rho), seed)  # type: ignore[arg-type]
    for name, (normalize, rhos) in KINDS.items()
    for rho in rhos[-STRENGTHS:]
    for seed in range(SEEDS)
]
made += [outcome("SGD", None, seed) for seed in range(SEEDS)]
table = pd.DataFrame([row for _, row in made])
table.set_index(["optimizer", "ρ", "seed"]).round(3)

# %%
longest = {name: rhos[-1] for name, (_, rhos) in KINDS.items()}
courses = pd.concat(course for course, _ in made)
chosen = courses[courses["rho"] == courses["optimizer"].map(longest)]
ax = pictures.over_training(chosen, "epsilon_norm", log=True, label="length of ε")

# %% [markdown]
# *What to see.* Each kind at its largest ρ. The normalised one has the same length at every step. Without the
# normalisation it is that of the momentum, which settles within a few epochs here; times η it goes to 0 with the rate:
# the last steps look at the loss where they are.

# %%
ends = table.set_index(["optimizer", "ρ"])
assert (ends.loc["times η", "length of ε at the end"] < 0.1 * ends.loc["times η", "mean length of ε"]).all()
assert (ends.loc["normalised", "length of ε at the end"] > 0.9 * ends.loc["normalised", "mean length of ε"]).all()

# %% [markdown]
# ## 4. What the switches cost
#
# The test accuracy of each run, not against ρ, whose unit changes with the kind, but against the mean length of ε.

# %%
against = table.rename(columns={"mean length of ε": "length"})
panel = pictures.Sweep(against, "length", "test_accuracy", "mean length of ε", "test accuracy (%)", percent=True)
axes = pictures.sweep(panel)

# %% [markdown]
# *What to see.* Against the length of ε the three kinds fall on nearly one curve: it rises to a length of about 3,
# which only the normalised kind reaches here. At the same mean length it matters little whether ε is normalised,
# follows the momentum, or goes away with the rate. NAG itself (times η, ρ = 0.9, the leftmost point) is no better than
# SGD for one reason: its ε is 0.1 long. A Nesterov that looked 35 times as far ahead would be a good MSAM.
#
# So what is the normalisation good for? It makes ρ *mean* something. The other two need a ρ that depends on how large
# the gradients happen to be, and on the rate; a length of 3 is a length of 3.
#
# *How far to trust it.* One seed of each, and 797 images: differences below two points are noise. In these runs the
# length of the momentum hardly changes after the first epochs; where it changes more, mean lengths say less.

# %%
best = table.groupby("optimizer")["test_accuracy"].max()
assert (best.drop("SGD") > best["SGD"] + 0.02).all()
assert best.drop("SGD").max() - best.drop("SGD").min() < 0.1

# %% [markdown]
# **Exercise.** Which steps matter? `rho=msam.Jump(3.0, steps=160)` leaves the first half of the 320 steps without ε.
# Guess before you run it: does it cost half of the gain, all of it, or none?
