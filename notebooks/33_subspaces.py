# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [task_singular_vectors, isotropic, opcm, doge]
# ---

# %% [markdown]
# # Subspaces: merge directions, not numbers
#
# **The question.** A weight matrix is more than a list of numbers: it reads some directions of its input and writes to
# some directions of its output. When eight experts are added up, which of their directions collide, and can we keep
# them apart?
#
# **The idea.** Take what an expert changed in one matrix, $\tau = \theta - \theta_0$, and cut it into directions:
# $\tau = \sum_k \sigma_k\, u_k v_k^\top$. It reads $v_k$, writes $u_k$, and $\sigma_k$ says how strongly. Four methods
# work on these. *TSV-Merge* turns the experts' directions apart. *Isotropic* merging makes all directions of the sum
# equally strong. *OPCM* lets experts come one by one, each outside what the merge already uses. *DOGE* leaves the task
# vectors whole and learns one small correction.

# %%
import inspect
from functools import partial

import torch

from notebook_kit import cite, claim, explore, sweep
from notebook_kit.diagnostics import merge_arrivals as arrivals
from notebook_kit.diagnostics import merge_subspaces as numbers
from notebook_kit.figures import merge_subspaces as pictures
from notebook_kit.figures.weights import spectra_figure
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.merging import Opcm, doge, isotropic, opcm, task_arithmetic, task_singular_vectors
from notebook_kit.widgets import LiveFigure
from notebook_kit.zoo import digit_labels

torch.set_num_threads(1)
bed = digit_labels()
layers = [name for name in bed.base if name.endswith("weight")]
validation = partial(bed.score, split="val")

# %% [markdown]
# ## What the experts changed
#
# The eight experts of the first merging lesson: same pictures, eight different questions. Below, how strong each of
# the 64 directions of the first layer's change is. Look at the shape: a few strong ones, then a long tail. And look at
# the sum of all eight: its strongest direction stands far above the rest. Whatever the experts have in common adds up;
# what only one of them knows stays small.

# %%
added = task_arithmetic(bed.base, bed.experts, scale=1.0)
models = dict(zip(bed.names, bed.experts, strict=True)) | {"sum of all": added}
LiveFigure(spectra_figure(numbers.merge_spectra(bed.base, models, layers[0]), title="layers.0"))

# %% [markdown]
# ## TSV-Merge: turn them apart
#
# Each of $K$ tasks keeps its $1/K$ strongest directions, so that together they just fit. But they overlap. Stack them
# side by side and take the **nearest orthonormal matrix**: every direction moves as little as possible, and no two
# overlap any more. A hand-worked case: task 1 writes to $(1, 0)$, task 2 to $(1, 1)/\sqrt2$, 45 degrees apart. Each is
# turned by 22.5 degrees. Read off the columns: the second is still twice as long as the first.

# %%
# NBVAL_CHECK_OUTPUT
zero, half = {"w": torch.zeros(2, 2)}, 0.5**0.5
one, two = {"w": torch.tensor([[1.0, 0.0], [0.0, 0.0]])}, {"w": torch.tensor([[0.0, 2 * half], [0.0, 2 * half]])}
turned = task_singular_vectors(zero, [one, two])["w"]
print(turned.numpy().round(2))
print("lengths", turned.norm(dim=0).numpy().round(2), "inner product", round(float(turned[:, 0] @ turned[:, 1]), 2))

# %% [markdown]
# The paper measures *interference* as what is left of the overlaps, weighted by the singular values. Before and after
# the turn, for each layer (`before_share` makes layers comparable):

# %%
overlap = numbers.interference(bed.base, bed.experts)
overlap.round(3)

# %% [markdown]
# Drag `scale` and `rank fraction`. With a larger fraction more directions come in than the matrix has room for, and
# turning them apart costs more than they bring.

# %%
explore(task_singular_vectors, bed.base, bed.experts, score=bed.score, rank_fraction=1 / 8)

# %% [markdown]
# ## Isotropic: all directions equally loud
#
# Another answer to the tall first direction: keep the directions of the sum, $U V^\top$, and give each the mean
# singular value. That is Iso-C, two lines (`polar` gives the nearest orthonormal matrix, which is $U V^\top$). What
# was said by one expert alone gets a voice. With `common` under 1 (Iso-CTS) the sum keeps its strongest directions
# only, and each task adds some of its own.

# %%
from notebook_kit.merging.isotropic import iso_c

print(inspect.getsource(iso_c))

# %% [markdown]
# Drag `scale` past 2: the mean singular value is small, so it takes more than 1. Then lower `common`.

