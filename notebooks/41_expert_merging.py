# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [m_smoe, average_experts, drop_experts]
# ---

# %% [markdown]
# # Expert merging: fewer experts, with their units in one order
#
# A mixture of experts computes little and stores much: each layer keeps eight networks and asks two of them per
# token. Can it keep fewer? The simplest way is to delete the experts that are asked least. But what they learned is
# gone. Merging averages experts instead. And then the lesson before this one comes back: hidden units have no order,
# so experts must be **aligned** before they are averaged.
#
# You will do all three on a small Mixtral trained on twelve languages, and see what alignment buys. You will also see
# that the simple way is not so easy to beat.

# %%
import inspect

import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, models, zoo
from notebook_kit import expert_merging as em
from notebook_kit.data import LANGUAGES, byte_batches, udhr
from notebook_kit.diagnostics import experts as report
from notebook_kit.expert_merging import average_experts, drop_experts, expert_view, m_smoe
from notebook_kit.figures.experts import experts_score_figure
from notebook_kit.routing import record_routing
from notebook_kit.training import fit
from notebook_kit.widgets import ExpertMergeExplorer, LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# ## The model and its trace
#
# Three layers, eight experts each, two asked per byte. We let it read training text in all twelve languages and write
# down what its routers say: that trace is all that merging needs to know about the data. Scores are log-likelihoods
# in nats per byte on held-out articles: higher is better, and knowing nothing at all would be −5.5. To be quick, this
# lesson scores on every fourth window of them; `bed.score` takes them all.

# %%
bed = zoo.language_moe()
model = bed.model


@torch.no_grad()
def calibrate(model, seed=0, windows=8):
    generator = torch.Generator().manual_seed(seed)
    with record_routing(model) as trace:
        for language, text in bed.batches("train").items():
            with trace.labelled(language):
                model(text[torch.randperm(len(text), generator=generator)[:windows]])
    return trace


trace = calibrate(model)
trace

# %%
held_out = {language: text[::4] for language, text in bed.batches("test").items()}


def score(model):
    tasks = bed.measure(model, None, held_out)
    return sum(tasks.values()) / len(tasks)


print(f"all eight experts: {score(model):.2f} nats per byte")

# %% [markdown]
# ## The idea, step by step
#
# **Usage and groups.** The most used experts of a layer are *dominant* and lead a group. Every other expert joins the
# dominant one that the router treats most alike: it compares the columns of router logits. Look at `members` (the
# leader comes first) and at the weights, which follow usage.

# %%
plan = em.plan_m_smoe(model, trace, n_experts=4)
report.groups_frame(plan)

# %% [markdown]
# **Alignment.** A gated expert computes `down · (silu(gate · x) * (up · x))`. Its hidden units can be permuted, and
# each unit has a free sign besides: turn the signs of its `up` row and its `down` column and nothing changes. So unit
# i of the leader and unit j of a member are as alike as `gate_i·gate_j + |up_i·up_j + down_i·down_j|`, and the best
# pairing is one linear assignment. It is `weight_matching` of the lesson before, on three matrices:

# %%
print(inspect.getsource(em.Aligner.__call__))

# %% [markdown]
# **Merge.** A group becomes the usage-weighted average of its aligned members. The router keeps all its eight rows,
# and a map leads the rows of a group to one stored expert. When top-2 asks for two members of one group, that expert
# is used with both weights added. The method in full:

# %%
print(inspect.getsource(m_smoe).split('"""')[2])

# %% [markdown]
# The result is a model like any other of transformers: it generates, and it can be saved and loaded. Fewer experts
# are really stored; the original is untouched.

# %%
# NBVAL_CHECK_OUTPUT
small = m_smoe(model, trace, n_experts=4)
before, after = report.expert_sizes(model), report.expert_sizes(small)
print(type(small).__name__, "| rows of each router:", after["rows"].tolist())
print("stored experts:", before["experts"].tolist(), "->", after["experts"].tolist())
print(f"expert parameters: {after['parameters'].sum() / before['parameters'].sum():.0%}")

# %% [markdown]
# ## A case where we know the answer
#
# We plant it: four experts of each layer stay, the other four become copies of them with their units shuffled and
# their signs flipped. This changes no expert's function. Four experts are enough, then, and a good merge loses
# nothing.

# %%
planted = report.plant_permuted_copies(model, em.usage_of(trace, model))
planted_trace = calibrate(planted)
scores = {
    "planted, 8 experts": score(planted),
    "4 experts, aligned": score(m_smoe(planted, planted_trace, n_experts=4)),
    "4 experts, not aligned": score(m_smoe(planted, planted_trace, n_experts=4, align=False)),
}
pd.Series(scores, name="nats per byte").round(3).to_frame()

