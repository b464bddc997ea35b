# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [ModelSurgery, refine_retrieval]
# ---

# %% [markdown]
# # Classes that arrive in steps: merge the adapters, then ask the right one
#
# **The question.** Digits arrive two classes at a time: first zeros and ones, then twos and threes. When a new pair
# comes, the old pictures are gone. A network that simply trains on learns the new pair and forgets the others. How can
# it know all ten at the end?
#
# **The idea (MOS, model surgery).** Keep the network frozen and train one small adapter per task. Do two things about
# forgetting. *While training*, pull each new adapter towards the mean of its predecessors after every step: that is a
# merge, done a little at a time. *When answering*, choose an adapter for each picture, and let the model check its own
# choice: the class it sees names a task, the task names an adapter, and that adapter may see another class.

# %%
import inspect

import pandas as pd
import torch
from torch.nn import functional as F

from notebook_kit import cite, claim, explore
from notebook_kit import expert_merging as em
from notebook_kit.data import class_increments, digits
from notebook_kit.diagnostics import incremental as report
from notebook_kit.expert_merging import ModelSurgery, insert_mlp_adapters, refine_retrieval
from notebook_kit.figures.incremental import incremental_figure, retrieval_figure, stream_figure
from notebook_kit.hyperparameters import Range
from notebook_kit.models import tiny_vit
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# ## A backbone that knows pictures, and no classes
#
# The paper starts from a vision transformer pretrained on ImageNet. Ours is a vision transformer of `transformers` with
# two layers, and we pretrain it here without any label: a few patches are erased, and from its class token it must
# give back the whole picture. Afterwards it stays frozen.

# %%
pixels, _ = digits("train")
vit = tiny_vit(image_size=8, num_labels=64, initializer_range=0.05)


def erased(generator):
    whole = pixels[torch.randint(len(pixels), (64,), generator=generator)]
    kept = (torch.rand(64, 1, 4, 4, generator=generator) > 0.2).float()
    return whole.reshape(-1, 1, 8, 8) * F.interpolate(kept, 8), whole


def loss(model, batch):
    return F.mse_loss(model(batch[0]).logits, batch[1])


fit(vit, erased, loss, steps=500, lr=3e-3, weight_decay=0.01, schedule=lambda done: 1 - done, progress=False)
backbone = vit.vit.state_dict()

# %% [markdown]
# Each learner gets a backbone of its own with fresh adapters. A MOS adapter is a narrow network beside the MLP of
# every block. It starts at zero, so that nothing changes at first. The paper multiplies it by 0.1; our adapters have
# few steps to learn in, so we use 1.


# %%
def learner(seed=0, **settings):
    model = tiny_vit(image_size=8).vit
    model.load_state_dict(backbone)
    insert_mlp_adapters(model, scale=1.0, seed=seed)
    return ModelSurgery(model, seed=seed, **{"epochs": 6, "lr": 0.05, "alignment_epochs": 10} | settings)


print(inspect.getsource(em.MLPAdapter.forward))

# %% [markdown]
# ## Merging while training
#
# After each step of the optimiser, adapter $A_t$ moves a share $m$ of the way to the mean of the adapters before it.
# With $m = 0$ tasks only start from one another; with $m = 1$ nothing new can be learnt. By hand: $A_t = 3$, earlier
# adapters 0 and 1, $m = 0.1$.

# %%
# NBVAL_CHECK_OUTPUT
print(inspect.getsource(em.merge_with_earlier))
print(em.merge_with_earlier({"w": torch.tensor(3.0)}, {"w": torch.tensor([0.0, 1.0]).mean()}, 0.1))

# %% [markdown]
# What is left of a task when its pictures are gone? A copy of its adapter, one prototype per class (the mean feature
# under the *first* adapter), and a Gaussian per class. The linear head trains on draws of these Gaussians, so that old
# and new classes meet in it although no picture was kept. Here is one task from start to end:

# %%
print(inspect.getsource(ModelSurgery.learn).split('"""')[2])

# %% [markdown]
# ## Five tasks
#
# We let one learner go through the stream with four merge strengths, and write down all its logits on test pictures
# after each task. Two more learners set the scale: one that has a single adapter, trained on and on with no merging
# and no Gaussians, and one that sees all classes at once, which no stream allows.

# %%
train, test = class_increments("train"), class_increments("test")
learners = {m: learner(adapter_momentum=m) for m in (0.0, 0.02, 0.1, 0.5)}
records = {m: report.record_stream(surgery, train, test) for m, surgery in learners.items()}
naive = report.record_stream(learner(adapter_momentum=0.0, alignment_epochs=0), train, test)
joint = report.record_stream(learner(), class_increments("train", n_tasks=1), test)
ceiling = report.accuracy_curve(joint)[-1]
print(f"all classes at once: {ceiling:.2f}")

