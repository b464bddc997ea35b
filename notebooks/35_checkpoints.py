# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [metrics_weighted, average_checkpoints, greedy_soup, model_stock, karcher, sce]
# ---

# %% [markdown]
# # Checkpoints and soups: one task, many networks
#
# **The question.** A training run leaves a trail of checkpoints. A search over seeds and learning rates leaves a shelf
# of finished runs. Usually one is kept and the others are deleted. Are they worth something together?
#
# **The idea.** They all do *the same task*, so nothing has to be traded between tasks. What differs between them is
# mostly noise: which batches came last, which labels were wrong. Noise averages out. This lesson asks which average is
# best: with equal weights, weighted by the loss, pulled towards the start, or taken on a sphere.

# %%
import inspect
from functools import partial

import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, data, explore, sweep, training, zoo
from notebook_kit.adapters import LoRA, adapter_weights, attach, load_adapter_weights
from notebook_kit.diagnostics import checkpoint_merges as report
from notebook_kit.figures import checkpoint_merges as pictures
from notebook_kit.hyperparameters import Range
from notebook_kit.models import MLP

torch.set_num_threads(1)
x, y = data.digits("train")
(val_x, val_y), (test_x, test_y) = data.digits("val"), data.digits("test")

# %%
from notebook_kit.merging import (
    CheckpointRecorder,
    average,
    average_checkpoints,
    checkpoint_weights,
    greedy_ingredients,
    greedy_soup,
    karcher,
    metrics_weighted,
    model_stock,
    product_of_pairs,
    sce,
    ties,
)

# %% [markdown]
# ## One run and its trail
#
# A small network learns the digits through LoRA adapters, from 600 pictures of which one in five has a random label.
# The learning rate is high and stays high, so the weights never settle. `CheckpointRecorder` stands between `fit` and
# the loss: every 20 steps it keeps the adapters and the mean loss of the 20 batches before.


# %%
def noisy(count, share, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=g)[:count]
    labels = y[rows].clone()
    wrong = torch.rand(count, generator=g) < share
    labels[wrong] = torch.randint(10, (int(wrong.sum()),), generator=g)
    return x[rows], labels


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def draw(xs, ys, size, generator):
    rows = torch.randint(len(xs), (size,), generator=generator)
    return xs[rows], ys[rows]


# %% [markdown]
# Four such runs, each with its own start, pictures, wrong labels and batches. Look at the last few windowed losses:
# they jump by more than they fall.


# %%
def run(seed):
    torch.manual_seed(seed)
    model = MLP([64, 64, 64, 10])
    attach(model, LoRA, targets="layers", rank=8, alpha=8, seed=seed)
    recorder = CheckpointRecorder(loss, weights=adapter_weights)
    batches = partial(draw, *noisy(600, 0.2, seed), 8)
    keep = {"evaluate": recorder.evaluate, "evaluate_every": 20, "progress": False}
    training.fit(model, batches, recorder.loss, steps=600, lr=1e-2, seed=seed, **keep)
    return model.eval(), recorder


runs = [run(seed) for seed in range(4)]
model, trail = runs[0]
print(len(trail.checkpoints), "checkpoints; the last losses:", [round(v, 1) for v in trail.losses[-5:]])

# %% [markdown]
# ## Weights from the losses
#
# *Metrics-weighted averaging* takes the last checkpoints and weighs each by a figure that training gives for nothing:
# its loss, or its age. One `penalty` says how sharply worse ones lose weight. Three losses by hand: `linear` with
# penalty 1 drops the worst altogether.

# %%
# NBVAL_CHECK_OUTPUT
for form, penalty in (("linear", 0.0), ("linear", 1.0), ("power", 1.0), ("power", 4.0)):
    weights = checkpoint_weights([0.8, 0.5, 0.4], form=form, penalty=penalty)
    print(f"{form:7} penalty {penalty:g}: {[round(w, 2) for w in weights]}")

# %% [markdown]
# Now live, on the first run. Top left: the weight of each checkpoint; below: the loss it was saved at. Right: the
# merged network's loss on test pictures, against the penalty. Drag `penalty`, switch `metric` to `steps`, and shrink
# `n_last` to 1: that is the last checkpoint, the dashed line.


# %%
@torch.no_grad()
def test_loss(model, adapters):
    load_adapter_weights(model, adapters)
    return float(F.cross_entropy(model(test_x), test_y))


explore(
    report.penalty_view,
    trail.checkpoints,
    trail.losses,
    trail.steps,
    partial(test_loss, model),
    draw=pictures.penalty_figure,
    limits={"n_last": Range(1, 20), "stride": Range(1, 5)},
)

# %% [markdown]
# ## The claims, on four runs
#
# The penalty is 1 for the linear form, fixed beforehand: no test picture chose it. First the loss, then the accuracy.


