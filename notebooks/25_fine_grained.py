# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [DeepSeekMoE, slice_experts, expert_balance_loss, device_balance_loss, UnionOfExperts,
#       SelectiveAttention]
# ---

# %% [markdown]
# # Fine-grained experts: cut thinner, share some
#
# **The question.** You have room for so many parameters, and time to compute with so many of them for each token. Is it
# better to have a few wide experts, or many thin ones?
#
# **Two ideas.** *DeepSeekMoE* cuts every expert into `m` thin slices and lets each token use `m` times as many. It also
# sets a few aside that every token uses, for what everybody needs. *Union of experts* goes further: it cuts the layers
# of an ordinary network into experts, so that all of them together are that network.
#
# Both begin with the same fact: a feed-forward layer is the sum of its slices.

# %%
import copy
import inspect

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, explore
from notebook_kit.data import digits
from notebook_kit.diagnostics import fine_grained as numbers
from notebook_kit.figures.fine_grained import FineRun, fine_view, masking_figure, union_view
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures import (
    DeepSeekMoE,
    SelectiveAttention,
    SwiGLUExperts,
    UnionOfExperts,
    aux_loss,
    device_balance_loss,
    expert_balance_loss,
    slice_experts,
)
from notebook_kit.models import MLP
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure

# %% [markdown]
# ## A layer is the sum of its slices
#
# An activation looks at one hidden unit at a time. So the units can be dealt out to slices: rows of the first matrices,
# columns of the last. Below one wide expert and its four slices answer the same five tokens. The gap is rounding.

# %%
# NBVAL_CHECK_OUTPUT
wide, tokens = SwiGLUExperts(1, 16, 32), torch.randn(5, 16)
thin = slice_experts(wide, granularity=4)
answers = thin(tokens.repeat(4, 1), [5] * 4).reshape(4, 5, 16)
gap = (answers.sum(0) - wide(tokens, [5])).abs().max().item()
print("experts of width", thin.down.shape[2], "| parameters the same:", thin.down.numel() == wide.down.numel())
print("sum of the slices equals the expert to 1e-5:", gap < 1e-5)
assert gap < 1e-5

# %% [markdown]
# ## One budget, many ways to combine
#
# What changes is the router's choice. Sixteen experts of which two are used can be combined in 120 ways. Cut each in
# four and use eight of the 64 slices: read the last column. The number of hidden units, in all and at work, stays.

# %%
# NBVAL_CHECK_OUTPUT
table = numbers.budget(64, 16, 2, [(1, 0), (2, 0), (4, 0), (4, 1), (4, 2)])
print(table.to_string(index=False, formatters={"combinations": "{:,}".format}))
assert table["total"].nunique() == table["active"].nunique() == 1

# %% [markdown]
# The layer itself. The routed part is the mixture you know from lesson 20. The shared part is one small network,
# because the sum of several is one that is wider.

# %%
print(inspect.getsource(DeepSeekMoE.forward))

# %% [markdown]
# ## Two balance losses
#
# With experts on several machines, two things should be even: the load of the experts, and that of the machines. Four
# tokens, four experts, two machines (experts 0, 1 and 2, 3). Each token picks one. Look at the second row: the machines
# are even although half of the experts do nothing. That freedom is why the paper has the second loss.

# %%
# NBVAL_CHECK_OUTPUT
cases = {"all even": [0, 1, 2, 3], "machines even": [0, 0, 2, 2], "one expert": [0, 0, 0, 0]}
for name, picks in cases.items():
    picks = torch.tensor(picks)[:, None]
    probs = 0.9 * F.one_hot(picks[:, 0], 4) + 0.025
    expert = expert_balance_loss(probs, picks)
    device = device_balance_loss(probs, picks, device_groups=2)
    print(f"{name:>13}: expert-level {expert:.2f}, device-level {device:.2f}")

# %% [markdown]
# ## What does it buy?
#
# Eight experts of 32 hidden units, two for each digit image, at equal parameters and equal compute: uncut; cut in two;
# in four; and with one or two of the slices shared. Everything else, learning rate and balance loss included, is the
# same for all, and nothing was tuned.


