# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [RandomRouter, k_schedule, StochasticExperts, consistency_loss, two_pass_loss]
# ---

# %% [markdown]
# # Random routers: what if the gate learns nothing?
#
# **The question.** A learned router can collapse, needs losses to hold it, and must be learned at the same time as the
# experts that it chooses among. How much of a mixture is due to it? Take it away, and see.
#
# **Two ways to take it away.** *SMoE-Dropout* draws a router once, at random, and freezes it: the same token always
# goes to the same experts, for no reason. While training, more and more experts take part. *THOR* has no router at all:
# each step draws an expert by lot, and two draws must agree. What remains in both is a network that works with *any* of
# its experts, and that turns out to be worth something.

# %%
import inspect

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, explore
from notebook_kit.data import digits
from notebook_kit.diagnostics.random_routers import compare_paths, slim_curve
from notebook_kit.figures.random_routers import disagreement_view, schedule_view, slim_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import MoE, aux_loss
from notebook_kit.models import MLP
from notebook_kit.routers import (
    RandomRouter,
    StochasticExperts,
    TopK,
    consistency_loss,
    k_schedule,
    set_k,
    slice_mlp,
    two_pass_loss,
)
from notebook_kit.training import fit

# %% [markdown]
# ## A wide network is a sum of narrow ones
#
# SMoE-Dropout cuts one wide two-layer network into `N` slices. Each slice has some of the hidden units; the slices add
# up to the whole. A router weighs them instead. With weights 1/N for all it gives dense / N, so multiplied by N it
# starts as the dense network, exactly.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
dense, tokens = MLP([32, 128, 32]), torch.randn(5, 32)
slices = slice_mlp(dense, 8)
even = RandomRouter(32, 8)
even.projection.zero_()
even.bias.zero_()
with torch.no_grad():
    added, mixed = sum(expert(tokens) for expert in slices), MoE(slices, even)(tokens)
    print("slices add up:", torch.allclose(added, dense(tokens), atol=1e-5))
    print("even router, times 8:", torch.allclose(8 * mixed, dense(tokens), atol=1e-5))

# %% [markdown]
# The random router. `R` and `b` are drawn as for a linear layer and then never change: they are buffers, so no
# optimiser sees them. The experts of a token at `k` are among those at `k + 1`. That is what lets one model serve any
# `k`.

# %%
print(inspect.getsource(RandomRouter.route))

# %%
# NBVAL_CHECK_OUTPUT
router = RandomRouter(32, 8, seed=1)
for k in (1, 2, 4):
    router.k = k
    print(f"k = {k}: experts of one token {router(tokens[:1]).experts[0].tolist()}")
print("parameters to train:", len(list(router.parameters())))

# %% [markdown]
# How many experts, and when? Move the ends and the shape. The paper goes linearly from half of the experts to all.

# %%
explore(schedule_view, k_min=4, k_max=8, limits={"k_min": Range(1, 8), "k_max": Range(1, 8)})

# %% [markdown]
# ## Six ways to train the same weights
#
# A digit classifier whose middle layer has 128 hidden units: whole, whole with dropout, or in eight slices. The slices
# are trained with a rising `k`, with all eight, or with two throughout; once with a *learned* top-2 router.


# %%
class Net(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.read, self.layers, self.write = nn.Linear(64, 32), nn.ModuleList(layers), nn.Linear(32, 10)

    def forward(self, x):
        h = self.read(x).relu()
        for layer in self.layers:
            h = h + layer(h)
        return self.write(h)


def mixture(router, width=16):
    return MoE([MLP([32, width, 32]) for _ in range(router.n_experts)], router)


# %%
x, y = digits("train")
x_test, y_test = digits("test")
STEPS = 160


def draw(generator):
    rows = torch.randint(len(x), (64,), generator=generator)
    return x[rows], y[rows]


@torch.no_grad()
def accuracy(net):
    return (net.eval()(x_test).argmax(1) == y_test).float().mean().item()


# %% [markdown]
# One training loop for all. If there is a schedule, it sets `k` before each step; the rest is as always.


# %%
def train(layers, seed, ks=None):
    torch.manual_seed(seed)
    net, step = Net(*layers()), iter(range(STEPS))

    def loss(net, batch):
        if ks is not None:
            set_k(net, ks[next(step)])
        error = F.cross_entropy(net(batch[0]), batch[1])
        return error + aux_loss(net) if isinstance(net.layers[0], MoE) else error

    fit(net, draw, loss, steps=STEPS, lr=1e-2, seed=seed, progress=False)
    return net


# %%
def whole(dropout):
    return [nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 32))]


