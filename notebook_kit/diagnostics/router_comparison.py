"""The same small mixture trained with one router or another: its budget, and what to measure of it."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from notebook_kit import data
from notebook_kit.diagnostics import routing as numbers
from notebook_kit.diagnostics.byte_mixture import ByteMixture
from notebook_kit.hyperparameters import hyperparameters, validate
from notebook_kit.routers import (
    DenseToSparse,
    HashRouter,
    Router,
    Routing,
    RoutingTrace,
    StableMoE,
    aux_loss,
    record_routing,
    set_step,
)

Entry = type[Router] | Router | Callable[[int, int], Router] | tuple[type[Router], Mapping[str, object]]

PARTS = 20  # of the budget, in the learning curve


@dataclass(frozen=True)
class Size:
    """How large model and batch are, and how long the budget.

    Args:
        n_experts: of each mixture.
        d_model: width.
        d_ff: hidden units of an expert.
        n_layers: mixtures.
        batch_size: windows in a batch.
        length: bytes in a window.
        lr: learning rate of Adam.
    """

    n_experts: int = 8
    d_model: int = 32
    d_ff: int = 64
    n_layers: int = 1
    batch_size: int = 16
    length: int = 32
    lr: float = 1e-2


@dataclass(frozen=True)
class Run:
    """One router, one seed: figures for a row, the learning curve, and the routing half way and at the end."""

    figures: dict[str, float | bool]
    curve: list[tuple[float, float, float]]  # share of the budget, nats per byte of the batches, MaxVio of the batches
    early: RoutingTrace
    trace: RoutingTrace


def make_router(entry: Entry, size: Size, steps: int, seed: int) -> list[Router]:
    """Make a router for each mixture.

    Args:
        entry: a class, a class with settings, a router that is made already (each mixture gets a copy), or a function
            from d_model and n_experts.
        size: of the model.
        steps: of the training; routers that follow a schedule are told it (`DenseToSparse` cools over all of it,
            `StableMoE` distils in the first third) where the settings do not say.
        seed: of the routers' weights, and of routers that draw.

    Raises:
        ValueError: settings out of range or unknown, or a made router for another size.
    """
    kind, settings = entry if isinstance(entry, tuple) else (entry, {})
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        for layer in range(size.n_layers):
            if isinstance(kind, Router):
                router = copy.deepcopy(kind)
            elif isinstance(kind, type) and issubclass(kind, Router):
                router = kind(size.d_model, size.n_experts, **_settings(kind, dict(settings), steps, seed + layer))
            elif callable(kind):
                router = kind(size.d_model, size.n_experts)
            else:
                raise ValueError(f"a router must be a class, (class, settings), a Router or a function, got {kind!r}")
            if (router.d_model, router.n_experts) != (size.d_model, size.n_experts):
                raise ValueError(
                    f"the router must be for d_model={size.d_model} and n_experts={size.n_experts}, "
                    f"got {router.d_model} and {router.n_experts}"
                )
            made.append(router)
    return made


def _settings(kind: type[Router], settings: dict, steps: int, seed: int) -> dict:
    schema = hyperparameters(kind)
    signature = {*schema, *kind.__init__.__annotations__}
    if unknown := [name for name in settings if name not in signature]:
        validate(schema, {unknown[0]: None})  # says what there is
    validate(schema, {name: value for name, value in settings.items() if name in schema})
    if "seed" in schema:
        settings.setdefault("seed", seed)
    if issubclass(kind, DenseToSparse):
        settings.setdefault("steps", steps)
    if issubclass(kind, StableMoE):
        settings.setdefault("distill_steps", max(1, steps // 3))
    if issubclass(kind, HashRouter) and settings.get("table") == "balanced" and "counts" not in settings:
        text = "".join(data.udhr(language, "train") for language in data.LANGUAGES)
        settings["counts"] = torch.bincount(torch.tensor(list(text.encode())), minlength=256)
    return settings


def train_router(
    entry: Entry,
    *,
    size: Size,
    steps: int,
    budget: str = "compute",
    seed: int = 0,
    advance: Callable[[float], None] = lambda share: None,
) -> Run:
    """Train the byte model of twelve languages with a router, then measure it on articles that nobody trained on.

    Args:
        entry: as `make_router` takes it.
        size: of model and batches.
        steps: batches of a model that uses two experts a token.
        budget: "compute": as many multiplications as `steps` batches with two experts a token need, so a router that
            uses fewer reads more text; "text": `steps` batches whatever they cost.
        seed: of weights and batches; other routers with this seed begin with the same weights and see the same text.
        advance: told the share of the budget that a step used.
    """
    started = time.perf_counter()
    net = ByteMixture(make_router(entry, size, steps, seed), d_ff=size.d_ff, seed=seed)
    texts = {language: data.udhr(language, "train") for language in data.LANGUAGES}
    draw = data.byte_batches(texts, batch_size=size.batch_size, length=size.length)
    optimizer = torch.optim.Adam(net.parameters(), lr=size.lr)
    generator, done, spent, early = torch.Generator().manual_seed(seed), 0, 0.0, None
    rows: list[tuple[float, float, float]] = []
    total = steps * net.active_parameters(2.0) if budget == "compute" else float(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while spent < total * (1 - 1e-9):
            if any(isinstance(module, DenseToSparse) for module in net.modules()):
                set_step(net, int(spent / total * steps))
            ids, _ = draw(generator)
            nats = _nats(net(ids[:, :-1]), ids[:, 1:])
            optimizer.zero_grad()
            (nats + aux_loss(net)).backward()
            optimizer.step()
            routings = [numbers.true_experts(moe.routing, size.n_experts) for moe in net.moes]
            cost = net.active_parameters(_used(routings)) if budget == "compute" else 1.0
            cost = min(cost, total - spent)
            spent, done = spent + cost, done + 1
            rows.append((spent / total, nats.item(), _mean(numbers.max_violation(r.demand) for r in routings)))
            if not torch.isfinite(nats):
                raise ValueError(f"the loss is {nats.item()} at step {done}: lower lr={size.lr:g}")
            advance(cost / total)
            if early is None and spent >= total / 2:
                early, _ = _record(net, size)
    trace, loss = _record(net, size)
    figures = {"loss": loss} | _measured(net, early, trace, size.n_experts)
    figures |= {"causal": all(moe.router.causal for moe in net.moes)}
    figures |= {"steps": done, "seconds": time.perf_counter() - started}
    return Run(figures, _curve(rows), early, trace)


def _nats(logits: Tensor, targets: Tensor) -> Float[Tensor, ""]:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def _record(net: ByteMixture, size: Size) -> tuple[RoutingTrace, float]:
    """The routing of the held-out articles, in windows of 64 bytes, and the mean loss over their bytes."""
    training, losses = net.training, []
    net.eval()
    with record_routing(net) as trace:
        for language in data.LANGUAGES:
            windows = data.byte_windows(data.udhr(language, "test"), 65)
            with trace.labelled(language):
                losses.append(float(_nats(net(windows[:, :-1]), windows[:, 1:])))
    net.train(training)
    return trace, sum(losses) / len(losses)


def _measured(net: ByteMixture, early: RoutingTrace, trace: RoutingTrace, n_experts: int) -> dict[str, float]:
    before, after = ([numbers.true_experts(r, n_experts) for r in numbers.recorded(t)] for t in (early, trace))
    information = [numbers.mutual_information(routing, trace, n_shuffles=100) for routing in after]
    used = _used(after)
    return {
        "experts_per_token": used,
        "active_parameters": net.active_parameters(used),
        "max_violation": _mean(numbers.max_violation(routing.load) for routing in after),
        "dead_experts": sum(numbers.dead_experts(routing.load) for routing in after),
        "information_bits": _mean(i.bits for i in information),
        "chance_99": _mean(i.chance_99 for i in information),
        "moved": float(numbers.drift_table(before, after)["best_changed"].mean()),
    }


def _used(routings: Sequence[Routing]) -> float:
    """Experts a token, mean over tokens and mixtures."""
    return _mean(float((routing.experts >= 0).sum()) / max(len(routing), 1) for routing in routings)


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _curve(rows: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Means over equal parts of the budget."""
    parts: dict[int, list] = {}
    for share, *rest in rows:
        parts.setdefault(min(int(share * PARTS), PARTS - 1), []).append(rest)
    return [((part + 1) / PARTS, *map(_mean, zip(*parts[part], strict=True))) for part in sorted(parts)]
