"""Routers beside a bare top-k, BASE beside scipy, DeepSeek's gate beside transformers, and a trace routed again.

    python benchmarks/routers.py

One thread, no gradients; CPU milliseconds, medians of alternating runs. `ratio` is to the first line of a block. The
decisions alone are the hard case; a gate also multiplies tokens by its matrix, which is most of its work in a model.
"""

import statistics
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from notebook_kit.figures.routing import PICTURES, ROUTERS, routing_view
from notebook_kit.routers import (
    BalancedAssignment,
    DenseToSparse,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NoisyTopK,
    NullExperts,
    RandomRouter,
    StableMoE,
    StochasticExperts,
    TopK,
    TopP,
)
from notebook_kit.routers.assignment import balanced_assignment
from notebook_kit.routing import RoutingTrace
from notebook_kit.widgets.wire import encode

TOKENS, EXPERTS, WIDTH = 16384, 64, 1024


def alternate(functions: dict, runs: int = 15) -> dict[str, float]:
    """Median CPU time of each in milliseconds; they take turns, so that a busy machine harms all alike."""
    times = {name: [] for name in functions}
    for run in range(runs + 2):
        for name, function in functions.items():
            started = time.process_time()
            function()
            if run >= 2:
                times[name].append(time.process_time() - started)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def report(ms: dict[str, float], baseline: str) -> None:
    """One line each, with the ratio to the baseline."""
    for name, value in ms.items():
        print(f"  {name:28} {value:9.2f} ms   ratio {value / ms[baseline]:6.2f}")


def routers_of(d_model: int, k: int) -> dict:
    """Every router that is no plain assignment, for k experts a token."""
    top_k = {"normalize": k > 1, "k": k}
    routers = {
        "top-k": TopK(d_model, EXPERTS, balance_coef=0.0, **top_k),
        "top-k, balance and z-loss": TopK(d_model, EXPERTS, z_coef=0.01, **top_k),
        "top-k, capacity": TopK(d_model, EXPERTS, capacity_factor=1.25, **top_k),
        "top-k, capacity, best first": TopK(d_model, EXPERTS, capacity_factor=1.25, priority="batch", **top_k),
        "bias, sigmoid": LossFreeBias(d_model, EXPERTS, k=k, normalize=k > 1),
        "bias, softmax": LossFreeBias(d_model, EXPERTS, k=k, normalize=k > 1, scores="softmax"),
        "null experts, as many": NullExperts(d_model, EXPERTS, n_null=EXPERTS, k=k),
        "random": RandomRouter(d_model, EXPERTS, k=k),
        "expert choice": ExpertChoice(d_model, EXPERTS, k=k),
    }
    if k > 1:
        routers["noisy"] = NoisyTopK(d_model, EXPERTS, k=k)
    else:
        routers |= {"top-p 0.4": TopP(d_model, EXPERTS), "top-p 0.2": TopP(d_model, EXPERTS, threshold=0.2)}
        routers |= {
            "dense to sparse, training": DenseToSparse(d_model, EXPERTS),
            "dense to sparse, evaluation": DenseToSparse(d_model, EXPERTS).eval(),
            "stochastic": StochasticExperts(d_model, EXPERTS),
        }
        routers["BASE, evaluation"] = BalancedAssignment(d_model, EXPERTS).eval()
    return routers


