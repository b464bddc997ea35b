# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [adamerging, frank_wolfe, m2n2]
# ---

# %% [markdown]
# # Search: let a number decide how to merge
#
# **The question.** A merge has knobs: how much of each expert, in each layer. Rules of thumb set them blindly. If you
# have a few samples, you can *ask*: try a merge, look at a number, and change the knobs. Which number, and how to
# change them?
#
# **Three answers.** *AdaMerging* follows a gradient, and its number needs no labels. *Frank-Wolfe* asks the gradient
# one question only: which of the models in my pool should I step towards? *M2N2* needs no gradient at all: merges are
# born, compete for data points, and mate with whoever knows what they do not.

# %%
import inspect
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, data, explore, training
from notebook_kit.diagnostics import merge_search as numbers
from notebook_kit.figures import merge_search as pictures
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.models import MLP
from notebook_kit.widgets import LiveFigure
from notebook_kit.zoo import digit_labels, digit_views

torch.set_num_threads(1)

# %% [markdown]
# ## AdaMerging: be sure of yourself
#
# Give every task vector its own coefficient in every tensor: $\theta_l = \theta_{0,l} + \sum_i \lambda_{il}
# \tau_{il}$. A good network is usually sure of its answers, so make the *entropy* of the answers small. That needs
# inputs, and no labels. Only the $\lambda$ learn; the weights follow. These lines are the whole merge:

# %%
from notebook_kit.merging import adamerging, adamerging_path, objective, task_arithmetic
from notebook_kit.merging.task_vectors import TaskVectors

print(inspect.getsource(TaskVectors.combine))
print(inspect.getsource(objective.mean_entropy))

# %% [markdown]
# With no step at all it is task arithmetic. Look for a difference of zero:

# %%
# NBVAL_CHECK_OUTPUT
views = digit_views()
inputs = {name: x for name, (x, _) in views.batches("test").items()}  # no labels
start = adamerging(views.base, views.experts, model=views.model, batches=inputs, scale=0.1, steps=0)
plain = task_arithmetic(views.base, views.experts, scale=0.1)
print("largest difference:", round(max((start[k] - plain[k]).abs().max().item() for k in start), 6))

# %% [markdown]
# Now let it learn, four times: two experts (one knows inverted digits, one mirrored ones) or all eight; from entropy
# without labels, or, as a control, from the cross-entropy on 200 labelled validation pictures.

# %%
PAIR = ["invert", "hflip"]
learn = partial(adamerging_path, model=views.model, steps=100, lr=1e-2, batch_size=64)


def learned(chosen, loss, scale):
    experts = [views.experts[views.names.index(name)] for name in chosen]
    source = inputs if loss == "entropy" else views.batches("val")
    path = learn(views.base, experts, batches={n: source[n] for n in chosen}, loss=loss, scale=scale)
    return path, partial(score_on, chosen)


def score_on(chosen, weights, split="test"):
    tasks = views.score(weights, split).tasks
    return sum(tasks[name] for name in chosen) / len(chosen)


# %%
records = {}
for pool, chosen, scale in (("two views", PAIR, 0.3), ("eight views", views.names, 0.1)):
    for loss in ("entropy", "cross_entropy"):
        path, score = learned(chosen, loss, scale)
        name = f"{pool}, {'no labels' if loss == 'entropy' else 'labels'}"
        unit = f"{loss.replace('_', '-')} (nats)"
        records[name] = numbers.record_coefficients(path, score, names=chosen, every=5, loss=unit)
        print(f"{name:24} accuracy {records[name].scores[0]:.2f} -> {records[name].scores[-1]:.2f}")

# %% [markdown]
# Drag `step`. Left: what is made small (above) and what we want (below) on one time axis. Right: the coefficients.
# With two views, the curves do what you hope, for a while. Then choose *eight views, no labels*: the entropy falls
# all the way, and the accuracy falls with it. The network has become *confidently wrong*: it says one digit to all.