# %%
@torch.no_grad()
def accuracy(model, adapters):
    load_adapter_weights(model, adapters)
    return float((model(test_x).argmax(-1) == test_y).float().mean())


def candidates(trail):
    last = partial(average_checkpoints, trail.checkpoints[-1], trail.checkpoints, metrics=trail.losses)
    found = {rule: last(rule=rule) for rule in ("last", "best", "uniform", "ema")}
    weigh = partial(metrics_weighted, trail.checkpoints[-1], trail.checkpoints)
    found["by loss"] = weigh(metrics=trail.losses, penalty=1.0)
    found["by steps"] = weigh(metrics=trail.steps, metric="steps", form="power", penalty=1.0)
    found["uniform, products"] = weigh(metrics=trail.losses, penalty=0.0, space="product")
    return found


# %%
def table(measure):
    rows = {i: {k: measure(m, w) for k, w in candidates(t).items()} for i, (m, t) in enumerate(runs)}
    return pd.DataFrame(rows).assign(mean=lambda frame: frame.mean(axis=1))


losses, accuracies = table(test_loss), table(accuracy)
pd.concat({"test loss": losses["mean"], "accuracy": accuracies["mean"]}, axis=1).round(3)

# %% [markdown]
# Any average is far better than the last checkpoint, and than the one with the lowest training loss. That is the big
# step:

# %%
jump = losses.loc["last"] - losses.loc["uniform"]
assert jump["mean"] > 0.03
claim(
    "mwa",
    "The uniform average of the last ten checkpoints has a test loss lower than the last one's by 0.03 nats or more",
    holds=bool(jump["mean"] > 0.03),
    figure=f"{losses.loc['uniform', 'mean']:.2f} against {losses.loc['last', 'mean']:.2f} nats, mean of 4 runs",
)

# %% [markdown]
# The weights then lower the loss a little further. So do weights by age (`by steps`), with no loss at all: the run was
# still getting better. The accuracy hardly moves, by less than the runs differ.

# %%
gain = losses.loc["uniform"] - losses.loc["by loss"]
assert gain["mean"] > 0.005
claim(
    "mwa",
    "Weights from the training loss lower the test loss further",
    holds=bool(gain["mean"] > 0),
    figure=f"{losses.loc['by loss', 'mean']:.3f} against {losses.loc['uniform', 'mean']:.3f}, mean of 4 runs",
)

# %%
points = 100 * (accuracies.loc["by loss", "mean"] - accuracies.loc["uniform", "mean"])
claim(
    "mwa",
    "Weights from the training loss raise the accuracy by two points or more over the uniform average",
    holds=bool(points >= 2),
    figure=f"{points:+.1f} points, mean of 4 runs",
)

# %% [markdown]
# ## Factors or products?
#
# An adapter changes the weights by the product $sBA$. Averaging $A$ and $B$ each by itself is not the same as
# averaging the products. Within one run the factors drift together, and the two agree well. Between runs they have
# nothing to do with each other: $BM$ and $M^{-1}A$ is the same adapter for any invertible $M$. Below, the share of
# the product that the average of factors misses:


# %%
def missed(adapters):
    whole = product_of_pairs(adapters)
    of_means = product_of_pairs([average(adapters[0], adapters)])
    return max(float((whole[name] - of_means[name]).norm() / whole[name].norm()) for name in whole)


within, between = missed(trail.checkpoints[-10:]), missed([other.checkpoints[-1] for _, other in runs])
print(f"largest share missed: within a run {within:.1f}, between runs {between:.1f}")

# %% [markdown]
# So between runs use `space="product"`. The average of products has a higher rank; `product_of_pairs` gives it whole,
# to be added to the weights, and `space="product"` gives the nearest adapter of the old rank.
#
# ## Soups: many runs
#
# Now whole networks. One base learnt 100 pictures; from there, eight runs learn the other 900, a fifth of them labelled
# wrong. `seeds` differ only in their batches; `rates` differ in the learning rate too.

# %%
torch.manual_seed(0)
net = MLP([64, 64, 64, 10])


def tune(start, xs, ys, steps, lr, seed):
    net.load_state_dict(start)
    training.fit(net, partial(draw, xs, ys, 16), loss, steps=steps, lr=lr, seed=seed, progress=False)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


@torch.no_grad()
def score(weights, x=val_x, y=val_y):
    return float((torch.func.functional_call(net, weights, (x,)).argmax(-1) == y).float().mean())


on_test = partial(score, x=test_x, y=test_y)
base = tune(net.state_dict(), x[:100], y[:100], 100, 3e-3, 0)
more = noisy(900, 0.2, 5)
seeds = [tune(base, *more, 150, 5e-3, 20 + i) for i in range(8)]
rates = [tune(base, *more, 150, lr, i) for i, lr in enumerate((1e-3, 3e-3, 5e-3, 7e-3, 1e-2, 2e-2))]