rising = [k_schedule(step, STEPS, k_min=4, k_max=8) for step in range(STEPS)]
schedules = {"rising 4 to 8": rising, "always 8": [8] * STEPS, "always 2": [2] * STEPS}
random_nets = {
    name: [train(lambda seed=seed: [mixture(RandomRouter(32, 8, seed=seed))], seed, ks) for seed in range(3)]
    for name, ks in schedules.items()
}
learned = [train(lambda: [mixture(TopK(32, 8, balance_coef=0.1))], seed) for seed in range(3)]
plain = {p: [train(lambda p=p: whole(p), seed) for seed in range(3)] for p in (0.0, 0.5)}

# %% [markdown]
# Now every sliced network is asked with 1, 2, ... 8 experts. Nothing is trained again: `k` is only set. The table is
# the mean of three seeds; the columns are `k`.

# %%
nets = random_nets | {"learned top-2": learned}
curves = {
    name: pd.DataFrame([slim_curve(net, accuracy, range(1, 9)) for net in three]).mean().to_dict()
    for name, three in nets.items()
}
whole_accuracy = {p: sum(map(accuracy, three)) / 3 for p, three in plain.items()}
print({f"whole, dropout {p}": round(value, 3) for p, value in whole_accuracy.items()})
table = pd.DataFrame(curves).T
table.round(3)

# %% [markdown]
# Left: `k` in the course of training. Right: accuracy against `k` at inference. Drag `k` down to 1, and read in the
# title how far apart the ways of training come.

# %%
explore(slim_view, curves, schedules | {"learned top-2": [2] * STEPS}, k=4, limits={"k": Range(1, 8)})

# %% [markdown]
# The paper's claim of a *self-slimmable* network: the more experts you can afford, the better it gets, smoothly.

# %%
# NBVAL_CHECK_OUTPUT
slim = curves["rising 4 to 8"]
steps = [slim[2] - slim[1], slim[4] - slim[2], slim[8] - slim[4]]
print("each doubling of k helps:", [step > 0 for step in steps])
assert all(step > 0 for step in steps)

# %%
claim(
    "smoe-dropout",
    "With the frozen random router and a rising k, every doubling of k at inference raises the accuracy",
    holds=all(step > 0 for step in steps),
    figure=", ".join(f"k={k}: {slim[k]:.3f}" for k in (1, 2, 4, 8)) + ", 3 seeds",
)

# %% [markdown]
# A learned router was trained for two experts, and more than two do it no good:

# %%
top_2 = curves["learned top-2"]
claim(
    "smoe-dropout",
    "A learned top-2 router gains less than half a point from using all experts at inference",
    holds=top_2[8] - top_2[2] < 0.005,
    figure=f"k=2: {top_2[2]:.3f}, k=8: {top_2[8]:.3f}, 3 seeds",
)

# %% [markdown]
# But is it the *schedule* that makes the difference? Compare with the frozen router at a constant `k` of 8. On these
# digits that is a small thing: over ten seeds we found 0.5 points, give or take 0.25. The frozen router does the rest.

# %%
constant = curves["always 8"]
claim(
    "smoe-dropout",
    "With all experts, the rising schedule is two points better than k = 8 from the start",
    holds=slim[8] - constant[8] > 0.02,
    figure=f"{slim[8]:.3f} against {constant[8]:.3f}, 3 seeds",
)

# %% [markdown]
# And the headline, better than dense training at equal parameters? Over ten seeds the three are level here. At least
# the network that serves every `k` costs nothing at full width.

# %%
best = max(whole_accuracy.values())
claim(
    "smoe-dropout",
    "With all experts, it is two points better than the dense network of equal size, with dropout or without",
    holds=slim[8] - best > 0.02,
    figure=f"{slim[8]:.3f}; dense {whole_accuracy[0.0]:.3f}, with dropout {whole_accuracy[0.5]:.3f}, 3 seeds",
)

# %% [markdown]
# ## THOR: by lot
#
# Two layers of four experts, and no router. In training each layer draws **one** expert for the whole batch. So there
# are 4 · 4 = 16 paths through the network. Every batch runs twice, along two paths, and the loss asks that both be
# right *and* that they agree:

# %%
print(inspect.getsource(consistency_loss))

# %% [markdown]
# By hand: two predictions (.9, .1) and (.6, .4) disagree by ½ (.3 log(.9/.6) + .3 log(.4/.1)) = 0.2688 nats.

# %%
# NBVAL_CHECK_OUTPUT
p, q = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.6, 0.4]]).log()
print(f"disagreement {consistency_loss(p, q):.4f}, with itself {consistency_loss(p, p):.4f}")

