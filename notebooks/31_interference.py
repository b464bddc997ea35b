# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [breadcrumbs, della, pcb, tall_masks, consensus]
# ---

# %% [markdown]
# # Interference: what gets lost when networks are added
#
# **The question.** Eight experts were fine-tuned from one network. Each is right nine times out of ten at its own
# task. Their sum is right six times out of ten. Is what they knew destroyed, or is it only in each other's way?
#
# **The idea.** Look at single weights. Two experts may pull one weight in *opposite directions*; many changes are
# *noise* that waters down the few that matter; and a weight that only *one* expert needs gets in the way of the other
# seven. Each method of this lesson removes one of these.

# %%
import inspect
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, explore, sweep, training, zoo
from notebook_kit.diagnostics.interference import conflict_view, owners, patch_view, pcb_view, sign_conflicts, tall_view
from notebook_kit.figures import interference as pictures
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import flatten, unflatten
from notebook_kit.widgets import LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# Five merges are new; `ties`, `dare` and the sums are those of lesson 30.

# %%
from notebook_kit.merging import (
    MaskedExperts,
    average,
    breadcrumbs,
    choose_thresholds,
    consensus,
    dare,
    della,
    magnitude_masks,
    multitask,
    pcb,
    pcb_search,
    save,
    tall_masks,
    task_arithmetic,
    task_vector,
    ties,
)

# %% [markdown]
# The eight experts see the same 8 x 8 digits and answer eight questions (lesson 30 introduces them). Settings are
# chosen on validation pictures, results are reported on test pictures. `tuned` does both for the factor $\lambda$ that
# multiplies a merged task vector. `own` asks each expert, or what is left of it, only its own question.

# %%
# NBVAL_CHECK_OUTPUT
bed = zoo.digit_labels()
base, experts, names = bed.base, bed.experts, bed.names
SCALES = [0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6]


def tuned(method, scales=SCALES, **settings):
    validation = partial(bed.score, split="val")
    found = sweep(method, base, experts, grid={"scale": scales}, score=validation, progress=False, **settings)
    return float(bed.score(method(base, experts, **settings, **found.best)))


def own(models):
    return float(np.mean([bed.score(model).tasks[name] for name, model in zip(names, models, strict=True)]))


added = tuned(task_arithmetic)
print(f"base {bed.score(base):.2f}, experts {own(experts):.2f}, their sum at its best scale {added:.2f}")

# %% [markdown]
# ## Where do they disagree?
#
# A weight is *in conflict* when one expert raises it and another lowers it. With all changes counted, nearly every
# weight is. So keep only each expert's largest fifth. The last column: of all the change that the experts made, what
# share cancels in the sum?

# %%
# NBVAL_CHECK_OUTPUT
for density in (1.0, 0.2):
    whole = sign_conflicts(base, experts, density=density).iloc[-1]
    print(f"largest {density:4.0%}: in conflict {whole.conflict:.2f}, mass that cancels {whole.lost:.2f}")

# %% [markdown]
# Drag `density` and `n_experts`. Left: which layers disagree most. Right: every expert that joins adds conflict.
# The first layer, which reads the pixels, is where all eight meet.

# %%
explore(conflict_view, base, experts, draw=pictures.conflict_figure, limits={"n_experts": Range(1, 8)})

# %% [markdown]
# ## TIES, step by step
#
# TIES **trims** each task vector, **elects** one sign for each weight and averages the entries that **agree**. Below
# are 64 weights of the middle layer. Blue lowers a weight, red raises it. Lower `density`: where does a vote change
# because a small entry was trimmed? Set `elect` to `none` and compare the last square. (All eight experts vote.)

# %%
explore(patch_view, base, experts, draw=pictures.patch_figure, names=("digit", "parity"))

# %% [markdown]
# What is each step worth? We take the steps away one at a time; each row has its own best scale.

# %%
ablation = {
    "plain sum": tuned(task_arithmetic),
    "trim only": tuned(ties, density=0.5, elect="none", combine="sum"),
    "elect and agree, no trim": tuned(ties, density=1.0),
    "all three steps": tuned(ties, density=0.5),
    "without agreement: a plain mean": tuned(ties, density=0.5, combine="average", scales=[1.0, 1.5, 2.0, 3.0]),
    "without election": tuned(ties, density=0.5, elect="none"),
    "trim harder": tuned(ties, density=0.2),
}
for row, score in ablation.items():
    print(f"{row:32} {score:.2f}")