# %%
class Net(nn.Module):
    def __init__(self, granularity, n_shared):
        super().__init__()
        self.read, self.norm, self.write = nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 10)
        self.moe = DeepSeekMoE(32, 32, 8, k=2, granularity=granularity, n_shared=n_shared)

    def forward(self, x):
        h = self.read(x)
        return self.write(h + self.moe(self.norm(h)))


# %%
x, y = digits("train")
x_test, y_test = digits("test")


def draw(generator):
    rows = torch.randint(len(x), (64,), generator=generator)
    return x[rows], y[rows]


def train(granularity, n_shared, seed):
    torch.manual_seed(seed)
    net = Net(granularity, n_shared)
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]) + aux_loss(net)  # noqa: E731
    fit(net, draw, loss, steps=120, lr=3e-3, seed=seed, progress=False)
    return net.eval()


# %% [markdown]
# Three layers are trained with three seeds; they carry the claims. Four more are trained once, for the picture.

# %%
claimed, shown = [(1, 0), (4, 0), (4, 2)], [(1, 1), (2, 0), (2, 1), (4, 1)]
nets = {(setting, seed): train(*setting, seed) for setting in claimed for seed in range(3)}
nets |= {(setting, 0): train(*setting, 0) for setting in shown}

# %% [markdown]
# The paper asks three questions of a trained layer; so do we. What if each token may not use its best experts? What if
# the shared ones are gone, and as many routed ones take their place? What if half as many are picked? `altered` changes
# the routing for a moment; the weights stay.


