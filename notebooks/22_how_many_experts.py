# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [TopP, NullExperts]
# ---

# %% [markdown]
# # How many experts does this token need?
#
# **The question.** A top-2 router spends the same on every token: on a full stop, and on the word a sentence hangs on.
# Could the router itself say how much a token needs?
#
# **Two answers.** *Top-p* asks experts, the most probable first, until they hold a share `p` of the router's
# probability. A sure router is done after one, an unsure one asks many. *Null experts* are extra experts that compute
# nothing. Every token still makes `k` picks; the picks that fall on nulls are free.
#
# (A third answer you know from lesson 20: with expert choice the experts pick, so a token may get none or many.)

# %%
import inspect

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, explore, zoo
from notebook_kit.data import digits
from notebook_kit.diagnostics import dynamic_routing as numbers
from notebook_kit.figures.dynamic_routing import compute_view, cut_view, null_view
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures import MoE, aux_loss
from notebook_kit.models import MLP
from notebook_kit.routers import NullExperts, TopK, TopP, install, record_routing, reroute
from notebook_kit.routers.top_p import nucleus
from notebook_kit.training import fit

# %% [markdown]
# ## Top-p on one token
#
# Four experts with probabilities .5, .3, .15, .05. Watch how the set grows with the threshold. The weights are the
# plain probabilities, so they sum to a bit more than the threshold, and not to 1.

# %%
# NBVAL_CHECK_OUTPUT
z = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
for threshold in (0.3, 0.5, 0.6, 0.9, 0.99):
    routing = TopP(1, 4, threshold=threshold).route(z)
    print(f"p = {threshold:4}: experts {routing.experts[0].tolist()}, weights sum to {routing.weights.sum():.2f}")

# %% [markdown]
# The rule in code. An expert is kept if the mass *before* it has not reached the threshold, so the first is always
# kept. The rest of the function saves time: most tokens need few experts, so only the few others are sorted whole.

# %%
print(inspect.getsource(nucleus))

# %% [markdown]
# There is a catch. A router that is flat over all experts asks nearly all of them, and nothing in the task stops it.
# So top-p has two losses: one for an even load, as Switch has, and the router's mean entropy, which asks it to make up
# its mind.
#
# ## Training it
#
# A digit classifier, eight experts of 8 hidden units, 240 steps, three seeds. We record the mean number of experts at
# every step. Read `train` once; all results below come from it.


