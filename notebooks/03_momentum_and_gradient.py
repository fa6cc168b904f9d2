# %% [markdown]
# # Why do momentum and gradient point against each other?
#
# Momentum is a running sum of gradients, $v_t = \mu v_{t-1} + g_t$, and the weights go along $-v$. One would expect a
# new gradient to agree with a sum of so many old ones. It does not: through most of a training run the cosine of
# $v_{t-1}$ and $g_t$ is *negative*. Becker, Altrock and Risse ([arXiv 2401.12033](https://arxiv.org/abs/2401.12033),
# figure 2C) found it, and Momentum-SAM is built on it: if the step just taken went too far, a little further along it
# the loss is higher, and SAM's climb costs no second gradient.
#
# This notebook asks why: first by hand for a parabola, then on a network, where three controls take the possible
# reasons apart.

# %%
import math

import pandas as pd
import torch
from torch import Tensor, nn

import msam_analysis as ma
from msam_analysis.studies import digits, pictures

torch.set_num_threads(1)

# %% tags=["parameters"]
EPOCHS = 40
SEEDS = 2

# %% [markdown]
# ## 1. A parabola, by hand
#
# Let $L(w) = h w^2/2$, with gradient $g = hw$, and let there be no noise:
#
# $$v_t = \mu v_{t-1} + h w_t, \qquad w_{t+1} = w_t - \eta v_t .$$
#
# For $(1-\sqrt\mu)^2 < \eta h < (1+\sqrt\mu)^2$ the weight swings to and fro, $w_t \propto \sqrt\mu^{\,t} \cos(\theta t
# + \varphi)$ with $\cos\theta = (1 + \mu - \eta h)/(2\sqrt\mu)$. The last step overshot if $w_t$ lies beyond the
# minimum, so that $v_{t-1}$, the way it came from, and $g_t$, the way back, have opposite signs. Put the cosine into
# $v_{t-1} w_t = (w_{t-1} - w_t)\, w_t/\eta$, and average over the phase. The share of steps with a negative product is
#
# $$\frac12 + \frac1\pi \arctan\frac{\eta h - (1 - \mu)}{2\sqrt\mu\,\sin\theta},$$
#
# so more than half of them **where $\eta h > 1 - \mu$**: in sharp directions. At $\eta = 0.1$ and $\mu = 0.9$ this is a
# curvature above 1. Flat directions, where the gradient hardly turns, agree most of the time.


# %%
def negative_share(eta_h: float, mu: float = 0.9, steps: int = 20_000) -> float:
    """Return the share of steps with v·g < 0, counted; the swing is rescaled, so that it does not die out."""
    w, v, negative = 1.0, 0.0, 0
    for step in range(steps):
        negative += step > 0 and v * w < 0
        v = mu * v + eta_h * w  # η = 1: only the product with h matters
        w -= v
        size = math.hypot(w, v)
        w, v = w / size, v / size
    return negative / (steps - 1)


def formula(eta_h: float, mu: float = 0.9) -> float:
    """Return the share of steps with v·g < 0, by the formula."""
    cosine = (1 + mu - eta_h) / (2 * mu**0.5)
    return 0.5 + math.atan((eta_h - (1 - mu)) / (2 * mu**0.5 * math.sqrt(1 - cosine**2))) / math.pi


strengths = [0.003 * 1.25**n for n in range(32)]
counted = [negative_share(eta_h) for eta_h in strengths]
computed = [formula(eta_h) for eta_h in strengths]