# %%
limits = {"run": Choice(*records), "step": Range(0, 100)}
explore(numbers.adamerging_view, records, step=25, limits=limits, draw=pictures.adamerging_figure)

# %% [markdown]
# So someone must say *stop*. Here the labelled validation pictures do, and the test pictures judge:

# %%
two = records["two views, no labels"]
stop = max(two.steps, key=lambda step: score_on(PAIR, two.path.merged(int(step)), "val"))
before, after = two.scores[0], two.scores[list(two.steps).index(stop)]
assert after - before > 0.05
claim(
    "adamerging",
    "Coefficients learned without labels, and stopped in time, bring five points on two views",
    holds=after - before > 0.05,
    figure=f"accuracy {before:.2f} to {after:.2f} at step {stop}",
)

# %% [markdown]
# With eight views the promise fails from the first step. The start is too poor for its own certainty to be a guide.

# %%
eight = records["eight views, no labels"]
fell = eight.path.losses[-1].mean() < eight.path.losses[0].mean()
assert fell
assert eight.scores[-1] < eight.scores[0] - 0.2
claim(
    "adamerging",
    "With eight views, coefficients learned without labels beat the ones they start from",
    holds=eight.scores.max() > eight.scores[0] + 0.01,
    figure=f"accuracy {eight.scores[0]:.2f} to {eight.scores[-1]:.2f} while the entropy falls",
)

# %% [markdown]
# Is a coefficient for each *layer* worth it? On the label bed (eight questions about the same digits; each has its own
# slice of the logits, `heads`), from labels, so that only the number of knobs differs: 8 against 48.

# %%
bed, heads = digit_labels(), numbers.label_heads()
tuned = {}
for granularity in ("task", "layer"):
    options = {"loss": "cross_entropy", "scale": 0.2, "steps": 80, "lr": 2e-2, "batch_size": 64, "heads": heads}
    data_of = {"model": bed.model, "batches": bed.batches("val")}
    tuned[granularity] = bed.score(adamerging(bed.base, bed.experts, granularity=granularity, **data_of, **options))
gain = tuned["layer"] - tuned["task"]
assert gain > 0.05
claim(
    "adamerging",
    "A coefficient for each layer beats one for each task by five points",
    holds=gain > 0.05,
    figure=f"accuracy {tuned['layer']:.2f} against {tuned['task']:.2f}, both learned from labels",
)

# %% [markdown]
# AdaMerging chooses *how much* of each task vector; DOGE (lesson 33) mends the task vectors *themselves*. So do both:
# `doge_experts` gives experts with the correction in them, one Δ a task, and AdaMerging learns their coefficients. No
# labels again, except that validation pictures say when to stop, and which of four settings each side may use.


# %%
pictures_only = {name: x for name, (x, _) in bed.batches("val").items()}
run = {"model": bed.model, "heads": heads, "steps": 20, "lr": 1e-2, "batch_size": 64}
stops = pd.Index(range(0, 21, 5), name="step")


def walk(vectors, scale, seed=0):
    """Accuracy at each stop, on validation and on test pictures."""
    path = adamerging_path(bed.base, vectors, batches=pictures_only, scale=scale, seed=seed, **run)
    merges = [path.merged(step) for step in stops]
    return pd.DataFrame({split: [float(bed.score(m, split)) for m in merges] for split in ("val", "test")}, stops)


# %% [markdown]
# The plain task vectors try four starts λ₀. The mended ones start from 0.2, and try two `eta` and two `density`:
# trimmed to 0.3, DOGE's default, or whole.

# %%
from notebook_kit.merging import doge_experts

mend = partial(doge_experts, bed.base, bed.experts, shared_delta=False, subspace=8, steps=100)
kinds = {"plain": {f"λ₀ {scale}": (bed.experts, scale) for scale in (0.1, 0.15, 0.2, 0.3)}, "mended": {}}
for eta in (0.2, 0.3):
    for density in (0.3, 1.0):
        kinds["mended"][f"eta {eta}, density {density:g}"] = (mend(eta=eta, density=density), 0.2)
