# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [average, task_arithmetic, slerp, ties, dare]
# ---

# %% [markdown]
# # Merging: one network out of eight
#
# **The question.** Eight people fine-tuned the same network, each for a task of their own. You have the eight sets of
# weights, no data, and room for one network. What do you do with the weights?
#
# **The idea.** Write $\theta_0$ for the network they all began with and $\theta_i$ for what expert $i$ ended with. The
# difference $\tau_i = \theta_i - \theta_0$ is a *task vector*: what fine-tuning changed. Everything in this lesson is a
# rule that turns eight task vectors into one.

# %%
import inspect
from functools import partial

import torch

from notebook_kit import cite, claim, explore, sweep
from notebook_kit.merging import average, dare, slerp, task_arithmetic, ties
from notebook_kit.zoo import digit_labels

torch.set_num_threads(1)
bed = digit_labels()
bed.names

# %% [markdown]
# ## Eight experts for the same pictures
#
# The inputs are scikit-learn's 8 x 8 digits. All experts see the same pictures and answer different questions: which
# digit, is it odd, is it at least five, has it a loop... They share one frozen head, so a merged network can be asked
# all eight. Below: how well the base and each expert do, as accuracy on held-out pictures. Each expert is good at its
# own question and poor at the others'.

# %%
# NBVAL_CHECK_OUTPUT
print(f"base, mean over tasks: {bed.score(bed.base):.2f}")
for name, expert in zip(bed.names, bed.experts, strict=True):
    score = bed.score(expert)
    print(f"{name:14} own task {score.tasks[name]:.2f}   all tasks {score:.2f}")

# %% [markdown]
# ## Plain sums
#
# *Averaging* gives every expert the same say. *Task arithmetic* adds the task vectors and multiplies the sum by a
# `scale` $\lambda$: $\theta = \theta_0 + \lambda \sum_i \tau_i$. With $\lambda = 1/8$ the two are the same network.

# %%
# NBVAL_CHECK_OUTPUT
mean = average(bed.base, bed.experts)
eighth = task_arithmetic(bed.base, bed.experts, scale=1 / 8)
gap = max((mean[name] - eighth[name]).abs().max().item() for name in mean)
print(f"average: {bed.score(mean):.2f}; differs from scale 1/8 by less than 1e-6: {gap < 1e-6}")

# %% [markdown]
# A slider for every hyperparameter comes from the function's signature. Drag `scale`: bars are the merged network's
# accuracy on each task, diamonds are where you started. Press **Pin** to keep a picture and compare.

# %%
explore(task_arithmetic, bed.base, bed.experts, score=bed.score)

# %% [markdown]
# Two models can also be joined along the arc between them instead of the straight line (SLERP). A straight line cuts
# through the sphere, so that the average of two weight matrices is shorter than either; the arc keeps the length.

# %%
# NBVAL_CHECK_OUTPUT
pair = bed.experts[:2]
for rule, merged in (("straight", average(bed.base, pair)), ("arc", slerp(bed.base, pair, t=0.5))):
    shrink = [merged[k].norm() / torch.stack([e[k].norm() for e in pair]).mean() for k in merged if "weight" in k]
    print(f"{rule:9} length against the experts': {min(shrink):.3f}")

# %% [markdown]
# ## TIES: what interferes, and what to do about it
#
# Two things go wrong in a sum. Many small changes that did not matter water down the few that did, and where two
# experts push a weight in opposite directions they cancel. TIES answers with three steps: **trim** each task vector to
# its largest entries, **elect** one sign for each parameter, and average only the entries that **agree** with it. Here
# are the last two in the code:

# %%
from notebook_kit.merging.ties import disjoint_merge, elect_sign

print(inspect.getsource(elect_sign))
print(inspect.getsource(disjoint_merge))

# %% [markdown]
# A hand-worked example with three experts and four parameters. Read a column at a time: in the second, the masses are
# -1 against 2 + 1.5, so plus wins and the mean of 2 and 1.5 is taken; the -1 has no say.

# %%
# NBVAL_CHECK_OUTPUT
tau = torch.tensor([[3.0, -1.0, 0.2, -2.0], [1.0, 2.0, -0.1, -1.0], [-2.0, 1.5, 0.3, 0.5]])
zero, three = {"w": torch.zeros(4)}, [{"w": row} for row in tau]
print("plain mean ", tau.mean(dim=0).tolist())
print("TIES       ", ties(zero, three, density=1.0)["w"].tolist())
print("density 0.5", ties(zero, three, density=0.5)["w"].tolist())

# %% [markdown]
# Now live. Watch what `density` does to single tasks, and what happens when `elect` is switched to `none`.

# %%
live = explore(ties, bed.base, bed.experts, score=bed.score, density=0.7, scale=0.8)
live

# %% [markdown]
# The line of Python under the picture reproduces what you see. It is also what `live.code` holds.

# %%
# NBVAL_CHECK_OUTPUT
print(live.code)
print(live.settings)

# %% [markdown]
# ## Choosing hyperparameters without fooling yourself
#
# A setting must be chosen on pictures that are not used to report the result. `sweep` tries a grid on the *validation*
# pictures; the winner is then scored once on the *test* pictures. The table keeps every run, so you can ask it other
# questions than "which is best".