def overhead(k: int) -> None:
    """Every router's decision on the same logits, with some experts asked for more than others.

    `of its like` is the ratio to a bare softmax and top-k of as many columns and picks as the router decides on.
    """
    z, ids = torch.randn(TOKENS, EXPERTS) + 0.5 * torch.randn(EXPERTS), torch.randint(0, 256, (TOKENS,))
    wide = torch.cat([z, torch.randn(TOKENS, EXPERTS)], 1)  # what null experts decide on
    functions = {"bare softmax and top-k": lambda: z.softmax(1).topk(k, dim=1)}
    likes = {}

    def like(name: str, bare) -> None:
        likes[name] = f"bare, as {name}"
        functions[likes[name]] = bare

    for name, router in routers_of(1, k).items():
        scores = wide if isinstance(router, NullExperts) else z
        functions[name] = lambda router=router, scores=scores: router.route(scores)
        picks = router.route(scores).experts.shape[1]
        if isinstance(router, ExpertChoice):
            like(name, lambda: z.softmax(1).topk(k * TOKENS // EXPERTS, dim=0))
        elif picks > k or scores is wide:
            like(name, lambda scores=scores, picks=picks: scores.softmax(1).topk(picks, dim=1))
    if k == 1:
        known = {"hash": HashRouter(1, EXPERTS), "stable, stage 1": StableMoE(1, EXPERTS)}
        known["stable, evaluation"] = StableMoE(1, EXPERTS).eval()
        functions |= {name: lambda router=router: router.route(z, tokens=ids) for name, router in known.items()}
    print(f"decisions: {TOKENS} tokens, {EXPERTS} experts, k={k}")
    ms = alternate(functions)
    for name, value in ms.items():
        own = f"   of its like {value / ms[likes[name]]:5.2f}" if name in likes else ""
        print(f"  {name:34} {value:9.2f} ms   ratio {value / ms['bare softmax and top-k']:6.2f}{own}")


def whole_call(k: int) -> None:
    """From tokens to decisions: the gate's product included."""
    x, weight = torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, WIDTH) / WIDTH**0.5
    functions = {"bare gate, softmax and top-k": lambda: (x @ weight.T).softmax(1).topk(k, dim=1)}
    for name, router in routers_of(WIDTH, k).items():
        if getattr(router, "weight", None) is not None:
            router.weight[:EXPERTS].copy_(weight)
        functions[name] = lambda router=router: router(x)
    print(f"whole call: {TOKENS} tokens of width {WIDTH}, {EXPERTS} experts, k={k}")
    report(alternate(functions, runs=5), "bare gate, softmax and top-k")


def assignment() -> None:
    """Balanced assignment; scipy needs a square of 2 GB for 16k tokens, so the comparison ends at 2k."""
    for tokens, experts in ((512, 8), (2048, 8), (2048, 64), (TOKENS, EXPERTS)):
        z = torch.randn(tokens, experts) + torch.randn(experts)
        slots = tokens // experts
        functions = {"balanced_assignment": lambda z=z, slots=slots: balanced_assignment(z, slots)}
        if tokens <= 2048:
            square = np.repeat(z.double().numpy(), slots, axis=1)
            functions = {"scipy": lambda square=square: linear_sum_assignment(square, maximize=True)} | functions
        print(f"{tokens} tokens, {experts} experts")
        report(alternate(functions, runs=3), next(iter(functions)))


def deepseek() -> None:
    """Eight of 256 experts, from 4 of 8 groups, logits included."""
    config = DeepseekV3Config(
        hidden_size=512, num_local_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True
    )
    theirs, x = DeepseekV3TopkRouter(config), torch.randn(4096, 512)
    torch.nn.init.normal_(theirs.weight, std=0.05)
    ours = LossFreeBias(512, 256, k=8, n_group=8, topk_group=4).eval()
    ours.weight.copy_(theirs.weight)
    print("DeepSeek-V3 gate, 4096 tokens of width 512, 256 experts")
    report(alternate({"transformers": lambda: theirs(x), "LossFreeBias": lambda: ours(x)}), "transformers")


def rerouting() -> None:
    """A trace of 20000 tokens, 8 experts and 3 layers, routed again, drawn, and made ready for the wire."""
    trace, places = RoutingTrace(["first", "second", "third"], k=2), torch.arange(20_000)
    layers = [TopK(1, 8).eval().route(torch.randn(20_000, 8)) for _ in trace.layers]
    parts = [(routing.logits, routing.weights, routing.experts) for routing in layers]
    about = {"tokens": places % 128, "positions": places % 100, "sequences": places // 100}
    trace.append(parts, **about, labels=[f"label {place // 2000}" for place in places.tolist()])

    def move(**settings) -> None:
        encode(routing_view(trace, other=trace, capacity_factor=1.25, **settings))

    print("20000 tokens: every router, picture load (target: below 100 ms)")
    report(alternate({name: lambda name=name: move(picture="load", router=name) for name in ROUTERS}, 5), "top-k")
    print("20000 tokens: every picture, routed by top-k")
    report(alternate({name: lambda name=name: move(picture=name, router="top-k") for name in PICTURES}, 5), "load")
    print("20000 tokens: the pictures of all layers, by a balanced assignment of 8192 tokens (layers: of all)")
    assigned = ("flow", "drift", "confusion", "layers")
    rows = {name: lambda name=name: move(picture=name, router="balanced assignment") for name in assigned}
    report(alternate(rows, 3), "confusion")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for k in (1, 2, 8):
        overhead(k)
    for k in (1, 2):
        whole_call(k)
    assignment()
    deepseek()
    rerouting()


if __name__ == "__main__":
    main()