# %%
eight, yes, no = scores.values()
lossless = abs(eight - yes) < 1e-3 and eight - no > 0.1
assert lossless
claim(
    "m-smoe",
    "Permuted copies of experts merge without loss when aligned, and only then",
    holds=lossless,
    figure=f"{eight:.3f} before, {yes:.3f} aligned, {no:.3f} not aligned",
)

# %% [markdown]
# ### The paper's own model
#
# The paper merges Switch Transformers: an encoder and a decoder, one expert a token, and experts without a gate,
# `down relu(up x)`. Their units have no free sign; they can only change places. A tiny one with random weights shows
# that the same calls work. We plant the same case in it, and look at how far its logits move.

# %%
# NBVAL_CHECK_OUTPUT
text = {"input_ids": torch.arange(2, 162).view(4, 40), "decoder_input_ids": torch.arange(2, 82).view(4, 20)}


@torch.no_grad()
def listen(switch):
    with record_routing(switch) as heard:
        return heard, switch(**text).logits


switch = models.tiny_switch()
switch = report.plant_permuted_copies(switch, em.usage_of(listen(switch)[0], switch))
heard, before = listen(switch)
for align in (True, False):
    small = m_smoe(switch, heard, n_experts=4, align=align)
    print(f"align={align}: logits move by {(listen(small)[1] - before).abs().max():.2f}")
print({layer.name: len(layer) for layer in expert_view(small)})

# %% [markdown]
# ## Drag it
#
# Bars: how often each expert is asked, in the colour of its group. Right: how alike the router treats experts, group
# by group. Move `n_experts` down, switch `align` off, then compare with `method` = `drop`. The score stands in the
# title.

# %%
calibration = torch.cat([text[:2] for text in bed.batches("train").values()])
explorer = ExpertMergeExplorer(model, trace, score, batches=[calibration])
explorer

# %% [markdown]
# ## Merging, with and without alignment, against dropping
#
# Nobody planted anything now: these experts were trained together, each for its own job. We store 8, 6, 4, 2 and 1
# per layer. `average` is merging at its plainest: no alignment, all members alike.

# %%
methods = {
    "merge, aligned": m_smoe,
    "merge, not aligned": lambda *inputs, n_experts: m_smoe(*inputs, n_experts=n_experts, align=False),
    "average": average_experts,
    "drop the least used": drop_experts,
    "drop at random": lambda *inputs, n_experts: drop_experts(*inputs, n_experts=n_experts, by="random"),
}
frame = report.compare_expert_merges(model, trace, score, methods, n_experts=(8, 6, 4, 2, 1))
frame.pivot(index="n_experts", columns="method", values="score")[list(methods)].sort_index(ascending=False).round(2)

# %%
LiveFigure(experts_score_figure(frame, title="Twelve languages, held-out articles"))

# %% [markdown]
# Two things to see. The gap between the first two columns is what alignment buys, and it grows as groups grow: three
# quarters of a nat per byte at two experts. And dropping the least used experts does better than any merge.
#
# Both could be an accident of the calibration text. So we repeat them with three other draws of it.

# %%
rows, traces = [], {seed: calibrate(model, seed) for seed in (1, 2, 3)}
for seed, other in traces.items():
    for n in (4, 2):
        merged = (m_smoe(model, other, n_experts=n, align=align) for align in (True, False))
        aligned, naive = map(score, merged)
        dropped = score(drop_experts(model, other, n_experts=n))
        rows.append({"seed": seed, "n_experts": n, "aligned": aligned, "not aligned": naive, "dropped": dropped})
draws = pd.DataFrame(rows)
draws.round(2)

# %%
gain = draws["aligned"] - draws["not aligned"]
assert (gain > 0.1).all()
claim(
    "m-smoe",
    "Aligning experts before merging keeps more than merging them as they lie",
    holds=bool((gain > 0.1).all()),
    figure=f"{gain.min():.2f} to {gain.max():.2f} nats per byte better at 4 and 2 experts, 3 draws of calibration text",
)

# %%
against = draws["aligned"] - draws["dropped"]
better = bool((against > 0).all())
claim(
    "m-smoe",
    "Merging experts keeps more than dropping the least used, without any training afterwards",
    holds=better,
    figure=f"{against.min():.2f} to {against.max():.2f} nats per byte, 3 draws of calibration text",
)

# %% [markdown]
# Why does dropping win here? The experts of one mixture are trained to differ, and they are not permuted copies of
# each other: after the best matching, two experts of this model are still nearly strangers, as the next cell shows.
# Their average is neither of them. An expert that stays whole at least does one job well, and the router, whose other
# rows are gone, spreads the tokens over those that stay. The paper's models are far larger, with more redundant
# experts.