# %% [markdown]
# Accuracy is over all classes seen so far, so every line falls: two classes are easier than ten. Look at how *much*
# each falls.

# %%
curves = {
    "MOS": report.accuracy_curve(records[0.1]),
    "adapters kept apart (m = 0)": report.accuracy_curve(records[0.0]),
    "prototypes only": report.accuracy_curve(records[0.1], use="prototypes"),
    "one adapter, trained on": report.accuracy_curve(naive, use="last adapter"),
    "all classes at once": [ceiling] * 5,
}
LiveFigure(stream_figure(curves, title="Digits, two classes at a time"))

# %% [markdown]
# *Forgetting* says it in one number: how far a task's accuracy fell, from its best to the end of the stream, on the
# mean of the tasks. A part of it is no forgetting but the harder question: two classes at first, ten at the end.

# %%
matrices = {
    "MOS": report.accuracy_matrix(records[0.1]),
    "adapters kept apart (m = 0)": report.accuracy_matrix(records[0.0]),
    "one adapter, trained on": report.accuracy_matrix(naive, use="last adapter"),
}
pd.Series({name: report.forgetting(matrix) for name, matrix in matrices.items()}, name="forgetting").round(2).to_frame()

# %% [markdown]
# ## Drag it
#
# Left, the accuracy along the stream with the settings you choose; right, a matrix at the place of the ring. Try
# `use = last adapter` and move `adapter momentum` from 0 to 0.1: that is what merging does. Then set `show` to `tasks`,
# and watch which columns fade. `right adapter` is what a perfect choice would give.

# %%
references = {"one adapter": curves["one adapter, trained on"], "all at once": curves["all classes at once"]}
explorer = explore(
    report.incremental_view,
    records,
    references,
    draw=incremental_figure,
    limits={"tasks_seen": Range(1, 5), "rounds": Range(1, 6)},
)
explorer

# %% [markdown]
# ## Choosing an adapter, and choosing again
#
# The prototypes' guess names the first adapter. The head, looking through that adapter, names a class, which names an
# adapter: if it is another one, ask again. No training, no label. The loop in full:

# %%
print(inspect.getsource(refine_retrieval).split('"""')[2].split('(refine_retrieval)")\n')[-1])

# %% [markdown]
# A case by hand, with two tasks of one class each. The prototypes say class 1 (adapter 1). Adapter 1 says class 0. So
# adapter 0 is asked, and it agrees with itself: settled after two rounds.

# %%
# NBVAL_CHECK_OUTPUT
adapted = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]])  # [adapters, pictures, classes]
found = refine_retrieval(adapted, torch.tensor([[0.1, 0.2]]), torch.tensor([0, 1]))
print("path:", found.path[0].tolist(), "| rounds:", found.used.tolist(), "| class:", found.column.tolist())

# %% [markdown]
# On the stream: which adapter answers the pictures of each task? Left the prototypes' choice, right after refinement.
# A perfect choice would fill the diagonal.

# %%
asked = [report.retrieval_matrix(records[0.1], rounds=rounds) for rounds in (1, 4)]
LiveFigure(retrieval_figure(*asked, title="Share of each task's pictures that ask each adapter"))

# %% [markdown]
# Some pictures that changed their adapter on the way. `task` is the right one, `path` what the model named.

# %%
paths = report.paths_frame(records[0.1])
paths[paths["path"].str.contains("→")].head(8)

# %% [markdown]
# ## The claims, on three streams
#
# One stream may be luck. So we repeat with two other orders of the classes, other adapters, other batches.

# %%
streams = {0: (records[0.1], records[0.0])}
for seed in (1, 2):
    parts = (class_increments(split, seed=seed) for split in ("train", "test"))
    both = list(parts)
    streams[seed] = tuple(report.record_stream(learner(seed, adapter_momentum=m), *both) for m in (0.1, 0.0))


def last(record, **how):
    return report.accuracy_curve(record, **how)[-1]


# %%
rows = {}
for seed, (merged, apart) in streams.items():
    rows[seed] = {
        "MOS": last(merged),
        "not merged": last(apart),
        "not refined": last(merged, rounds=1),
        "no ensemble": last(merged, ensemble=False),
        "prototypes": last(merged, use="prototypes"),
        "last adapter": last(merged, use="last adapter"),
        "last, not merged": last(apart, use="last adapter"),
        "right adapter": last(merged, use="right adapter"),
        "right, not merged": last(apart, use="right adapter"),
    }
table = pd.DataFrame(rows)
table["mean"] = table.mean(axis=1)
table.round(3)

# %% [markdown]
# **Merging stops the forgetting.** Compare `last adapter` with `last, not merged`: one adapter for all pictures, and
# the whole difference is the pull towards its predecessors.

