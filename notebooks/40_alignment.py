# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [weight_matching, activation_matching, barrier]
# ---

# %% [markdown]
# # Alignment: two networks, one order
#
# Train the same network twice, from two seeds, on the same digits. Both end at 96 % accuracy. Now average their
# weights. You might hope for something in between. What you get can barely read.
#
# Why? A hidden unit has no fixed place. Swap two units of a layer, together with the weights that read them, and the
# network computes exactly the same. So unit 7 of one network and unit 7 of the other have nothing to do with each
# other, and averaging them mixes two strangers. In this lesson you find out who belongs to whom, and average again.

# %%
import copy
import inspect

import pandas as pd
import torch
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit import alignment, cite, claim, models, zoo
from notebook_kit.alignment import Permutations, activation_matching, barrier, interpolate, permute, weight_matching
from notebook_kit.diagnostics.alignment import matching_cost, moved_units, unit_similarity
from notebook_kit.figures.alignment import permutation_figure, similarity_figure
from notebook_kit.widgets import AlignmentExplorer, LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# ## The question
#
# Here are the twins: 64 pixels, two hidden layers of 64 units, 10 digits. The score is the log-likelihood of the
# right digit on held-out images (0 is perfect, lower is worse; minus this number is the usual loss). Compare the two
# ends with the middle.

# %%
twins = zoo.digit_twins(64)
a, b = twins.experts
x, y = twins.batches("test")["digit"]


def log_likelihood(weights):
    return -F.cross_entropy(functional_call(twins.model, weights, (x,)), y).item()


middle = interpolate(a, b, 0.5)
for name, weights in {"A": a, "B": b, "middle": middle}.items():
    print(f"{name:7} accuracy {twins.score(weights):.2f}, log-likelihood {log_likelihood(weights):.2f}")

# %% [markdown]
# The dip between the ends is called the **barrier**: how far the line falls below the straight chord between its
# ends. It is a short function:

# %%
print(inspect.getsource(barrier).split('"""')[2])

# %% [markdown]
# ## The idea
#
# A **permutation spec** says which axes must move together. For our network: the rows of layer 0 (they make the
# units), its bias, and the columns of layer 1 (they read the units) carry the permutation `layers.0`. Pixels in and
# digits out carry none: they have a meaning of their own.

# %%
spec = alignment.permutation_spec(twins.model)
for name, axes in spec.axes.items():
    print(f"{name:16} {[parts[0].perm if parts else None for parts in axes]}")

# %% [markdown]
# The proof that a spec is right: shuffle everything that it allows, and the output must not change. The kit tests
# this for each architecture that it knows. Here it is for a small Mixtral, where each of eight experts in each layer
# has its own permutation, and attention heads move too (as whole heads: inside one, rotary positions fix the order).

# %%
# NBVAL_CHECK_OUTPUT
mixtral, text = models.tiny_mixtral(), torch.arange(40).reshape(2, 20)
wide = alignment.permutation_spec(mixtral, residual=True)
shuffled = copy.deepcopy(mixtral)
shuffled.load_state_dict(permute(wide, alignment.random_permutations(wide, seed=0, signs=True), mixtral.state_dict()))
with torch.no_grad():
    difference = (shuffled(text).logits - mixtral(text).logits).abs().max().item()
print(wide)
print("same logits:", difference < 1e-5)

# %% [markdown]
# ## Matching
#
# Which permutation brings B into A's order? Take the one that makes the weights most alike: the largest sum of
# products `Σ⟨w_A, π(w_B)⟩`. With the other layers held fixed this is a **linear assignment problem**: `C[i, j]` says
# how alike unit i of A and unit j of B are, and each i gets a j of its own. Layers take turns until nothing improves.
# Read the loop:

# %%
print(inspect.getsource(weight_matching).split('"""')[2])

# %% [markdown]
# By hand, with two units: A's units are (1, 0) and (0, 1), B's are the same in the other order. C has its large
# entries off the diagonal, so the assignment swaps them.