# %%
class Net(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.read, self.write = nn.Linear(64, 32), nn.Linear(32, 10)
        self.moe = MoE([MLP([32, 8, 32]) for _ in range(router.n_experts)], router)

    def forward(self, x):
        h = self.read(x).relu()
        return self.write(h + self.moe(h))


# %%
x, y = digits("train")
x_test, y_test = digits("test")


def draw(generator):
    rows = torch.randint(len(x), (64,), generator=generator)
    return x[rows], y[rows]


# %%
def train(make, seed):
    torch.manual_seed(seed)
    net, used = Net(make()), []

    def loss(net, batch):
        error = F.cross_entropy(net(batch[0]), batch[1]) + aux_loss(net)
        used.append(numbers.experts_per_token(net.moe.routing).float().mean().item())
        return error

    fit(net, draw, loss, steps=240, lr=1e-2, seed=seed, progress=False)
    return net.eval(), used


# %% [markdown]
# On the test images we ask three things: the accuracy, the number of experts, and who gets them. *Hard* is the quarter
# of the images on which the network's own answer is least confident. *Noisy* is the same images with Gaussian noise
# (standard deviation 0.4), which makes all of them harder.


# %%
@torch.no_grad()
def measure(net):
    answer = net(x_test).softmax(1)
    counts = numbers.experts_per_token(net.moe.routing).float()
    hard = answer.amax(1) <= answer.amax(1).quantile(0.25)
    row = {"accuracy": (answer.argmax(1) == y_test).float().mean(), "experts": counts.mean()}
    row |= {"hard": counts[hard].mean(), "rest": counts[~hard].mean()}
    noisy = net(x_test + 0.4 * torch.randn(x_test.shape, generator=torch.Generator().manual_seed(0)))
    row["noisy accuracy"] = (noisy.argmax(1) == y_test).float().mean()
    row["noisy"] = numbers.experts_per_token(net.moe.routing).float().mean()
    return {name: float(value) for name, value in row.items()}


# %%
routers = {
    "top-2": lambda: TopK(32, 8),
    "top-p": lambda: TopP(32, 8, threshold=0.8, entropy_coef=0.03),
    "top-p, no entropy loss": lambda: TopP(32, 8, threshold=0.8, entropy_coef=0.0),
    "null experts": lambda: NullExperts(32, 8, n_null=16, k=4, balance_coef=0.1),
}
runs = {name: [train(make, seed) for seed in range(3)] for name, make in routers.items()}
measured = pd.concat({name: pd.DataFrame([measure(net) for net, _ in nets]) for name, nets in runs.items()})
table = measured.groupby(level=0, sort=False).mean()
table.round(2)

# %% [markdown]
# First: how does the number of experts change while top-p trains? The paper's model fell below two experts a token.
# Ours begins with seven of eight, because an untrained router is flat.

# %%
course = torch.tensor([used for _, used in runs["top-p"]]).mean(0)
print("experts a token at steps 1, 60, 120, 240:", [round(course[i].item(), 1) for i in (0, 59, 119, 239)])
assert course[0] > 6
claim(
    "dynamic-moe",
    "Training takes the mean number of experts from above six of eight to below three",
    holds=bool(course[0] > 6 and course[-20:].mean() < 3),
    figure=f"{course[0]:.1f} to {course[-20:].mean():.1f} (last 20 steps), 3 seeds",
)

# %% [markdown]
# Without the entropy loss it falls too, but less. The loss does its work:

# %%
free, held = table.loc["top-p, no entropy loss", "experts"], table.loc["top-p", "experts"]
claim(
    "dynamic-moe",
    "The entropy loss lowers the number of experts by more than a fifth",
    holds=held < 0.8 * free,
    figure=f"{free:.2f} without, {held:.2f} with it, 3 seeds",
)

# %% [markdown]
# The title of the paper: harder tasks need more experts. Compare `hard` with `rest`, seed by seed.

# %%
# NBVAL_CHECK_OUTPUT
top_p = measured.loc["top-p"]
print("hard images get more experts, seed by seed:", (top_p["hard"] > top_p["rest"]).tolist())
assert (top_p["hard"] > top_p["rest"]).all()

# %%
claim(
    "dynamic-moe",
    "The least confident quarter of the images gets more experts than the rest, with every seed",
    holds=bool((top_p["hard"] > top_p["rest"]).all()),
    figure=f"{top_p['hard'].mean():.2f} against {top_p['rest'].mean():.2f}, 3 seeds",
)

# %% [markdown]
# Careful, though. Noise makes every image harder: see the accuracy in the table. Does the router notice? Only a little.
# It is unsure between experts, and that is not the same as being wrong about a picture.

# %%
claim(
    "dynamic-moe",
    "Noise on the images raises the number of experts by more than a fifth",
    holds=top_p["noisy"].mean() > 1.2 * top_p["experts"].mean(),
    figure=f"{top_p['experts'].mean():.2f} clean, {top_p['noisy'].mean():.2f} noisy, 3 seeds",
)

# %% [markdown]
# And is it worth it? The paper is 0.7 points *better* than top-2 with under 90 % of its active parameters. We find less
# compute at about the same accuracy; no gain.

# %%
saved = table.loc["top-p", "experts"] / 2
gap = table.loc["top-p", "accuracy"] - table.loc["top-2", "accuracy"]
assert saved < 0.9
claim(
    "dynamic-moe",
    "With less than 90 % of top-2's active experts, top-p stays within two points of its accuracy",
    holds=bool(saved < 0.9 and gap > -0.02),
    figure=f"{saved:.0%} of the experts, {100 * gap:+.1f} points, 3 seeds",
)

# %% [markdown]
# ## Move the cut
#
# Left: every column is a test image, sorted by how many experts it takes; from top to bottom its experts by falling
# probability. The white line is the cut. Right: what the trained network does when the threshold is changed
# *afterwards*. Drag `threshold` to 0.4, where nearly every image has one expert, and to 0.95.

# %%
net = runs["top-p"][0][0]
with torch.no_grad():
    net(x_test)
logits = net.moe.routing.logits


def accuracy(net):
    return (net(x_test).argmax(1) == y_test).float().mean().item()


curve = numbers.threshold_curve(net, accuracy, [i / 20 for i in range(1, 21)])
explore(cut_view, logits, curve, threshold=0.8)

# %% [markdown]
# ## Null experts
#
# The same network, eight experts, sixteen nulls, `k = 4`. The balance loss treats all nulls as one pool and pushes only
# their total share, to 16/24. Then a token gets 4 · 8/24 = 1.33 true experts in the mean. Here is the decision:

# %%
print(inspect.getsource(NullExperts.route))

# %% [markdown]
# The weights are divided by their sum over the *true* picks. So a null takes nothing away from the others. In this
# token, four experts and four nulls, `k = 3`: the picks are expert 0, a null, expert 1.

# %%
# NBVAL_CHECK_OUTPUT
token = torch.tensor([[2.0, 1, 0, -1, 1.5, 0.5, 0.5, 0.5]])
routing = NullExperts(1, 4, n_null=4, k=3).route(token)
print("experts", routing.experts[0].tolist(), "weights", [round(w, 4) for w in routing.weights[0].tolist()])
print("the weight of expert 0 is sigmoid(2 - 1):", round(torch.tensor(1.0).sigmoid().item(), 4))

# %% [markdown]
# On the test images, left: how many true experts an image gets, from 0 (the residual alone) to 4. Right: who gets the
# picks. Drag `n null` to 0: it is top-4. Drag `k`: the measured mean follows `k n / (n + m)`, roughly.

# %%
net = runs["null experts"][0][0]
with torch.no_grad():
    net(x_test)
limits = {"k": Range(1, 8), "n_null": Range(0, 16)}
explore(null_view, net.moe.routing.logits, 8, k=4, n_null=16, limits=limits)

# %%
null, expected = measured.loc["null experts"], net.moe.router.expected_experts
assert abs(null["experts"].mean() / expected - 1) < 0.25
claim(
    "adamoe",
    "The balance loss brings the mean number of true experts within a quarter of k n / (n + m)",
    holds=abs(null["experts"].mean() / expected - 1) < 0.25,
    figure=f"{null['experts'].mean():.2f} of {expected:.2f} expected, 3 seeds; "
    f"{numbers.compute_share(net.moe.routing, 2):.0%} of top-2's expert FLOPs with the first",
)

# %% [markdown]
# The loss fixes the mean and leaves each token free. Who gets more? One would hope: the hard images. It is the other
# way round. An image the router does not recognise matches no expert well, and then the nulls win.

# %%
claim(
    "adamoe",
    "The least confident quarter of the images gets more true experts than the rest",
    holds=null["hard"].mean() > null["rest"].mean(),
    figure=f"{null['hard'].mean():.2f} against {null['rest'].mean():.2f}, 3 seeds",
)

# %% [markdown]
# ## In a language model
#
# The byte Mixtral of lesson 20: three layers, eight experts, trained with top-2. We record its router once on articles
# it has not seen. Then any rule can decide again, without the model.

# %%
# NBVAL_CHECK_OUTPUT
bed = zoo.language_moe()
with torch.no_grad(), record_routing(bed.model) as trace:
    for language, windows in bed.batches("test").items():
        with trace.labelled(language):
            bed.model(windows)
print(trace)

# %% [markdown]
# Above: the bytes of a text, coloured by how many experts each gets in each layer. Below: the mean for each class of
# byte (a letter such as ß is several bytes: a first and later ones). Drag `threshold` with top-p. Then take
# `expert choice`: the mean is exactly `k`, but some bytes get none. With `null experts` the number jumps in steps and
# is the same for all bytes; the next cell says why.

# %%
limits = {"k": Range(1, 24), "n_null": Range(0, 32), "start": Range(0, len(trace) - 48)}
explore(compute_view, trace, limits=limits, start=1200)

# %% [markdown]
# Converting a trained model, each null starts as the *shadow* of an expert: with a copy of its row of the gate. An
# expert and its two shadows then tie, the expert comes first, and four picks are two experts and two shadows. So right
# after the conversion the model computes exactly what it did before. Fine-tuning then pulls shadows and experts apart.

# %%
# NBVAL_CHECK_OUTPUT
ids = bed.batches("test")["eng"][:8]
with torch.no_grad():
    before = bed.model(ids).logits
    install(bed.model, NullExperts, n_null=16, k=4)
    after = bed.model(ids).logits
print("converted, the model is the same to 1e-4:", torch.allclose(before, after, atol=1e-4))
assert torch.allclose(before, after, atol=1e-4)

# %% [markdown]
# The paper of top-p also found that lower layers want more experts than upper ones. We need no training for that: the
# trained router's own certainty says it, at any threshold.

# %%
# NBVAL_CHECK_OUTPUT
by_layer = {}
for threshold in (0.4, 0.6, 0.8):
    routings = reroute(trace, TopP, threshold=threshold)
    by_layer[threshold] = [numbers.experts_per_token(r).float().mean().item() for r in routings]
print(pd.DataFrame(by_layer, index=["layer 0", "layer 1", "layer 2"]).T.round(1).to_string())
falling = all(a > b > c for a, b, c in by_layer.values())
assert falling

# %%
claim(
    "dynamic-moe",
    "Lower layers need more experts than upper ones, at every threshold from 0.4 to 0.8",
    holds=falling,
    figure="; ".join(f"p {p}: " + ", ".join(f"{k:.2f}" for k in ks) for p, ks in by_layer.items()),
)

# %% [markdown]
# By language, at p = 0.6: most are close together. Polish stands out in the lowest layer, Vietnamese in the upper two.

# %%
labels = [trace.label_names[i] for i in trace.labels.tolist()]
numbers.experts_by_group(reroute(trace, TopP, threshold=0.6), labels).T.round(2)

# %% [markdown]
# ## What to try
#
# - Train top-p with `threshold=0.4`, the paper's value. How many experts are left after 240 steps? Why is 0.4 not too
#   low for 16 experts and a large model?
# - `install(bed.model, TopP, threshold=0.6)`, then `bed.score(bed.model)`, and the same at 0.3 and 0.95. The model was
#   trained with two experts. Which threshold does it like best?
# - Set `pool_nulls=False`: now every null is balanced too. What changes, and what does not?
# - Install `NullExperts` and fine-tune the gates alone for a few dozen steps, with `aux_loss(bed.model)` added to the
#   task's loss. Do spaces still get as many experts as letters?
# - For the digits, give `NullExperts` a `balance_coef` of 0. What does the network do with its free choice?
#
# ## Sources

# %%
for router in (TopP, NullExperts):
    print(cite(router), end="\n\n")