# %%
explore(isotropic, bed.base, bed.experts, score=bed.score, scale=2.0)

# %% [markdown]
# The spectra of one layer after merging. The two flat lines are isotropic. TSV-Merge lifts the middle: what falls to a
# twentieth within 20 directions in plain task arithmetic is still loud there, without being made flat.

# %%
merges = {
    "task arithmetic": task_arithmetic(bed.base, bed.experts, scale=0.2),
    "TSV-Merge": task_singular_vectors(bed.base, bed.experts),
    "Iso-C": isotropic(bed.base, bed.experts, scale=2.5),
    "Iso-CTS": isotropic(bed.base, bed.experts, scale=3.5, common=0.8),
    "OPCM": opcm(bed.base, bed.experts),
}
LiveFigure(spectra_figure(numbers.merge_spectra(bed.base, merges, layers[1]), title="layers.1"))

# %% [markdown]
# ## Chosen on validation pictures, scored on test pictures

# %%
trial = partial(sweep, score=validation, progress=False)
grids = {
    "task arithmetic": (task_arithmetic, {"scale": [0.1, 0.15, 0.2, 0.25, 0.3]}),
    "TSV-Merge": (task_singular_vectors, {"scale": [0.8, 0.9, 1.0, 1.1, 1.2]}),
    "Iso-C": (isotropic, {"scale": [1.5, 2.0, 2.5, 3.0], "common": [1.0]}),
    "Iso-CTS": (isotropic, {"scale": [2.5, 3.0, 3.5, 4.0], "common": [0.9, 0.8, 0.6]}),
}
best = {name: trial(rule, bed.base, bed.experts, grid=grid).best for name, (rule, grid) in grids.items()}
test = {name: bed.score(grids[name][0](bed.base, bed.experts, **found)) for name, found in best.items()}

# %%
# NBVAL_CHECK_OUTPUT
for name, score in test.items():
    print(f"{name:16} {score:.2f}  {best[name]}")

# %% [markdown]
# Both beat task arithmetic by far, as their papers say. Notice that this is the same bed on which trimming and sign
# elections brought nearly nothing.

# %%
lead = test["TSV-Merge"] - test["task arithmetic"]
assert lead > 0.05
claim(
    "tsv-merge",
    "Turning the tasks' singular vectors apart beats tuned task arithmetic by ten points or more",
    holds=lead >= 0.1,
    figure=f"accuracy {test['TSV-Merge']:.3f} against {test['task arithmetic']:.3f}, chosen on validation pictures",
)

# %%
lead = test["Iso-C"] - test["task arithmetic"]
assert lead > 0.05
claim(
    "isotropic-merging",
    "A flat spectrum beats tuned task arithmetic by ten points or more",
    holds=lead >= 0.1,
    figure=f"accuracy {test['Iso-C']:.3f} against {test['task arithmetic']:.3f}, chosen on validation pictures",
)

# %% [markdown]
# Iso-CTS is said to be better still, most of all with many tasks. Our layers have 64 directions to share among eight
# tasks, a ViT's have 768. Here, each direction that is given to a single task is missed by the others.

# %%
gain = test["Iso-CTS"] - test["Iso-C"]
assert abs(gain) > 0.02
claim(
    "isotropic-merging",
    "Room for single tasks (Iso-CTS) beats a flat sum (Iso-C)",
    holds=gain > 0,
    figure=f"accuracy {test['Iso-CTS']:.3f} against {test['Iso-C']:.3f}, chosen on validation pictures",
)

# %% [markdown]
# ## OPCM: experts that come one after another
#
# Now you may keep the base and *one* merge. Expert 5 comes by today, the first four are gone. Write its change $D$ in
# the merge's own directions, $P = U^\top D V$. Where the merge is strong, top left, is where earlier experts live.
# OPCM removes that corner, and the whole diagonal, the part that points along the merge. Below is $|P|$ for the second
# layer. Drag `alpha`, the share of the merge's spectrum that is protected, and watch the corner grow; then let later
# experts arrive.

# %%
explore(
    arrivals.projection_view,
    bed.base,
    bed.experts,
    draw=pictures.projection_figure,
    limits={"tensor": Choice(*layers), "arrival": Range(2, 8)},
    tensor=layers[1],
    alpha=0.7,
)

# %% [markdown]
# Does it forget less? Each column is one arrival, each row a task; a row begins to count at the line. Switch `project`
# off and see the first tasks fade. `order` deals another order. On the right: the scale $\lambda_t$ that keeps the
# merge as far from the base as the average expert. If updates were exactly orthogonal, it would be $\sqrt t$.

