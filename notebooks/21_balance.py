# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   notebook_kit:
#     methods: [BalancedAssignment, HashRouter, LossFreeBias, StableMoE]
# ---

# %% [markdown]
# # Balance: what keeps the load even?
#
# **The question.** Left alone, a router sends nearly everything to a few experts, and the rest of the layer is paid for
# and never used. What can be done about it, and what does each remedy cost?
#
# **The idea.** There are six answers, and you met three of them in the lesson on routers.
#
# | what keeps the load even | how | router |
# |---|---|---|
# | a loss | unevenness costs something | `TopK`, Switch's rule |
# | noise | other experts are tried by chance | `NoisyTopK` |
# | the experts | each takes the same number of tokens | `ExpertChoice` |
# | an assignment | the best match with equal shares | `BalancedAssignment` (BASE) |
# | a bias | who got too much is picked a little less | `LossFreeBias` (DeepSeek-V3) |
# | nothing | a fixed table decides, from the start or from some day on | `HashRouter`, `StableMoE` |

# %%
import inspect
import itertools

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)

# %%
from notebook_kit import cite, claim, data, explore, zoo
from notebook_kit.diagnostics import routing as numbers
from notebook_kit.diagnostics.balance import bias_stream, constancy, id_table
from notebook_kit.figures.balance import bias_figure, history_figure, id_figure
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures import MoE, SwiGLUExperts, aux_loss
from notebook_kit.routers import (
    BalancedAssignment,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    StableMoE,
    TopK,
    assignment,
    record_routing,
    reroute,
)
from notebook_kit.training import fit
from notebook_kit.widgets import LiveFigure, RouterExplorer

# %% [markdown]
# ## An assignment
#
# Four tokens, two experts, and every token likes expert 0 better. Greedy routing sends all four there. BASE asks
# another question: of all ways to give each expert **two** tokens, which has the largest sum of affinities? Token 2
# hardly minds to move (5 or 4.5), and token 3 minds less than token 1.

# %%
# NBVAL_CHECK_OUTPUT
affinity = torch.tensor([[3.0, 2.0], [4.0, 1.0], [5.0, 4.5], [1.0, 0.0]])
base = BalancedAssignment(1, 2)
for mode in (False, True):
    routing = base.train(mode).route(affinity)
    total = affinity.gather(1, routing.experts).sum().item()
    print("training " if mode else "evaluation", routing.experts.flatten().tolist(), "sum", total)

# %% [markdown]
# That is a linear assignment problem, and general solvers need minutes for a real batch. There is a shorter way when
# many tokens share few experts. Give every expert a *price*; at the right prices each token may simply take what is
# best for it, and the shares come out even. The few tokens that are left over are moved along shortest paths between
# experts, so the answer is exact. The first half of it:

# %%
print(inspect.getsource(assignment.by_prices))

# %% [markdown]
# ## A bias
#
# DeepSeek-V3 leaves the scores alone and adds a bias, for the *choice* only. The weight of an answer comes from the
# score without it. After every batch the bias takes one small step: down for experts that got more than the mean, up
# for the others. No gradient ever reaches it, so it cannot disturb what the task teaches.

# %%
print(inspect.getsource(LossFreeBias.update_bias))

# %% [markdown]
# Below, the favourites 0 and 1 carry a handicap and expert 3 a bonus. Who is picked, and with what weight?

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.tensor([[0.9, 0.8, 0.3, 0.2]])
router = LossFreeBias(1, 4, k=2)
for bias in ([0.0, 0.0, 0.0, 0.0], [-0.2, -0.2, 0.0, 0.5]):
    router.bias.copy_(torch.tensor(bias))
    routing = router.route(scores.logit())
    print(bias, "->", routing.experts.tolist()[0], [round(w, 3) for w in routing.weights.tolist()[0]])
router.counts.copy_(torch.tensor([5.0, 3.0, 2.0, 2.0]))
before = router.bias.clone()
router.update_bias()
print("after counts 5, 3, 2, 2:", [round(step, 4) for step in (router.bias - before).tolist()])