# %% [markdown]
# We train it with three weights of the consistency loss. Weight 0 is plain random routing. As a rival, a Switch router
# of the same size, which *learns* its one expert.


# %%
def train_thor(coefficient, seed):
    torch.manual_seed(seed)
    net = Net(*(mixture(StochasticExperts(32, 4, seed=2 * seed + layer)) for layer in range(2)))

    def loss(net, batch):
        a, b = net(batch[0]), net(batch[0])
        return two_pass_loss(a, b, batch[1], consistency_coef=coefficient)

    fit(net, draw, loss, steps=STEPS, lr=1e-2, seed=seed, progress=False)
    return net


def switch():
    return [mixture(TopK(32, 4, k=1, convention="switch", balance_coef=0.01)) for _ in range(2)]


# %%
coefficients, seeds = (0.0, 1.0, 5.0), (0, 1)
paths = [(i, j) for i in range(4) for j in range(4)]


def right(logits):
    return (logits.argmax(1) == y_test).float().mean().item()


thor = {c: [compare_paths(train_thor(c, s), x_test, paths, right) for s in seeds] for c in coefficients}
gate = sum(accuracy(train(switch, seed)) for seed in seeds) / 2

# %% [markdown]
# Left: every dot is the accuracy of one path, the bar that of all experts together. Right: how far each path disagrees
# with each other on the test images. Move the slider from 0 to 5 and watch the squares go dark.

# %%
explore(
    disagreement_view,
    {c: both[0] for c, both in thor.items()},
    consistency_coef=0.0,
    limits={"consistency_coef": Choice(*coefficients)},
)

# %%
rows = {
    c: {
        "disagreement": sum(run.mean_disagreement for run in both) / 2,
        "same answer": sum(run.mean_agreement for run in both) / 2,
        "mean path": sum(sum(run.scores.values()) / len(paths) for run in both) / 2,
        "worst path": sum(min(run.scores.values()) for run in both) / 2,
        "all experts": sum(run.ensemble for run in both) / 2,
    }
    for c, both in thor.items()
}
thor_table = pd.DataFrame(rows).T.rename_axis("consistency_coef")
print(f"Switch, learned gate: {gate:.3f}")
thor_table.round(4)

# %% [markdown]
# Consistency does what it says: the paths come to agree.

# %%
apart, together = thor_table.loc[0.0, "disagreement"], thor_table.loc[5.0, "disagreement"]
assert together < apart / 2
claim(
    "thor",
    "The consistency loss with weight 5 at least halves the disagreement of paths",
    holds=together < apart / 2,
    figure=f"{apart:.4f} to {together:.4f} nats, mean over pairs of 16 paths, 2 seeds",
)

# %% [markdown]
# And a gate that knows nothing is as good as one that learned. (Here with one expert computed a layer in both.)

# %%
lot = thor_table.loc[5.0, "mean path"]
claim(
    "thor",
    "A path drawn by lot is as good as a learned Switch gate, within a point",
    holds=lot > gate - 0.01,
    figure=f"mean of 16 paths {lot:.3f}, Switch {gate:.3f}, 2 seeds",
)

# %% [markdown]
# The paper gains two BLEU points of translation from it. On our digits agreement brings no accuracy:

# %%
gain = thor_table.loc[5.0, "all experts"] - thor_table.loc[0.0, "all experts"]
claim(
    "thor",
    "The consistency loss makes the ensemble of all experts a point more accurate",
    holds=gain > 0.01,
    figure=f"{100 * gain:+.1f} points, 2 seeds",
)

# %% [markdown]
# At inference there is a choice, since any path will do: each token its own draw, one draw a sentence, all experts, or
# one fixed path. Here is the code that draws.

# %%
print(inspect.getsource(StochasticExperts._draw))

# %% [markdown]
# Hash layers are the third member of this family: they route by the token's identity. You meet them in the lesson on
# balanced routing.
#
# ## What to try
#
# - Give `k_schedule` a `schedule="multi-step"` from 1 to 8. What happens to the left end of its curve?
# - `RandomRouter(32, 8, frozen=False)` lets the router learn, with nothing else changed. Does its curve still rise?
# - Draw another router *after* training: set `projection` to new random numbers. Which of the networks survives?
# - THOR with one expert and dropout in it is known as R-Drop. Build it: `StochasticExperts(32, 1)`.
# - Nine of the sixteen paths avoid expert 0 of both layers. Delete the expert, and see whether anybody misses it.
# - `install(model, RandomRouter)` puts a random router into a trained Mixtral. How bad is it, and why?
#
# ## Sources

# %%
for router in (RandomRouter, StochasticExperts):
    print(cite(router), end="\n\n")