# %% [markdown]
# A *greedy soup* sorts the runs by their score on validation pictures and lets each join only if it does no harm there.
# In code:

# %%
print(inspect.getsource(greedy_ingredients).split('"""')[2])

# %% [markdown]
# What to look for: the uniform soup of `seeds` is far better than the mean run, and no worse than the best one, which
# nobody can point at without the test pictures. Among `rates`, the greedy soup leaves out some runs. It is never worse
# than the best run *on the pictures that chose it*; on the test pictures nothing is promised.

# %%
rows = {}
for name, group in (("seeds", seeds), ("rates", rates)):
    alone = [on_test(one) for one in group]
    best = max(group, key=score)
    soup = greedy_soup(base, group, score=score)
    assert score(soup) >= score(best)
    rows[name] = {"mean run": sum(alone) / len(alone), "best run": max(alone), "best on validation": on_test(best)}
    rows[name] |= {"uniform soup": on_test(average(base, group)), "greedy soup": on_test(soup)}
    rows[name]["in the greedy soup"] = len(greedy_ingredients(base, group, score=score)["ingredients"])
soups = pd.DataFrame(rows).T
soups.round(3)

# %%
lead = soups.loc["seeds", "uniform soup"] - soups.loc["seeds", "mean run"]
assert lead > 0.015
claim(
    "model-soups",
    "The soup of eight runs that differ by their batches is better than the mean run by a point and a half or more",
    holds=bool(lead > 0.015),
    figure=f"accuracy {soups.loc['seeds', 'uniform soup']:.3f} against {soups.loc['seeds', 'mean run']:.3f}",
)

# %% [markdown]
# ## Model Stock: two runs instead of many
#
# Runs of one task lie around a centre, all about equally far from it. If so, the angle between two of them says how far
# out their mean still is: go from the mean back towards the base, to $t = K\cos\theta / (1 + (K-1)\cos\theta)$.
#
# In the picture the horizontal line runs from the base to the mean of the merged runs. The star is Model Stock. The
# cross is the mean of the *other* runs, which nobody told it about: compare how far along the line the two are.
#
# Try `n_experts` from 2 to 8. Then switch `group` to eight *different* tasks: right angles everywhere,
# and the star falls back to the base.

# %%
bed = zoo.digit_labels()
groups = {"one task": (base, seeds), "eight tasks": (bed.base, bed.experts)}
explore(report.stock_view, groups, draw=pictures.stock_figure, limits={"layer": Range(0, 5)})


# %% [markdown]
# Is it really nearer to the centre than the mean of two? Four pairs out of eight runs; for each, the distance to the
# mean of the six others:


# %%
def distance(a, b):
    return float(sum(((a[name] - b[name]) ** 2).sum() for name in a) ** 0.5)


rows = []
for i in range(0, 8, 2):
    pair, others = seeds[i : i + 2], average(base, [*seeds[:i], *seeds[i + 2 :]])
    merged = {"one run": pair[0], "mean of two": average(base, pair), "Model Stock of two": model_stock(base, pair)}
    rows += [{"how": how, "distance": distance(w, others), "accuracy": on_test(w)} for how, w in merged.items()]
stock = pd.DataFrame(rows).groupby("how", sort=False).mean()
stock.round(3)

# %%
near = stock["distance"]
assert near["Model Stock of two"] < 0.97 * near["mean of two"]
claim(
    "model-stock",
    "Of two runs, Model Stock lies nearer to the centre of six other runs than the mean does",
    holds=bool(near["Model Stock of two"] < near["mean of two"]),
    figure=f"distance {near['Model Stock of two']:.2f} against {near['mean of two']:.2f}, mean of 4 pairs",
)

# %% [markdown]
# Nearer to the centre, but is it better? Here the two are level.

# %%
better = 100 * (stock.loc["Model Stock of two", "accuracy"] - stock.loc["mean of two", "accuracy"])
claim(
    "model-stock",
    "Of two runs, Model Stock is more accurate than the mean by a point or more",
    holds=bool(better >= 1),
    figure=f"{better:+.1f} points, mean of 4 pairs",
)

# %% [markdown]
# On eight different tasks it throws away most of what averaging brings. Use it for runs of one task only.

# %%
eight = {fn.__name__: bed.score(fn(bed.base, bed.experts)) for fn in (average, model_stock, karcher, sce)}
kept = (eight["model_stock"] - bed.score(bed.base)) / (eight["average"] - bed.score(bed.base))
assert kept < 0.4
claim(
    "model-stock",
    "On eight different tasks Model Stock keeps less than half of what the average brings over the base",
    holds=bool(kept < 0.5),
    figure=f"accuracy: base {bed.score(bed.base):.2f}, stock {eight['model_stock']:.2f}, mean {eight['average']:.2f}",
)