# %%
figure, (left, right) = ma.plots.panels(2)
with ma.plots.style():
    w, v, weights, opposed = 1.0, 0.0, [], []
    for _ in range(31):
        weights.append(w)
        opposed.append(v * w < 0)
        v = 0.9 * v + 0.2 * w
        w -= v
    left.plot(weights, color="#7F7F7F")
    for sign, name, color in ((True, "v and g opposed", "#D55E00"), (False, "v and g agree", "#0072B2")):
        shown = [step for step, each in enumerate(opposed) if each == sign and step > 0]
        left.plot(shown, [weights[step] for step in shown], "o", markersize=3, color=color, label=name)
    left.axhline(0, color="#4d4d4d", linewidth=0.7)
    left.set(xlabel="step", ylabel="weight", title="ηh = 0.2, μ = 0.9")
    left.legend(loc="upper right")
    right.semilogx(strengths, computed, label="formula")
    right.semilogx(strengths, counted, "o", markersize=3, color="#D55E00", label="counted")
    right.axvline(0.1, color="#4d4d4d", linewidth=0.7)
    right.axhline(0.5, color="#4d4d4d", linewidth=0.7)
    right.annotate("ηh = 1 − μ", (0.1, 0.05), (4, 0), textcoords="offset points")
    right.set(xlabel="ηh", ylabel="share of steps with v·g < 0", ylim=(0, 1))
    right.legend(loc="upper left")

# %% [markdown]
# *What to see.* On the left the weight comes down with the momentum, crosses the minimum and keeps on climbing: those
# are the orange steps. On the right the count sits on the formula, and passes one half at $1 - \mu$.
#
# *How far to trust it.* As far as algebra goes; but a network is no parabola, has 14,458 directions, and its gradient
# has noise.

# %%
assert max(abs(a - b) for a, b in zip(counted, computed, strict=True)) < 0.005
assert all((share > 0.5) == (eta_h > 0.1) for eta_h, share in zip(strengths, computed, strict=True))

# %% [markdown]
# ## 2. With noise: one line that holds for all
#
# Late in training at a constant rate the weights no longer get anywhere: they wander about a minimum. Let $g_t = H w_t
# + \xi_t$ with fresh noise $\xi_t$, and let all averages be constant in time. As $w_t = w_{t-1} - \eta v_{t-1}$, a
# constant average of $w^\top H w$ means $\langle v_{t-1}^\top H w_{t-1} \rangle = \frac\eta2 \langle v_{t-1}^\top H
# v_{t-1} \rangle$, and one step later
#
# $$\langle v_{t-1} \cdot g_t \rangle = \langle v_{t-1}^\top H (w_{t-1} - \eta v_{t-1}) \rangle
# = -\frac{\eta}{2}\,\langle v_{t-1}^\top H\, v_{t-1} \rangle .$$
#
# **Negative, for every learning rate, every momentum and every noise**: whoever is not getting anywhere takes back on
# average what they have just done. Read it as a line: from $w_t$ the loss falls back along $+v_{t-1}$, and the minimum
# along that line lies, on average, half a step back. Here are 100 directions of different curvature, with noise.

# %%
generator = torch.Generator().manual_seed(0)
curvature = torch.logspace(-1, 1, 100, dtype=torch.float64)
place, momentum, eta = torch.zeros_like(curvature), torch.zeros_like(curvature), 0.1
products, halves = [], []
for step in range(4000):
    gradient = curvature * place + torch.randn(100, generator=generator, dtype=torch.float64)
    if step >= 500:
        products.append(float(momentum @ gradient))
        halves.append(float(-eta / 2 * (momentum @ (curvature * momentum))))
    momentum = 0.9 * momentum + gradient
    place = place - eta * momentum
mean, predicted = (sum(values) / len(values) for values in (products, halves))
print(f"mean of v·g {mean:.1f}, of −η/2 v'Hv {predicted:.1f}")
assert abs(mean - predicted) < 0.1 * abs(predicted)

# %% [markdown]
# And after the buffer has taken the gradient in? $v_t \cdot g_t = \mu\, v_{t-1} \cdot g_t + \lVert g_t \rVert^2$ has
# the gradient's own square in it, and is positive. Whoever measures after `optimizer.step()` measures this, and sees
# nothing of what this notebook is about.
#
# ## 3. On a network
#
# A `Monitor` attaches to any optimizer, here torch's own SGD, and asks its probes inside of `step`, while $v_{t-1}$ is
# still the buffer and $g_t$ already the gradient. The data are the digits of the other notebooks, 40 % of the labels
# wrong. Other reasons than overshooting are possible, and each has its control:
#
# | what else could it be? | control |
# | ---------------------- | ------- |
# | each sample comes once an epoch, and what $v$ has just seen will not come again | draw *with replacement* |
# | the network learns its samples by heart, and $v$ is made of them | gradients of *fresh, held-out* batches |
# | any gradient would do | the gradient of *one fixed* held-out batch, again and again |
#
# The held-out images get wrong labels, too, so that they are what the training images are: draws from one source.