# %%
def measure(net):
    score = lambda: F.cross_entropy(net(x_test), y_test)  # noqa: E731
    half = max(net.moe.router.k // 2, 1)
    changes = [{}, {"masked": 1 / 8}, {"masked": 1 / 4}, {"masked": 1 / 2}, {"shared": False}, {"k": half}]
    names = ["as trained", "best 1/8 masked", "best 1/4 masked", "best 1/2 masked", "shared off", "half the picks"]
    return dict(zip(names, numbers.ablations(net.moe, score, changes)["score"], strict=True))


measured = {key: measure(net) for key, net in nets.items()}
names = {(1, 0): "coarse", (4, 0): "cut in 4", (4, 2): "cut in 4, 2 shared"}
rows = pd.DataFrame([{"layer": names[s], **m} for (s, _), m in measured.items() if s in names])
table = rows.groupby("layer", sort=False).mean()
table.T.round(2)

# %% [markdown]
# First row first. The paper has 1.81 nats instead of 1.87 for GShard, at two billion parameters. Does our small layer
# profit too? We ask for a fifth, because single runs differ by as much. Three seeds would not show a smaller gain. (And
# the digits are a small task: a coarse layer already solves it.)

# %%
coarse, cut, both = (table.loc[name] for name in names.values())
best = min(cut["as trained"], both["as trained"])
claim(
    "deepseekmoe",
    "At equal parameters and compute, slices with or without shared ones lower the test loss by a fifth",
    holds=best < 0.8 * coarse["as trained"],
    figure=f"{coarse['as trained']:.3f} coarse, {cut['as trained']:.3f} cut in 4, {both['as trained']:.3f} with 2 "
    "shared; 3 seeds",
)

# %% [markdown]
# ## Are the experts specialists?
#
# If experts are redundant, a token deprived of its best ones finds others that do as well. The paper masks them and
# sees DeepSeekMoE suffer *more* than a coarse layer: its experts cannot be replaced. Read from left to right.

# %%
columns = {0: "as trained", 1 / 8: "best 1/8 masked", 1 / 4: "best 1/4 masked", 1 / 2: "best 1/2 masked"}
frame = pd.DataFrame(
    {"layer": name, "masked": share, "score": table.loc[name, column]}
    for name in table.index
    for share, column in columns.items()
)
LiveFigure(masking_figure(frame, y="test loss (nats), mean of 3 seeds"))

# %% [markdown]
# With shared experts we see the opposite. The shared part alone nearly solves our task, so losing the best routed
# experts costs little. That is not what the paper saw in language, where there is more to know than two slices hold.

# %%
claim(
    "deepseekmoe",
    "Masking the best eighth of the routed experts hurts a layer with slices and shared ones more than a coarse one",
    holds=both["best 1/8 masked"] - both["as trained"] > coarse["best 1/8 masked"] - coarse["as trained"],
    figure=f"loss {both['as trained']:.2f} to {both['best 1/8 masked']:.2f}, coarse {coarse['as trained']:.2f} to "
    f"{coarse['best 1/8 masked']:.2f}; cut only {cut['as trained']:.2f} to {cut['best 1/8 masked']:.2f}; 3 seeds",
)

# %% [markdown]
# Do routed experts at least say more different things when shared ones take the common part? Take the cosine between
# what two routed experts answer, averaged over the test images; then the mean of its size over all pairs.


# %%
@torch.no_grad()
def alike(setting):
    found = []
    for seed in range(3):
        net = nets[setting, seed]
        cosine = numbers.expert_similarity(net.moe, net.norm(net.read(x_test)))
        found.append(numbers.mean_similarity(cosine.abs()))
    return sum(found) / 3


without, with_shared = alike((4, 0)), alike((4, 2))
claim(
    "deepseekmoe",
    "With two shared experts the routed ones answer less alike, by a quarter",
    holds=with_shared < 0.75 * without,
    figure=f"mean |cosine| {without:.3f} without, {with_shared:.3f} with; coarse {alike((1, 0)):.3f}; 3 seeds",
)

# %% [markdown]
# No: they hardly answered alike before. What is clear is that the shared experts are needed: in the paper the loss
# jumps from 1.81 to 2.41 when they are replaced.

# %%
assert both["shared off"] > 2 * both["as trained"]
claim(
    "deepseekmoe",
    "Routed experts cannot stand in for the shared ones: the loss at least doubles",
    holds=both["shared off"] > 2 * both["as trained"],
    figure=f"{both['as trained']:.2f} to {both['shared off']:.2f}, 3 seeds",
)

# %% [markdown]
# And thin experts waste less. Halve the picks of the trained layers: one wide expert instead of two, or three slices
# instead of six, beside the two shared.

# %%
thin_cost, coarse_cost = (row["half the picks"] / row["as trained"] for row in (both, coarse))
claim(
    "deepseekmoe",
    "Half of the routed picks raise the loss by less than a tenth, in the coarse layer by more than a quarter",
    holds=bool(thin_cost < 1.1 and coarse_cost > 1.25),
    figure=f"times {thin_cost:.2f} with slices and 2 shared, times {coarse_cost:.2f} coarse; 3 seeds",
)

# %% [markdown]
# ## Look at the routing
#
# Columns are test images sorted by digit, rows are experts, the brighter the more their answer counts. Drag `n_shared`:
# bright rows appear on top. Raise `granularity`: many dim dots instead of two bright ones. That is because the weights
# are raw probabilities and a token's eight share one. The bars say what the three changes cost.


# %%
order = y_test.sort(stable=True).indices[::6]


def stored(setting):
    net = nets[setting, 0]
    with torch.no_grad():
        net(x_test[order])
    routing, scores = net.moe.routing, measured[setting, 0]
    kept = torch.zeros(len(order), net.moe.router.n_experts).scatter(1, routing.experts, routing.weights)
    size = numbers.budget(32, 8, 2, [setting]).iloc[0]
    bars = {name: scores[name] for name in ("as trained", "best 1/8 masked", "shared off", "half the picks")}
    return FineRun(kept, bars, setting[1], int(size["picks"]), int(size["width"]), int(size["combinations"]))


runs = {setting: stored(setting) for setting in claimed + shown}
labels = [str(digit) for digit in y_test[order].tolist()]
limits = {"granularity": Choice(1, 2, 4), "n_shared": Range(0, 2), "start": Range(0, len(order) - 50)}
explore(fine_view, runs, labels, granularity=4, n_shared=2, limits=limits)

# %% [markdown]
# ## Union of experts: an ordinary network, cut
#
# Now we do not train experts at all. A small transformer reads a digit as 16 patches of 2 x 2 pixels: attention with
# four heads, then a feed-forward layer. Attention can be cut as well; its slices are the heads.


# %%
class Reader(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.read, self.place = nn.Linear(4, d), nn.Parameter(torch.randn(16, d) * 0.3)
        self.norm1, self.norm2, self.write = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 10)
        self.attention, self.mlp = nn.MultiheadAttention(d, 4, batch_first=True), MLP([d, 2 * d, d], "gelu")

    def forward(self, x):
        patches = x.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        h = self.read(patches) + self.place
        z = self.norm1(h)
        dense = isinstance(self.attention, nn.MultiheadAttention)
        h = h + (self.attention(z, z, z, need_weights=False)[0] if dense else self.attention(z))
        return self.write((h + self.mlp(self.norm2(h))).mean(1))


# %%
def teach(net, steps, lr, seed):
    batch = lambda generator: tuple(part[:32] for part in draw(generator))  # noqa: E731
    loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])  # noqa: E731
    fit(net, batch, loss, steps=steps, lr=lr, seed=seed, progress=False)
    return net.eval()


