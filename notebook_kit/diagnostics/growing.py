"""Numbers about mixtures that grow out of a dense model: gates that cool, channels that domains share, serving."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.diagnostics.dynamic_routing import experts_per_token
from notebook_kit.diagnostics.routing import shared_information
from notebook_kit.mixtures import ReadME, expert_batches, expert_cache, keep_channels, split_channels
from notebook_kit.routers import DenseToSparse, gumbel_noise, temperature_schedule
from notebook_kit.routing import Routing

POLICIES = ("belady", "lru", "lfu", "random")


def gate_at(
    logits: Float[Tensor, "tokens experts"],
    *,
    temperature: float,
    threshold: float = 1e-3,
    hard: bool = False,
    noise: bool = True,
    seed: int = 0,
) -> Routing:
    """Route recorded logits by a dense-to-sparse gate at one temperature, as in training.

    Args:
        logits: z, without noise.
        temperature: τ.
        threshold: gates at or below it are cut.
        hard: the largest gate only.
        noise: add Gumbel noise.
        seed: of the noise: the same at every temperature, so that a slider moves nothing else.
    """
    settings = {"temperature": temperature, "decay": "constant", "threshold": threshold, "balance_coef": 0.0}
    router = DenseToSparse(1, logits.shape[1], switch_to_hard=0 if hard else None, **settings)
    return router.route(logits, noise=gumbel_noise(logits, seed=seed) if noise else None)


def active_course(
    snapshots: Float[Tensor, "moments tokens experts"],
    steps: Sequence[int],
    *,
    duration: int,
    temperature: float,
    final_temperature: float,
    decay: str,
    threshold: float,
) -> pd.DataFrame:
    """Follow recorded logits through a schedule: what it would have made of them.

    Args:
        snapshots: logits of the same tokens at some steps of training.
        steps: at which.
        duration: D of the schedule.
        temperature: at step 0.
        final_temperature: at step D; at most `temperature` counts.
        decay: of `temperature_schedule`.
        threshold: of the gate.

    Returns:
        DataFrame: step, temperature, experts (mean active a token).
    """
    rows = []
    for step, logits in zip(steps, snapshots, strict=True):
        cooled = {"temperature": temperature, "final_temperature": min(final_temperature, temperature), "decay": decay}
        tau = temperature_schedule(step, duration, **cooled)
        counts = experts_per_token(gate_at(logits, temperature=tau, threshold=threshold)).float()
        rows.append({"step": step, "temperature": tau, "experts": float(counts.mean()) if len(counts) else 0.0})
    return pd.DataFrame(rows, columns=["step", "temperature", "experts"])


def mask_table(kept: Bool[Tensor, "layers n_domains d_ff"]) -> pd.DataFrame:
    """Tabulate each layer's masks, in shares of its channels.

    Args:
        kept: from `keep_channels`.

    Returns:
        DataFrame: residual (kept by all domains), specific (an expert's own, mean), any (kept by some domain: what is
        stored), runs (what a token computes).
    """
    residual, specific = split_channels(kept)
    columns = {
        "residual": residual.float().mean(-1),
        "specific": specific.float().mean((1, 2)),
        "any": kept.any(1).float().mean(-1),
        "runs": kept.float().mean((1, 2)),
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


@torch.no_grad()
def domain_likelihood(readme: ReadME, windows: Mapping[str, Int[Tensor, "n length"]]) -> dict[str, float]:
    """Score each domain behind its own expert, in every token: what a router that knew the domain would reach.

    Args:
        readme: its experts in the order of the domains.
        windows: domain to token ids.

    Returns:
        Mean log-likelihood in nats a token, by domain.
    """
    figures = {}
    for expert, (name, ids) in enumerate(windows.items()):
        log_p = readme(ids, choices=torch.full_like(ids, expert)).logits[:, :-1].log_softmax(-1)
        figures[name] = float(log_p.gather(-1, ids[:, 1:, None]).mean())
    return figures


def density_curve(
    model: nn.Module,
    scores: Float[Tensor, "layers n_domains d_ff"],
    windows: Mapping[str, Int[Tensor, "n length"]],
    densities: Iterable[float],
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Score a dense model of which only a share of the MLP runs: a domain's own channels, or random ones.

    Args:
        model: dense.
        scores: from `channel_scores`, of the domains in the order of `windows`.
        windows: held-out token ids.
        densities: shares of the channels.
        seed: of the random channels.

    Returns:
        DataFrame: density, domain, random: mean log-likelihood in nats a token.
    """
    drawn = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    rows = []
    for density in densities:
        row = {"density": float(density)}
        for name, values in (("domain", scores), ("random", drawn)):
            readme = ReadME(model, keep_channels(values, density=float(density)), router="layer-wise").eval()
            figures = domain_likelihood(readme, windows)
            row[name] = sum(figures.values()) / len(figures)
        rows.append(row)
    return pd.DataFrame(rows)


def agreement_table(choices: Int[Tensor, "layers batch length"], n_experts: int) -> pd.DataFrame:
    """Say how often neighbouring layers choose the same expert for a token, beside chance.

    Args:
        choices: of each layer.
        n_experts: N.

    Returns:
        DataFrame: layers ("0-1", ...), agreement (share of tokens), chance (if the two were independent), bits
        (mutual information).
    """
    flat, rows = choices.flatten(1), []
    for i, (first, then) in enumerate(pairwise(flat)):
        shares = [torch.bincount(row, minlength=n_experts).float() / max(len(row), 1) for row in (first, then)]
        row = {"layers": f"{i}-{i + 1}", "agreement": float((first == then).float().mean())}
        rows.append(row | {"chance": float(shares[0] @ shares[1]), "bits": shared_information(first, then)})
    return pd.DataFrame(rows, columns=["layers", "agreement", "chance", "bits"])


def cache_table(
    sequence: Int[Tensor, " tokens"],
    capacities: Iterable[int],
    *,
    lookaheads: Sequence[int] = (16,),
    policies: Sequence[str] = POLICIES,
) -> pd.DataFrame:
    """Tabulate hit rates.

    Args:
        sequence: the expert of each token.
        capacities: one a row.
        lookaheads: belady with so many coming tokens known, a column each.
        policies: a column each; belady's sees everything.

    Returns:
        DataFrame: capacities x policies.
    """
    table = {}
    for capacity in capacities:
        row = {policy: expert_cache(sequence, capacity=capacity, policy=policy).hit_rate for policy in policies}
        for reach in lookaheads:
            row[f"belady, {reach} ahead"] = expert_cache(sequence, capacity=capacity, lookahead=reach).hit_rate
        table[capacity] = row
    return pd.DataFrame(table).T.rename_axis("capacity")


def batch_table(choices: Int[Tensor, "requests tokens"], batch_sizes: Iterable[int]) -> pd.DataFrame:
    """Tabulate what grouping requests by expert saves and what it costs.

    Args:
        choices: the expert of each request's tokens.
        batch_sizes: most tokens in a batch.

    Returns:
        DataFrame by batch size and policy: batches, tokens (mean in a batch), loads (experts a token, none kept between
        batches), wait and longest_wait (in batches).
    """
    rows, names = [], []
    for size in batch_sizes:
        for policy in ("arrival", "expert"):
            run = expert_batches(choices, batch_size=size, policy=policy)
            total, count = max(choices.numel(), 1), max(len(run.batches), 1)
            names.append((size, policy))
            row = {"batches": len(run.batches), "tokens": choices.numel() / count, "loads": run.loads / total}
            rows.append(row | {"wait": sum(run.waits) / total, "longest_wait": max(run.waits, default=0)})
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(names, names=["batch_size", "policy"]))