tried = {(kind, name): walk(*one)["val"].max() for kind, settings in kinds.items() for name, one in settings.items()}
pd.Series(tried, name="best on validation").round(2).to_frame()

# %% [markdown]
# Trimmed, the correction is lost; whole, it helps. Now the best of each kind, from three seeds, on test pictures. Who
# starts higher? Who gains more?

# %%
ends, curves = {}, {}
for kind, settings in kinds.items():
    best = settings[max(settings, key=lambda name, kind=kind: tried[kind, name])]
    walks = [walk(*best, seed) for seed in range(3)]
    ends[kind] = [float(one["test"][one["val"].idxmax()]) for one in walks]
    curves[kind] = walks[0]["test"]
pd.DataFrame(curves).T.round(2)

# %% [markdown]
# The table is one seed; the claim takes all three. Both rise, and the mended ones begin higher.

# %%
lead = min(ends["mended"]) - max(ends["plain"])
assert lead > 0.03
claim(
    "doge",
    "AdaMerging on DOGE's adjusted experts beats AdaMerging on the plain ones by three points in every seed",
    holds=lead > 0.03,
    figure=f"accuracy {min(ends['mended']):.2f} or more against {max(ends['plain']):.2f} or less, 3 seeds, "
    "settings and stop chosen on validation pictures",
)

# %% [markdown]
# ## Frank-Wolfe: which model should I step towards?
#
# You want a network for *digit* and *parity*, and have 100 labelled pictures for each. The pool has eight checkpoints.
# Six of them are of no use to you, but nobody says which. Averages get worse with every useless model that joins.
#
# The gradient $g$ of your loss ranks the whole pool with one inner product each. Step towards the best, ask again.

# %%
from notebook_kit.merging import frank_wolfe, frank_wolfe_path
from notebook_kit.merging.frank_wolfe_oracle import pick

print(inspect.getsource(pick))

# %% [markdown]
# Two corners of a triangle and a bowl between them, by hand: the picks alternate, and the *gap* says how far the
# minimum can still be away.


# %%
# NBVAL_CHECK_OUTPUT
class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(3))

    def forward(self, _):
        return self.x


corners, centre = [{"x": row} for row in torch.eye(3)], torch.tensor([0.5, 0.5, 0.0])
bowl = {"model": Point(), "batches": {"bowl": torch.zeros(1)}, "init": "base", "steps": 5}
walk = frank_wolfe_path(corners[2], corners[:2], **bowl, task_loss=lambda x, *_: 0.5 * ((x - centre) ** 2).sum())
print("picks", walk.picks.flatten().tolist(), "gaps", [round(gap, 2) for gap in walk.gaps.tolist()])
print("shares of start and corners", [round(share, 2) for share in walk.coefficients[-1, 0].tolist()])

# %% [markdown]
# Now the pool. It grows from two models (digit and parity) to all eight. Diamond: the settings you choose. Right: how
# much of each model is in the result after every step; dots are the picks. Move `pool` to 8 and watch the useless
# columns stay dark. Then try `oracle`: `cos_checkpoint` is what the official code does.

# %%
samples = {name: (x[:100], y[:100]) for name, (x, y) in bed.batches("train").items()}
targets = {name: samples[name] for name in ("digit", "parity")}
run = {"model": bed.model, "batches": targets, "heads": heads}


def target_score(weights, names=("digit", "parity")):
    tasks = bed.score(weights).tasks
    return sum(tasks[name] for name in names) / len(names)


curve = numbers.pool_growth(bed.base, bed.experts, numbers.pool_merges(**run), target_score)
curve.pivot(index="pool", columns="method", values="score").round(2)

# %%
look = {"names": bed.names, "measure": target_score, "curve": curve, **run}
limits = {"pool": Range(2, 8), "steps": Range(1, 30)}
explore(
    numbers.frank_wolfe_view, bed.base, bed.experts, pool=4, limits=limits, draw=pictures.frank_wolfe_figure, **look
)

