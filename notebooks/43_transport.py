# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [transport_plan, ot_fusion]
# ---

# %% [markdown]
# # Transport: fusing networks softly, and of different widths
#
# **The question.** A permutation pairs units one to one. But what if one network has 64 hidden units and the other
# 128? And what if a unit of B is a bit like three units of A, and much like none?
#
# **The idea.** Think of each unit of B as a heap of sand and each unit of A as a hole. Moving sand from unit i of B to
# unit j of A costs $M_{ij}$: little where the two do alike. A **transport plan** $T$ says how much goes where, so that
# all heaps are moved, all holes are filled, and the cost is least. A permutation is the special case in which every
# heap goes into one hole.

# %%
import copy
import inspect

import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import alignment, cite, claim, data, explore, models, training, zoo
from notebook_kit.alignment import incoming, interpolate, ot_fusion, outgoing, record_features, transport_plan
from notebook_kit.diagnostics.transport import epsilon_curve, fusion_view, plan_table, with_weights
from notebook_kit.figures.transport import fusion_figure, plan_figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.widgets import LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# ## A plan by hand
#
# Two units each, in the other order: staying costs 1, crossing costs 0. The exact plan crosses. The soft plan (after
# Sinkhorn) also wants to spread out; `epsilon` says how much. Look at the first row: at 0.5 it sends 0.44 of its half
# across, at 0.05 practically all. Rows and columns sum to one half in every plan.

# %%
# NBVAL_CHECK_OUTPUT
cost = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
print("exact       ", transport_plan(cost, method="exact").tolist())
for epsilon in (5.0, 0.5, 0.05):
    plan = transport_plan(cost, epsilon=epsilon)
    print(f"epsilon {epsilon:4}", [[round(value, 2) for value in row] for row in plan.tolist()])

# %% [markdown]
# With a plan between the units of every layer, B's weights can be carried over. A unit of the result is an *average*
# of B's units, so on the way out the plan's columns sum to 1. What a unit of B sent to the next layer is *shared out*,
# so on the way in its rows sum to 1. That is all of the arithmetic:

# %%
print(inspect.getsource(outgoing))
print(inspect.getsource(incoming))

# %% [markdown]
# Three units of B on two of A: the two scalings differ, and both are needed. (With equal widths they are the same.)

# %%
# NBVAL_CHECK_OUTPUT
plan = transport_plan(torch.tensor([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]), method="exact")
print("out:", [[round(v, 2) for v in row] for row in outgoing(plan).tolist()], "columns sum to 1")
print("in: ", [[round(v, 2) for v in row] for row in incoming(plan).tolist()], "rows sum to 1")

# %% [markdown]
# ## Sixty-four units and a hundred and twenty-eight
#
# Two digit networks, trained apart: A has two hidden layers of 64, B two of 128. No permutation pairs them. Two units
# are alike when their activations on the same 1000 images correlate; we record them once.

# %%
narrow, wide = zoo.digit_twins(64), zoo.digit_twins(128)
a, b = with_weights(narrow.model, narrow.experts[0]), with_weights(wide.model, wide.experts[1])
images = narrow.batches("train")["digit"][0]
features = record_features(a, b, [images])
fused = ot_fusion(a, b, features=features, method="exact")
print(f"A {narrow.score(a):.2f}, B {wide.score(b):.2f}, fused {narrow.score(fused):.2f}, in A's shapes:")
print({name: tuple(tensor.shape) for name, tensor in fused.items() if name.endswith("weight")})

# %% [markdown]
# The plan of the first layer: rows are B's 128 units, sorted by where they go. Two rows for each column: every unit of
# A takes in two of B, since 128 heaps fill 64 holes evenly. (Where one width does not divide the other, some are torn.)

# %%
LiveFigure(plan_figure(fused.plans["layers.0"], title="layers.0: where B's units go (exact plan)"))

