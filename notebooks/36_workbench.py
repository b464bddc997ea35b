# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: []
# ---

# %% [markdown]
# # The workbench: all merges side by side, and your own models
#
# **The question.** You have met some twenty ways to merge networks. Which one do you take for yours? A paper's table
# will not tell you: it has other networks. So you try them all, in one call, and read the table with care.
#
# **The idea.** A fair table needs four things. Every method gets its hyperparameters chosen on pictures that do not
# count. Every method is scored once, on pictures that nothing was chosen on. Two lines say what is possible: the
# experts, each at its own task, and one network that *learned* all tasks together. And the table says what each method
# was given.

# %%
import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, compare_merges, explore
from notebook_kit import merging as m
from notebook_kit.data import digit_labelings
from notebook_kit.diagnostics.transport import with_weights
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure
from notebook_kit.zoo import Score, digit_labels

torch.set_num_threads(1)
bed = digit_labels()

# %% [markdown]
# ## One call
#
# Eight experts see the same digits and answer eight questions. `compare_merges` takes base and experts, names of
# methods and a score. Without a grid it makes a small one from each method's annotations. `slerp` joins two models, not
# eight: see how it says so in the last column, and how the others go on.

# %%
choose = partial(bed.score, split="val")
first = compare_merges(
    bed.base, bed.experts, ["average", "task_arithmetic", "slerp", "ties"], score=bed.score, tune=choose, progress=False
)
first.table[["score", "tuned", "settings", "problem"]]

# %% [markdown]
# ## The line to reach
#
# What could one network of this size do? We train one on all eight questions at once. It is the *multitask reference*:
# it has seen all the data, which merging is meant to do without.

# %%
# NBVAL_CHECK_OUTPUT
train, columns, start = bed.batches("train"), {}, 0
for name, labeling in digit_labelings().items():
    columns[name] = slice(start, start + labeling.n_classes)
    start += labeling.n_classes
pixels = train["digit"][0]


def loss_of(model, rows, tasks=tuple(bed.names)):
    logits = model(pixels[rows])
    return sum(F.cross_entropy(logits[:, columns[task]], train[task][1][rows]) for task in tasks) / len(tasks)


def rows_of(generator):
    return torch.randint(len(pixels), (64,), generator=generator)


multitask = copy.deepcopy(bed.model)
fit(multitask, rows_of, loss_of, steps=250, lr=1e-3, progress=False)
print(f"trained on all eight: {bed.score(multitask):.2f}")

# %% [markdown]
# ## What some methods ask for
#
# Three methods want to know what each expert cares about, measured on its training pictures: Fishers, Gram matrices,
# squared gradients. Three more learn or search, on the validation pictures. They have an advantage; the table says so.

# %%
models = {name: with_weights(bed.model, expert) for name, expert in zip(bed.names, bed.experts, strict=True)}
minibatches = list(torch.arange(960).view(15, 64))
fishers = [
    m.diagonal_fisher(models[task], [pixels[:128]], logits=lambda z, part=columns[task]: z[..., part])
    for task in bed.names
]
grams = [m.gram_matrices(models[task], [pixels]) for task in bed.names]
moments = [m.squared_gradients(models[t], minibatches, partial(loss_of, tasks=[t])) for t in bed.names]
val = bed.batches("val")
answers = torch.stack([val[task][1] for task in bed.names], dim=1)
points = m.PointScores(bed.model, val["digit"][0], answers, heads=list(columns.values()))

# %%
learning = {"model": bed.model, "batches": val, "heads": columns}
data = {
    "fisher": {"fishers": fishers},
    "regmean": {"grams": grams},
    "ota": {"moments": moments},
    "adamerging": learning | {"steps": 40, "lr": 0.02, "batch_size": 64},
    "frank_wolfe": learning,
    "m2n2": {"score_points": points, "evals": 400, "children": 8},
    "doge": {"steps": 50, "lr": 1e-3},
}
given = dict.fromkeys(("fisher", "regmean", "ota"), "training data")
given |= {"adamerging": "validation data, no labels"}
given |= dict.fromkeys(("adamerging, labels", "frank_wolfe", "m2n2", "greedy_soup"), "validation labels")

# %% [markdown]
# Small grids, centred where each method was good in its own lesson.