# %% [markdown]
# On a network as small as this the steps hardly matter, and trimming hard hurts. The paper's tables, on networks a
# thousand times as large, have each step earn its place.

# %%
without = ablation["without election"], ablation["elect and agree, no trim"], ablation["plain sum"]
claim(
    "ties-merging",
    "Trim and election together are worth a point over leaving either out",
    holds=ablation["all three steps"] >= max(without) + 0.01,
    figure=f"all steps {ablation['all three steps']:.3f}; best of the incomplete ones {max(without):.3f}",
)

# %% [markdown]
# ## How much is in the signs?
#
# Flip the signs of some of an expert's changes: the largest fifth, or the smallest fifth.


# %%
def flipped(expert, share, largest):
    tau = flatten(task_vector(base, expert))
    places = tau.abs().argsort(descending=largest)[: int(share * len(tau))]
    tau[places] *= -1
    return unflatten(flatten(base) + tau, base)


large, small = (own([flipped(expert, 0.2, which) for expert in experts]) for which in (True, False))
assert large < own(experts) - 0.2
claim(
    "ties-merging",
    "Flipping the signs of a task vector's largest fifth ruins an expert, of its smallest fifth costs under a point",
    holds=large < own(experts) - 0.2 and own(experts) - small < 0.01,
    figure=f"expert {own(experts):.3f}; largest flipped {large:.3f}, smallest {small:.3f}; 8 experts",
)

# %% [markdown]
# Now suppose an oracle told us the right sign of every weight. We ask a network that was trained on all eight tasks at
# once, and take *only the signs* of its task vector. The sizes still come from the eight experts.

# %%
labels = torch.stack([y for _, y in bed.batches("train").values()], dim=1)
pixels = next(iter(bed.batches("train").values()))[0]
sizes = [int(column.max()) + 1 for column in labels.T]


def draw(generator):
    rows = torch.randint(len(pixels), (64,), generator=generator)
    return pixels[rows], labels[rows]


def all_tasks(model, batch):
    parts = model(batch[0]).split(sizes, dim=-1)
    return sum(F.cross_entropy(part, y) for part, y in zip(parts, batch[1].T, strict=True))


# %%
student = zoo.digit_labels().model
training.fit(student, draw, all_tasks, steps=300, lr=5e-4, progress=False)
trained_on_all = student.eval().state_dict()
oracle = tuned(ties, density=1.0, signs=task_vector(base, trained_on_all))
elected = ablation["elect and agree, no trim"]
all_at_once = float(bed.score(trained_on_all))
share = (oracle - elected) / (all_at_once - elected)
assert oracle > elected + 0.1
claim(
    "ties-merging",
    "With the signs of a multitask network TIES closes more than half of the gap to training on all tasks",
    holds=share > 0.5,
    figure=f"elected signs {elected:.3f}, oracle signs {oracle:.3f}, trained on all {all_at_once:.3f}",
)

# %% [markdown]
# So what the experts learned is there. It is the *signs* that eight votes do not find.
#
# ## Three ways to drop
#
# Fewer entries, fewer collisions. But which ones may go? *Trimming* keeps the largest. *Breadcrumbs* keeps the large
# but not the very largest. *DARE* drops at random and rescales the rest. *DELLA* drops at random too, but the larger an
# entry is in its row, the likelier it stays, and each survivor is divided by its own probability:

# %%
from notebook_kit.merging.della import keep_probabilities

print(inspect.getsource(keep_probabilities))

# %% [markdown]
# Four magnitudes, four probabilities; below, a band out of ten entries:

# %%
# NBVAL_CHECK_OUTPUT
row = torch.tensor([0.1, 0.4, 0.2, 0.3])
print(keep_probabilities(row, density=0.5, epsilon=0.2).numpy().round(2))
print(breadcrumbs({"w": torch.zeros(10)}, [{"w": torch.arange(1.0, 11)}], density=0.5, gamma=0.1, scale=1.0)["w"])

# %% [markdown]
# One expert at a time: drop, put the rest back on the base, ask the expert's own question. Random draws are repeated
# with four seeds.


