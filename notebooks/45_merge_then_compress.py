# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [mc_smoe]
# ---

# %% [markdown]
# # Merge, then compress: fewer experts, and smaller ones
#
# Merging experts makes a mixture store less. Does it also make it compute less? And once experts are merged, can each
# of them be made smaller too? The paper behind this lesson says that it can, because merged experts use fewer
# directions than the experts they came from. You will check that, then cut each matrix down to a low rank plus a few
# rows, and train for a few steps. In the end everything is counted: bytes, operations, and what was lost.

# %%
import inspect

import pandas as pd
import torch

from notebook_kit import cite, claim, explore, zoo
from notebook_kit import expert_merging as em
from notebook_kit.data import LANGUAGES, byte_batches, udhr
from notebook_kit.diagnostics import expert_compression as report
from notebook_kit.expert_merging import drop_experts, m_smoe, mc_smoe
from notebook_kit.expert_merging.low_rank import factor, split
from notebook_kit.expert_merging.mc_smoe import distillation_loss, kept_share
from notebook_kit.figures.experts import compression_figure, experts_memory_figure
from notebook_kit.hyperparameters import Range
from notebook_kit.routing import record_routing
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# The model is the small Mixtral of the lesson on expert merging: three layers, eight experts each, two asked per byte,
# twelve languages. Scores are log-likelihoods in nats per byte on held-out text; higher is better.

# %%
bed = zoo.language_moe()
model = bed.model
held_out = {language: text[::3] for language, text in bed.batches("test").items()}


@torch.no_grad()
def calibrate(seed=0, windows=8):
    generator = torch.Generator().manual_seed(seed)
    with record_routing(model) as trace:
        for text in bed.batches("train").values():
            model(text[torch.randperm(len(text), generator=generator)[:windows]])
    return trace


def score(model):
    tasks = bed.measure(model, None, held_out)
    return sum(tasks.values()) / len(tasks)


trace = calibrate()
print(f"all eight experts: {score(model):.2f} nats per byte")

# %% [markdown]
# ## What merging saves, and what it does not
#
# We count what experts store, and what they compute per token: two operations for each number of each expert that a
# token is sent to. Look at `flops`: four experts instead of eight take half the memory, and exactly the same time.
# Every token still visits two.

# %%
# NBVAL_CHECK_OUTPUT
merged = m_smoe(model, trace, n_experts=4)
for name, one in {"eight experts": model, "four": merged}.items():
    total = report.compression_frame(one, trace)[["bytes", "flops"]].sum()
    print(f"{name:13} {total['bytes'] / 1e6:.2f} MB {total['flops'] / 1e3:.0f} thousand operations per token")

# %% [markdown]
# ## Do merged experts use fewer directions?
#
# The stable rank of a matrix, ‖W‖_F² / ‖W‖₂², counts how many directions it really uses. We compare each merged expert
# with the expert that leads its group, left alone, on three draws of calibration text.

# %%
rows = []
for n, seed in [(n, seed) for n in (4, 2) for seed in (0, 1, 2)]:
    draw = calibrate(seed)
    alone = drop_experts(model, draw, n_experts=n)
    ranks = {"leaders alone": alone, "merged": m_smoe(model, draw, n_experts=n)}
    ranks["merged, not aligned"] = m_smoe(model, draw, n_experts=n, align=False)
    means = {name: report.stable_rank_frame(one)["stable_rank"].mean() for name, one in ranks.items()}
    rows.append({"n_experts": n, "seed": seed, **means})
ranks = pd.DataFrame(rows)
ranks.round(2)

# %%
fall = ranks["leaders alone"] - ranks["merged"]
lower = bool((fall > 0.4).all())
assert lower
claim(
    "m-smoe",
    "Merged experts use fewer directions than the experts that lead their groups",
    holds=lower,
    figure=f"stable rank {fall.min():.1f} to {fall.max():.1f} lower of about 21, 3 draws of calibration text",
)

# %% [markdown]
# It holds, and it is a small effect here: one or two directions of twenty. Without alignment it is gone at four
# experts: an average of strangers is no simpler than either.
#
# ## Low rank plus a few rows
#
# Each matrix becomes W = L R + S. L R is the best approximation of low rank; S is the rest, so that at first nothing
# changes. The code is short:

# %%
print(inspect.getsource(split).split('"""')[2])

# %%
# NBVAL_CHECK_OUTPUT
factored = factor(merged, rank=32)
print("L R + S gives the same score:", abs(score(factored) - score(merged)) < 1e-4)

# %% [markdown]
# Then rows of S go. Drag `rank` and `density` (the share of rows that stays) and watch the three numbers in the title.
# Nothing is trained here: the rows of largest norm stay. At what rank does the score begin to suffer? What does
# `n_experts` do to the operations, and what does `rank`?

