"""`routing_view`: route a recorded trace again, live, and draw it; `ROUTERS` says by which rules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from notebook_kit.diagnostics import routing as numbers
from notebook_kit.figures.routing_flow import LETTERS, LINES, confusion_figure, drift_figure, flow_figure, text_figure
from notebook_kit.figures.routing_pictures import (
    co_activation_figure,
    entropy_figure,
    label_figure,
    label_of_token,
    layer_figure,
    load_figure,
    token_figure,
)
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers import (
    BalancedAssignment,
    DenseToSparse,
    ExpertChoice,
    HashRouter,
    LossFreeBias,
    NullExperts,
    Router,
    StochasticExperts,
    TopK,
    TopP,
)
from notebook_kit.routers.reroute import route_trace
from notebook_kit.routing import Routing, RoutingTrace

__all__ = ["PICTURES", "ROUTERS", "WINDOW", "Rules", "label_of_token", "routing_view", "token_figure"]

WINDOW = 64  # tokens that fit side by side and can still be read
ASSIGNED = 8192  # tokens of a balanced assignment where a picture needs several
PAIRS = ("drift", "confusion")  # pictures of two traces
PICTURES = ("text", "tokens", "layers", "labels", "load", "entropy", "co-activation", "flow", *PAIRS)


@dataclass(frozen=True)
class Rules:
    """What the sliders say; each router uses what it knows."""

    k: int = 2
    capacity_factor: float | None = None
    threshold: float = 0.5
    bias: float = 1.0


def _top_k(n_experts: int, rules: Rules, **more) -> Router:
    # One expert with a weight divided by itself is a constant; offline there is no gradient to lose.
    more = {"k": rules.k, "normalize": more.get("k", rules.k) > 1} | more
    return TopK(1, n_experts, capacity_factor=rules.capacity_factor, balance_coef=0.0, **more)


def _sigmoid(n_experts: int, rules: Rules) -> Router:
    return LossFreeBias(1, n_experts, k=rules.k, normalize=rules.k > 1)


# What `routing_view` can re-route by: (n_experts, rules) -> router.
ROUTERS: dict[str, Callable[[int, Rules], Router]] = {
    "top-k": _top_k,
    "top-k, best first": lambda n, rules: _top_k(n, rules, priority="batch"),
    "switch": lambda n, rules: _top_k(n, rules, k=1, convention="switch", normalize=False),
    "gshard": lambda n, rules: _top_k(n, rules, convention="gshard"),
    "sigmoid": _sigmoid,
    "loss-free bias": _sigmoid,
    "expert choice": lambda n, rules: ExpertChoice(1, n, k=rules.k),
    "balanced assignment": lambda n, rules: BalancedAssignment(1, n, evaluation="balanced"),
    "top-p": lambda n, rules: TopP(1, n, threshold=rules.threshold, balance_coef=0.0, entropy_coef=0.0),
    "null experts": lambda n, rules: NullExperts(1, n, k=rules.k, n_null=rules.k, balance_coef=0.0),
    "dense to sparse": lambda n, rules: DenseToSparse(
        1, n, threshold=rules.threshold, temperature=1.0, decay="constant", evaluation="dense"
    ),
    "hash": lambda n, rules: HashRouter(1, n),
    "by lot": lambda n, rules: StochasticExperts(1, n),
}
# Those that do not use k; the titles leave it out.
WITHOUT_K = ("as recorded", "switch", "balanced assignment", "top-p", "dense to sparse", "hash", "by lot")


def routing_view(
    trace: RoutingTrace,
    *,
    other: RoutingTrace | None = None,
    picture: Annotated[str, Choice(*PICTURES)] = "tokens",
    layer: Annotated[int, Range(0, 255)] = 0,
    router: Annotated[str, Choice("as recorded", *ROUTERS)] = "as recorded",
    k: Annotated[int, Range(1, 512)] = 2,
    capacity_factor: Annotated[float | None, Range(0.25, 4, step=0.25)] = None,
    temperature: Annotated[float, Range(0.1, 10, log=True)] = 1.0,
    threshold: Annotated[float, Range(0, 1)] = 0.5,
    bias: Annotated[float, Range(0, 1)] = 1.0,
    start: Annotated[int, Range(0, 10_000_000)] = 0,
) -> go.Figure:
    """Route a trace again and draw it.

    20 000 tokens take a few hundredths of a second; balanced assignment, which is solved exactly, about a tenth for
    each layer that the picture shows; "flow", "drift" and "confusion" assign the first 8192 tokens only, and say so.

    Args:
        trace: from `record_routing`.
        other: the same text, recorded with another checkpoint; for the pictures "drift" and "confusion".
        picture: what to draw: text coloured by expert; tokens, layers, labels or load against experts; entropy; experts
            that work together; flow from layer to layer; and of two checkpoints how far tokens drifted, and from where
            to where.
        layer: of the trace, from 0; the first of the picture "flow"; not used by "layers" and "drift".
        router: whose rules; "as recorded" is the model's own, and leaves everything but picture, layer, start unused.
        k: experts a token (expert choice: in the mean; null experts: picks; switch: always 1).
        capacity_factor: slots of an expert relative to an even share, over the whole trace; None is no limit. Of the
            top-k family.
        temperature: the logits are divided by it first; low is sure, high is even.
        threshold: top-p: share of probability to reach. dense to sparse: the least gate that counts. null experts: what
            every null's probability is beside the true ones', so a pick of less computes nothing.
        bias: loss-free bias: how much of the bias that evens this trace's load is added; 0 is none.
        start: first token of the pictures "text" and "tokens".

    Returns:
        go.Figure

    Raises:
        ValueError: no such layer, k above the number of experts, no labels or token ids where they are needed, no
            `other` of the same text, or an empty trace.
    """
    rules = Rules(k, capacity_factor, threshold, bias)
    told = router if router in WITHOUT_K else f"{router}, k={k}"

    # Exact assignments of several layers would take too long to be live.
    tokens = ASSIGNED if router == "balanced assignment" and picture in ("flow", *PAIRS) else None
    if tokens is not None and len(trace) > tokens:
        told += f", first {tokens} tokens"

    def routed(layers, of=trace):
        return [_route(of, index, router, rules, temperature, tokens) for index in layers]

    every = range(len(trace.layers))
    if picture in PAIRS:
        if other is None:
            raise ValueError(f"the picture {picture!r} needs other=, the same text recorded with another checkpoint")
        numbers.same_text(trace, other)
    if picture == "drift":
        return drift_figure(numbers.drift_table(routed(every), routed(every, other)), title=f"all layers, {told}")
    if picture == "layers":
        return layer_figure(numbers.load_table(routed(every)), title=f"all layers, {told}")
    if picture == "flow":
        trace.layer_logits(layer)  # raises if there is none
        shown = every[min(layer, max(len(every) - 2, 0)) :][:6]
        return flow_figure(routed(shown), first_layer=shown[0], title=told)
    (routing,) = routed([layer])
    place = f"layer {layer}, {told}"
    begin = min(start, max(len(trace) - 1, 0))
    if picture == "confusion":
        return confusion_figure(routing, routed([layer], other)[0], title=place)
    if picture == "text":
        return text_figure(routing, trace.text(begin, begin + LINES * LETTERS), start=begin, title=place)
    if picture == "tokens":
        return token_figure(routing, trace.text(begin, begin + WINDOW), start=begin, title=place)
    if picture == "labels":
        information = numbers.mutual_information(routing, trace, n_shuffles=100)
        return label_figure(numbers.specialisation(routing, trace), information, title=place)
    if picture == "load":
        return load_figure(routing, title=place)
    if picture == "entropy":
        return entropy_figure(numbers.entropy(routing.probs), routing.logits.shape[1], title=place)
    return co_activation_figure(numbers.co_activation(routing), title=place)


@torch.no_grad()
def _route(
    trace: RoutingTrace, layer: int, router: str, rules: Rules, temperature: float, tokens: int | None
) -> Routing:
    if router == "as recorded":
        return trace.layer(layer)
    logits = trace.layer_logits(layer)[:tokens] / temperature
    n_experts = logits.shape[1]
    if router == "hash":
        return route_trace(_hash(trace, n_experts, layer), trace, logits)
    with torch.random.fork_rng(devices=[]):
        made = ROUTERS[router](n_experts, rules).eval()
    if router == "by lot":
        made.generator.manual_seed(layer)  # or all layers would draw alike
    if router == "loss-free bias" and rules.bias:
        made.bias.copy_(rules.bias * _even_bias(logits, rules.k))
    if router == "null experts":
        null = logits.logsumexp(1, keepdim=True) + torch.tensor(max(rules.threshold, 1e-30)).log()
        logits = torch.cat([logits, null.expand(-1, made.n_null)], 1)
    return numbers.true_experts(route_trace(made, trace, logits), n_experts)


def _hash(trace: RoutingTrace, n_experts: int, seed: int) -> Router:
    if len(trace) and int(trace.tokens.min()) < 0:
        raise ValueError("the router 'hash' needs token ids, and this trace has none: its model takes no ids")
    return HashRouter(1, n_experts, vocab_size=max(256, int(trace.tokens.max()) + 1), seed=seed)


def _even_bias(logits: Float[Tensor, "tokens experts"], k: int) -> Float[Tensor, " experts"]:
    """The bias that evens the load: steps of loss-free balancing that get smaller, on some 1000 of the tokens."""
    some, router = logits[:: max(1, len(logits) // 1024)], _sigmoid(logits.shape[1], Rules(k))
    for step in range(25):
        router.bias_rate = 0.1 * 0.84**step
        router.counts.copy_(router.route(some).load)
        router.update_bias()
    return router.bias