# %%
weak, strong = [0.1, 0.15, 0.2, 0.3], [0.5, 0.75, 1.0, 1.25]
grids = {
    "task_arithmetic": {"scale": weak},
    "ties": {"density": [0.2, 0.5, 0.9], "scale": strong},
    "dare": {"density": [0.5, 0.9], "scale": weak},
    "breadcrumbs": {"density": [0.5, 0.9], "scale": weak},
    "della": {"density": [0.5, 0.8], "scale": strong[:3]},
    "pcb": {"density": [0.2, 0.5], "scale": strong},
    "consensus": {"k": [1, 2, 3], "scale": [*weak, 0.4]},
    "sce": {"density": [0.2, 0.5, 1.0], "scale": strong},
    "isotropic": {"scale": [2.0, 3.0, 4.0, 5.0]},
    "task_singular_vectors": {"scale": strong},
    "opcm": {"alpha": [0.2, 0.5, 0.8]},
    "doge": {"eta": [0.2, 0.4, 0.8]},
    "regmean": {"alpha": [0.1, 0.9]},
    "frank_wolfe": {"scale": [0.3, 1.0]},
}

# %% [markdown]
# `methods` may be names, functions, either with a grid, or a mapping with labels of your own, as here: `adamerging`
# stands there twice, once without labels and once with.

# %%
plain = ("average", "karcher", "model_stock", "fisher", "ota", "adamerging", "m2n2", "greedy_soup")
methods = {name: (name, grids.get(name, {})) for name in [*grids, *plain]}
methods["adamerging, labels"] = partial(m.adamerging, loss="cross_entropy", **data["adamerging"]), {}
result = compare_merges(
    bed.base, bed.experts, methods, score=bed.score, tune=choose, arguments=data,
    reference=multitask.state_dict(), names=bed.names,
)  # fmt: skip
result

# %% [markdown]
# Dark dots are means, light ones single tasks. Switch `picture` to `map`, or `task` to `digit`: ten classes are harder
# to keep than two. Now the table, with what each method was given. `tuned` is the score on validation pictures, by
# which the settings were chosen; what `score` lacks of it is the price of choosing.

# %%
table = result.table[["score", "tuned", "settings", "seconds"]].copy()
table.insert(1, "given", [given.get(name, "") for name in table.index])
table

# %% [markdown]
# Some methods have no row, because one network for eight tasks is not what they make:

# %%
# NBVAL_CHECK_OUTPUT
why = {
    "slerp": "joins two models",
    "fast_fisher_graft": "thins one expert",
    "tall_masks": "keeps a mask for each task",
    "average_checkpoints": "averages one run",
    "metrics_weighted": "averages one run",
}
for name, reason in why.items():
    print(f"{name:20} {reason}")

# %% [markdown]
# ## What the table says here
#
# Four methods stand clear of the rest: three that turn or flatten the directions of what changed, and coefficients
# learned from labels. Behind them is a crowd around 0.6. With 597 pictures, differences of a point there say nothing.

# %%
# NBVAL_CHECK_OUTPUT
scores = result.frame.set_index("model")["score"]
free = scores[[name for name in methods if name not in given]]
crowd = free[(free > 0.55) & (free < 0.65)]
print(f"best without data: {free.idxmax()} {free.max():.2f}")
print(f"between 0.55 and 0.65: {len(crowd)} of {len(free)} methods without data")

# %% [markdown]
# Papers on large networks keep nine tenths and more of what eight experts know. Ours are small and have less room.

# %%
share = free.max() / scores["best expert, task by task"]
assert 0.7 < share < 0.87
claim(
    "tsv-merge",
    "On eight tasks the best merge without data keeps nine tenths of the experts' accuracy",
    holds=share >= 0.9,
    figure=f"{free.idxmax()}: {free.max():.3f} of {scores['best expert, task by task']:.3f}, that is {share:.0%}",
)

# %% [markdown]
# ## Look inside
#
# `result.merge(name)` gives a method's merged weights. Three pictures of them, with one set of controls. *Kept
# changes*: of each expert's largest changes, the share that the merge moves the same way; `method` picks one and shows
# its experts. *Sign conflicts*: where the experts pull in two directions. *Spectrum*: the directions of what changed.
# Drag `density`: among the very largest changes, conflicts are rarer.

# %%
from notebook_kit.figures.merges import merge_view
from notebook_kit.hyperparameters import Choice

