# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [sub_moe, merge_in_subspace, hc_smoe, drop_experts]
# ---

# %% [markdown]
# # Experts in a subspace: who is alike, and what may go
#
# M-SMoE asks the router which experts are alike. Two later papers say: ask the experts. Run them all on the same
# tokens and compare what they output. HC-SMoE then joins the most similar ones bottom up; Sub-MoE clusters them with
# k-means and merges each cluster inside a subspace that its members share. And one more paper deletes experts, but
# looks at what each layer's output loses.
#
# You will see all of them against each other, at several budgets, without any training. Some promises hold here, and
# some do not.

# %%
import inspect

import pandas as pd
import torch

from notebook_kit import cite, claim, explore, zoo
from notebook_kit import expert_merging as em
from notebook_kit.diagnostics import expert_compression, experts
from notebook_kit.expert_merging import drop_experts, hc_smoe, m_smoe, merge_in_subspace, sub_moe
from notebook_kit.figures.experts import experts_memory_figure, experts_score_figure, subset_losses_figure
from notebook_kit.hyperparameters import Range
from notebook_kit.routing import record_routing
from notebook_kit.widgets import ExpertMergeExplorer, LiveFigure
from notebook_kit.zoo import Score

torch.set_num_threads(1)

# %% [markdown]
# The model is the small Mixtral of the lessons before: eight experts a layer, two asked per byte, twelve languages.
# Besides the trace of its routers we now keep what its experts receive.

# %%
bed = zoo.language_moe()
model = bed.model


@torch.no_grad()
def calibrate(seed=0, windows=8):
    generator = torch.Generator().manual_seed(seed)
    with record_routing(model) as trace:
        for text in bed.batches("train").values():
            model(text[torch.randperm(len(text), generator=generator)[:windows]])
    return trace, em.calibration_inputs(model, trace, None, most=2048)


def scored(every):
    held_out = {language: text[::every] for language, text in bed.batches("test").items()}
    return lambda model: Score(bed.measure(model, None, held_out), bed.unit)


score, quick = scored(3), scored(12)
trace, inputs = calibrate()
print(f"all eight experts: {score(model):.2f} nats per byte")

# %% [markdown]
# ## Who is alike?
#
# Every expert runs on every token, and we take the mean cosine of two experts' outputs. The order of hidden units does
# not matter to outputs, so permuted copies would be found. Look for large numbers off the diagonal.

# %%
cosine, means = em.output_statistics(em.expert_view(model)[0], inputs["model.layers.0.mlp"][0])
pd.DataFrame(cosine.numpy()).round(2)

# %% [markdown]
# There are none: these experts do not compute alike. That is worth knowing before any merge. Still, drag: `method`
# offers six ways to have fewer experts; *hierarchical* shows how they join and where the tree is cut. Below, all that
# you have tried stays as a dot: score against memory, a cross where units were not aligned.

# %%
explorer = ExpertMergeExplorer(model, trace, quick, method="hierarchical")
explorer

# %% [markdown]
# ## Merging in a shared subspace
#
# Sub-MoE writes the matrices of a cluster side by side and decomposes them together: [W₁ … Wₙ] = U Σ [V₁; …; Vₙ]ᵀ.
# What they share, U Σ, stays; the V blocks are averaged by usage. The code:

# %%
print(inspect.getsource(merge_in_subspace).split('"""')[2].split("union = ")[1])

# %% [markdown]
# Before we use it, think: every Wᵢ is U Σ Vᵢᵀ with one and the same U Σ. So the average of the Vᵢ gives the average of
# the Wᵢ. At full rank the subspace does nothing at all. We check it on the whole model: the same clusters, once merged
# through the SVD and once averaged.

# %%
f, d = em.expert_view(model)[0].expert(0)[0].shape
gates = list(em.expert_view(model)[0].gate[:3])
left, right = merge_in_subspace(gates, [0.5, 0.3, 0.2])
average = 0.5 * gates[0] + 0.3 * gates[1] + 0.2 * gates[2]
difference = (left @ right - average).abs().max().item() / average.abs().max().item()
assert difference < 1e-4
claim(
    "sub-moe",
    "Averaging V blocks in the shared subspace gives another expert than averaging weights by usage",
    holds=difference > 1e-4,
    figure=f"they differ by {difference:.0e} of the largest weight",
)

