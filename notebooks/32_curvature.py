# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [fisher, regmean, ota, fast_fisher_graft]
# ---

# %% [markdown]
# # Curvature: who should decide about which weight?
#
# **The question.** An average gives every expert the same say about every weight. But an expert does not care about
# every weight. Some could be anything, and it would answer the same. Can we ask each expert what it cares about, and
# let it decide there?
#
# **The idea.** Care is *curvature*: how fast the loss rises when a weight is moved. Three methods measure it in three
# places. **Fisher merging** looks at the answers, **RegMean** at what each layer sees, **OTA** at what the optimiser
# already knows.

# %%
import inspect
from functools import partial

import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, explore
from notebook_kit.data import digit_labelings
from notebook_kit.diagnostics import curvature
from notebook_kit.diagnostics.transport import with_weights
from notebook_kit.figures import curvature as draw
from notebook_kit.hyperparameters import Choice
from notebook_kit.merging import average, diagonal_fisher, fisher, search_weights
from notebook_kit.widgets import LiveFigure
from notebook_kit.zoo import digit_labels, digit_views

torch.set_num_threads(1)
bed = digit_labels()

# %% [markdown]
# Eight experts see the same digits and answer eight questions. Each reads the network through columns of its own.

# %%
# NBVAL_CHECK_OUTPUT
train, columns, first = bed.batches("train"), {}, 0
for name, labeling in digit_labelings().items():
    columns[name] = slice(first, first + labeling.n_classes)
    first += labeling.n_classes
models = {name: with_weights(bed.model, expert) for name, expert in zip(bed.names, bed.experts, strict=True)}
print({name: f"{part.start}-{part.stop - 1}" for name, part in columns.items()})

# %% [markdown]
# ## The Fisher information of a weight
#
# Let the network answer: class $c$ with probability $p(c|x)$. How much would $\log p(c|x)$ change if weight $j$ moved?
# Square it, average over the network's *own* answers and over examples, and you have the diagonal Fisher:
#
# $$F_j = \frac1N \sum_n \sum_c p(c|x_n)\,\Big(\frac{\partial}{\partial\theta_j} \log p(c|x_n)\Big)^2 .$$
#
# No labels are needed. The square stands *inside* the sums; squaring the gradient of a batch is a common mistake. For
# a linear layer with softmax it is $p(1-p)\,x^2$, which we can check by hand:

# %%
# NBVAL_CHECK_OUTPUT
layer, x = torch.nn.Linear(2, 3), torch.tensor([[1.0, 2.0]])
p = layer(x).softmax(-1).detach()
by_hand = (p * (1 - p)).T @ x.square()
print("equal to p (1 - p) x²:", torch.allclose(diagonal_fisher(layer, [x])["weight"], by_hand))


# %% [markdown]
# Now the Fishers of all eight, each from 256 pictures. A second or so.


# %%
def fisher_of(name, n=256, **settings):
    logits = lambda z: z[..., columns[name]]  # noqa: E731
    return diagonal_fisher(models[name], [train[name][0][:n]], logits=logits, **settings)


fishers = [fisher_of(name) for name in bed.names]

# %% [markdown]
# **The merge** is a weighted mean, and each weight's weights are its Fishers:
# $\theta = \sum_i \lambda_i F_i \theta_i \,/\, \sum_i \lambda_i F_i$. Two numbers by hand: Fishers (4, 1) and (1, 1),
# values (1, 2) and (0, 4).