# %%
ask = (bed.base, bed.experts, bed.names, bed.score)
live = explore(arrivals.arrival_view, *ask, draw=pictures.arrival_figure, limits={"order": Range(0, 20)})
live

# %%
lambdas = live.value.lambdas
ratio = lambdas / torch.arange(1, 9).sqrt().numpy()
assert 0.9 < ratio.min() < ratio.max() < 1.05
claim(
    "opcm",
    "Projected updates are nearly orthogonal, so that the scale grows like the root of t",
    holds=bool(abs(ratio - 1).max() < 0.05),
    figure=f"scale over root of t between {ratio.min():.3f} and {ratio.max():.3f}, 8 arrivals",
)

# %% [markdown]
# Five orders of arrival, beside the baselines that also keep nothing but a merge. No scale was tuned for any of them
# (the official code's settings). `backward_transfer` is what tasks lost, on average, to those that came later.

# %%
variants = {
    "average": {"how": "average"},
    "task arithmetic": {"how": "task_arithmetic", "scale": 0.3},
    "ties": {"how": "ties", "scale": 0.5},
    "no projection": {"project": False},
    "OPCM": {},
    "OPCM, cross": {"block": "cross"},
}
study = arrivals.order_study(*ask, variants)
by_variant = study.groupby("variant", sort=False)
LiveFigure(pictures.order_figure(study))

# %%
# NBVAL_CHECK_OUTPUT
for name, rows in by_variant:
    mean, spread = rows["mean"].mean(), rows["mean"].std()
    print(f"{name:16} {mean:.2f} +- {spread:.2f}   backward transfer {rows['backward_transfer'].mean():.2f}")

# %%
ours, averaged = (by_variant.get_group(name)["mean"] for name in ("OPCM", "average"))
assert ours.min() > averaged.max() + 0.05
claim(
    "opcm",
    "In every order, OPCM keeps five points more than continual averaging",
    holds=ours.min() - averaged.max() >= 0.05,
    figure=f"accuracy {ours.min():.3f} to {ours.max():.3f} over 5 orders, average {averaged.mean():.3f}",
)

# %% [markdown]
# The paper's formula protects more than its code: not only the corner, also everything beside and below it, the
# *cross*. Then little is left of what arrives.

# %%
cross = by_variant.get_group("OPCM, cross")["mean"]
assert ours.min() > cross.max() + 0.02
claim(
    "opcm",
    "Protecting the cross, as the formula says, keeps more than protecting the corner, as the code does",
    holds=cross.mean() > ours.mean(),
    figure=f"accuracy {cross.mean():.3f} against {ours.mean():.3f}, mean of 5 orders",
)

# %% [markdown]
# How does one use it? `Opcm` is the merge as an object: add experts as they come, save, go on next month. What it keeps
# is a base, a sum, and a few numbers, however many came before.

# %%
# NBVAL_CHECK_OUTPUT
import tempfile

folder = tempfile.TemporaryDirectory()
stream, sizes = Opcm(bed.base), []
for expert in bed.experts:
    stream.add(expert)
    path = stream.save(f"{folder.name}/merge.safetensors")
    sizes.append(path.stat().st_size)
    stream = Opcm.load(path)
together = opcm(bed.base, bed.experts)
print("one size of state:", len(set(sizes)) == 1)
print("same as all at once:", all(torch.equal(together[name], stream.merged[name]) for name in together))

# %% [markdown]
# ## DOGE: leave them whole, learn what is missing
#
# Trimming and turning throw parts of the task vectors away. DOGE keeps them and asks: which one correction $\Delta$,
# added to every task vector, brings the merge closer to all tasks at once? Near $\theta_0$, task $j$ wants to go along
# $\tau_j$. So the gap of task $j$ is what the merge still lacks along $\tau_j$, row by row. No data is needed: the
# loss is a sum of squares in $\Delta$, and its gradient can be written down.

# %%
from notebook_kit.merging.doge_descent import Objective

print(inspect.getsource(Objective))

# %% [markdown]
# Three parts, each of which can be switched off: **λ** gives every task vector the same length `eta` in every layer,
# **Δ** is learned in `steps` steps, and a **projection** keeps Δ out of the directions that the tasks share. First we
# choose `eta` and `density` on the validation pictures, each with Δ and without.