# %% [markdown]
# What is left to help: the clusters, and the rank. First the clusters.
#
# ## All of them, at several budgets
#
# Whole matrices, no training. `clusters` are Sub-MoE's groups and `hierarchy` HC-SMoE's; both papers average units as
# they lie, so each is there with and without alignment. `zipit` merges units by their correlation.


# %%
def ways(inputs):
    sees = {"inputs": inputs}
    return {
        "M-SMoE": m_smoe,
        "clusters": lambda *a, n_experts: sub_moe(*a, n_experts=n_experts, **sees),
        "clusters, aligned": lambda *a, n_experts: sub_moe(*a, n_experts=n_experts, align=True, **sees),
        "hierarchy": lambda *a, n_experts: hc_smoe(*a, n_experts=n_experts, **sees),
        "hierarchy, aligned": lambda *a, n_experts: hc_smoe(*a, n_experts=n_experts, align=True, **sees),
        "zipit": lambda *a, n_experts: em.zipit_experts(*a, n_experts=n_experts, n_calibration=512),
        "drop least used": drop_experts,
        "drop least missed": lambda *a, n_experts: drop_experts(*a, n_experts=n_experts, by="reconstruction", **sees),
    }


# %%
frame = experts.compare_expert_merges(model, trace, score, ways(inputs), n_experts=(6, 4, 2))
frame.pivot(index="n_experts", columns="method", values="score")[list(ways(inputs))].iloc[::-1].round(2)

# %%
LiveFigure(experts_score_figure(frame, title="Twelve languages, held-out articles"))

# %% [markdown]
# Three things to see. Alignment helps every way of grouping. Asking the experts is not better than asking the router:
# M-SMoE's groups, led by the most used experts, keep more. And both ways to drop experts keep more than any merge.
# Two more draws of calibration text, at six and four experts:

# %%
names = ["M-SMoE", "clusters, aligned", "hierarchy", "hierarchy, aligned", "drop least used", "drop least missed"]
rows = [frame[frame["n_experts"] > 2].assign(seed=0)]
for seed in (1, 2):
    other, seen = calibrate(seed)
    again = {name: ways(seen)[name] for name in names}
    rows.append(experts.compare_expert_merges(model, other, score, again, n_experts=(6, 4)).assign(seed=seed))
draws = pd.concat(rows)
table = draws.pivot(index=["n_experts", "seed"], columns="method", values="score")[names]
table.round(3)


# %%
def verdict(paper, statement, gain, margin=0.0):
    return claim(paper, statement, bool((gain > margin).all()), f"{gain.min():.2f} to {gain.max():.2f} nats, 3 draws")


# %% [markdown]
# The claims one by one. The paper of HC-SMoE does not align; here it should:

# %%
gain = table["hierarchy, aligned"] - table["hierarchy"]
assert (gain > 0.1).all()
verdict("hc-smoe", "Clusters of experts with like outputs merge better when their units are aligned first", gain, 0.1)

# %%
statement = "Joining experts with like mean outputs keeps more than M-SMoE's groups"
verdict("hc-smoe", statement, table["hierarchy, aligned"] - table["M-SMoE"])

# %%
statement = "Clustering experts by their outputs keeps more than M-SMoE's groups"
verdict("sub-moe", statement, table["clusters, aligned"] - table["M-SMoE"])

# %% [markdown]
# Why not? Look at the tree in the widget, layers 1 and 2, four experts: five join one group, and three stay alone.
# Those are the ones whose outputs are farthest from the others, not the ones that are used most. M-SMoE lets the most
# used experts lead: they weigh most in their groups, so that what is used most changes least. And a group of five
# strangers is a bad average, however it was found.
#
# ## Which ones to drop
#
# *The least missed* tries all sets of experts that could stay, and looks at the layer's output. These are the 28 sets
# of six in the first layer:

# %%
losses = experts.subset_losses_frame(model, trace, n_experts=6, inputs=inputs)
print("keep", losses["kept"][0], "rather than", losses["kept"].iloc[-1])
LiveFigure(subset_losses_figure(losses, title="Six of eight, first layer"))