# %%
def kept(method, seeds=(None,), **settings):
    draws = [{} if seed is None else {"seed": seed} for seed in seeds]
    return np.mean([own([method(base, [e], scale=1.0, **settings, **s) for e in experts]) for s in draws])


DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
curves = {
    "trim (largest)": {d: kept(ties, density=d) for d in DENSITIES},
    "breadcrumbs, gamma 0.01": {d: kept(breadcrumbs, density=d) for d in DENSITIES},
    "DARE": {d: kept(dare, density=d, seeds=range(4)) for d in DENSITIES},
    "DELLA": {d: kept(della, density=d, epsilon=0.9 * min(d, 0.5), seeds=range(4)) for d in DENSITIES},
}

# %% [markdown]
# Surprising at first sight: chance beats choice. The largest entries alone are a *biased* sample, much too small in
# sum; a random sample, rescaled, is right on average, and a network averages over many weights.

# %%
LiveFigure(pictures.kept_figure(curves, title="One expert, part of its task vector dropped"))

# %%
fifth = {name: curve[0.2] for name, curve in curves.items()}
assert fifth["DARE"] > fifth["trim (largest)"] + 0.1
claim(
    "dare",
    "A random fifth of a task vector, rescaled, keeps more of an expert than its largest fifth",
    holds=fifth["DARE"] > fifth["trim (largest)"],
    figure=f"random {fifth['DARE']:.3f}, largest {fifth['trim (largest)']:.3f}; 8 experts, 4 seeds",
)

# %%
twentieth = {name: curve[0.05] for name, curve in curves.items()}
assert twentieth["DELLA"] > twentieth["DARE"]
claim(
    "della",
    "At density 0.05 dropping by rank keeps two points more of an expert than dropping at random",
    holds=twentieth["DELLA"] > twentieth["DARE"] + 0.02,
    figure=f"DELLA {twentieth['DELLA']:.3f}, DARE {twentieth['DARE']:.3f}; 8 experts, 4 seeds",
)

# %% [markdown]
# And merged? Drag `gamma` from 0: does it pay to drop the very largest entries?

# %%
explore(breadcrumbs, base, experts, score=bed.score, scale=0.15, limits={"gamma": Range(0, 0.1)})

# %%
crumbs = {gamma: tuned(breadcrumbs, density=0.9, gamma=gamma, scales=SCALES[:6]) for gamma in (0.0, 0.01, 0.05)}
dropped = {name: tuned(fn, density=0.5, elect="mass") for name, fn in (("DARE", dare), ("DELLA", della))}
for name, score in ({f"breadcrumbs, gamma {gamma}": score for gamma, score in crumbs.items()} | dropped).items():
    print(f"{name:24} {score:.2f}")

# %%
assert abs(crumbs[0.01] - crumbs[0.0]) < 0.02
claim(
    "model-breadcrumbs",
    "Dropping the largest hundredth of each task vector makes a merge a point better",
    holds=crumbs[0.01] > crumbs[0.0] + 0.01,
    figure=f"gamma 0.01 {crumbs[0.01]:.3f}, gamma 0 {crumbs[0.0]:.3f}",
)

# %% [markdown]
# ## PCB: let parameters compete
#
# TIES gives every weight a yes or no. PCB gives it a score for each task: how large it is among that task's changes
# (*intra*), times how well it agrees with what all tasks do to this weight (*inter*). Each task keeps its best; those
# are averaged by their scores. Left: each point is a weight of one task, grey ones lost. High up a task agrees with the
# others; below zero it pulls against them, and is not kept. Right, below: how many tasks keep a weight. Set `inter` to
# `none` and watch who wins then.

# %%
draw_pcb = partial(pictures.pcb_figure, y="accuracy")
explore(pcb_view, base, experts, bed.score, draw=draw_pcb, density=0.2, scale=0.6, names=names)

# %% [markdown]
# Both scores and neither, at density 0.1:

# %%
on = {True: {}, False: {"intra": "none"}}
off = {True: {}, False: {"inter": "none"}}
both, agree, size, neither = (tuned(pcb, **on[i], **off[j]) for i, j in ((1, 1), (0, 1), (1, 0), (0, 0)))
print(f"both {both:.2f}, inter alone {agree:.2f}, intra alone {size:.2f}, neither (nothing dropped) {neither:.2f}")

