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
# # A tour in five minutes
#
# Four subjects, four live pictures. Run the cells from top to bottom (Shift+Enter) and drag what can be dragged.
# Everything runs on small networks that come with the kit: no download, no GPU.
#
# First, **merging**: eight experts, fine-tuned from one network, become one network. The bars say how well it does on
# each of their tasks; the diamonds say where you started.

# %%
import torch

from notebook_kit import catalog, claim, explore
from notebook_kit.merging import ties
from notebook_kit.zoo import digit_labels

torch.set_num_threads(1)
digits = digit_labels()
explore(ties, digits.base, digits.experts, score=digits.score)

# %% [markdown]
# Try `density` and `scale` together. Can you bring the mean above 0.59? Press **Pin** to keep what you like. The line
# of Python below the picture is what you would write to get the same result. Lesson `30_merging` explains the method.
#
# ## Routers: who reads what
#
# A mixture of experts sends each token to a few of its experts. Here a small Mixtral, trained on the Universal
# Declaration of Human Rights in twelve languages, reads sentences that it has not seen. We record what its router said.

# %%
from notebook_kit.routing import record_routing
from notebook_kit.widgets import RouterExplorer
from notebook_kit.zoo import language_moe

mixture = language_moe()
with record_routing(mixture.model) as trace, torch.no_grad():
    for language, windows in mixture.batches("val").items():
        with trace.labelled(language):
            mixture.model(windows[:4])
trace

# %% [markdown]
# Each row is a byte of text, each column an expert. Change `picture` to `labels`: some experts prefer some languages,
# and the title says how much beyond chance. Then set `router` to another rule: the recorded run is routed again, live.

# %%
RouterExplorer(trace, layer=1)

# %% [markdown]
# ## Alignment: the same network in another order
#
# Two networks, trained from two seeds, do equally well; their plain average is poor. Hidden units have no fixed order,
# so the average mixes strangers. Find the order in which they belong together, and the path between the two opens.

# %%
from notebook_kit.alignment import permutation_spec, permute, weight_matching
from notebook_kit.merging import average
from notebook_kit.widgets import AlignmentExplorer
from notebook_kit.zoo import digit_twins

twins = digit_twins(64)
spec = permutation_spec(twins.model)
AlignmentExplorer(*twins.experts, spec, twins.score, y="accuracy")

# %% [markdown]
# The paper's claim, as an assertion. A lesson fails when a verdict changes; one that does not hold at this scale is
# said so. All verdicts together stand in `CLAIMS.md`.

# %%
a, b = twins.experts
aligned = permute(spec, weight_matching(spec, a, b), b)
middles = [twins.score(average(a, [a, other])) for other in (b, aligned)]
assert middles[1] > middles[0] + 0.2
claim(
    "git-re-basin",
    "After matching, the average of the digit twins is within two points of the twins",
    holds=middles[1] > min(twins.score(a), twins.score(b)) - 0.02,
    figure=f"accuracy of the average {middles[0]:.2f} before, {middles[1]:.2f} after",
)

# %% [markdown]
# ## Expert merging: fewer experts, the same model
#
# The mixture above has eight experts a layer. Which can be joined, and what does it cost? Drag `n_experts` down, and
# see what happens without alignment.

# %%
from notebook_kit.expert_merging import drop_experts, m_smoe
from notebook_kit.widgets import ExpertMergeExplorer

ExpertMergeExplorer(mixture.model, trace, mixture.score, n_experts=6)

# %% [markdown]
# The widget called plain functions, and so can you. The result is a model like any other: it generates, it saves. Its
# score is printed beside that of simply dropping the two least used experts. Is merging worth it here? Lesson
# `41_expert_merging` measures it at every size, and shows the case for which merging is lossless.

# %%
smaller = m_smoe(mixture.model, trace, n_experts=6)
dropped = drop_experts(mixture.model, trace, n_experts=6)
for name, model in {"8 experts": mixture.model, "6, merged": smaller, "6, dropped": dropped}.items():
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name:11}{size:>10,} parameters {mixture.score(model):.2f} nats per byte")
text = smaller.generate(torch.tensor([list(b"Everyone has ")]), max_new_tokens=30, do_sample=False)
print(bytes(text[0].tolist()).decode(errors="replace"))

# %% [markdown]
# ## Adapters: teach a frozen model something small
#
# LoRA leaves every weight alone and adds a thin detour beside it. Two matrices of rank 4 at each attention projection:

# %%
from notebook_kit.adapters import LoRA, attach, detach, trainable_parameters
from notebook_kit.zoo import language_experts

reader = language_experts()
names = attach(reader.model, LoRA, targets=r"(q|v)_proj$", rank=4)
table = trainable_parameters(reader.model)
assert len(table) == len(names)
table

# %% [markdown]
# Lesson `10_adapters` trains them. Detached, the model is the old one, bit for bit.

# %%
# NBVAL_CHECK_OUTPUT
detach(reader.model)
print(all(torch.equal(tensor, reader.base[name]) for name, tensor in reader.model.state_dict().items()))

# %% [markdown]
# ## Where to go
#
# | lesson | question |
# |---|---|
# | `10_adapters` | how little must change to teach a model something new? |
# | `20_routers` | who decides which expert reads a token, and how is the load kept even? |
# | `30_merging` | eight experts, one network: what interferes? |
# | `40_alignment` | when are two networks the same network? |
# | `41_expert_merging` | which experts of a mixture can be joined? |
#
# All methods, with their papers:

# %%
catalog()[["name", "family", "summary", "year"]]

# %% [markdown]
# A blank picture somewhere? `notebook_kit.doctor()` looks at this Jupyter and says what to do.