def unite(net, k, gate_mode="weight", seed=0):
    net = copy.deepcopy(net)
    torch.manual_seed(seed)  # of the gates: two modes begin with the same
    net.attention = SelectiveAttention(net.attention, k=k, gate_mode=gate_mode)
    net.mlp = UnionOfExperts(net.mlp, n_experts=4, k=k, gate_mode=gate_mode)
    return net, {"attention": net.attention, "feed-forward": net.mlp}


def read(seed):
    torch.manual_seed(seed)
    return teach(Reader(), 160, 5e-3, seed)


readers = [read(seed) for seed in range(3)]

# %% [markdown]
# Who computes what? Each patch scores the four experts and keeps `k`. An expert gathers the patches that chose it,
# computes them in one batched product, and adds the answers back at their places. Read it from top to bottom:

# %%
print(inspect.getsource(UnionOfExperts.forward))

# %% [markdown]
# With `k = 4` every expert takes every patch, and the network is the one we cut. Sewn together again it has the same
# weights.

# %%
# NBVAL_CHECK_OUTPUT
whole, _ = unite(readers[0], k=4, gate_mode="select")
with torch.no_grad():
    gap = (whole(x_test) - readers[0](x_test)).abs().max().item()
same = torch.equal(whole.mlp.to_dense().layers[0].weight, readers[0].mlp.layers[0].weight)
print("the same answers to 1e-4:", gap < 1e-4, "| sewn together, the same weights:", same)
assert gap < 1e-4

# %%
claim(
    "uoe",
    "The union of all experts, of attention and of feed-forward layers, is the dense network",
    holds=gap < 1e-4,
    figure=f"largest difference {gap:.0e}",
)

# %% [markdown]
# ## What is a part of it worth?
#
# Now fewer experts, without any training. `share` is the work compared with the dense layers. It is more than k/4: all
# experts compute as many rows as the busiest, and the gates have not learned to be fair.


# %%
def accuracy(net):
    return (net(x_test).argmax(1) == y_test).float().mean().item()


settings = [{"k": k, "capacity_factor": None} for k in (4, 3, 2, 1)]
curves = []
for reader in readers:
    united, layers = unite(reader, k=4, gate_mode="select")
    curves.append(numbers.union_curve(list(layers.values()), lambda net=united: accuracy(net), settings))
mean_curve = pd.concat(curves).groupby("k", sort=False)[["share", "score"]].mean()
mean_curve.round(2)

# %% [markdown]
# A slice of a trained layer is not an expert for anything. The gate picks by chance, and losing one slice of four
# already hurts:

# %%
claim(
    "uoe",
    "Without training, three experts of four keep the accuracy within 5 points of the dense network",
    holds=mean_curve.loc[3, "score"] > mean_curve.loc[4, "score"] - 0.05,
    figure=f"{mean_curve.loc[4, 'score']:.2f} to {mean_curve.loc[3, 'score']:.2f}, 3 networks",
)

# %% [markdown]
# ## Does the gate learn?
#
# So it must be trained. But how? The released language code uses the gate only to *select*; its long-range code
# multiplies by the *sum* of the kept weights, which is always one. Here is the gradient that reaches the gates, for
# both and for the kit's way, which multiplies each answer by its *weight*.