# %%
kept = table.loc["last adapter"] - table.loc["last, not merged"]
assert kept.min() > 0.15
claim(
    "mos-model-surgery",
    "Merging each adapter with its predecessors keeps the last one from forgetting, by fifteen points or more",
    holds=bool(kept.min() > 0.15),
    figure=f"{100 * kept.min():.0f} to {100 * kept.max():.0f} points of accuracy, 3 streams",
)

# %% [markdown]
# **And the whole method loses nothing by it**; here it even gains a little, though less: retrieval already repairs most
# of what adapters that were kept apart get wrong. It is also a little better than prototypes alone, for which nothing
# trains after the first task. Both gains are a point or two over three streams, too thin to promise.

# %%
gain = table.loc["MOS", "mean"] - table.loc["not merged", "mean"]
assert gain > -0.01
claim(
    "mos-model-surgery",
    "With retrieval, merged adapters do as well as adapters kept apart, or better, to within a point",
    holds=bool(gain > -0.01),
    figure=f"accuracy {table.loc['MOS', 'mean']:.3f} against {table.loc['not merged', 'mean']:.3f}, mean of 3 streams",
)

# %%
over = table.loc["MOS"] - table.loc["prototypes"]
claim(
    "mos-model-surgery",
    "Adapters with retrieval do as well as prototypes alone, or better, to within a point",
    holds=bool(over["mean"] > -0.01),
    figure=f"{100 * over.min():+.1f} to {100 * over.max():+.1f} points, mean {100 * over['mean']:+.1f}",
)

# %% [markdown]
# **Refinement** is the paper's other half. It does move pictures to other adapters, as the matrices show. But here it
# gains nothing.

# %%
refined = table.loc["MOS"] - table.loc["not refined"]
claim(
    "mos-model-surgery",
    "Self-refined retrieval gains a point or more over the prototypes' choice of adapter",
    holds=bool(refined["mean"] > 0.01),
    figure=f"{100 * refined.min():+.1f} to {100 * refined.max():+.1f} points, mean {100 * refined['mean']:+.1f}",
)

# %% [markdown]
# Why not? Look at the last rows of the table. Told the right adapter, the learner whose adapters were kept apart would
# be far better: its adapters are specialists. Merged adapters are nearly one adapter, so it matters little which
# answers. Merging buys stability with plasticity, and a choice among look-alikes cannot gain much. How far are the
# adapters from each other? The norm of the difference to the first one, by merge strength:


# %%
for m, surgery in learners.items():
    vectors = torch.stack([torch.cat([t.flatten() for t in adapter.values()]) for adapter in surgery.adapters])
    print(f"m = {m:<4}  adapters are {(vectors[1:] - vectors[0]).norm(dim=1).mean():.2f} away from the first")

# %% [markdown]
# At $m = 0.5$ the later adapters are the first one over again: nothing is forgotten because nothing is learnt. At 0.1
# they are near enough that one may ask what retrieval is for: the last merged adapter, used for every picture, does
# as well here as the whole method. And all classes at once stay five points and more ahead of any of them.

# %%
assert abs(table.loc["last adapter", "mean"] - table.loc["MOS", "mean"]) < 0.02
table.loc[["last adapter", "MOS"], "mean"].round(2)

# %% [markdown]
# ## Keep it, and go on
#
# All that was learnt is a file of small tensors, without the backbone and without any picture. A learner that loads it
# answers the same, and can learn the next task.

# %%
# NBVAL_CHECK_OUTPUT
import tempfile
from pathlib import Path

first, second = learner(), learner(seed=5)
first.learn(*train[0])
with tempfile.TemporaryDirectory() as folder:
    second.load(first.save(Path(folder) / "stream.safetensors"))
images = test[0][0]
print("same answers:", torch.equal(first.predict(images), second.predict(images)), "| knows", second.classes)

# %% [markdown]
# ## What to try
#
# 1. In the widget, `use = right adapter`: at which merge strength are the specialists best? Why is MOS not best there?
# 2. `class_increments("train", n_tasks=10)`: one class at a time. What can the cross-entropy
#    inside a task still teach?
# 3. `ModelSurgery(model, statistics="variance")` keeps less of each class. What does it cost?
# 4. Another adapter: `notebook_kit.adapters.attach(model, LoRA, targets=r"mlp\.fc1$")` in place of
#    `insert_mlp_adapters`. `ModelSurgery` takes whatever is trainable for the adapter.
# 5. Your own: `ViTModel.from_pretrained(...)`, `insert_mlp_adapters(model)`, the paper's settings (`scale=0.1`,
#    `epochs=20`), and one `learn(images, labels)` a task.
#
# ## Sources

# %%
print(cite(ModelSurgery))
