# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [DenseToSparse, temperature_schedule, spawn_experts, ReadME, keep_channels, alternate, expert_cache,
#       expert_batches]
# ---

# %% [markdown]
# # Growing a mixture out of a dense model
#
# **The question.** A mixture of experts that starts from nothing has a chicken-and-egg problem. The router cannot tell
# experts apart that know nothing, and experts that get no tokens learn nothing. But a *dense* model is easy to train.
# Can a mixture grow out of one?
#
# **Two answers.** *EvoMoE* trains one expert, makes copies of it, and lets the router begin dense: every expert sees
# every token. Then it cools down, and tokens keep fewer and fewer experts. *Read-ME* starts from a finished language
# model and takes it apart: each domain keeps the channels that it uses. Its router reads the text before the model.

# %%
import copy
import inspect

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, explore, zoo
from notebook_kit.data import byte_batches, byte_windows, digits, udhr
from notebook_kit.diagnostics import growing as numbers
from notebook_kit.figures import growing as pictures
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures import (
    MoE,
    ReadME,
    alternate,
    channel_scores,
    expert_batches,
    expert_cache,
    keep_channels,
    spawn_experts,
    train_router,
)
from notebook_kit.models import MLP
from notebook_kit.routers import DenseToSparse, TopK, aux_loss, set_step, temperature_schedule
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure

# %% [markdown]
# # EvoMoE: hot, then cold
#
# The gate divides its logits by a temperature before the softmax. Experts whose gate is above a small threshold are
# active. Watch one token with logits 2, 0, -2, -4 cool down: hot, all four experts work on it. Cold, one is left.

# %%
# NBVAL_CHECK_OUTPUT
z = torch.tensor([[2.0, 0.0, -2.0, -4.0]])
for temperature in (2.0, 1.0, 0.5, 0.25):
    routing = numbers.gate_at(z, temperature=temperature, threshold=1e-3, noise=False)
    gates = [round(g, 4) for g in routing.probs[0].tolist()]
    print(f"temperature {temperature:4}: gates {gates}, {(routing.experts >= 0).sum()} active")

# %% [markdown]
# In training, Gumbel noise is added to the logits. Then the coldest gate does not always take the best expert: it
# *draws* one, with the probabilities softmax(z). Here is the whole decision. Note that the weights are not divided by
# their sum.

# %%
print(inspect.getsource(DenseToSparse.route))

# %% [markdown]
# The temperature follows the training step. Exponential cooling takes the same *ratio* off at each step:

# %%
# NBVAL_CHECK_OUTPUT
for decay in ("exponential", "linear", "constant"):
    taus = [temperature_schedule(t, 100, temperature=2.0, final_temperature=0.3, decay=decay) for t in (0, 25, 50, 100)]
    print(f"{decay:12}", [f"{tau:.2f}" for tau in taus])

# %% [markdown]
# ## One expert becomes eight
#
# Before the gate comes the seed: one expert, trained without any router. `spawn_experts` copies it, and sets a random
# half of each copy's weights to zero, so that the copies differ. Without masks they are all the same, and a dense gate
# over them *is* the seed expert. (Their optimiser starts anew here. `inherit_moments` would hand on the seed's.)

# %%
# NBVAL_CHECK_OUTPUT
seed_expert, x = MLP([32, 8, 32]), torch.randn(100, 32)
same = MoE(spawn_experts(seed_expert, 8, mask_rate=0.0), DenseToSparse(32, 8, threshold=0.0))
masked = spawn_experts(seed_expert, 8, mask_rate=0.5)
print("eight equal copies are the seed to 1e-6:", torch.allclose(same(x), seed_expert(x), atol=1e-6))
print(f"with masks {(masked[0].layers[0].weight == 0).float().mean():.1f} of the weights are zero")
assert torch.allclose(same(x), seed_expert(x), atol=1e-6)

# %% [markdown]
# ## Three ways to train
#
# Digits, eight experts of 8 hidden units, 160 steps in all, three seeds. *Switch* is top-1 from the first step.
# *Dense to sparse* cools from 2 to 0.1 over 80 % of its steps. *EvoMoE* spends a fifth of the steps on one expert
# first. There is **no balance loss** for now: we want to see what the schedule does alone. (The paper also compares
# with BASE, hash layers and StableMoE. You meet these in lesson 21.)


# %%
class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.read, self.write, self.layer = nn.Linear(64, 32), nn.Linear(32, 10), layer

    def forward(self, x):
        h = self.read(x).relu()
        return self.write(h + self.layer(h))