# %% [markdown]
# ## Karcher: averaging on the sphere
#
# The mean of two weight matrices is shorter than either, unless they point the same way. SLERP walks along the arc
# between two; the *Karcher mean* is the same idea for any number: the point on the sphere where the ways to all
# networks cancel out, with the mean of their lengths. The iteration needs only the angles between the networks:

# %%
from notebook_kit.merging.karcher import karcher_coefficients

print(inspect.getsource(karcher_coefficients).split('"""')[2])

# %% [markdown]
# Left: the length on the way from one network to another. Right: the length of all networks' merge. `trained apart` are
# two networks with nothing in common; runs from `one base` are nearly parallel, so for them the choice hardly matters.

# %%
twins = zoo.digit_twins(64)
families = {"trained apart": (twins.base, twins.experts), "one base": (base, seeds)}
explore(report.length_view, families, draw=pictures.length_figure, limits={"layer": Range(0, 5)})

# %%
apart = report.length_table(twins.base, twins.experts).set_index("tensor").filter(like="weight", axis=0)
assert (apart["average"] < 0.9).all()
claim(
    "karcher",
    "Of networks trained apart, the mean loses a tenth of every matrix's length or more, the Karcher mean nothing",
    holds=bool((apart["average"] < 0.9).all() and (apart["karcher"] > 0.999).all()),
    figure=f"length {apart['average'].min():.2f} to {apart['average'].max():.2f} against 1.00",
)

# %%
ahead = 100 * (eight["karcher"] - eight["average"])
assert abs(ahead) < 0.5
claim(
    "karcher",
    "On eight experts from one base, the Karcher mean is more accurate than the plain mean by a point or more",
    holds=bool(ahead >= 1),
    figure=f"{ahead:+.1f} points",
)

# %% [markdown]
# ## SCE: where experts differ
#
# Back to the eight tasks. SCE **s**elects the positions where the experts differ most, **c**alculates for each tensor
# how much each expert changed it, and weighs by that, then **e**rases the minority's signs. A case by hand: two
# experts, four weights. In the second the signs disagree and -3 has more mass; with `density` 0.5 only that position
# is left.

# %%
# NBVAL_CHECK_OUTPUT
two = [{"w": torch.tensor([3.0, 1.0, 1.0, 0.0])}, {"w": torch.tensor([1.0, -3.0, 1.0, 0.0])}]
for density in (1.0, 0.5):
    print(f"density {density}: {[round(v, 3) for v in sce({'w': torch.zeros(4)}, two, density=density)['w'].tolist()]}")

# %% [markdown]
# Live. With a small `density`, raise `scale`: what is selected may be made larger.

# %%
explore(sce, bed.base, bed.experts, score=bed.score, density=0.5, scale=2.0, limits={"floor": None})

# %% [markdown]
# Settings are chosen on validation pictures, for SCE and for TIES alike, from grids of about the same size.

# %%
trial = partial(sweep, score=partial(bed.score, split="val"), progress=False)
grids = {
    sce: {"density": [0.3, 0.5, 0.7, 1.0], "scale": [0.5, 1.0, 2.0, 3.0]},
    ties: {"density": [0.3, 0.5, 0.7, 1.0], "scale": [0.4, 0.6, 0.8, 1.0]},
}
tuned = {}
for fn, grid in grids.items():
    best = trial(fn, bed.base, bed.experts, grid=grid).best
    tuned[fn.__name__] = float(bed.score(fn(bed.base, bed.experts, **best)))
    print(f"{fn.__name__:5} {best} {tuned[fn.__name__]:.3f}")

# %%
over = tuned["sce"] - eight["average"]
assert over > 0.02
claim(
    "fusechat",
    "SCE beats plain averaging on the eight digit labelings by two points or more",
    holds=bool(over > 0.02),
    figure=f"accuracy {tuned['sce']:.3f} against {float(eight['average']):.3f}; tuned TIES {tuned['ties']:.3f}",
)

# %% [markdown]
# ## Try
#
# 1. Halve the learning rate of the first run. How much is left for averaging to repair?
# 2. `average_checkpoints(..., rule="ema", decay=0.9)`: is a moving average any better than equal weights?
# 3. Put the diverged run of `rates` into the uniform soup alone with a good one. What does the greedy soup do with it?
# 4. `model_stock(..., scope="row")` takes an angle for every unit. Is the star nearer to the cross?
# 5. Your own run: `CheckpointRecorder` works in any training loop with `saw` and `store`.
#
# ## Sources

# %%
for paper in ("mwa", "model-soups", "model-stock", "karcher", "fusechat"):
    print(cite(paper))