# %% [markdown]
# ## Drag it
#
# Left: accuracy of the fused network against `epsilon`, the dotted line for exact plans. Right: the plan. Drag
# `epsilon` up and see it blur; at the far right all units of B go everywhere, and the result forgets them. `t` is B's
# share: at 1 the network is B alone, squeezed into A's shapes.

# %%
curve = epsilon_curve(a, b, narrow.score, features=features)
explore(
    fusion_view, a, b, narrow.score, features=features, curve=curve,
    draw=lambda view: fusion_figure(view, y="accuracy"),
    limits={"epsilon": Range(0.01, 1, log=True), "layer": Range(0, 1), "residual": None, "qk": None},
)  # fmt: skip

# %% [markdown]
# `partners` says over how many units of A one unit of B is spread, on average. The accuracy falls where the plans
# blur beyond a few partners.

# %%
curve.round(2)

# %% [markdown]
# ## The claim: different widths
#
# Model fusion by transport claims that networks of different widths can be joined in one shot. We try both trainings
# at each width, wide into narrow and narrow into wide, with exact plans, and keep the worst. How many points of
# accuracy does the result lose against the worse parent?

# %%
lost = {}
for width_a, width_b in ((64, 128), (128, 64)):
    twins_a, twins_b = zoo.digit_twins(width_a), zoo.digit_twins(width_b)
    for one in twins_a.experts:
        for other in twins_b.experts:
            model_a, model_b = with_weights(twins_a.model, one), with_weights(twins_b.model, other)
            parents = min(twins_a.score(model_a), twins_b.score(model_b))
            fused = ot_fusion(model_a, model_b, [images], method="exact")
            lost.setdefault(f"{width_b} into {width_a}", []).append(100 * (parents - twins_a.score(fused)))
worst = {widths: max(values) for widths, values in lost.items()}

# %%
assert max(worst.values()) < 4
claim(
    "otfusion",
    "Digit networks of width 64 and 128 fuse in one shot, either way, to within four points of the worse parent",
    holds=max(worst.values()) < 4,
    figure="points lost at worst: " + ", ".join(f"{widths} {value:.1f}" for widths, value in worst.items()),
)

# %% [markdown]
# ## A transformer
#
# In a transformer the plans must find their way. Queries, keys and values get a plan each, over all heads at once.
# A norm takes the plan of the stream it stands on. And where a branch is *added* to the residual stream, two plans
# meet: the stream's and the branch's. `residual` says what goes on from there; `mean` is half of each. Read the walk
# through a vision transformer, and `join`:

# %%
print(inspect.getsource(alignment.transport_walks._vit).split("for i in range")[1])
print(inspect.getsource(alignment.transport_flow.Flow.join))

# %% [markdown]
# We train three tiny vision transformers (one layer, four patches and a class token, width 32) from three seeds, and
# one of width 48. A few seconds each.

# %%
x, y = data.digits("train")
test_x, test_y = data.digits("test")


def draw(generator):
    rows = torch.randint(0, len(x), (64,), generator=generator)
    return x[rows].reshape(-1, 1, 8, 8), y[rows]


def fit(model, steps, lr, seed):
    loss = lambda model, batch: F.cross_entropy(model(batch[0]).logits, batch[1])  # noqa: E731
    training.fit(model, draw, loss, steps=steps, lr=lr, seed=seed, progress=False, schedule=lambda done: 1 - done)
    return model.eval()


@torch.no_grad()
def accuracy(model):
    return float((model(test_x.reshape(-1, 1, 8, 8)).logits.argmax(-1) == test_y).float().mean())


# %%
def vit(seed, width):
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    return fit(models.tiny_vit(seed, image_size=8, **size), steps=250, lr=3e-3, seed=seed)


small, large = [vit(seed, 32) for seed in range(3)], vit(9, 48)
print("width 32:", [round(accuracy(model), 2) for model in small], " width 48:", round(accuracy(large), 2))

# %% [markdown]
# Now fuse each pair, in both directions: plain averaging, exact plans, soft plans. Nothing is trained.