# %%
# NBVAL_CHECK_OUTPUT
zero, values = {"w": torch.zeros(2)}, [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.0, 4.0])}]
weighed = [{"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([1.0, 1.0])}]
plain, loud = average(zero, values)["w"], fisher(zero, values, fishers=weighed, normalize_fishers=False)["w"]
print(f"average ({plain[0]:.1f}, {plain[1]:.1f})   Fisher ({loud[0]:.1f}, {loud[1]:.1f})")

# %% [markdown]
# ## Two experts, every λ
#
# *digit* and *parity*. Each dot is a merge, with $\lambda$ from 0 to 1; up and right is good at both. Drag `weight`:
# the average leaves *digit* behind long before the Fisher merge does. The Fisher fronts bend outwards. Dividing the
# Fishers by their norm (dotted) moves the diamond, but along the same front: for two experts it rescales $\lambda$.

# %%
tasks = ("digit", "parity")
pair = [bed.experts[bed.names.index(task)] for task in tasks]
pair_fishers = [fishers[bed.names.index(task)] for task in tasks]
ways = {
    "average": (average, {}),
    "Fisher": (fisher, {"fishers": pair_fishers, "normalize_fishers": False}),
    "Fisher, normalized": (fisher, {"fishers": pair_fishers}),
}
fronts = curvature.weight_fronts(bed.base, pair, ways, score=bed.score, tasks=tasks)
explore(curvature.front_view, fronts, weight=0.3, draw=partial(draw.front_figure, tasks=tasks))

# %% [markdown]
# Who decides where? Left and middle: the two Fishers of one layer. Right: their ratio, red where *digit* is louder,
# blue where *parity* is. `weight` is $\lambda$. Rows are units: some matter to one expert only. In `layers.0.weight`,
# columns are pixels, and the empty ones never vary: they matter to nobody.

# %%
tensors = Choice(*bed.base)
explore(
    curvature.decision_view, pair_fishers, tasks, tensor="layers.1.weight", limits={"tensor": tensors},
    draw=draw.decision_figure,
)  # fmt: skip

# %% [markdown]
# A fair comparison chooses $\lambda$ on validation pictures, for both, from the same 26 values. We do it for every
# pair that has *digit* in it.

# %%
rows = {}
for other in bed.names[1:]:
    both = [bed.experts[0], bed.experts[bed.names.index(other)]]
    mean = lambda weights, split, other=other: sum(  # noqa: E731
        bed.score(weights, split).tasks[task] / 2 for task in ("digit", other)
    )
    search = partial(search_weights, base=bed.base, experts=both, score=partial(mean, split="val"), n_points=26)
    some = {"fishers": [fishers[0], fishers[bed.names.index(other)]]}
    found = {"average": search(average).weights, "fisher": search(fisher, **some).weights}
    merged = average(bed.base, both, weights=found["average"]), fisher(bed.base, both, weights=found["fisher"], **some)
    rows[other] = [mean(weights, "test") for weights in merged]
    print(f"digit + {other:14} average {rows[other][0]:.3f}   Fisher {rows[other][1]:.3f}")

# %%
gain = [fisher_score - plain for plain, fisher_score in rows.values()]
mean_gain = sum(gain) / len(gain)
assert mean_gain > 0.02
claim(
    "fisher-merging",
    "On the mean of seven pairs, the Fisher merge beats the average by more than two points, both with the best λ",
    holds=mean_gain > 0.02,
    figure=f"{100 * mean_gain:+.1f} points, from {100 * min(gain):+.1f} to {100 * max(gain):+.1f}; λ from validation",
)

# %% [markdown]
# All eight at once, with equal $\lambda$ and nothing tuned:

# %%
everyone = {
    "average": average(bed.base, bed.experts),
    "fisher": fisher(bed.base, bed.experts, fishers=fishers),
}
score = {name: bed.score(weights) for name, weights in everyone.items()}
assert score["fisher"] > score["average"] + 0.02
claim(
    "fisher-merging",
    "Fisher merging of all eight experts beats their average by more than two points",
    holds=score["fisher"] - score["average"] > 0.02,
    figure=f"{score['fisher']:.3f} against {score['average']:.3f}, equal λ",
)

# %% [markdown]
# **How many examples does it take?** The official scripts use thousands. Here is the score of the merge of all eight
# by the number of pictures that each Fisher has seen; four already go most of the way.

# %%
few = {
    n: bed.score(fisher(bed.base, bed.experts, fishers=[fisher_of(name, n) for name in bed.names])) for n in (4, 16, 64)
}
few[256] = score["fisher"]
print({n: round(float(value), 3) for n, value in few.items()})
assert few[256] - few[16] < 0.02
claim(
    "fisher-merging",
    "Sixteen examples an expert are enough: within two points of 256",
    holds=few[256] - few[16] < 0.02,
    figure=", ".join(f"{n}: {value:.3f}" for n, value in few.items()),
)

# %% [markdown]
# ## RegMean: what does each layer see?
#
# Take one linear layer. Expert $i$ sends inputs $X_i$ through $W_i$. Which *one* matrix comes closest to what all of
# them do, each on its own inputs? That is least squares, and it has one answer:
# $W = (\sum_i W_i G_i)(\sum_i G_i)^{-1}$ with $G_i = X_i^\top X_i / n$. No gradients, only what the layers see.

# %%
from notebook_kit.merging import gram_matrices, regmean
from notebook_kit.merging.regmean import fit_layer

print(inspect.getsource(fit_layer))

# %% [markdown]
# It should matter *whether experts see different things*. So two beds: the eight **labelings** see the same digits;
# the eight **views** see them mirrored, turned, inverted, ...

# %%
views = digit_views()
seen = {"labels": (bed, train), "views": (views, views.batches("train"))}
grams = {
    kind: [
        gram_matrices(with_weights(which.model, expert), [data[name][0][:256]])
        for name, expert in zip(which.names, which.experts, strict=True)
    ]
    for kind, (which, data) in seen.items()
}

# %% [markdown]
# Drag `alpha` on the views. At 0 each input is looked at alone; at 1 correlations between inputs count in full.

# %%
explore(regmean, views.base, views.experts, grams=grams["views"], score=views.score, title="RegMean on eight views")

# %% [markdown]
# Now side by side, `alpha` chosen on validation pictures. On the labelings all see the same pixels, so that the first
# layer's Grams are equal, and equal Grams make RegMean the plain mean, exactly.

# %%
lead = {}
for kind, (which, _) in seen.items():
    run = partial(regmean, which.base, which.experts, grams=grams[kind])
    alpha = max((0.0, 0.1, 0.5, 0.9, 0.99, 1.0), key=lambda a: which.score(run(alpha=a), "val"))
    plain, best = which.score(average(which.base, which.experts)), which.score(run(alpha=alpha))
    lead[kind] = best - plain
    print(f"{kind:7} alpha {alpha:<5} average {plain:.3f}   RegMean {best:.3f}")
same = [g["layers.0.weight"] for g in grams["labels"]]
print("first layer, labels: all Grams equal:", all(torch.equal(g, same[0]) for g in same))

# %%
assert lead["views"] > 0.1
claim(
    "regmean",
    "Where experts see different inputs, RegMean beats the average by more than ten points",
    holds=lead["views"] > 0.1,
    figure=f"{100 * lead['views']:+.1f} points on eight views",
)

# %%
claim(
    "regmean",
    "Where experts see the same inputs, RegMean still beats the average by more than five points",
    holds=lead["labels"] > 0.05,
    figure=f"{100 * lead['labels']:+.1f} points on eight labelings",
)

# %% [markdown]
# ## OTA: the optimiser has measured it already
#
# Adam keeps, for each weight, a running mean of squared gradients, $v \approx E[g^2]$. That is nearly the Fisher, and
# it was free. It is usually thrown away with the optimiser. `training.fit` keeps it if you hand it a dict. We train
# the eight experts again, with the recipe of the zoo, and get the same weights up to rounding.

# %%
from notebook_kit.merging import fast_fisher_graft, graft_density, ota, squared_gradients, stored_numbers, ties
from notebook_kit.training import fit


def train_again(i, name):
    x, y = train[name]
    draw_rows = lambda g: torch.randint(len(x), (64,), generator=g)  # noqa: E731
    loss = lambda model, r: F.cross_entropy(model(x[r])[:, columns[name]], y[r])  # noqa: E731
    model, v = with_weights(bed.model, bed.base), {}
    fit(model, draw_rows, loss, steps=150, lr=5e-4, seed=1 + i, progress=False, moments=v)
    return model.state_dict(), v


again, moments = zip(*[train_again(i, name) for i, name in enumerate(bed.names)], strict=True)
gap = max((new[k] - old[k]).abs().max().item() for new, old in zip(again, bed.experts, strict=True) for k in old)
assert gap < 0.01

# %% [markdown]
# Is $v$ the Fisher? Each dot is one weight of the *prime* expert; both axes are logarithmic. (Adam's $v$ comes from
# batches of 64 and from the whole way, so it is smaller by a common factor. A factor does not matter here.)

# %%
pairs = [curvature.log_pairs(v, f) for v, f in zip(moments, fishers, strict=True)]
prime = bed.names.index("prime")
LiveFigure(draw.pairs_figure(*pairs[prime], x="v (Adam)", y="F (exact Fisher)", title="prime"))

# %%
correlations = [correlation for _, correlation in pairs]
assert min(correlations) > 0.9
claim(
    "ota-ffg",
    "Adam's second moments stand in for the Fisher: the logarithms correlate above 0.9 for every expert",
    holds=min(correlations) > 0.9,
    figure=f"{min(correlations):.2f} to {max(correlations):.2f}, 8 experts",
)

# %% [markdown]
# An optimiser that is gone can be replaced by a pass over data: squared batch gradients at the end of training.

# %%
# NBVAL_CHECK_OUTPUT
x, y = train["prime"]
batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 960, 64)]
loss = lambda model, batch: F.cross_entropy(model(batch[0])[:, columns["prime"]], batch[1])  # noqa: E731
passed = squared_gradients(models["prime"], batches, loss)
print(f"correlation with Adam's v: {curvature.log_pairs(moments[prime], passed)[1]:.2f}")