# %% [markdown]
# ## Seven runs on the digits
#
# A digit classifier with eight small experts. Everything is the same but the router. We write down MaxVio at every
# step: how far the busiest expert is above its even share (0 is even; 7 means one of eight does everything).


# %%
class Net(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.read, self.write = nn.Linear(64, 32), nn.Linear(32, 10)
        self.moe = MoE(SwiGLUExperts(8, 32, 16), router)

    def forward(self, x):
        h = self.read(x).relu()
        return self.write(h + self.moe(h))


x, y = data.digits("train")
x_test, y_test = data.digits("test")


# %% [markdown]
# BASE routes to one expert, the others to two in the mean. Its layer is `y = σ(a) E(x) + (1 - σ(a)) x` with residual
# experts `E(x) = x + F(x)`; work it out, and it is `x + σ(a) F(x)`: an ordinary `h + moe(h)`.


# %%
def draw(generator):
    rows = torch.randint(len(x), (64,), generator=generator)
    return x[rows], y[rows]


@torch.no_grad()
def accuracy(net, images, labels):
    return (net.eval()(images).argmax(1) == labels).float().mean().item()


def train(make_router, seed):
    torch.manual_seed(seed)
    net, violations = Net(make_router()), []

    def loss(net, batch):
        value = F.cross_entropy(net(batch[0]), batch[1]) + aux_loss(net)
        violations.append(numbers.max_violation(net.moe.routing.demand))
        return value

    fit(net, draw, loss, steps=200, lr=3e-3, seed=seed, progress=False)
    return net, violations


# %% [markdown]
# Seven settings, two seeds each. The coefficient of the loss is that of the lesson on routers; of the bias we try three
# rates. Which one is right the load in training tells, no test digit is asked.

# %%
remedies = {
    "nothing": lambda: TopK(32, 8, balance_coef=0.0),
    "loss 0.1": lambda: TopK(32, 8, balance_coef=0.1),
    "bias 0.001": lambda: LossFreeBias(32, 8, bias_rate=0.001),
    "bias 0.01": lambda: LossFreeBias(32, 8, bias_rate=0.01),
    "bias 0.1": lambda: LossFreeBias(32, 8, bias_rate=0.1),
    "BASE": lambda: BalancedAssignment(32, 8),
    "expert choice": lambda: ExpertChoice(32, 8, k=2),
}
runs = {name: [train(make, seed) for seed in range(2)] for name, make in remedies.items()}

# %% [markdown]
# Look at the three biases. One creeps, one is right, one never comes to rest. BASE and expert choice lie on the zero
# line: there the load is even by construction.

# %%
steps = [
    {"router": name, "step": step, "value": value}
    for name, seeds in runs.items()
    for _, violations in seeds
    for step, value in enumerate(violations)
]
title = "MaxVio in training, mean of 2 seeds and 10 steps"
LiveFigure(history_figure(pd.DataFrame(steps), y="MaxVio of the batch", title=title, smooth=10))

# %% [markdown]
# Now the digits that nobody trained on. `training` is MaxVio in the second half of training, `test` on the test digits,
# `dead` how many experts no test digit uses.


# %%
def row(net, violations):
    score = accuracy(net, x_test, y_test)
    demand = net.moe.routing.demand
    late = sum(violations[100:]) / 100
    return {"training": late, "test": numbers.max_violation(demand), "dead": numbers.dead_experts(demand), "acc": score}


table = pd.DataFrame({name: pd.DataFrame([row(*run) for run in seeds]).mean() for name, seeds in runs.items()}).T
table.round(2)

# %% [markdown]
# The bias does what its paper promises, at the right rate. The papers' own rate, 0.001, is meant for hundreds of
# thousands of steps: here it is ten times too slow. And at 0.1 the load swings from expert to expert.

# %%
right, none = table.loc["bias 0.01"], table.loc["nothing"]
evens = none["training"] > 2 and right["training"] < 1
cheap = right["acc"] > none["acc"] - 0.03
assert evens
claim(
    "loss-free-balancing",
    "A bias of the right rate takes MaxVio from above 2 to below 1 and costs at most 3 points of accuracy",
    holds=evens and cheap,
    figure=f"MaxVio {none['training']:.1f} to {right['training']:.1f}, accuracy {none['acc']:.2f} to "
    f"{right['acc']:.2f}, 2 seeds",
)

# %%
slow, wild = table.loc["bias 0.001", "training"], table.loc["bias 0.1", "training"]
assert right["training"] < 0.7 * min(slow, wild)
claim(
    "loss-free-balancing",
    "The paper's rate 0.001 evens the load of 200 steps as well as 0.01 does",
    holds=slow < right["training"] + 0.2,
    figure=f"MaxVio {slow:.1f} at 0.001, {right['training']:.1f} at 0.01, {wild:.1f} at 0.1, 2 seeds",
)

# %% [markdown]
# BASE is perfectly even in training. But look at its test row. In evaluation there is no assignment, each token takes
# its best expert; and a router that never had to choose by itself may not be good at it. Assign the test digits as in
# training, and the same network is as good as any:

# %%
greedy, assigned = [], []
for net, _ in runs["BASE"]:
    greedy.append(accuracy(net, x_test, y_test))
    net.moe.router.evaluation = "balanced"
    assigned.append(accuracy(net, x_test, y_test))
    net.moe.router.evaluation = "greedy"
greedy, assigned = sum(greedy) / 2, sum(assigned) / 2
print(f"greedy {greedy:.2f}, assigned {assigned:.2f}")
assert assigned > 0.9

# %%
even = max(max(violations) for _, violations in runs["BASE"])
claim(
    "base-layers",
    "In training every expert gets the same number of tokens, without a loss and with nothing to tune",
    holds=even == 0,
    figure=f"largest MaxVio of 400 batches {even:.0f}",
)

# %%
claim(
    "base-layers",
    "At test time each token may simply take its best expert: it costs at most 2 points of accuracy",
    holds=greedy > assigned - 0.02,
    figure=f"{greedy:.2f} greedy, {assigned:.2f} assigned, 2 seeds",
)

# %% [markdown]
# The paper trains far longer, and evaluates greedily. Two hundred steps are not enough for the affinities to agree with
# the assignment. Whoever trains BASE for a short time should look at both numbers.
#
# ## The same question, inside a language model
#
# A small Mixtral has read human rights in twelve languages; it was trained with a balance loss. We record what its
# routers say on articles it has not seen.

# %%
# NBVAL_CHECK_OUTPUT
bed = zoo.language_moe()
with torch.no_grad(), record_routing(bed.model) as trace:
    for language, windows in bed.batches("test").items():
        with trace.labelled(language):
            bed.model(windows)
print(trace)

# %% [markdown]
# Now route the trace again, live. `balanced assignment` solves the assignment of all 19 584 tokens each time you move a
# slider, exactly. Compare `as recorded`, `top-k`, `sigmoid`, `expert choice`, in the pictures `load` and `labels`.

# %%
RouterExplorer(trace, router="balanced assignment", picture="load", layer=1, k=1)

# %% [markdown]
# And let a bias work on it: batches of the trace go by, after each the bias moves by `bias rate`. The model does not
# learn meanwhile, so all you see is the bias. Find a rate that is even soon, and quiet afterwards. Then lower the
# `batch size` to 32: what you see now is chance, which no bias can mend.

# %%
limits = {"layer": Range(0, 2), "k": Range(1, 8)}
explore(bias_stream, trace, layer=1, bias_rate=0.01, draw=bias_figure, limits=limits)

# %%
# NBVAL_CHECK_OUTPUT
late = {rate: bias_stream(trace, layer=1, bias_rate=rate).max_violation[75:].mean() for rate in (0.001, 0.003, 0.1)}
assert late[0.003] < late[0.001] < late[0.1]
print("0.001 creeps:", late[0.001] > 2 * late[0.003], "| 0.1 jumps:", late[0.1] > 5 * late[0.003])

# %% [markdown]
# ## Nothing at all
#
# Hash layers need no balance because they learn no routing: a table, made before training, says which expert has which
# token id. StableMoE learns first, then *distils* what it learned into such a table, and keeps to it.
#
# How much of our Mixtral's routing is a matter of the byte alone? We let StableMoE's small router learn it from the
# trace, and deal out a balanced table for comparison.

# %%
torch.manual_seed(0)
counts = torch.bincount(trace.tokens, minlength=256)
table = HashRouter(1, 8, table="balanced", counts=counts)
student = StableMoE(1, 8, balance_coef=0.0, capacity_factor=8.0).train()
optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
logits = trace.layer_logits(0)
for _ in range(100):
    rows = torch.randint(len(logits), (1024,))
    loss = student.route(logits[rows], tokens=trace.tokens[rows]).aux_loss  # cross entropy to the recorded choice
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# %% [markdown]
# Each row is a byte; the bright cells say which experts computed it. As recorded, most bytes have a favourite, and some
# have several. The two tables know one expert for each.

# %%
routings = {"as recorded": trace.layer(0), "distilled": reroute(trace, student, 0), "hash": reroute(trace, table, 0)}
LiveFigure(
    id_figure(
        {name: id_table(routing, trace) for name, routing in routings.items()},
        title="first choices of the 24 most frequent bytes, layer 0",
    )
)

# %% [markdown]
# `constant` is the share of tokens that are where their byte mostly is; `agrees`, how often a table sends a token
# where the model sent it. Three quarters of the first layer's choices follow from the byte alone.

# %%
recorded = routings["as recorded"].experts[:, 0]
for name, routing in routings.items():
    agrees = (routing.experts[:, 0] == recorded).float().mean()
    violation = numbers.max_violation(routing.demand)
    print(f"{name:>12}: constant {constancy(routing, trace):.2f}, agrees {agrees:.2f}, MaxVio {violation:.1f}")
assert constancy(routings["as recorded"], trace) > 0.6

# %% [markdown]
# ## Does a fixed table cost anything?
#
# We train a tiny language model on the same text: it sees four bytes and guesses the fifth. One mixture of eight
# experts, one expert a token, four routers. Those that route by ids get them by `tokens=`.


# %%
def windows(split):
    return torch.cat([data.byte_windows(data.udhr(language, split), 5) for language in data.LANGUAGES])


text, held_out = windows("train"), windows("test")


class ByteModel(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.embed, self.read = nn.Embedding(256, 16), nn.Linear(64, 32)
        self.norm, self.write = nn.LayerNorm(32), nn.Linear(32, 256)
        self.moe = MoE(SwiGLUExperts(8, 32, 64), router)

    def forward(self, ids):
        h = self.read(self.embed(ids[:, :4]).flatten(1))
        return self.write(h + self.moe(self.norm(h), tokens=ids[:, 3]))


# %% [markdown]
# Every 20 steps we ask where 2000 fixed tokens would go, and count those that go elsewhere than before. (Each router
# is asked as it routes in training at that moment; BASE by its affinities.)


# %%
def train_bytes(make_router, seed, steps=160):
    torch.manual_seed(seed)
    net, seen = ByteModel(make_router()), []

    def watch(net):
        router = net.moe.router
        router.train(isinstance(router, StableMoE))  # the teacher in stage 1, the table in stage 2
        h = net.norm(net.read(net.embed(held_out[:2000, :4]).flatten(1)))
        ids = {"tokens": held_out[:2000, 3]} if router.needs_tokens else {}
        seen.append(router.route(router.logits(h), **ids))
        return {}

    batch = lambda generator: text[torch.randint(len(text), (256,), generator=generator)]  # noqa: E731
    loss = lambda net, ids: F.cross_entropy(net(ids), ids[:, 4]) + aux_loss(net)  # noqa: E731
    fit(net, batch, loss, steps=steps, lr=3e-3, seed=seed, progress=False, evaluate=watch, evaluate_every=20)
    with torch.no_grad():
        nats = F.cross_entropy(net.eval()(held_out), held_out[:, 4]).item()
    return nats, [numbers.changed(a, b) for a, b in itertools.pairwise(seen)]


# %% [markdown]
# StableMoE changes to its second stage after 60 of 160 steps; the paper does after a tenth of far more.

# %%
byte_counts = torch.bincount(text[:, 3], minlength=256)
routers = {
    "Switch, loss 0.1": lambda: TopK(32, 8, k=1, convention="switch", balance_coef=0.1),
    "BASE": lambda: BalancedAssignment(32, 8),
    "hash, balanced": lambda: HashRouter(32, 8, table="balanced", counts=byte_counts),
    "StableMoE": lambda: StableMoE(32, 8, distill_steps=60),
}
byte_runs = {name: [train_bytes(make, seed) for seed in range(2)] for name, make in routers.items()}
nats = {name: sum(value for value, _ in seeds) / 2 for name, seeds in byte_runs.items()}
print({name: round(value, 2) for name, value in nats.items()})

# %% [markdown]
# Where do the routes stop moving? An expert whose tokens keep changing has to unlearn; the samples of the last expert
# do not help the next one. StableMoE's paper starts from this picture.

# %%
steps = [
    {"router": name, "step": 40 + 20 * place, "value": value}
    for name, seeds in byte_runs.items()
    for _, changes in seeds
    for place, value in enumerate(changes)
]
title = "tokens that changed their expert in the last 20 steps, mean of 2 seeds"
LiveFigure(history_figure(pd.DataFrame(steps), y="share of tokens", title=title))

# %%
late = {name: sum(sum(changes[-3:]) / 3 for _, changes in seeds) / 2 for name, seeds in byte_runs.items()}
assert late["hash, balanced"] == 0
claim(
    "stable-moe",
    "In stage 2 no token changes its expert any more, while Switch and BASE still move more than a tenth in 20 steps",
    holds=late["StableMoE"] == 0 and min(late["Switch, loss 0.1"], late["BASE"]) > 0.1,
    figure=", ".join(f"{name} {value:.0%}" for name, value in late.items()) + ", 2 seeds",
)

# %%
claim(
    "stable-moe",
    "With its routes frozen StableMoE predicts at least as well as Switch and BASE",
    holds=nats["StableMoE"] < min(nats["Switch, loss 0.1"], nats["BASE"]) + 0.01,
    figure=", ".join(f"{name} {value:.2f}" for name, value in nats.items()) + " nats a byte, 2 seeds",
)

# %%
claim(
    "hash-layers",
    "A table that is never learned predicts at least as well as Switch and BASE",
    holds=nats["hash, balanced"] < min(nats["Switch, loss 0.1"], nats["BASE"]) + 0.01,
    figure=", ".join(f"{name} {value:.2f}" for name, value in nats.items()) + " nats a byte, 2 seeds",
)

# %% [markdown]
# Do not make too much of it: 160 steps are the very beginning, where a router that must still learn is at its worst,
# and the last byte says a lot about the next. The hash paper too found its tables best on the current token.
#
# ## What to try
#
# - `HashRouter(32, 8, table="bigram")`, and `table="clustered", embeddings=net.embed.weight`: the paper's warning. How
#   uneven is it, and what does it cost? `n_hashes=2` takes halves of two experts.
# - Train BASE on the digits for 2000 steps. Does the gap between greedy and assigned close?
# - `LossFreeBias(32, 8, scores="softmax")`: the scores are smaller now. Which rate is right?
# - DeepSeek-V3 lets a token use 4 of 8 groups of experts: `LossFreeBias(32, 8, n_group=4, topk_group=2)`. Does the
#   bias still even the load? In a DeepSeek-V3 of transformers, `install(model, LossFreeBias)` takes over the gate's
#   own bias, and moves it when you train.
#
# ## Sources

# %%
for router in (BalancedAssignment, HashRouter, StableMoE, LossFreeBias):
    print(cite(router), end="\n\n")
