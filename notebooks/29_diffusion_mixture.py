# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [DiTMoE]
# ---

# %% [markdown]
# # A mixture that draws: experts in a diffusion transformer
#
# **The question.** In a language model, experts share out tokens of text. What do they share out when the model draws?
# The places in the image? The moments on the way from noise to picture? Or the things that are drawn?
#
# **The idea** (DiT-MoE). Take a diffusion transformer and put a mixture of experts where each block had one wide layer.
# A router picks two of eight experts for every patch of the image, at every step; a *shared* path works on all of them.
# The paper trained up to 16 billion parameters this way. Here are half a million, on digits of 8 x 8 pixels, and you
# can look inside.

# %%
import inspect

import pandas as pd
import torch

from notebook_kit import cite, claim, explore, training, zoo
from notebook_kit.diagnostics import diffusion as numbers
from notebook_kit.figures.diffusion import (
    balance_view,
    dependence_figure,
    evenness_figure,
    expert_map_view,
    sample_view,
)
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures import DeepSeekMoE, DiTMoE, aux_loss
from notebook_kit.models import DiffusionTransformer, flow_loss, noised, sample, sample_path
from notebook_kit.widgets import LiveFigure

torch.set_num_threads(1)

# %% [markdown]
# ## From noise to a picture, along a straight line
#
# Mix an image `x` with noise `ε`: at noise level `t` you have `z = (1 - t) x + t ε`. As `t` grows, `z` moves by
# `ε - x`, always the same. The network sees `z`, `t` and the class, and guesses that velocity. To draw, start from
# noise and walk against it, in a few steps. Here is the whole walk:

# %%
print(inspect.getsource(sample_path).split('"""')[-1])

# %% [markdown]
# Were the guess exact, one step from `t = 1` would give the image back. And a new network? Its last layer and all its
# gates start at zero ("adaLN-Zero"): it answers exactly 0, and training begins quietly.

# %%
# NBVAL_CHECK_OUTPUT
x, y = zoo.digit_images("test")
noise, ones = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), torch.ones(len(x))
back = noised(x, noise, ones) - (noise - x)
print("exact velocity, one step:", torch.allclose(back, x, atol=1e-5))
new = DiffusionTransformer(feed_forward=DiTMoE)
print("a new network answers", float(new(x[:4], ones[:4], y[:4]).detach().abs().max()))

# %% [markdown]
# ## Draw
#
# The trained mixture draws twenty digits, live. `guidance` says how far to walk away from "any digit" and towards the
# one you ask for: compare 0, 1 and 4. Set `steps` to 1: you get the *average* digit, a blur, whatever the noise. Choose
# `path` to watch a digit form. And `silence` switches a part of the mixture off; more on that below.

# %%
bed = zoo.digit_diffusion("mixture")
model = bed.model
explore(sample_view, model)

# %% [markdown]
# Guidance is a trade. A small classifier of the zoo reads 100 drawings, and we measure how much the drawings of one
# digit differ. Real digits differ by 0.42. Without any class (guidance 0) the drawings are digits, but not those you
# asked for; with much guidance they are easy to read and more and more alike.

# %%
asked = torch.arange(100) % 10
rows = {}
for guidance in (0.0, 1.0, 2.0, 4.0):
    drawn = sample(model, asked, steps=6, guidance=guidance)
    right = (numbers.read_as(drawn) == asked).float().mean().item()
    rows[guidance] = {"read as asked": right, "variety": numbers.variety(drawn.clamp(-1, 1), asked)}
trade = pd.DataFrame(rows).T.rename_axis("guidance")
trade.round(2)

# %%
read = trade["read as asked"]
helps = read[4.0] >= read[1.0] - 0.02 and read[1.0] > read[0.0] + 0.5
alike = trade["variety"][4.0] < 0.9 * trade["variety"][1.0]
assert helps
assert alike
claim(
    "dit-moe",
    "Classifier-free guidance makes drawings no harder to read, and at least a tenth less varied",
    holds=helps and alike,
    figure=f"read {read[1.0]:.2f} to {read[4.0]:.2f}, "
    f"variety {trade['variety'][1.0]:.2f} to {trade['variety'][4.0]:.2f}, guidance 1 to 4",
)

# %% [markdown]
# ## The layer
#
# Scores are a softmax over eight experts. A patch takes the best two, and their answers count with their scores, which
# are *not* divided by their sum. The shared path is one gated layer, always on. This is DeepSeek's layer with another
# width of the shared path, so it is the same code:

# %%
print(inspect.getsource(DiTMoE.__init__).split("):", 1)[1])
print(inspect.getsource(DeepSeekMoE.forward).split('"""')[-1])