# %%
validation = partial(bed.score, split="val")
trial = partial(sweep, score=validation, progress=False)
added = trial(task_arithmetic, bed.base, bed.experts, grid={"scale": [0.05 * i for i in range(1, 13)]})
elected = trial(
    ties,
    bed.base,
    bed.experts,
    grid={"density": [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0], "scale": [0.4, 0.6, 0.8, 1.0, 1.4, 2.0]},
)
dropped = trial(dare, bed.base, bed.experts, grid={"density": [0.1, 0.3, 0.5, 0.9], "scale": [0.1, 0.15, 0.2, 0.3]})
elected

# %% [markdown]
# Lines rise to the right: on networks as small as these (30,000 weights) hard trimming costs more than it helps. Task
# vectors of large networks are far more redundant. What the winners do on the test pictures:

# %%
# NBVAL_CHECK_OUTPUT
test = {"average": bed.score(average(bed.base, bed.experts))}
for fn, found in ((task_arithmetic, added), (ties, elected), (dare, dropped)):
    test[fn.__name__] = bed.score(fn(bed.base, bed.experts, **found.best))
for name, score in test.items():
    print(f"{name:16} {score:.2f}")

# %% [markdown]
# ## The papers' claims, here
#
# TIES is better than plain averaging, as promised.

# %%
assert test["ties"] > test["average"] + 0.01
claim(
    "ties-merging",
    "TIES beats plain averaging on the eight digit labelings",
    holds=test["ties"] > test["average"],
    figure=f"accuracy {test['ties']:.3f} against {test['average']:.3f}",
)

# %% [markdown]
# Against *tuned* task arithmetic the paper reports three points more for TIES on a ViT. Here the two come out level.

# %%
lead = test["ties"] - test["task_arithmetic"]
assert abs(lead) < 0.02
claim(
    "ties-merging",
    "TIES beats tuned task arithmetic by two points or more",
    holds=lead >= 0.02,
    figure=f"{100 * lead:+.1f} points, settings chosen on validation pictures",
)

# %% [markdown]
# ## DARE: throw away most of it, at random
#
# DARE keeps each entry of a task vector with probability `density` and divides the survivors by `density`, so that the
# sum stays right *on average*. To see the claim alone, take one expert at a time: drop, rescale, add it back, and ask
# how much of its own task it still knows.


# %%
def own_accuracy(density, rescale="inverse", seeds=3):
    scores = [
        bed.score(dare(bed.base, [expert], density=density, scale=1.0, rescale=rescale, seed=seed)).tasks[name]
        for name, expert in zip(bed.names, bed.experts, strict=True)
        for seed in range(seeds)
    ]
    return sum(scores) / len(scores)


kept = {density: own_accuracy(density) for density in (1.0, 0.5, 0.1, 0.01)}
raw = {density: own_accuracy(density, rescale="none") for density in kept}

# %% [markdown]
# The upper line rescales, the lower does not. The horizontal axis is logarithmic.

# %%
from notebook_kit.figures.style import figure

lines = [
    {"type": "scatter", "name": name, "x": list(line), "y": list(line.values()), "mode": "lines+markers"}
    for name, line in (("rescaled", kept), ("not rescaled", raw))
]
picture = figure(lines, title="One expert, part of its task vector dropped", x="density (share kept)", y="accuracy")
picture.update_xaxes(type="log")

from notebook_kit.widgets import LiveFigure

LiveFigure(picture)

# %%
assert kept[1.0] - kept[0.5] < 0.02 < kept[0.5] - raw[0.5]
claim(
    "dare",
    "Half of a task vector can be dropped at random, if the rest is rescaled, at a loss under two points",
    holds=kept[1.0] - kept[0.5] < 0.02,
    figure=f"accuracy {kept[1.0]:.3f} to {kept[0.5]:.3f}; without rescaling {raw[0.5]:.3f}; 8 experts x 3 seeds",
)

# %% [markdown]
# The paper drops 90 % and more from language models with billions of weights. Ours are small, and it shows:

# %%
claim(
    "dare",
    "Nine tenths of a task vector can be dropped at random at a loss under two points",
    holds=kept[1.0] - kept[0.1] < 0.02,
    figure=f"accuracy {kept[1.0]:.3f} to {kept[0.1]:.3f}; 8 experts x 3 seeds",
)

# %% [markdown]
# ## Look into the weights
#
# How alike are the task vectors, layer by layer? `WeightExplorer` draws norms, cosines, agreement of signs and spectra
# of the same eight experts.

# %%
from notebook_kit.widgets import WeightExplorer

WeightExplorer(bed.base, bed.experts, names=bed.names)

# %% [markdown]
# ## Try
#
# 1. Set `elect` to `none` and `combine` to `sum` in the TIES widget. Which `scale` makes it task arithmetic?
# 2. Merge only two experts whose labels have nothing to do with each other. Is there less interference?
# 3. `dare(..., elect="mass")` is DARE-TIES. Sweep its `density` and `scale` on the validation pictures.
# 4. Your own checkpoints: `merge_files(ties, "base", ["expert_a", "expert_b"], "merged", density=0.5)` works tensor by
#    tensor, so memory is no limit; `preflight("base", ["expert_a"])` says beforehand what would happen.

# %%
for paper in ("task-arithmetic", "ties-merging", "dare"):
    print(cite(paper))