# %%
calibration = [x[:200].reshape(-1, 1, 8, 8)]
rows = []
for i, j in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
    one, other = small[i], small[j]
    seen = record_features(one, other, calibration)
    hard, soft = (ot_fusion(one, other, features=seen, **how) for how in ({"method": "exact"}, {"epsilon": 0.08}))
    plain = interpolate(one.state_dict(), other.state_dict(), 0.5)
    rows.append([accuracy(with_weights(one, weights)) for weights in (plain, hard, soft)])
shots = pd.DataFrame(rows, columns=["average", "exact", "soft"], index=["01", "10", "02", "20", "12", "21"])
shots.round(2)

# %%
mean = shots.mean()
holds = bool(mean["soft"] > mean["exact"] + 0.02 and mean["exact"] > mean["average"] + 0.1)
assert holds
claim(
    "ot-fusion",
    "In one shot, soft plans fuse tiny vision transformers better than hard ones, and hard ones better than averaging",
    holds=holds,
    figure=", ".join(f"{name} {value:.2f}" for name, value in mean.items()) + " (mean of 6 fusions)",
)

# %% [markdown]
# So softness pays for these transformers, and did not for the digit networks above. Drag it yourself: here B is the
# transformer of width 48. Try the six `residual` policies (`identity` needs equal widths, so it is left out).

# %%
seen = record_features(small[0], large, calibration)
curve = epsilon_curve(small[0], large, accuracy, features=seen)
policies = Choice("mean", "weighted_scalar", "weighted_matrix", "branch", "stream")
explore(
    fusion_view, small[0], large, accuracy, features=seen, curve=curve, draw=lambda v: fusion_figure(v, y="accuracy"),
    limits={"epsilon": Range(0.01, 2, log=True), "layer": Range(0, 7), "residual": policies},
)  # fmt: skip

# %% [markdown]
# How soft are the plans there? A table of one fusion: every layer, the units on both sides, and the partners.

# %%
plan_table(ot_fusion(small[0], large, features=seen).plans).round(1)

# %% [markdown]
# ## After a short fine-tuning
#
# The paper goes on: fused, then fine-tuned for a while, the network passes *both* parents. We give the fused network
# 100 steps, and to be fair one parent the same 100 steps more.

# %%
rows = []
for i, j in ((0, 1), (1, 2), (2, 0)):
    fused = with_weights(small[i], ot_fusion(small[i], small[j], calibration))
    parents = [accuracy(small[i]), accuracy(small[j])]
    tuned, further = (fit(model, 100, 1e-3, seed=5) for model in (fused, copy.deepcopy(small[i])))
    rows.append([*parents, accuracy(tuned), accuracy(further)])
tuned = pd.DataFrame(rows, columns=["parent A", "parent B", "fused, tuned", "parent A, tuned"])
tuned.round(3)

# %%
best = tuned[["parent A", "parent B"]].max(axis=1)
ahead = float((tuned["fused, tuned"] - best).mean())
assert tuned["fused, tuned"].min() > 0.85
claim(
    "ot-fusion",
    "After 100 steps of fine-tuning the fused transformer is more than half a point better than both its parents",
    holds=ahead > 0.005,
    figure=f"{100 * ahead:+.1f} points to the better parent, mean of 3",
)

# %% [markdown]
# It comes all the way back, from far below, in 100 steps. But it does not pass its parents here. The task is small,
# the parents are close to their ceiling, and more training helps a parent just as well.
#
# ## What to try
#
# - `align="weight"`: no data at all. How much does it cost on the digit networks? On the transformers?
# - `qk="shared"` cancels in q·k when plans are hard. Does it help when they are soft?
# - Carry three networks over to one (`t=1`) and average all four.
# - `ot_fusion(a, a, features=...)` with a soft plan does not give `a` back. Why? How small must `epsilon` be?
#
# ## Sources

# %%
print(cite(transport_plan), cite(ot_fusion), sep="\n\n")