# %% [markdown]
# What does a patch cost? `active` counts the weights that it is multiplied with. The dense twin has one wide layer in
# place of the mixture, as wide as makes `active` equal, and it saw the same batches. The loss is on digits that neither
# has seen.

# %%
beds = {"dense": zoo.digit_diffusion("dense"), "mixture": bed}
table = pd.DataFrame({name: numbers.token_cost(one.model) for name, one in beds.items()}).T
losses = {name: -float(one.score(one.base)) for name, one in beds.items()}
print(table.assign(loss=[round(loss, 3) for loss in losses.values()]))

# %% [markdown]
# The paper's promise is a better model at the same compute. Here the two are practically equal: each was trained once,
# and half a percent is nothing to build on. A thousand digits seem to leave nothing for three times the weights to
# know; the paper had over a million photographs.

# %%
ahead = 1 - losses["mixture"] / losses["dense"]
assert abs(table["active"]["mixture"] / table["active"]["dense"] - 1) < 0.02
claim(
    "dit-moe",
    "At equal active weights the mixture's loss on held-out digits is at least 2 % lower than the dense transformer's",
    holds=ahead > 0.02,
    figure=f"{losses['mixture']:.3f} against {losses['dense']:.3f}, {ahead:.1%} lower, one training each",
)

# %% [markdown]
# ## What do the experts share out?
#
# We noise 200 digits to ten levels, show them to the model, and record every choice: layer, patch, noise level, class,
# experts. In the picture, each small square is the whole image: bright patches are those that the expert is first
# choice for. Then change `by` to `time` and to `class`, and go through the layers.

# %%
record = numbers.record_denoising(model, x[:200], y[:200])
explore(expert_map_view, record, limits={"layer": Range(0, 2)})

# %% [markdown]
# One number each: how many bits does the first expert of a patch tell about its position (of 4 there are), about the
# noise level (of 3.3), about the digit (of 3.3)? Shuffling says what chance would give: below 0.01 everywhere.

# %%
bits = numbers.dependence(record)
print(bits.round(2).to_string())
LiveFigure(dependence_figure(bits))

# %%
place_first = bool((bits["position"] > 5 * bits["class"]).all() and (bits["position"] > 2 * bits["time"]).all())
assert place_first
assert (bits.filter(like="chance") < 0.02).all(axis=None)
claim(
    "dit-moe",
    "In every layer the first expert tells most about the position in the image",
    holds=place_first,
    figure="position " + ", ".join(f"{b:.2f}" for b in bits["position"]) + " bits, layer by layer",
)

# %% [markdown]
# The paper also finds that the choice hardly depends on the class. So it is here, though not as little as chance:

# %%
little = bool((bits["class"] < torch.tensor(10.0).log2().item() / 10).all())
assert little
claim(
    "dit-moe",
    "The first expert tells less than a tenth of what there is to know about the class",
    holds=little,
    figure=", ".join(f"{b:.2f}" for b in bits["class"]) + " of 3.32 bits",
)

# %% [markdown]
# And that it depends on time. That is true of the first layer. In the last one, the class counts for more than the
# time:

# %%
time_counts = bool((bits["time"] > bits["class"]).all())
assert bits["time"][0] > 5 * bits["class"][0]
claim(
    "dit-moe",
    "In every layer the first expert tells more about the time than about the class",
    holds=time_counts,
    figure="; ".join(f"{by} " + ", ".join(f"{b:.2f}" for b in bits[by]) for by in ("time", "class")) + " bits",
)

# %% [markdown]
# ## Early steps, late steps
#
# Are all experts busy at every moment? Read the picture from left to right, as drawing goes: from noise to image.

# %%
even = numbers.evenness(record)
LiveFigure(evenness_figure(even))

# %% [markdown]
# Deeper layers are more even, as the paper says.

# %%
depth = even.mean()
deeper = bool(depth.is_monotonic_increasing and depth.iloc[-1] > depth.iloc[0] + 0.03)
assert deeper
claim(
    "dit-moe",
    "Deeper layers spread the work more evenly over their experts",
    holds=deeper,
    figure="evenness " + ", ".join(f"{value:.2f}" for value in depth) + ", layer by layer",
)

# %% [markdown]
# The paper's other finding is different here. It sees the choice concentrated in the first steps and even in the second
# half. Our model is even in the *middle*, and least even at the very end. Think of how it was trained: times are drawn
# around one half, so the balance loss hardly ever sees an image that is nearly clean, or nothing but noise.

# %%
late, early = even.loc[:0.5].min().min(), even.loc[0.5:].min().min()
claim(
    "dit-moe",
    "Work is concentrated on few experts in the early, noisy steps, and even in the second half",
    holds=bool(early < 0.9 and late > 0.95),
    figure=f"least evenness {early:.2f} in the noisy half, {late:.2f} in the clean half",
)