STEPS, SEEDS = 160, 3
x, y = digits("train")
x_test, y_test = digits("test")


def draw(generator):
    rows = torch.randint(len(x), (64,), generator=generator)
    return x[rows], y[rows]


# %% [markdown]
# `run` trains a network and remembers the mean number of active experts at each step. Every tenth step it also keeps
# the router's logits on 200 test images: the recorded trace that the pictures below are drawn from.


# %%
def run(net, steps, seed, snapshots=None):
    used = []

    def loss(net, batch):
        if isinstance(net.layer, MoE) and isinstance(net.layer.router, DenseToSparse):
            set_step(net, len(used))
        error = F.cross_entropy(net(batch[0]), batch[1])
        if not isinstance(net.layer, MoE):
            used.append(1.0)
            return error
        used.append((net.layer.routing.experts >= 0).sum(1).float().mean().item())
        if snapshots is not None and len(used) % 10 == 1:
            snapshots.append(net.layer.router.logits(net.read(x_test[:200]).relu()).detach())
        return error + aux_loss(net)

    fit(net, draw, loss, steps=steps, lr=5e-3, seed=seed, progress=False)
    return used


# %%
def experts():
    return [MLP([32, 8, 32]) for _ in range(8)]


def gate(steps, seed, balance):
    cooling = {"temperature": 2.0, "final_temperature": 0.1, "steps": int(0.8 * steps)}
    return DenseToSparse(32, 8, balance_coef=balance, seed=seed, **cooling)


def train(scheme, seed, balance=0.0, snapshots=None):
    torch.manual_seed(seed)
    if scheme == "Switch":
        net = Net(MoE(experts(), TopK(32, 8, k=1, convention="switch", balance_coef=balance)))
        return net, run(net, STEPS, seed)
    if scheme == "dense to sparse":
        net = Net(MoE(experts(), gate(STEPS, seed, balance)))
        return net, run(net, STEPS, seed, snapshots)
    net, first = Net(MLP([32, 8, 32])), STEPS // 5
    used = run(net, first, seed)
    net.layer = MoE(spawn_experts(net.layer, 8, seed=seed), gate(STEPS - first, seed, balance))
    return net, used + run(net, STEPS - first, seed + 100)


# %% [markdown]
# An expert is *unused* if no test image goes to it. All three schemes are asked the same way: the most probable expert
# alone.


# %%
@torch.no_grad()
def measure(net):
    right = net.eval()(x_test).argmax(1) == y_test
    return {"accuracy": right.float().mean().item(), "unused": int((net.layer.routing.load == 0).sum())}


SCHEMES = ("Switch", "dense to sparse", "EvoMoE")
snapshots = []
runs = {s: [train(s, i, snapshots=snapshots if i == 0 else None) for i in range(SEEDS)] for s in SCHEMES}
table = pd.concat({s: pd.DataFrame([measure(net) for net, _ in nets]) for s, nets in runs.items()})
table.groupby(level=0, sort=False).mean().round(3)

# %% [markdown]
# Left: the number of experts through training. EvoMoE has one while the seed is trained, then all eight, then few.
# Right: how many experts are unused in the end, a dot for each seed.

# %%
unused = {scheme: table.loc[scheme, "unused"].tolist() for scheme in SCHEMES}
courses = {scheme: torch.tensor([used for _, used in nets]).mean(0).tolist() for scheme, nets in runs.items()}
LiveFigure(pictures.growth_figure(courses, unused, 8))

# %%
course = courses["dense to sparse"]
assert course[0] > 7
claim(
    "evomoe",
    "Cooling takes the gate from all eight experts a token to fewer than two",
    holds=course[0] > 7.5 and course[-1] < 2,
    figure=f"{course[0]:.1f} at the first step, {course[-1]:.1f} at the last, {SEEDS} seeds",
)

# %%
lost = {scheme: sum(counts) / SEEDS for scheme, counts in unused.items()}
assert lost["dense to sparse"] < lost["Switch"]
claim(
    "evomoe",
    "Without a balance loss, dense-to-sparse leaves fewer experts unused than Switch",
    holds=lost["dense to sparse"] < lost["Switch"],
    figure=f"{lost['dense to sparse']:.1f} against {lost['Switch']:.1f} of 8, mean of {SEEDS} seeds",
)

# %% [markdown]
# And the first phase, the seed expert? Its copies start alike, and the gate has less time to tell them apart. If the
# phase helped as the gate did, a network would keep two experts more in use. It does not. (Runs differ so much that
# three seeds could not show a smaller gain. In 30 runs EvoMoE had 4.6 unused experts, the gate alone 3.6.)