# %%
norms = {}
for mode in ("select", "sum", "weight"):
    united, layers = unite(readers[0], k=2, gate_mode=mode)
    loss = lambda net=united: F.cross_entropy(net(x[:200]), y[:200])  # noqa: E731
    norms[mode] = {name: numbers.gate_gradient(layer, loss) for name, layer in layers.items()}
print(pd.DataFrame(norms).T.map("{:.0e}".format))
small = max(*norms["select"].values(), *norms["sum"].values())
large = min(norms["weight"].values())
assert large > 1e-2 > 1e-5 > small

# %%
claim(
    "uoe",
    "Used as in the released code the gates get no gradient, or rounding errors; multiplied by the weight they learn",
    holds=large > 1e-2 > 1e-5 > small,
    figure=f"at most {small:.0e} against at least {large:.0e}",
)

# %% [markdown]
# Does a gate that learns make the better network? We fine-tune both for 60 steps with two experts of four, from the
# same gates and on the same batches.

# %%
tuned = {
    mode: [teach(unite(reader, 2, mode, seed)[0], 60, 2e-3, seed) for seed, reader in enumerate(readers)]
    for mode in ("select", "weight")
}
with torch.no_grad():
    losses = {m: [F.cross_entropy(n(x_test), y_test).item() for n in ns] for m, ns in tuned.items()}
    reached = {m: sum(map(accuracy, ns)) / 3 for m, ns in tuned.items()}
select, weight = (sum(losses[mode]) / 3 for mode in ("select", "weight"))
claim(
    "uoe",
    "After 60 steps of fine-tuning a gate that learns has a lower loss than one that only selects",
    holds=weight < select,
    figure=f"loss {weight:.2f} against {select:.2f}, 3 networks",
)

# %% [markdown]
# It does. Are two of four now as good as all four? To be fair, the dense network too gets the 60 steps, on the same
# batches. It stays ahead. The paper trains from scratch, for 200,000 steps; sixty are a beginning.

# %%
longer = [teach(copy.deepcopy(reader), 60, 2e-3, seed) for seed, reader in enumerate(readers)]
with torch.no_grad():
    before, dense = (sum(map(accuracy, nets)) / 3 for nets in (readers, longer))
claim(
    "uoe",
    "After 60 more steps for both, two experts of four come within 2 points of the dense network's accuracy",
    holds=max(reached.values()) > dense - 0.02,
    figure=f"{max(reached.values()):.2f} against {dense:.2f} ({before:.2f} before these steps), 3 networks",
)

# %% [markdown]
# ## See what they see
#
# The same digit, once for each expert, and only the patches it computes. Lower `capacity_factor` to 1 and below: full
# experts turn patches away, and some are served by nobody. Switch `layer` to the heads of the attention. Two experts do
# most of the work: like the paper's, these gates have no balance loss.

# %%
united = tuned["weight"][0]
layers = {"attention": united.attention, "feed-forward": united.mlp}
curve = numbers.union_curve(list(layers.values()), lambda: accuracy(united), settings)
limits = {"k": Range(1, 4), "capacity_factor": Range(0.25, 2, step=0.25), "image": Range(0, 59)}
explore(union_view, united, layers, x_test[:60], curve, k=2, image=3, limits=limits)

# %% [markdown]
# ## What to try
#
# - Give `DeepSeekMoE` `normalize=True`: the picked weights are divided by their sum. What do the dim dots do?
# - Train `Net(8, 4)`: 60 routed slices of 4 units. When does thinner stop helping, and what does the router cost then?
# - Set `balance_coef=0.1`, or use `scores="sigmoid", normalize=True, bias_rate=0.01`, as DeepSeek-V3 does. How many
#   routed experts are never used, before and after?
# - Cut a trained mixture: `DeepSeekMoE.from_moe(moe, granularity=4)` answers as before; then train it on. Or read a
#   real one: `DeepSeekMoE.from_transformers(model.model.layers[1].mlp)`.
# - Train `unite(Reader(), 2)[0]` from scratch. Is the gap to the dense network smaller than after fine-tuning?
# - Give `UnionOfExperts` `selection="both"` and `k_sample=2`: a digit chooses two experts, its patches one of them.
#
# ## Sources

# %%
for method in (DeepSeekMoE, UnionOfExperts):
    print(cite(method), end="\n\n")