# %% [markdown]
# Do experts care about the same weights? Cosine of $\sqrt v$ between experts: they share most of their curvature.

# %%
cosine = curvature.curvature_cosine(moments)
LiveFigure(draw.similarity_figure(cosine, bed.names, title="Shared curvature"))

# %% [markdown]
# ## Grafting: undo what does not matter
#
# $\Delta = \theta_i - \theta_0$ is what an expert changed. Undoing one edit costs about $\frac12 v \Delta^2$. *Fast
# Fisher Grafting* keeps the edits with the largest $v\Delta^2$, by one threshold for the whole network, and puts the
# base back everywhere else. Drag `density` down to 0.2: what is left of the experts (blue) against keeping the largest
# edits (orange). Right: where the kept edits lie. Green: the merge of all eight grafts.

# %%
curves = curvature.graft_curves(bed.base, bed.experts, moments, score=bed.score, names=bed.names)
explore(
    curvature.graft_view, bed.base, bed.experts, moments, bed.score, bed.names, curves, density=0.2,
    draw=draw.graft_figure,
)  # fmt: skip

# %%
at = curves.set_index(["curve", "density"])["score"]
assert at["graft: FFG", 0.2] > at["graft: magnitude", 0.2] + 0.1
claim(
    "ota-ffg",
    "With a fifth of the edits, curvature keeps more than ten points more of the experts than magnitude does",
    holds=at["graft: FFG", 0.2] - at["graft: magnitude", 0.2] > 0.1,
    figure=f"{at['graft: FFG', 0.2]:.2f} against {at['graft: magnitude', 0.2]:.2f}, mean of 8 experts",
)