# %%
assert both > size + 0.02
claim(
    "pcb-merging",
    "At density 0.1 agreement between tasks is worth two points over importance inside the task alone",
    holds=both > size + 0.02,
    figure=f"both scores {both:.3f}, intra alone {size:.3f}",
)

# %% [markdown]
# Tuned over density as well, does the competition beat the vote?

# %%
grid = {"density": [0.1, 0.2, 0.4, 0.7], "scale": [0.4, 0.6, 0.8]}
rival = sweep(pcb, base, experts, grid=grid, score=partial(bed.score, split="val"), progress=False).best
competed = float(bed.score(pcb(base, experts, **rival)))
assert abs(competed - elected) < 0.02
claim(
    "pcb-merging",
    "PCB beats TIES by two points or more",
    holds=competed > elected + 0.02,
    figure=f"PCB {competed:.3f}, TIES {elected:.3f}; settings chosen on validation pictures",
)

# %% [markdown]
# One factor for each task is still free. An evolution strategy asks the validation pictures: it draws eight factors,
# merges, scores, and moves towards the better ones. The scores are computed once, so a hundred merges take a second.

# %%
runs = [pcb_search(base, experts, partial(bed.score, split="val"), seed=seed, **rival) for seed in range(3)]
histories = {f"seed {seed}": run.history for seed, run in enumerate(runs)}
LiveFigure(pictures.search_figure(histories, title="One factor for each task, by evolution", y="validation accuracy"))

# %%
searched = [float(bed.score(pcb(base, experts, weights=run.weights, **rival))) for run in runs]
assert min(searched) > competed
claim(
    "pcb-merging",
    "One factor for each task, found by evolution, adds two points on test pictures",
    holds=min(searched) > competed + 0.02,
    figure=f"test accuracy {competed:.3f} to {min(searched):.3f} or more; 3 seeds, 100 merges each",
)

# %% [markdown]
# ## TALL-masks: nothing is lost, only buried
#
# Take the plain sum of all task vectors at full strength. As a network it is useless. But a weight where expert $t$
# outweighs all the others together, times a `threshold`, still carries what expert $t$ wanted. Mark these weights with
# one bit, add only them to the base, and expert $t$ is back.
#
# The mask is one comparison:

# %%
print(inspect.getsource(multitask.claimed))

# %% [markdown]
# Drag `threshold`. Blue bars: base plus masked sum, each on its own task. Right: how many tasks claim a weight. Weights
# claimed by nobody are *catastrophic*, by one task *selfish*; `k` deletes them from the merge (green dots).

# %%
explore(tall_view, base, experts, bed.score, draw=pictures.tall_figure, limits={"k": Range(0, 9)})

# %% [markdown]
# Each expert gets the threshold that is best for it on validation pictures.

# %%
# NBVAL_CHECK_OUTPUT
thresholds, table = choose_thresholds(base, experts, lambda weights, i: bed.score(weights, "val").tasks[names[i]])
masked = tall_masks(base, experts, thresholds=thresholds, names=names)
rescued = own([masked.expert(name) for name in names])
by_size = own([magnitude_masks(base, experts, density=0.2).expert(i) for i in range(8)])
print(f"masked {rescued:.2f}, masked by magnitude {by_size:.2f}, no mask {added:.2f}, experts {own(experts):.2f}")

# %%
assert rescued > added + 0.1
claim(
    "tall-masks",
    "Masks bring back nine tenths of the experts' accuracy from one sum",
    holds=rescued > 0.9 * own(experts),
    figure=f"{100 * rescued / own(experts):.1f} % of {own(experts):.3f}; magnitude masks {by_size:.3f}",
)

# %%
claim(
    "tall-masks",
    "Masks bring back 99 % of the experts' accuracy from one sum",
    holds=rescued > 0.99 * own(experts),
    figure=f"{100 * rescued / own(experts):.1f} %",
)

# %% [markdown]
# What does it cost? The table is measured on files: nine networks, against one file with the base, the sum and eight
# masks of one bit a weight.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    apart = [save(w, Path(folder) / f"{i}.safetensors") for i, w in enumerate([base, *experts])]
    together = masked.save(Path(folder) / "masked.safetensors")
    again = MaskedExperts.load(together)
    bytes_of = {"nine networks": sum(f.stat().st_size for f in apart), "masked experts": together.stat().st_size}