# %% [markdown]
# ## Without the shared path
#
# What does each part contribute? We let one part answer 0, everywhere, and leave the rest as it was trained. In the
# first widget you can see what that does to the drawings.

# %%
rows = {"whole": {"loss": -float(bed.score(model))}}
for part in ("routed", "shared"):
    with numbers.silenced(model, part):
        drawn = sample(model, asked, steps=6, guidance=2.0)
        right = (numbers.read_as(drawn) == asked).float().mean().item()
        rows[f"without the {part} part"] = {"loss": -float(bed.score(model)), "read as asked": right}
parts = pd.DataFrame(rows).T
parts.round(2)

# %% [markdown]
# The shared path is half as wide as what a patch gets from its two experts, and yet it is missed far more. What all
# patches need has moved into it. (Mind that this silences a part of a model that counts on it; a model trained without
# it would find another way.)

# %%
increase = parts["loss"] - parts["loss"]["whole"]
shared, routed = increase["without the shared part"], increase["without the routed part"]
assert shared > 1.5 * routed
claim(
    "dit-moe",
    "Silencing the shared path costs more than silencing all routed experts",
    holds=bool(shared > routed),
    figure=f"loss +{shared:.2f} against +{routed:.2f}",
)

# %% [markdown]
# ## What the balance loss does
#
# The loss is `α Σ f P`: the share of the picks `f` times the mean score `P`, of each expert; `α` when all is even. By
# hand, with two experts, two tokens and one pick: scores (.7, .3) and (.6, .4) give f = (2, 0), P = (.65, .35).

# %%
# NBVAL_CHECK_OUTPUT
layer = DiTMoE(2, 4, n_experts=2, k=1)
routing = layer.router.route(torch.tensor([[0.7, 0.3], [0.6, 0.4]]).log())
print(f"{routing.aux_loss.item():.3f}")

# %% [markdown]
# Now train smaller models, one block of width 32, for 60 steps each, with and without it, from four seeds.


# %%
train_x, train_y = zoo.digit_images("train")


def draw(generator):
    rows = torch.randint(len(train_x), (32,), generator=generator)
    return train_x[rows], train_y[rows]


def loads_of(balance_coef, seed):
    torch.manual_seed(seed)
    net = DiffusionTransformer(d_model=32, n_blocks=1, feed_forward=lambda d: DiTMoE(d, 32, balance_coef=balance_coef))
    loss = lambda net, batch: flow_loss(net, *batch) + aux_loss(net)  # noqa: E731
    training.fit(net, draw, loss, steps=60, lr=4e-3, seed=seed, progress=False)
    trace = numbers.record_denoising(net.eval(), x[:60], y[:60]).trace
    return [trace.layer(0).load]


# %% [markdown]
# Without the loss, three to five tenths of the work end up with one expert; half is all that one can get where every
# patch picks two, and an even share is one eighth. Move `balance_coef`.

# %%
runs = {(coef, seed): loads_of(coef, seed) for coef in (0.0, 0.01) for seed in range(4)}
busiest = {coef: [runs[coef, seed][0].max().item() for seed in range(4)] for coef in (0.0, 0.01)}
loads = {coef: runs[coef, 0] if (coef, 0) in runs else loads_of(coef, 0) for coef in (0.0, 0.001, 0.01, 0.1)}
explore(balance_view, loads, balance_coef=0.0, limits={"layer": None})

# %%
ratios = [without / with_it for without, with_it in zip(busiest[0.0], busiest[0.01], strict=True)]
typical = sum(ratios) / len(ratios)
assert typical > 1.5
claim(
    "dit-moe",
    "Without the balance loss the busiest of eight experts has on average at least half as much work again as with it",
    holds=typical > 1.5,
    figure=f"{typical:.1f} times as much on average, {min(ratios):.1f} to {max(ratios):.1f}, 4 seeds",
)

# %% [markdown]
# ## What to try
#
# - In the first widget: `path`, with `guidance` 0. At which noise level does it become clear which digit it will be?
# - Silence the `routed` part with guidance 4. What is still right about the digits, what is not?
# - `DiTMoE(d, per_image=True)` balances each image apart. Before you train it: will position still matter as much?
# - Upcycle: train a dense model with `feed_forward=lambda d: SwiGLU(d, 96)`, then replace each of its layers by
#   `DiTMoE.from_dense(layer, n_shared=0, normalize=True)`. It draws the same digits; train it on.
# - Draw the times of `flow_loss` evenly from 0 to 1. Are the ends still uneven?
#
# ## Sources

# %%
print(cite(DiTMoE))