# %%
# NBVAL_CHECK_OUTPUT
two = alignment.PermutationSpec({"w": ("p", None)}, {"p": 2})
one, other = {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, {"w": torch.tensor([[0.0, 1.0], [1.0, 0.0]])}
print("C =", alignment.similarity(two, "p", one, other, Permutations())[0].tolist())
print("p =", weight_matching(two, one, other)["p"].tolist())

# %% [markdown]
# Now the twins. The objective rises with each step and never falls. Nearly every unit moves: the two orders had
# nothing in common.

# %%
found = weight_matching(spec, a, b)
aligned = permute(spec, found, b)
print("objective:", [round(value, 1) for value in found.objective])
assert all(later >= earlier for earlier, later in zip(found.objective, found.objective[1:], strict=False))
moved_units(spec, found)

# %% [markdown]
# B computes what it computed before; only its units stand elsewhere. Look at the pairs: left, unit against unit as B
# came; right, after matching. A diagonal appears.

# %%
assert twins.score(aligned) == twins.score(b)
before, after = (unit_similarity(spec, "layers.0", a, b, p) for p in (Permutations(), found))
LiveFigure(similarity_figure(before, after, title="layers.0: cosine of units"))

# %% [markdown]
# The permutation itself is a cloud: there was no order to begin with. The table says how alike a pair is on average,
# before and after (1 would be a perfect copy; these are two trainings, so they are cousins, not copies).

# %%
LiveFigure(permutation_figure(found, "layers.0", title="layers.0: which unit of B goes where"))

# %%
matching_cost(spec, a, b, found).round(2)

# %% [markdown]
# ## Drag it
#
# The left panel walks the line from A to B. Switch `method` to `none` and back, choose the other `layer`, change the
# `seed` (the order in which layers take turns). `activation` pairs units by what they do on training images instead
# of by their weights.

# %%
network = {name: copy.deepcopy(twins.model) for name in "AB"}
network["A"].load_state_dict(a), network["B"].load_state_dict(b)
images = [twins.batches("train")["digit"][0]]
explorer = AlignmentExplorer(
    a, b, spec, log_likelihood, models=(network["A"], network["B"]), batches=images, y="log-likelihood (nats)"
)
explorer

# %% [markdown]
# ## The claim
#
# Git Re-Basin claims that networks trained apart lie in one valley once their units are matched, and that wider
# networks do better. Three widths, both ways of matching; the barrier is in nats.

# %%
rows = {}
for width in (32, 64, 128):
    twins = zoo.digit_twins(width)
    (a, b), spec = twins.experts, alignment.permutation_spec(twins.model)
    network = [copy.deepcopy(twins.model) for _ in "AB"]
    network[0].load_state_dict(a), network[1].load_state_dict(b)
    matched = {"naive": Permutations(), "weight": weight_matching(spec, a, b)}
    matched["activation"] = activation_matching(spec, *network, images)
    rows[width] = {name: barrier(log_likelihood, a, permute(spec, p, b)) for name, p in matched.items()}
barriers = pd.DataFrame(rows).T.rename_axis("width")
barriers.round(2)

# %% [markdown]
# Weight matching takes away more than half of the barrier at every width. Is that luck with the visiting order? We
# try eight seeds at each width and keep the worst.

# %%
worst = {}
for width in (32, 64, 128):
    twins = zoo.digit_twins(width)
    (a, b), spec = twins.experts, alignment.permutation_spec(twins.model)
    tries = [permute(spec, weight_matching(spec, a, b, seed=seed), b) for seed in range(8)]
    worst[width] = max(barrier(log_likelihood, a, line) for line in tries) / barriers.loc[width, "naive"]
worst

# %%
holds = all(share < 0.5 for share in worst.values())
assert holds
claim(
    "git-re-basin",
    "Weight matching takes away more than half of the loss barrier between two networks trained apart",
    holds=holds,
    figure=f"left at width 32, 64, 128: {', '.join(f'{share:.0%}' for share in worst.values())} (worst of 8 seeds)",
)

# %% [markdown]
# Activation matching does as well or nearly so. But the second half of the claim needs care: the naive barrier
# shrinks with width too, so here most of what wider networks gain is gained without matching.
#
# ## What to try
#
# - `weight_matching(spec, a, b, max_iter=1)`: one sweep. How much of the objective is there already?
# - Average three networks: match B and C to A. Then match both to the average, and repeat.
# - `permutation_spec(model, residual=True)` on `models.tiny_llama()`: how many permutations does a transformer have?
# - Your own two checkpoints: `alignment.permutation_spec(model_a)`, then `weight_matching` on their state dicts. Were
#   both fine-tuned from one base? Then expect hardly anything to move: they are in one order already.
#
# ## Sources

# %%
print(cite(weight_matching))