# %%
CRITERION = nn.CrossEntropyLoss()
inputs, labels, test_inputs, test_labels = digits.load()
drawn = torch.Generator().manual_seed(1)
wrong = torch.rand(len(test_labels), generator=drawn) < digits.WRONG_LABELS
others = (test_labels + torch.randint(1, 10, test_labels.shape, generator=drawn)) % 10
test_labels = torch.where(wrong, others, test_labels)
held_out = [pair for pair in zip(test_inputs.split(64), test_labels.split(64), strict=True) if len(pair[1]) == 64]
OFFSETS = (-1.0, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 1.0)


WIDTH = max(1, EPOCHS // 10)  # epochs that one point of a curve is the mean of


def watched(seed: int, *, replacement: bool = False) -> pd.DataFrame:
    """Train the digits network as in the first notebook, with SGD, and return what a monitor has recorded."""
    torch.manual_seed(seed)
    model = digits.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * 16)
    batch: list[tuple[Tensor, Tensor]] = []

    def loss_of(data: list[tuple[Tensor, Tensor]]) -> ma.Objective:
        return ma.Objective(model, CRITERION, data, batchnorm="batch")

    fresh = ma.probes.HeldOutCosine(loss_of(held_out), in_turn=True)
    fixed = ma.probes.HeldOutCosine(loss_of(held_out[:1]))
    probes: list[ma.probes.Probe | ma.probes.Every] = [
        ma.probes.MomentumGradientCosine(after=True),
        # A probe is any function of optimizer and step that returns named numbers: here two get names of their own.
        ma.probes.Every(lambda *now: {"fresh": fresh(*now)["held_out_cosine"]}, 8),
        ma.probes.Every(lambda *now: {"fixed": fixed(*now)["held_out_cosine"]}, 8),
        ma.probes.Every(ma.probes.LossAlongMomentum(lambda: loss_of(batch), OFFSETS), 7),
    ]
    with ma.Monitor(optimizer, probes, every=1) as monitor:
        for _ in range(EPOCHS):
            order = torch.randint(len(inputs), (len(inputs),)) if replacement else torch.randperm(len(inputs))
            for index in order.split(64):
                batch[:] = [(inputs[index], labels[index])]
                optimizer.zero_grad()
                CRITERION(model(inputs[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
    table: pd.DataFrame = monitor.frame()
    table["seed"], table["epoch"] = seed, table["step"] // 16 // WIDTH * WIDTH + WIDTH / 2
    return table


runs = {
    "each once an epoch": pd.concat(watched(seed) for seed in range(SEEDS)),
    "with replacement": pd.concat(watched(seed, replacement=True) for seed in range(SEEDS)),
}

# %% [markdown]
# ### Before and after the update
#
# The same two vectors' angle, asked a moment apart:


# %%
def curves(columns: dict[str, tuple[str, str]]) -> pd.DataFrame:
    """Return one curve for each name, from a column of a run: means over ``WIDTH`` epochs, by seed."""
    parts = []
    for name, (run, column) in columns.items():
        means = runs[run].groupby(["seed", "epoch"])[column].mean().rename("cosine").reset_index()
        parts.append(means.assign(optimizer=name))
    whole: pd.DataFrame = pd.concat(parts)
    return whole


moments = curves(
    {
        "before the update": ("each once an epoch", "cosine"),
        "after the update": ("each once an epoch", "cosine_after"),
    }
)
ax = pictures.over_training(moments, "cosine", label="cosine of momentum and gradient")

# %% [markdown]
# *What to see.* Measured before the update, the cosine is negative from the first tenth of the run on. Measured after
# it, it is 0.4, about the gradient's own share in a buffer of ten or so: independent gradients would give $\sqrt{1 -
# \mu^2} = 0.44$.
#
# ### The controls

# %%
once, again = "each once an epoch", "with replacement"
controls = curves(
    {
        once: (once, "cosine"),
        again: (again, "cosine"),
        "held out, fresh batches": (once, "fresh"),
        "held out, one batch": (once, "fixed"),
    }
)
ax = pictures.over_training(controls, "cosine", label="cosine with v of the last step")

# %%
late = {name: table[table["step"] >= 2 * EPOCHS] for name, table in runs.items()}  # without the first eighth
means = pd.concat(
    {name: table.groupby("seed")[["cosine", "cosine_after", "fresh", "fixed"]].mean() for name, table in late.items()}
)
means.groupby(level=0, sort=False).mean().round(3)

# %% [markdown]
# *What to see.* Each control takes something away. With replacement the cosine is nearer to 0, and positive at the end:
# most of its negative value comes from the order of the samples. Within an epoch the batches share out what there is,
# so that after a few whose noise pointed one way the others' must point the other way. What is left in the middle of
# the run is there on fresh held-out batches as well, and on a single one: about 0.02.
#
# *How far to trust it.* 0.02 is small, but the angle is one in 14,458 dimensions, where the cosine of two random
# vectors is 0.008 by its standard deviation, and these are means over training; in most of the points drawn, of eight
# records each, the held-out curves cannot be told from 0. On held-out batches there is a second
# reason to be negative, which no control here removes: learning wrong labels by heart raises the held-out loss, with or
# without overshooting. And at the end of the run with replacement the cosine is *positive*: there the rate is almost 0,
# and section 2's average over a state that does not change does not hold.

# %%
average = means.groupby(level=0).mean()
assert average.loc[once, "cosine"] < 0
assert average.loc[once, "cosine_after"] > 0.3
assert average.loc[once, "cosine"] < average.loc[again, "cosine"] - 0.02

# %% [markdown]
# ## 4. The loss along the last step
#
# A cosine is a slope. This is the line itself: the loss of the next batch at $w_t + a\, v/\lVert v \rVert$. Negative
# $a$ goes on as before, positive $a$ goes back.

# %%
lines = []
for name, table in late.items():
    known = table.dropna(subset="loss_along/0")
    for a in OFFSETS:
        rise = (known[f"loss_along/{a:g}"] - known["loss_along/0"]).groupby(known["seed"]).mean()
        lines.append(pd.DataFrame({"optimizer": name, "seed": rise.index, "a": a, "rise": rise.to_numpy()}))
along = pd.concat(lines)
line = pictures.Sweep(along, "a", "rise", "distance a along v", "rise of the batch's loss", log=False, zero_line=True)
axes = pictures.sweep(line)

# %% [markdown]
# *What to see.* With each sample once an epoch the valley leans: ahead the loss rises at once, and a step back it first
# falls a little; at a distance of 1 it rises on both sides, twice as much ahead as behind. With replacement it is even,
# like the cosine, which is near 0 on average. A climb of MSAM's length, here 3, lives from the *curvature* along the
# momentum more than from the slope, and goes uphill without asking for a gradient.
#
# *How far to trust it.* These are means over many steps, with a single batch each. On one batch of one step the slope
# is nearly as often of the other sign.

# %%
at = along.groupby(["optimizer", "a"])["rise"].mean()
assert at[once, -0.5] > at[once, 0.5]
assert at[once, -0.25] > 0

# %% [markdown]
# ## In short
#
# A negative cosine has three causes, and they add up: the step overshoots in sharp directions ($\eta h > 1 - \mu$, and
# on average in any state that does not change); samples do not come again within the epoch; and a network that learns
# by heart leaves the rest of the world behind. On this problem the second is the largest. Whatever the cause, going on
# along the last step raises the loss of the next batch, and that is all that MSAM needs.
#
# **Exercise.** The formula of section 1 says that half of the learning rate moves the border from $h = 1$ to $h = 2$.
# Train with `lr=0.05` and a constant rate, with replacement: does the cosine come nearer to 0? Then try `momentum=0.5`,
# and say before you run it which way the border moves.