shown = {name: result.merge(name) for name in ("task_arithmetic", "ties", "opcm", "task_singular_vectors")}
matrices = Choice(*(key for key in bed.base if key.endswith("weight")))
limits = {"tensor": matrices, "method": Choice("all methods", *shown)}
explore(merge_view, bed.base, bed.experts, shown, limits=limits, names=bed.names)

# %% [markdown]
# The spectrum of the first layer. A plain sum has few strong directions, those that the experts share, and the rest is
# weak. The better methods lift the rest.

# %%
LiveFigure(merge_view(bed.base, bed.experts, shown, picture="spectrum", tensor="layers.0.weight"))

# %% [markdown]
# ## A map of two experts
#
# Three models span a plane: base, *digit*, *parity*. Each point of it is a network, and we score a grid of them once,
# on the two tasks. Merges of the two lie in the plane or near it; each ring is a merge's shadow. How far is the best
# spot from both experts?

# %%
from notebook_kit.diagnostics.merges import score_surface
from notebook_kit.figures.merges import surface_view

pair = {name: bed.experts[bed.names.index(name)] for name in ("digit", "parity")}


def both(weights, split="val"):
    tasks = bed.score(weights, split).tasks
    return Score({task: tasks[task] for task in pair}, "accuracy")


two = compare_merges(
    bed.base, list(pair.values()), ["average", "slerp", "task_arithmetic", "ties", "task_singular_vectors"],
    score=partial(both, split="test"), tune=both, names=list(pair), progress=False,
)  # fmt: skip
merges = {name: two.merge(name) for name in two.best}
surface = score_surface({"base": bed.base, **pair}, both, also=merges, progress=False)
places = surface.place(merges)

# %%
explore(surface_view, surface, places, limits={"task": Choice(*surface.scores)})

# %% [markdown]
# Switch `task`: the two hills overlap beyond the line between the experts. Averages stay on that line; methods that
# *add* step over it.

# %%
two.table[["score", *pair, "settings"]].join(places.set_index("model")[["distance"]]).round(2)

# %% [markdown]
# ## Adapters: merge what they do, not what they are made of
#
# A LoRA adapter is two thin matrices, and acts through their product: $\Delta W = s B A$. Two of them add up to
# $w_1 s_1 B_1 A_1 + w_2 s_2 B_2 A_2$. It is tempting to add the factors instead; then
# $(B_1 + B_2)(A_1 + A_2)$ also holds $B_1 A_2$ and $B_2 A_1$, which nobody trained. We train two adapters.


# %%
from notebook_kit.adapters import LoRA, MergedAdapter, adapter_on, attach, merge_adapters, save_peft


def trained(task, seed):
    model = copy.deepcopy(bed.model)
    attach(model, LoRA, targets="layers", rank=4, alpha=8, seed=seed)
    fit(model, rows_of, partial(loss_of, tasks=[task]), steps=150, lr=5e-3, seed=seed, progress=False)
    return model


adapters = [trained(task, seed) for seed, task in enumerate(pair)]
merged = merge_adapters(adapters, [1.0, 1.0], names=list(pair))
merged.report.round(3)

# %% [markdown]
# `merge_adapters` finds the sum's singular values from the thin factors; the dense matrices are never made. Without a
# `rank` the sum is exact, of rank 8 here. With `rank=4` it is the best there is of rank 4, and says what it lost.

# %%
# NBVAL_CHECK_OUTPUT
cut = merge_adapters(adapters, [1.0, 1.0], rank=4)
print(f"rank 8: {merged.error:.0%} lost; rank 4: {cut.error:.0%} lost")

# %% [markdown]
# **The trap.** `peft`'s `add_weighted_adapter(combination_type="linear")` adds the factors, each times the root of its
# weight. Red: how wrong that is, module by module, against the true sum. Blue: the true sum cut to `rank`. At weight 0
# or 1 there is one adapter, and no stranger to cross with.

# %%
from notebook_kit.diagnostics.merges import factorwise
from notebook_kit.figures.merges import adapter_sum_view
from notebook_kit.hyperparameters import Range

explore(adapter_sum_view, adapters, limits={"rank": Range(1, 8)}, rank=4)

# %% [markdown]
# What it does to the two tasks, on test pictures:

# %%
# NBVAL_CHECK_OUTPUT
ways = {
    "true sum": merged,
    "true sum, rank 4": cut,
    "sum of factors": MergedAdapter(factorwise(adapters, [1.0, 1.0])),
    "true mean": merge_adapters(adapters, [0.5, 0.5]),
    "mean of factors": MergedAdapter(factorwise(adapters, [0.5, 0.5])),
}
kept = {name: both(adapter.on(bed.base), "test") for name, adapter in ways.items()}
for name, score in kept.items():
    print(f"{name:18} digit {score.tasks['digit']:.2f}   parity {score.tasks['parity']:.2f}")

# %%
lead = min(kept["true sum"] - kept["sum of factors"], kept["true mean"] - kept["mean of factors"])
assert lead > 0.2
claim(
    "task-arithmetic",
    "Adding what two LoRA adapters change keeps ten points more than adding their factors",
    holds=lead > 0.1,
    figure=f"mean accuracy of digit and parity {kept['true sum']:.2f} against {kept['sum of factors']:.2f}; "
    f"halves {kept['true mean']:.2f} against {kept['mean of factors']:.2f}",
)

# %% [markdown]
# Any merging method works on adapters, in the same space: `method=ties` trims and elects among the changes. The result
# is an adapter again, a folder that `load_peft` and `peft` read.

# %%
# NBVAL_CHECK_OUTPUT
desk = Path(tempfile.mkdtemp())
elected = merge_adapters(adapters, method=m.ties, density=0.5, rank=8)
print(f"ties at rank 8: {elected.error:.0%} of the change lost")
folder = elected.save(desk / "both")
print(sorted(path.name for path in folder.iterdir()))

# %% [markdown]
# ## Your own checkpoints, from the command line
#
# What you chose in a notebook goes into a recipe, and `notebook-kit merge recipe.toml` runs it on files of any size:
# one tensor is in memory at a time. An expert may be a LoRA folder. `--dry-run` says what would happen and what it
# would cost, before anything is written. Here from Python, on a temporary folder:

# %%
from notebook_kit.jupyter.merge import merge_recipe

for name, weights in {"base": bed.base, **pair}.items():
    m.save(weights, desk / f"{name}.safetensors")
save_peft(adapters[1], desk / "parity-lora")
recipe = desk / "recipe.toml"
recipe.write_text("""
method = "ties"
base = "base.safetensors"
experts = ["digit.safetensors", "parity-lora"]
out = "merged.safetensors"

[hyperparameters]
density = 0.5
""")
plan = merge_recipe(recipe, dry_run=True)
print(str(plan).replace(f"{desk}/", ""))

# %% [markdown]
# And the merge itself: the same tensors as from the function, to the bit.

# %%
# NBVAL_CHECK_OUTPUT
written = m.load(merge_recipe(recipe, progress=False))
lora = adapter_on(bed.base, desk / "parity-lora")
expected = m.ties(bed.base, [pair["digit"], lora], density=0.5)
print("equal:", all(torch.equal(written[name], expected[name]) for name in expected))

# %% [markdown]
# It reads `mergekit`'s YAML too, and gives the same tensors (the tests run both). What it cannot express, it refuses by
# name, instead of leaving it out:

# %%
# NBVAL_CHECK_OUTPUT
yaml = desk / "recipe.yml"
yaml.write_text("""
merge_method: ties
base_model: base.safetensors
models:
  - model: digit.safetensors
    parameters: {weight: 1.0, density: [0.2, 0.8]}
""")
try:
    merge_recipe(yaml)
except ValueError as error:
    print(str(error).replace(f"{desk}/", ""))

# %% [markdown]
# ## Try
#
# 1. Give `compare_merges` a grid of your own for the winner, say `("task_singular_vectors", {"scale": [...]})`. Is
#    there a better setting on the validation pictures? And on the test pictures?
# 2. Leave `tune` out, so that `score` chooses. How much better does each method look than it is?
# 3. Train the two adapters with `rslora=True` in `attach`. What does the red bar say at weight 1?
# 4. Put a function of your own into the list: anything that takes base and experts and returns a state dict.
# 5. In the map, which method's shadow lies nearest to the top of the hill for both tasks?

# %%
for paper in ("task-arithmetic", "tsv-merge", "lora"):
    print(cite(paper))