# %%
def flat(weights):
    return torch.cat([part.flatten() for part in weights.values()])


layer, aligner = expert_view(model)[0], em.Aligner("weight")
for name, weights in {"as it lies": aligner(layer, 3, 3), "aligned": aligner(layer, 3, 1)}.items():
    cosine = torch.cosine_similarity(flat(aligner(layer, 1, 1)), flat(weights), dim=0)
    print(f"cosine of expert 3, {name}, with expert 1: {cosine:.2f}")

# %% [markdown]
# ## Who counts, and how much?
#
# M-SMoE weighs the members of a group by usage. The paper tries four other ways, and so do we, at four experts: all
# alike, by 1 − usage, at random, and by Fisher information: how much the loss feels each single entry, measured by
# gradients on some of the calibration text. Each row is one of the three draws. Which rule is best?


# %%
def some_text(seed):
    """Two windows of each language, one a batch."""
    generator = torch.Generator().manual_seed(seed)
    texts = bed.batches("train").values()
    return torch.cat([text[torch.randperm(len(text), generator=generator)[:2]] for text in texts]).split(1)


rules = draws[draws["n_experts"] == 4].set_index("seed")[["aligned"]].rename(columns={"aligned": "frequency"})
for rule in ("uniform", "reversed", "random", "fisher"):
    options = {"n_experts": 4, "merge_weights": rule}
    merged = (m_smoe(model, traces[seed], batches=some_text(seed), seed=seed, **options) for seed in traces)
    rules[rule] = [score(one) for one in merged]
rules.round(2)

# %%
careless = rules["frequency"] - rules[["uniform", "reversed"]].max(axis=1)
assert (careless > 0.1).all()
claim(
    "m-smoe",
    "Weighting experts by usage keeps more than weighting them alike, or by how little they are used",
    holds=bool((careless > 0.1).all()),
    figure=f"at least {careless.min():.2f} nats per byte better at 4 experts, 3 draws of calibration text",
)

# %%
against_fisher = rules["frequency"] - rules["fisher"]
claim(
    "m-smoe",
    "Weighting experts by usage keeps more than weighting their entries by Fisher information",
    holds=bool((against_fisher > 0).all()),
    figure=f"{against_fisher.min():.2f} to {against_fisher.max():.2f} nats per byte at 4 experts, "
    "3 draws of calibration text",
)

# %% [markdown]
# Usage is one number for a whole expert, and it is free: the trace has it. Fisher information has a number for each
# entry and needs gradients. Where experts are strangers to each other, it pays to know which entries matter to whom.
# (What random weights are worth depends on the draw; the other columns hardly do.)

# %% [markdown]
# ## A little training afterwards
#
# The paper goes on: after merging it trains, with the routers frozen. Twenty small steps are enough to see what that
# does. The aligned merge keeps a lead over the unaligned one, and most of its distance to dropping is gone.

# %%
texts = {language: udhr(language, "train") for language in LANGUAGES}
batches = byte_batches(texts, batch_size=4, length=128)


def loss(model, batch):
    ids = batch[0]
    return F.cross_entropy(model(ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:])


# %%
for name in ("merge, aligned", "merge, not aligned", "drop the least used"):
    small = methods[name](model, trace, n_experts=4)
    before = score(small)
    for parameter_name, parameter in small.named_parameters():
        parameter.requires_grad_("mlp.gate." not in parameter_name)
    fit(small, batches, loss, steps=20, lr=1e-3, progress=False)
    print(f"{name:20} {before:.2f} -> {score(small):.2f} nats per byte")

# %% [markdown]
# How much each expert is asked matters too. Where usage is uneven, the least used experts are cheap to lose:

# %%
report.usage_frame(model, trace).pivot(index="layer", columns="expert", values="usage").round(2)

# %% [markdown]
# ## What to try
#
# - `m_smoe(..., adaptive=True)`: layers share one budget. Which layer keeps more experts, and does it help?
# - `drop_experts(..., router="map")`: the rows stay and lead to the most similar expert. Better or worse than deleting?
# - `m_smoe(..., signs=False)`: what is the free sign worth?
# - Train for a hundred steps instead of twenty, at two experts. Which lead is left?
# - Your own: `AutoModelForCausalLM.from_pretrained("a Mixtral, Qwen-MoE, OLMoE or DeepSeek-V3 folder")` (or
#   `AutoModelForSeq2SeqLM`, for Switch), record a trace of your text, `m_smoe(model, trace, n_experts=...)`,
#   `save_pretrained`. To load the result again, import
#   `notebook_kit.expert_merging` first, or pass `trust_remote_code=True`.
#
# ## Sources

# %%
print(cite(m_smoe))
print(cite(drop_experts))