assert all(torch.equal(again.expert(3)[key], masked.expert(3)[key]) for key in base)
pd.Series(masked.sizes() | bytes_of, name="bytes").round(2).to_frame()

# %%
ratio = bytes_of["nine networks"] / bytes_of["masked experts"]
assert ratio > 3
claim(
    "tall-masks",
    "Eight experts take less than a third of the storage",
    holds=ratio > 3,
    figure=f"{ratio:.2f} times smaller on disk",
)

# %% [markdown]
# Whose weight is it? A square of the middle layer: a colour for the one task that claims a weight, dark where several
# do, white where nobody does.

# %%
LiveFigure(pictures.owners_figure(owners(masked), names, title="Who claims which weight"))

# %% [markdown]
# ## Consensus: delete what at most one task wants
#
# Back to one network for all tasks. Keep a weight of the sum only where at least `k` tasks claim it.

# %%
agreed = {k: tuned(consensus, k=k, thresholds=thresholds) for k in range(4)}
agreed_ties = {k: tuned(consensus, k=k, thresholds=thresholds, base_merge="ties", density=1.0) for k in range(4)}
for k in agreed:
    print(f"k = {k}: sum {agreed[k]:.2f}, TIES {agreed_ties[k]:.2f}")

# %%
assert agreed[3] < agreed[0]
claim(
    "tall-masks",
    "Deleting catastrophic and selfish weights makes a merge a point better",
    holds=agreed[2] > agreed[0] + 0.01,
    figure=f"k = 2 {agreed[2]:.3f}, k = 1 {agreed[1]:.3f}, all weights {agreed[0]:.3f}",
)

# %% [markdown]
# ## Ten times as large: six languages
#
# Six fine-tunes of one small Llama, each on a language. The score is the log-likelihood of a byte in nats. What share
# of the experts' gain over the base is left? Their mean, their masks at threshold 0.4, and their largest fifth alone.

# %%
# NBVAL_CHECK_OUTPUT
speech = zoo.language_experts()
windows = speech.batches("test")


def gain(models):
    each = [speech.measure(speech.model, w, {n: windows[n]})[n] for n, w in zip(speech.names, models, strict=True)]
    return np.mean(each)


start, tongues = gain([speech.base] * 6), gain(speech.experts)
hidden = tall_masks(speech.base, speech.experts, threshold=0.4)
models = {
    "mean": [average(speech.base, speech.experts)] * 6,
    "masked": [hidden.expert(i) for i in range(6)],
    "largest fifth": [ties(speech.base, [expert], density=0.2) for expert in speech.experts],
}
left = {name: (gain(group) - start) / (tongues - start) for name, group in models.items()}
print({name: f"{value:.2f}" for name, value in left.items()})

# %%
trimmed_digits = (fifth["trim (largest)"] - own([base] * 8)) / (own(experts) - own([base] * 8))
print(f"digits: the largest fifth keeps {trimmed_digits:.2f} of the gain")
assert left["largest fifth"] > trimmed_digits
claim(
    "ties-merging",
    "The largest fifth of a task vector keeps nine tenths of what fine-tuning gained",
    holds=left["largest fifth"] > 0.9,
    figure=f"language experts {left['largest fifth']:.2f}, digit experts {trimmed_digits:.2f}",
)

# %% [markdown]
# The larger network is more redundant, as the paper would have it. It is still far from a T5.
#
# ## What to try
#
# - `ties(..., signs=...)`: train the multitask network for 30 steps instead of 300. How good must an oracle be?
# - In the PCB widget, `inter="votes"` ignores how large the others' changes are. Which tasks gain?
# - `tall_masks(..., threshold=0)` keeps every weight that a task changed. Why is that no good for eight experts, and
#   perfect for experts that changed different weights?
# - `della(..., rescale="norm")` and `breadcrumbs(..., rescale="norm")` are mergekit's conventions. On files:
#   `merge_files(della, "base", ["a", "b"], "merged", density=0.5)` draws the same masks as in memory.
#
# ## Sources

# %%
for paper in ("ties-merging", "model-breadcrumbs", "della", "pcb-merging", "tall-masks"):
    print(cite(paper))