# %%
claim(
    "evomoe",
    "Without a balance loss, the seed expert and its copies leave two experts fewer unused than the gate alone",
    holds=lost["EvoMoE"] <= lost["dense to sparse"] - 2,
    figure=f"{lost['EvoMoE']:.1f} against {lost['dense to sparse']:.1f} of 8, mean of {SEEDS} seeds",
)

# %% [markdown]
# The usual medicine for unused experts is a balance loss. With a coefficient of 0.1, is there anything left to cure?
# (Two seeds each.)

# %%
medicine = {s: [measure(train(s, i, balance=0.1)[0])["unused"] for i in range(2)] for s in SCHEMES[:2]}
claim(
    "evomoe",
    "With a balance loss of 0.1 too, dense-to-sparse leaves at least one expert fewer unused than Switch",
    holds=sum(medicine["dense to sparse"]) <= sum(medicine["Switch"]) - 2,
    figure=f"{sum(medicine['dense to sparse']) / 2} against {sum(medicine['Switch']) / 2} of 8, mean of 2 seeds",
)

# %% [markdown]
# The paper's headline is a better model for the same compute. On digits, nobody wins by a point and a half:

# %%
accuracy = table["accuracy"].groupby(level=0).mean()
claim(
    "evomoe",
    "EvoMoE is 1.5 points more accurate than Switch after equally many steps",
    holds=accuracy["EvoMoE"] > accuracy["Switch"] + 0.015,
    figure=f"{accuracy['EvoMoE']:.3f} against {accuracy['Switch']:.3f}, {SEEDS} seeds",
)

# %% [markdown]
# ## Turn the knobs yourself
#
# The recorded logits, with the noise drawn once. Each column is an image; colour is the size of an active gate, an
# expert that is not active is blank. Below: how many experts an image has. Drag
# `temperature` down and watch the picture thin out. Then go back to 1, and drag `threshold` up instead. `moment` moves
# through the training: an untrained router (0) is flat, so only noise and cold make it sparse.

# %%
trace, moments = torch.stack(snapshots), list(range(0, STEPS, 10))
explore(pictures.gate_view, trace, moments, moment=15, limits={"moment": Range(0, len(moments) - 1)})

# %% [markdown]
# The same logits along a whole schedule. Grey: the run as it was. Blue: what *your* schedule would make of the same
# logits. (A real run would also have trained differently.) Which reaches two experts first, linear or exponential?

# %%
used = runs["dense to sparse"][0][1]
explore(pictures.schedule_view, trace, moments, used, duration=128, limits={"duration": Range(10, 320)})

# %% [markdown]
# # Read-ME: taking a language model apart
#
# Now the dense model is finished: a byte-level Llama of three layers that learned twelve languages. We call six of them
# *domains*. In each layer's MLP there are 256 hidden channels. How strongly does each fire on each domain?

# %%
bed = zoo.language_experts()
names = bed.names
domains = {name: byte_windows(udhr(name, "train"), 128)[:12] for name in names}
held_out = {name: windows[:6] for name, windows in bed.batches("test").items()}
scores = channel_scores(bed.model, domains)
print("layers, domains, channels:", tuple(scores.shape))

# %% [markdown]
# Each domain keeps its strongest channels. What everybody keeps is the *residual*, computed once for every token: the
# bright band on the left. Drag `density`, the share that is kept. Below: how much of all activation those channels
# hold. Half of the channels hold about three quarters. That is less sparse than a large model, yet enough to cut.

# %%
explore(pictures.channel_view, scores, names, density=0.5, limits={"layer": Range(0, len(scores) - 1)})

# %% [markdown]
# How good is the model if each domain has only its own channels? Random channels are the control.


# %%
def quality(model):
    return sum(bed.measure(model.eval(), None, held_out).values()) / len(held_out)


dense = quality(bed.model)
curve = numbers.density_curve(bed.model, scores, held_out, (0.1, 0.25, 0.5, 0.75, 1.0))
curve.round(3)

# %%
half = curve.set_index("density").loc[0.5]
assert half["random"] < half["domain"] < dense
claim(
    "read-me",
    "With half of the channels, the domain's own lose less than a third of what random ones lose",
    holds=dense - half["domain"] < (dense - half["random"]) / 3,
    figure=f"{dense - half['domain']:.3f} against {dense - half['random']:.3f} nats per byte below the dense model",
)