# %%
grid = {"eta": [0.2, 0.3, 0.4], "density": [0.3, 1.0], "steps": [0, 100]}
tried = trial(doge, bed.base, bed.experts, grid=grid)
chosen = {name: value for name, value in tried.best.items() if name != "steps"}
rows = tried.frame.sort_values("score", ascending=False)
rows.head(6)

# %% [markdown]
# Replay it: `steps` moves along the recorded descent. The loss of every layer falls, but the score has a best moment
# and then declines: the loss is only a first-order guess, good near $\theta_0$. On the right, how much of Δ lies in the
# shared subspace; the grey mark is what a random Δ would have there. Set `show` to `matrices` to see what is learned.

# %%
record = numbers.doge_path(bed.base, bed.experts, bed.score, **chosen)
explore(
    numbers.doge_view,
    record,
    draw=pictures.doge_figure,
    limits={"steps": Range(0, 400), "tensor": Choice(*layers)},
    tensor=layers[2],
)

# %% [markdown]
# The projection was meant to keep Δ out of the shared subspace. But Adam rescales every entry of the projected
# gradient by itself, and so bends it back in part: less of Δ lies there than without projection, but not nothing.
# `project="step"` projects Δ itself, after each step.

# %%
steps = tried.best["steps"] or 100
run = partial(numbers.doge_details, bed.base, bed.experts, steps=steps, **chosen)
inside = {}
for how in ("none", "grad", "step"):
    table = numbers.energy_table({name: found[0] for name, found in run(project=how).items()})
    inside[how] = table["inside"].mean()
chance = table["by_chance"].mean()
print({how: round(share, 3) for how, share in inside.items()}, "by chance", round(chance, 3))

# %%
assert inside["step"] < 1e-6 < inside["grad"] < inside["none"]
claim(
    "doge",
    "Projecting the gradient keeps Δ out of the shared subspace: under a hundredth of its energy lies there",
    holds=inside["grad"] < 0.01,
    figure=f"share {inside['grad']:.3f}; {inside['none']:.3f} without projection, {chance:.3f} by chance",
)

# %% [markdown]
# The ablation of the paper, redrawn: plain task arithmetic, then λ, then Δ without and with a projection. Without it,
# Δ does harm: it takes back what all tasks want. Protected, it helps.

# %%
parts = {"task arithmetic": test["task arithmetic"]}
settings = {"+ λ": {"steps": 0}, "+ Δ": {"project": "none"}, "+ projection": {}, "projected steps": {"project": "step"}}
for name, options in settings.items():
    parts[name] = bed.score(doge(bed.base, bed.experts, **{"steps": steps, **chosen, **options}))
LiveFigure(pictures.bars_figure(parts, title=f"DOGE, part by part, {steps} steps", start=bed.score(bed.base)))

# %%
# NBVAL_CHECK_OUTPUT
print({name: round(float(score), 2) for name, score in parts.items()})

# %%
whole = parts["+ projection"]
assert whole > parts["+ λ"] + 0.02
claim(
    "doge",
    "The learned correction adds two points or more to norm-aware task arithmetic",
    holds=whole - parts["+ λ"] >= 0.02,
    figure=f"accuracy {whole:.3f} against {parts['+ λ']:.3f}; tuned task arithmetic {parts['task arithmetic']:.3f}",
)

# %%
assert whole > parts["+ Δ"] + 0.05
claim(
    "doge",
    "Leaving the shared subspace alone beats an unprotected correction by a point or more",
    holds=whole - parts["+ Δ"] >= 0.01,
    figure=f"accuracy {whole:.3f} against {parts['+ Δ']:.3f}, {steps} steps",
)

# %% [markdown]
# ## All of them

# %%
final = dict(test) | {"OPCM": bed.score(together), "DOGE": whole}
LiveFigure(pictures.bars_figure(final, title="Eight tasks in one network, test pictures", start=bed.score(bed.base)))

# %% [markdown]
# ## Try
#
# 1. `task_singular_vectors(..., rank_fraction=0.02)`: one or two directions a task and layer. How much is left?
# 2. In the arrival widget, switch `project` off and `rescale` on. What does the scale alone do? And $\lambda_t$?
# 3. Send OPCM the same expert twice. What does the projection leave of it?
# 4. `doge_experts(..., shared_delta=False, subspace=8)` gives adjusted experts whose coefficients AdaMerging can learn.
# 5. Your own checkpoints: `merge_files(isotropic, "base", ["expert_a", "expert_b"], "merged", scale=1.5)`.
#
# ## Sources

# %%
for paper in ("tsv-merge", "isotropic-merging", "opcm", "doge"):
    print(cite(paper))