# %% [markdown]
# How few edits would do for each expert? `graft_density` asks the validation pictures for the smallest density that
# loses no more than two points.

# %%
for name, expert, v in zip(bed.names, bed.experts, moments, strict=True):
    own = lambda weights, name=name: bed.score(weights, "val").tasks[name]  # noqa: E731
    found = graft_density(bed.base, expert, moments=v, score=own, tolerance=0.02)
    kept = bed.score(fast_fisher_graft(bed.base, [expert], moments=[v], density=found.density)).tasks[name]
    print(f"{name:14} density {found.density:<5} test {kept:.2f}, expert {bed.score(expert).tasks[name]:.2f}")

# %% [markdown]
# ## OTA: merge what is left
#
# $\theta = \theta_0 + \sum_i \sqrt{v_i}\, m_i \Delta_i \,/\, \sum_i \sqrt{v_i}\, m_i$. Read the second sum: a masked
# edit leaves the *denominator* too. What only one expert wants is taken at full strength, not divided by eight. Two
# experts, two weights, $v$ = (4, 1) and (1, 9), edits (1, 1) and (3, 1):

# %%
# NBVAL_CHECK_OUTPUT
edits, v = (
    [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 1.0])}],
    [weighed[0], {"w": torch.tensor([1.0, 9.0])}],
)
print("all edits", [round(value, 3) for value in ota(zero, edits, moments=v, density=1.0)["w"].tolist()])
print("half     ", [round(value, 3) for value in ota(zero, edits, moments=v, density=0.5)["w"].tolist()])