# %% [markdown]
# ## The mixture, in two forms
#
# `ReadME` copies the model and puts masks behind its channels. `cut()` makes real small matrices of them: a residual
# and six experts. Both give the same logits, for any choice of experts. With `density=1` it would be the dense model.

# %%
# NBVAL_CHECK_OUTPUT
kept = keep_channels(scores, density=0.5)
torch.manual_seed(0)
readme = ReadME(bed.model, kept).eval()
text = held_out["fin"][:2]
with torch.no_grad():
    same = torch.allclose(readme(text).logits, readme.cut()(text).logits, atol=1e-4)
print("masked and cut agree to 1e-4:", same)
print(numbers.mask_table(kept).round(2).to_string())
assert same

# %% [markdown]
# The router is a small transformer of its own. It reads the *token ids*, and never looks at the model's hidden states.
# So a server can ask it before the model runs; it even works with the model deleted. One choice serves all layers.

# %%
print(inspect.getsource(type(readme.router).forward))

# %% [markdown]
# ## Training in turns
#
# First the router. In each layer the dense model shows which expert holds the channels that a token fires most; the
# router learns to foretell that from the text. For comparison we train *layer-wise* routers on the same targets: a
# linear gate in each layer, which may look at the hidden states and choose anew.

# %%
windows = byte_batches({name: udhr(name, "train") for name in names}, batch_size=8, length=64)


def batches(generator):
    return windows(generator)[0]


layerwise = ReadME(bed.model, kept, router="layer-wise")
marks = {"untrained router": (0.5, quality(readme))}
texts = torch.stack([ids[0] for ids in held_out.values()])
before = readme.choose(texts)
train_router(readme, batches, steps=30, lr=3e-3)
train_router(layerwise, batches, steps=30, lr=1e-2)
marks |= {"trained router": (0.5, quality(readme)), "layer-wise routers": (0.5, quality(layerwise))}

# %% [markdown]
# Then backbone and router in turns, two rounds. The backbone learns the text with each token behind its expert's mask.
# The control: the dense model, trained for as many steps on the same text. If that alone made models better here, the
# mixture's gain would prove nothing.

# %%
from notebook_kit.mixtures.read_me_training import next_token_loss

history = alternate(readme, batches, rounds=2, router_steps=15, backbone_steps=20, router_lr=3e-3)
marks["after two rounds"] = (0.5, quality(readme))
control = copy.deepcopy(bed.model)
fit(control, batches, next_token_loss, steps=40, lr=1e-3, weight_decay=0.01, progress=False)
print(f"dense {dense:.3f}, after 40 more steps {quality(control):.3f}, the mixture {marks['after two rounds'][1]:.3f}")
LiveFigure(pictures.density_figure(curve, dense, marks))

# %%
value = {name: quality for name, (_, quality) in marks.items()}
won = (value["after two rounds"] - value["untrained router"]) / (dense - value["untrained router"])
claim(
    "read-me",
    "Training router and backbone in turns wins back a third of what the untrained mixture lost",
    holds=won > 1 / 3,
    figure=f"{won:.0%}: {value['untrained router']:.3f} to {value['after two rounds']:.3f} nats per byte",
)

# %% [markdown]
# The paper's mixture keeps up with dense models. It had a billion tokens to adapt; ours had 100 steps.

# %%
claim(
    "read-me",
    "The trained mixture is within 0.02 nats per byte of the dense model, with half of its MLP",
    holds=value["after two rounds"] > dense - 0.02,
    figure=f"{value['after two rounds']:.3f} against {dense:.3f}",
)

# %% [markdown]
# ## Is one choice for all layers enough?
#
# The paper's argument: neighbouring layers choose alike anyway, so choosing again in each layer is redundant. Look at
# the agreement, and at what chance would give.

# %%
with torch.no_grad():
    layerwise(torch.cat(list(held_out.values())))
agreement = numbers.agreement_table(layerwise.choices, len(names))
agreement.round(3)

# %%
assert (agreement["agreement"] > 2 * agreement["chance"]).all()
claim(
    "read-me",
    "Layer-wise routers of neighbouring layers agree more than twice as often as chance",
    holds=bool((agreement["agreement"] > 2 * agreement["chance"]).all()),
    figure=", ".join(
        f"{a:.0%} (chance {c:.0%})" for a, c in zip(agreement["agreement"], agreement["chance"], strict=True)
    ),
)

# %% [markdown]
# Redundant, then? Alike is not equal. Compare both kinds of router after 30 steps each, before the backbone adapts:

# %%
claim(
    "read-me",
    "One choice for all layers costs less than 0.02 nats per byte against layer-wise routers",
    holds=value["trained router"] > value["layer-wise routers"] - 0.02,
    figure=f"{value['trained router']:.3f} against {value['layer-wise routers']:.3f}",
)

# %% [markdown]
# What did the router learn? One text of each language, every byte in the colour of its expert. An expert bears the name
# of the domain that its channels come from. Switch `trained` off to see the router as it began.

# %%
choices = readme.choose(texts)
explore(pictures.strip_view, before, choices, names)

# %% [markdown]
# And it writes. The router reads each new prefix, then the model runs with the experts it chose. (A model of this size,
# taking the likeliest byte each time, soon repeats itself. The dense one does too.)

# %%
start = torch.tensor([list(b"Jeder hat das Recht auf")])
print(bytes(readme.cut().generate(start, max_new_tokens=40)[0].tolist()).decode("utf-8", "replace"))

# %% [markdown]
# ## Serving: knowing what comes
#
# A server may have room for a few experts only. Six requests take turns, one for each language. If an expert is not
# there, it must be loaded, and another one leaves. *LRU* drops the one not used for longest. *Belady* drops the one
# whose next use is farthest away: for that one must know the future, and a router that reads only text does.

# %%
# NBVAL_CHECK_OUTPUT
letters = ["ABCD".index(letter) for letter in "ABCABDABCABD"]
for policy in ("lru", "belady"):
    cache = expert_cache(letters, capacity=2, policy=policy)
    print(f"{policy:7} on ABCABDABCABD, room for two: {cache.hits.sum()} hits, {cache.loads} loads")

# %% [markdown]
# The requests of our six texts, token by token in turn. Light: in the cache. Drag `capacity`, switch `policy`, and drag
# `lookahead` of belady: how many tokens must one know ahead?

# %%
sequence = choices.T.flatten()
explore(pictures.cache_view, sequence, len(names), start=120, limits={"capacity": Range(1, 6), "start": Range(0, 700)})

# %%
hits = numbers.cache_table(sequence, range(1, 7))
hits.round(3)

# %%
gain = hits["belady"] - hits["lru"]
assert (gain > -1e-9).all()
claim(
    "read-me",
    "Knowing 16 tokens ahead reaches nine tenths of what full knowledge gains over LRU, with room for three",
    holds=hits.loc[3, "belady, 16 ahead"] - hits.loc[3, "lru"] > 0.9 * gain[3],
    figure=f"hit rates: LRU {hits.loc[3, 'lru']:.3f}, 16 ahead {hits.loc[3, 'belady, 16 ahead']:.3f}, "
    f"all {hits.loc[3, 'belady']:.3f}",
)

# %% [markdown]
# The second use of foresight: put requests that need the same expert into one batch. 36 requests; `loads` is the number
# of experts to bring in for each token. Fewer loads, but look at `longest_wait`: a request whose expert nobody else
# wants is left standing. (Our scheduler takes the expert with the longest queue. A fair one would have to give way.)
# First the rule on four requests of two tokens each:

# %%
# NBVAL_CHECK_OUTPUT
small = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])
for policy in ("arrival", "expert"):
    run_ = expert_batches(small, batch_size=2, policy=policy)
    print(f"{policy:8} {run_.batches}: {run_.loads} loads")

# %% [markdown]
# Now the 36 texts:

# %%
requests = readme.choose(torch.cat(list(held_out.values())))[:, :64]
served = numbers.batch_table(requests, (4, 8, 16))
served.round(2)

# %%
loads, wait = served["loads"].unstack(), served["longest_wait"]
claim(
    "read-me",
    "Batches by expert save a third of the expert loads at batch size 8",
    holds=loads.loc[8, "expert"] < loads.loc[8, "arrival"] * 2 / 3,
    figure=f"{loads.loc[8, 'expert']:.2f} against {loads.loc[8, 'arrival']:.2f} loads a token; "
    f"longest wait {wait[8, 'expert']} against {wait[8, 'arrival']} batches",
)

# %% [markdown]
# ## What to try
#
# - Train EvoMoE with `mask_rate=0`. Do equal copies become different experts? What could make them?
# - Set `switch_to_hard=0`: hard from the first step. This is what the authors' code does if you leave its option alone.
# - Use a learning rate of 0.01 in `run`. Switch then loses hardly any expert. Why might that be?
# - Make the masks from other domains: first and second halves of the texts. Do they still beat random masks?
# - Give `expert_batches` requests of one language only. What does grouping gain then?
#
# ## Sources

# %%
for method in (DenseToSparse, ReadME):
    print(cite(method), end="\n\n")