# %%
line = curve.set_index(["method", "pool"])["score"]
lost = {method: line[method, 2] - line[method, 8] for method in ("average", "Frank-Wolfe")}
assert lost["Frank-Wolfe"] < 0.03 < lost["average"] - 0.2
claim(
    "fw-merging",
    "Six useless models in the pool cost Frank-Wolfe less than three points",
    holds=lost["Frank-Wolfe"] < 0.03,
    figure=f"{line['Frank-Wolfe', 2]:.2f} to {line['Frank-Wolfe', 8]:.2f}; "
    f"the average falls from {line['average', 2]:.2f} to {line['average', 8]:.2f}",
)

# %% [markdown]
# And useful models? Make all eight questions the target, so that every model that joins has something to say.

# %%
every = {"model": bed.model, "batches": samples, "heads": heads, "granularity": "layer"}
useful = numbers.pool_growth(bed.base, bed.experts, numbers.pool_merges(**every), bed.score, sizes=(2, 4, 6, 8))
more = useful.set_index(["method", "pool"])["score"]
rise = more["Frank-Wolfe", 8] - more["Frank-Wolfe", 2]
assert rise > 0.03 > more["average", 8] - more["average", 2]
claim(
    "fw-merging",
    "With useful models Frank-Wolfe gains three points from a pool of two to a pool of eight",
    holds=rise > 0.03,
    figure=f"{more['Frank-Wolfe', 2]:.2f} to {more['Frank-Wolfe', 8]:.2f}; "
    f"average {more['average', 2]:.2f} to {more['average', 8]:.2f}",
)

# %% [markdown]
# With two models and the start, the set of all mixtures is a triangle, and the whole walk can be seen. The star is
# the end. Dark is low loss.

# %%
path = frank_wolfe_path(bed.base, bed.experts[:2], **run)
begin = task_arithmetic(bed.base, bed.experts[:2], scale=0.3)
target = objective.Objective(**{**run, "loss": "cross_entropy"})


@torch.no_grad()
def loss_of(weights):
    return sum(float(value) for _, value in target.losses(weights, target.draw())) / 2


ground = numbers.loss_triangle([begin, *bed.experts[:2]], loss_of)
names = ("start", "digit", "parity")
LiveFigure(pictures.triangle_figure(*ground, path.coefficients[:, 0], names=names, title="the walk, ten steps"))

# %% [markdown]
# Two variants. FW-soft lets every target task pick, and merges all picks at once (plainly here; AdaMerging inside is
# `move="adamerging"`). And a pool may stay on disk: one tensor at a time is read, so a pool of a hundred needs no more
# memory than a pool of two.

# %%
for pool in (2, 8):
    soft = frank_wolfe(bed.base, bed.experts[:pool], variant="soft", scale=0.3, **run)
    print(f"soft, pool of {pool}: {target_score(soft):.2f}")

from notebook_kit.merging import save
from notebook_kit.weights import Checkpoint

with tempfile.TemporaryDirectory() as folder:
    files = [save(expert, Path(folder) / f"{i}.safetensors") for i, expert in enumerate(bed.experts)]
    streamed = frank_wolfe(bed.base, [Checkpoint(file) for file in files], **run)
assert all(torch.equal(streamed[k], tensor) for k, tensor in frank_wolfe(bed.base, bed.experts, **run).items())

# %% [markdown]
# ## M2N2: who eats what others leave
#
# The paper's own first experiment, smaller: raw pixels, a network 64-64-10, two specialists from one start. One has
# seen the digits 0 to 4 for ten steps, the other 5 to 9. Each gets under half of all digits right.

# %%
x, y = data.digits("train")
test_x, test_y = data.digits("test")
x, test_x = 16 * x, 16 * test_x
net = MLP([64, 64, 10])

from notebook_kit.merging import FlatSpace, NicheArchive, PointScores, cma_es, m2n2, random_weights, slerp_search

origin = random_weights(net.state_dict(), 1)[0]


def specialist(low, high):
    mine = (y >= low) & (y < high)
    net.load_state_dict(origin)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    training.fit(net, lambda _: (x[mine], y[mine]), loss, steps=10, lr=3e-3, progress=False)
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