# %% [markdown]
# Live, on all eight: which tasks gain from `density`, and what do `power` 0 and 1 do? `aggregate` set to `linear` with
# a larger `scale` is grafting without curvature in the mean.

# %%
hidden = dict.fromkeys(("epsilon", "rank", "fallback", "normalize_moments"))
start = {"density": 0.2, "limits": hidden, "title": "OTA + FFG"}
explore(ota, bed.base, bed.experts, moments=moments, score=bed.score, **start)

# %% [markdown]
# Each part on its own, `density` from validation pictures: without the masks; with the masks but a plain mean; both.
# And the moments squeezed to their row and column sums.

# %%
merge = partial(ota, bed.base, bed.experts, moments=moments)
variants = {
    "OTA without FFG": partial(merge, density=1.0),
    "FFG + plain mean": partial(merge, aggregate="linear"),
    "OTA + FFG": merge,
    "OTA + FFG, rank 1": partial(merge, curvature="rank1"),
}
result = {"average": score["average"], "Fisher": score["fisher"]}
for name, run in variants.items():
    grid = (1.0,) if "without" in name else (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
    density = max(grid, key=lambda d: bed.score(run(density=d), "val"))
    result[name] = bed.score(run(density=density))
for name, value in result.items():
    print(f"{name:18} {value:.3f}")

# %%
gain = result["OTA + FFG"] - result["OTA without FFG"]
assert gain > 0.02
claim(
    "ota-ffg",
    "Grafting before merging brings more than two points over merging all edits by curvature",
    holds=gain > 0.02,
    figure=f"{result['OTA + FFG']:.3f} against {result['OTA without FFG']:.3f}, density from validation",
)

# %%
space = stored_numbers(moments[0], curvature="rank1") / stored_numbers(moments[0])
loss_of_rank1 = result["OTA + FFG"] - result["OTA + FFG, rank 1"]
assert abs(loss_of_rank1) < 0.02
claim(
    "ota-ffg",
    "Second moments squeezed to row and column sums keep the merge within two points",
    holds=abs(loss_of_rank1) < 0.02,
    figure=f"{result['OTA + FFG, rank 1']:.3f} against {result['OTA + FFG']:.3f}, with {space:.1%} of the numbers",
)

# %% [markdown]
# The paper finds OTA + FFG ahead of strong baselines that know no curvature. Here is one, TIES, with two knobs tuned
# on the same validation pictures:

# %%
grid = [(d, s) for d in (0.2, 0.4, 0.7, 1.0) for s in (0.6, 0.8, 1.0, 1.4, 2.0)]
tries = {(d, s): ties(bed.base, bed.experts, density=d, scale=s) for d, s in grid}
tuned = bed.score(tries[max(grid, key=lambda setting: bed.score(tries[setting], "val"))])
claim(
    "ota-ffg",
    "OTA with grafts, one knob tuned, beats TIES with two knobs tuned by more than two points",
    holds=result["OTA + FFG"] - tuned > 0.02,
    figure=f"{result['OTA + FFG']:.3f} against {tuned:.3f}",
)

# %% [markdown]
# ## What to try
#
# 1. `fisher(..., power=0.5)`: something between the average and the Fisher merge. Where is the best?
# 2. Sampled Fishers: `fisher_of(name, estimator="sampled")` costs one backward pass a picture. What is lost? And with
#    `"empirical"`, which uses labels?
# 3. Give `ota` the exact Fishers as `moments`, or `fisher` the moments as `fishers`. Who gains?
# 4. In the graft widget, set `importance` to `curvature`: why is $v$ alone a poor guide?
# 5. A large model: train with `moments={}`, save the dict as safetensors, and let
#    `merge_files(ota, "base", ["a", "b"], "merged", moments=[v_a, v_b])` work tensor by tensor.
#
# ## Sources

# %%
for paper in ("fisher-merging", "regmean", "ota-ffg"):
    print(cite(paper))