# %%
gain = (table["drop least missed"] - table["drop least used"]).loc[6]
assert (gain > 0.01).all()
verdict(
    "not-all-experts-are-equal",
    "Dropping the two experts that each layer's output misses least keeps more than dropping the least used",
    gain,
    0.01,
)

# %% [markdown]
# At four and two experts the two ways are close, and either may win: what is best for each layer alone is not always
# best for the model.
#
# ## Rank instead of experts
#
# Now the second half of Sub-MoE. Each matrix is cut to rank r and stored as two factors. *Whitening* weighs directions
# by how the inputs of an expert use them, before the cut. Bars: each language. Drag `rank`, then switch `whitening`.

# %%
explore(
    sub_moe,
    model,
    trace,
    score=quick,
    inputs=inputs,
    limits={
        "n_experts": Range(1, 8),
        "rank": Range(1, 96, log=True),
        "seed": None,
        "n_calibration": None,
        "axis": None,
    },
    n_experts=8,
    rank=24,
    align=True,
)

# %% [markdown]
# And the question that matters: with half the memory, four whole experts or eight of low rank? Rank 27 takes just
# under half. The lines of whole experts have the budgets from above: six, four and two.

# %%
options = {"n_experts": 8, "align": True, "inputs": inputs}
whole_bytes = expert_compression.compression_frame(model, trace)["bytes"].sum()
rows = []
for rank in (12, 16, 20, 27):
    for whitening in ("none", "full"):
        small = sub_moe(model, trace, rank=rank, whitening=whitening, **options)
        memory = expert_compression.compression_frame(small, trace)["bytes"].sum()
        rows.append((f"low rank, whitening {whitening}", rank, memory / whole_bytes, score(small)))
ranks = pd.DataFrame(rows, columns=["method", "rank", "memory", "score"])
ranks.pivot(index=["rank", "memory"], columns="method", values="score").round(2)

# %%
whole = frame.assign(memory=4 * frame["parameters"] / whole_bytes)
whole = whole[whole["method"].isin(["M-SMoE", "hierarchy, aligned", "drop least used", "drop least missed"])]
LiveFigure(experts_memory_figure(pd.concat([whole, ranks]), title="Fewer experts, or smaller ones"))

# %%
scores = ranks.pivot(index="rank", columns="method", values="score")
gain = scores["low rank, whitening full"] - scores["low rank, whitening none"]
assert (gain > 0.05).all()
claim(
    "sub-moe",
    "Whitening by an expert's inputs before the cut keeps more at low rank",
    holds=bool((gain > 0.05).all()),
    figure=f"{gain.min():.2f} to {gain.max():.2f} nats per byte better, ranks 12 to 27 of 96",
)

# %%
best = draws[draws["n_experts"] == 4]["score"].max()
half = ranks[(ranks["rank"] == 27) & ranks["method"].str.endswith("full")].iloc[0]
smaller = bool(half["memory"] < 0.5 and half["score"] > best + 0.02)
assert smaller
claim(
    "sub-moe",
    "At half the memory, eight experts of low rank keep more than four whole ones, however they were made",
    holds=smaller,
    figure=f"{half['score']:.2f} against {best:.2f}, the best of all methods and draws",
)

# %% [markdown]
# So at this scale the best thing that Sub-MoE has to offer is the part that merges nothing. These eight experts differ
# from each other, yet each has directions that its inputs hardly use. The paper's models have sixty or more experts a
# layer; there, some may really be alike. Measure `output_statistics` first: it tells which case is yours.
#
# ## What to try
#
# - `hc_smoe(..., linkage="ward")`, or `"complete"`: does the tree have fewer chains, and does the score follow?
# - `hc_smoe(..., merge_weights="dominant")`: the most used member alone stands for its cluster. Compare with dropping.
# - `hc_smoe(..., router="mean")`: one router row a cluster. Why is it worse than keeping all rows?
# - `sub_moe(..., n_experts=6, rank=36)`: a little of both. Is there a better mixture at half the memory?
#
# ## Sources

# %%
print(cite(sub_moe))
print(cite(hc_smoe))
print(cite(drop_experts))