# %%
low, high = specialist(0, 5), specialist(5, 10)
points, on_test = PointScores(net, x, y), PointScores(net, test_x, test_y)
accuracy = lambda weights: float(on_test(weights).mean())  # noqa: E731
print(f"digits 0-4: {accuracy(low):.2f}, digits 5-9: {accuracy(high):.2f}")

# %% [markdown]
# A data point is food. If many solve it, each gets little; if you alone solve it, it is all yours. That is
# *competition*. *Attraction*: your best mate is the one who eats what you cannot. Three models, four points:

# %%
# NBVAL_CHECK_OUTPUT
from notebook_kit.merging import niches

solved = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
print("accuracy  ", solved.sum(1).tolist(), "  fitness", niches.fitness(solved).tolist())
print("attraction to each, as seen by 0, 1, 2:", [niches.attraction(solved, i).tolist() for i in range(3)])
print(inspect.getsource(niches.competition))

# %% [markdown]
# The weakest model is the only mate for the strongest. A child takes `w` of one parent up to a random place in the
# flat weights, and `1 - w` from there on. Four variants, 480 evaluations each, four seeds. (Eight children are born at
# a time, so that one pass scores them all; the paper breeds one at a time, and spends 50,000 evaluations.)

# %%
VARIANTS = {
    "M2N2": {},
    "no split point": {"splitpoint": False},
    "no matchmaker": {"matchmaker": False},
    "plain GA": {"matchmaker": False, "alpha": 0.0},
}


def evolved(seed, **how):
    archive = NicheArchive(low, [low, high], score_points=points, children=8, seed=seed, **how)
    if seed == 0:
        return numbers.record_evolution(archive, 480, labels=y, every=24, test=accuracy)
    archive.run(480)
    return archive


runs = {name: [evolved(seed, **how) for seed in range(4)] for name, how in VARIANTS.items()}
lives = {name: first for name, (first, *_) in runs.items()}

# %% [markdown]
# Above: the archive, a row a member, a column a data point, sorted by digit. At first only two rows are filled: one
# specialist knows the left half, one the right. Drag `picture` and watch who survives. Blue bars: the parents of the
# last child; red: the child. Below: coverage (points that *anyone* solves), accuracy, and how the child was mixed
# along the weights (dotted: tensors).

# %%
limits = {"variant": Choice(*lives), "picture": Range(0, len(lives["M2N2"].snapshots) - 1)}
explore(numbers.niche_view, lives, picture=12, limits=limits, draw=pictures.niche_figure)

# %%
rows = {}
for name, (first, *others) in runs.items():
    last = [first.curves.iloc[-1], *(archive.history[-1] | {"test": accuracy(archive.best())} for archive in others)]
    rows[name] = {key: sum(row[key] for row in last) / len(last) for key in ("test", "coverage", "diversity")}
arc = slerp_search(low, [low, high], score_points=points, evals=200)
board = pd.DataFrame(rows).T
print(f"best of 200 places on the arc between the two: {accuracy(FlatSpace(low).weights(arc.flat)):.2f}")
board.round(2)

# %%
kept = board.loc["M2N2", "coverage"] - board.loc["plain GA", "coverage"]
assert kept > 0.15
claim(
    "m2n2",
    "Competition keeps niches: M2N2's archive covers 15 points more than a plain genetic algorithm's",
    holds=kept > 0.15,
    figure=f"coverage {board.loc['M2N2', 'coverage']:.2f} against {board.loc['plain GA', 'coverage']:.2f}, 4 seeds",
)

# %%
split = board.loc["M2N2", "test"] - board.loc["no split point", "test"]
assert split > 0.03
claim(
    "m2n2",
    "The split point is worth three points of accuracy",
    holds=split > 0.03,
    figure=f"{board.loc['M2N2', 'test']:.2f} against {board.loc['no split point', 'test']:.2f}, 4 seeds",
)