# %%
quick = {language: text[::12] for language, text in bed.batches("test").items()}
explore(
    report.compression_view,
    model,
    trace,
    score=lambda view: sum(bed.measure(view.model, None, quick).values()) / len(quick),
    draw=compression_figure,
    limits={"n_experts": Range(1, 8), "rank": Range(1, 96, log=True), "layer": Range(0, 2)},
    cache={},
)

# %% [markdown]
# ## Rows fall while the model learns
#
# The paper does not cut at once. It trains, with the routers frozen and the original model as a teacher, and lets rows
# of S fall on the way: those whose weights times gradients are smallest. The share that may stay falls by a cubic.

# %%
# NBVAL_CHECK_OUTPUT
print([round(kept_share(step, 20, density=0.1), 2) for step in range(0, 21, 2)])

# %%
print(inspect.getsource(mc_smoe).split('"""')[2])

# %% [markdown]
# ## Everything against its memory
#
# Twenty training steps for each. *Merge* is M-SMoE with 4, 3 and 2 experts, trained with the very same loss. *Merge,
# then compress* has four experts of rank 32, 21 and 16, with a tenth of the rows of S. Look at the memory column
# before you look at the score.

# %%
texts = {language: udhr(language, "train") for language in LANGUAGES}
batches = byte_batches(texts, batch_size=4, length=128)


def merge_and_train(trace, n):
    small = m_smoe(model, trace, n_experts=n)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_("mlp.gate." not in name)
    loss = lambda student, batch: distillation_loss(model, student, batch[0])  # noqa: E731
    fit(small, batches, loss, steps=20, lr=1e-3, progress=False, schedule=lambda done: 1 - done)
    return small


def compress(trace, rank):
    return mc_smoe(model, trace, n_experts=4, rank=rank, density=0.1, steps=20, batches=batches)


# %%
whole = report.compression_frame(model, trace)[["bytes", "flops"]].sum()


def row(method, what, small, trace):
    share = report.compression_frame(small, trace)[["bytes", "flops"]].sum() / whole
    return {"method": method, "what": what, "memory": share["bytes"], "flops": share["flops"], "score": score(small)}


rows = [row("merge", f"{n} experts", merge_and_train(trace, n), trace) for n in (4, 3, 2)]
rows += [row("merge, then compress", f"4 of rank {r}", compress(trace, r), trace) for r in (32, 21, 16)]
frame = pd.DataFrame([{"method": "all", "what": "8 experts", "memory": 1, "flops": 1, "score": score(model)}, *rows])
frame.round(2)

# %%
LiveFigure(experts_memory_figure(frame, title="What experts store against what they know, after 20 steps"))

# %% [markdown]
# Where the two lines meet there is little between them. At a quarter of the memory compressing wins, and it computes
# less besides. Once more, on another draw of calibration text:

# %%
other = calibrate(1)
pairs = [(frame.loc[3], frame.loc[5])]
pairs.append((row("merge", "", merge_and_train(other, 2), other), row("", "", compress(other, 21), other)))
gains = [small["score"] - merged["score"] for merged, small in pairs]
less = all(small["memory"] <= merged["memory"] and small["flops"] < merged["flops"] for merged, small in pairs)
assert less
assert min(gains) > 0.05
claim(
    "m-smoe",
    "At a quarter of the memory, merging then compressing keeps more than merging alone, and computes less",
    holds=less and min(gains) > 0.05,
    figure=f"{min(gains):.2f} to {max(gains):.2f} nats per byte better, 20 training steps, 2 draws",
)

# %%
last = frame.loc[6]
lossless = bool(last["score"] > frame.loc[0, "score"] - 0.1)
claim(
    "m-smoe",
    "Experts can give up four fifths of their memory at a loss under a tenth of a nat per byte",
    holds=lossless,
    figure=f"{last['memory']:.0%} of the memory, {frame.loc[0, 'score']:.2f} becomes {last['score']:.2f}",
)

# %% [markdown]
# The paper reports up to 80 % less memory with hardly any loss, on large models with many redundant experts, after a
# real training. Twenty steps on a model of one million numbers are something else: none of its experts is idle.
#
# The result is a model like any other: it saves, loads and generates. Rows that fell are really gone from the file.

# %%
small = em.mc_smoe(model, trace, n_experts=4, rank=16, density=0.1, steps=0)
print(type(small).__name__, small.config.expert_rows["0"])

# %% [markdown]
# ## What to try
#
# - `steps=100`. How much of the loss comes back? Do both lines gain alike?
# - `density=0` against `density=0.3` at the same memory (lower the rank): are rows or directions worth more?
# - `n_experts=8` with a low rank: no merging at all, only compression. The next lesson is about that.
# - On disk, with no more than one layer in memory: `notebook-kit merge-experts FOLDER --calibration TEXT`.
#
# ## Sources

# %%
print(cite(mc_smoe))