# %% [markdown]
# The paper also evolves networks from *nothing*: two random ones, and mutation. It spends 50,000 evaluations and comes
# out level with CMA-ES. At 1,200 evaluations it does not; CMA-ES (with a diagonal covariance) is far ahead.

# %%
random_pair = random_weights(net.state_dict(), 2, seed=5)
scratch = NicheArchive(random_pair[0], random_pair, score_points=points, mutation_std=0.01, children=8).run(1200)
space = scratch.space
cloud = cma_es(
    space.flatten(random_pair)[0],
    lambda flat: float(points(space.weights(flat)).mean()),
    sigma=0.01,
    evals=1200,
    pop_size=20,
    diagonal=True,
)
from_nothing = {"M2N2": accuracy(scratch.best()), "CMA-ES": accuracy(space.weights(cloud.flat))}
assert from_nothing["CMA-ES"] > from_nothing["M2N2"] + 0.1

# %%
claim(
    "m2n2",
    "From random weights M2N2 is within five points of CMA-ES after 1200 evaluations",
    holds=from_nothing["M2N2"] > from_nothing["CMA-ES"] - 0.05,
    figure=f"accuracy {from_nothing['M2N2']:.2f} against {from_nothing['CMA-ES']:.2f}; the paper spends 50,000",
)

# %% [markdown]
# The same function merges any experts: here the eight of the label bed, with every (picture, question) a data point.

# %%
val = bed.batches("val")
labels = torch.stack([classes for _, classes in val.values()], dim=1)
questions = PointScores(bed.model, val["digit"][0], labels, list(heads.values()))
merged = m2n2(bed.base, bed.experts, score_points=questions, evals=400, children=8)
print(f"M2N2 on the label bed: {bed.score(merged):.2f}")

# %% [markdown]
# ## A handful of coefficients: ask CMA-ES
#
# Where there are only eight knobs, one a task, no gradient and no archive is needed. PCB merging (lesson on
# interference) searches them so. We do it for PCB and for plain task arithmetic: validation pictures decide.

# %%
from notebook_kit.merging.pcb import pcb
from notebook_kit.merging.pcb_search import pcb_search

validation = partial(bed.score, split="val")
searched = pcb_search(bed.base, bed.experts, validation, budget=80)
weighted = lambda flat: task_arithmetic(bed.base, bed.experts, scale=1.0, weights=flat.tolist())  # noqa: E731
added = cma_es(torch.full((8,), 0.2), lambda flat: validation(weighted(flat)), sigma=0.1, evals=200)
LiveFigure(
    pictures.search_figure(
        {"PCB": searched.history, "task arithmetic": added.history},
        title="one coefficient a task, by CMA-ES",
        y="best validation accuracy so far",
    )
)

# %%
one, many = bed.score(pcb(bed.base, bed.experts)), bed.score(pcb(bed.base, bed.experts, weights=searched.weights))
print(f"test: PCB {one:.2f} -> {many:.2f}, task arithmetic by search {bed.score(weighted(added.flat)):.2f}")
assert many > one + 0.01
claim(
    "pcb-merging",
    "Searching one coefficient a task on validation pictures brings PCB one point or more on test pictures",
    holds=many > one + 0.01,
    figure=f"accuracy {one:.3f} to {many:.3f}, 80 merges tried",
)

# %% [markdown]
# ## What to try
#
# 1. `density=0.2` in `adamerging` trims the task vectors first (AdaMerging++). Does it put off the collapse?
# 2. In the Frank-Wolfe widget set `scale` to 0.3, as the official code has it. Which corner does the first step miss?
# 3. Give M2N2 specialists from *two different* random starts. It stalls: align them first (lesson 40).
# 4. `angle="part"` uses one angle for each side of the split, as the paper's formula says. Is there a difference?
# 5. Your own classifier from `transformers`: `adamerging(base, experts, model=model, batches={"task": [batch, ...]})`,
#    where a batch is the dict your tokenizer made.
#
# ## Sources

# %%
for paper in (adamerging, frank_wolfe, m2n2):
    print(cite(paper))
