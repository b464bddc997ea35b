"""Transport plans: pair the units of two networks softly, and also where one network has more of them."""

import warnings
from typing import Annotated

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range

ANNEALING = 50  # sweeps at each epsilon on the way down
MISPLACED = 1e-3  # share of the mass that may be out of place before the last rounding


@method(family="alignment", paper="sinkhorn-distances")
@torch.no_grad()
def transport_plan(
    cost: Float[Tensor, "n m"],
    *,
    method: Annotated[str, Choice("sinkhorn", "exact")] = "sinkhorn",
    epsilon: Annotated[float, Range(1e-4, 10, log=True)] = 0.08,
    max_iter: Annotated[int, Range(10, 100_000, log=True)] = 500,
    source: Float[Tensor, " n"] | None = None,
    target: Float[Tensor, " m"] | None = None,
) -> Float[Tensor, "n m"]:
    """Find how to move mass from rows to columns at the least cost, blurred by an entropy term.

    T = argmin ⟨T, M⟩ − ε·H(T)  over T ≥ 0 with T·1 = source and Tᵀ·1 = target,  H(T) = −Σ T (log T − 1)

    M [n, m] is the cost and T [n, m] the plan. For ε > 0 the solution is diag(u)·exp(−M/ε)·diag(v): Sinkhorn's sweeps
    scale rows and columns in turn until both sums are right. As ε falls, T tends to the unblurred plan, which for
    n = m and uniform mass is a permutation divided by n; as ε grows, to source·targetᵀ, everything with everything.

    Args:
        cost: M; any finite numbers.
        method: "sinkhorn" for ε > 0, "exact" for ε = 0 (a linear programme).
        epsilon: ε, in units of the cost; not used by "exact".
        max_iter: sweeps at the last epsilon.
        source: mass of each row, uniform 1/n by default.
        target: mass of each column, uniform 1/m by default; must add up to the source's sum.

    Returns:
        T in float64 on the cost's device, T ≥ 0, with the marginals exact to rounding.

    Raises:
        ValueError: NaN or Inf in the cost, or masses that are negative or do not add up to the same.
        RuntimeError: Sinkhorn left more than a thousandth of the mass out of place after max_iter sweeps.

    Limits: sweeps needed grow as ε falls. Here ε is halved down from the largest cost, each stage starting at the
        scalings of the last, in a stabilised form in which no exp(−M/ε) underflows; what mass is still out of place at
        the end is moved in proportion (Altschuler, Weed and Rigollet 2017, algorithm 2).

    Source: Cuturi (2013), equation 2 and algorithm 1; solved by POT (`ot.bregman.sinkhorn_stabilized`, `ot.emd`), and
        by scipy's assignment where the plan is a permutation.
    """
    import ot  # brings scikit-learn along, so only when it is needed

    n, m = cost.shape
    _check_finite(cost, "cost")
    a = _masses(source, n, "source", cost)
    b = _masses(target, m, "target", cost)
    if abs(a.sum() - b.sum()) > 1e-5 * a.sum():
        raise ValueError(f"source and target must hold the same mass, got {a.sum():.6g} and {b.sum():.6g}")
    b = b * (a.sum() / b.sum())  # to the last digit
    M = cost.double().cpu().numpy()
    if method == "exact":
        if n == m and source is None and target is None:
            plan = torch.zeros(n, n, dtype=torch.float64)
            plan[linear_sum_assignment(M)] = 1 / n
            return plan.to(cost.device)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # POT only warns where it did not get to the end
            plan = ot.emd(a.numpy(), b.numpy(), M, numItermax=max(100_000, 100 * n * m))
        return torch.from_numpy(plan).to(cost.device)

    M = M - M.min()  # a constant moves no mass
    stage, scalings = max(float(M.max()), epsilon), None
    while True:
        last = stage <= epsilon
        plan, log = ot.bregman.sinkhorn_stabilized(
            a.numpy(),
            b.numpy(),
            M,
            max(stage, epsilon),
            numItermax=max_iter if last else ANNEALING,
            stopThr=1e-9,
            warmstart=scalings,
            print_period=10,
            log=True,
            warn=False,
        )
        if last:
            break
        stage, scalings = stage / 2, (log["alpha"], log["beta"])
    plan = torch.from_numpy(plan)
    misplaced = ((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()) / a.sum()
    if not misplaced <= MISPLACED:  # NaN too
        raise RuntimeError(
            f"Sinkhorn did not converge: {misplaced:.1e} of the mass is out of place after {max_iter} sweeps at "
            f"epsilon {epsilon:g}; raise max_iter or epsilon, or use method='exact' (transport_plan)"
        )
    return _round(plan, a, b).to(cost.device)


def ground_cost(
    z_b: Float[Tensor, "k units_b"], z_a: Float[Tensor, "k units_a"], *, center: bool = True
) -> Float[Tensor, "units_b units_a"]:
    """Euclidean distance between units as unit vectors, divided by the largest.

    Args:
        z_b: one column a unit, on k samples (or k incoming weights).
        z_a: the same samples in the other network.
        center: take each unit's mean away first; the distance is then √(2 − 2·correlation).

    Returns:
        M in [0, 1], float64. A unit that never varies is as far from all others as uncorrelated ones are.

    Raises:
        ValueError: NaN or Inf in the features, or other numbers of rows.

    Source: Imfeld et al. (2023), appendix; graldij/transformer-fusion, `otfusion/ground_metric.py`.
    """
    if len(z_b) != len(z_a):
        raise ValueError(f"units are compared row by row, got {len(z_b)} rows of b and {len(z_a)} of a (ground_cost)")
    units = []
    for z, name in ((z_b, "z_b"), (z_a, "z_a")):
        _check_finite(z, name)
        z = z.double()
        z = z - z.mean(0) if center else z
        norm = z.norm(dim=0)
        units.append(torch.where(norm > 1e-10, z / norm.clamp(min=1e-10), 0.0))
    cost = (2 - 2 * units[0].T @ units[1]).clamp(min=0).sqrt()
    return cost / cost.max().clamp(min=1e-10)


def outgoing(plan: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The plan with columns that sum to 1: a unit of the result is an average of units."""
    return plan / plan.sum(0, keepdim=True).clamp(min=1e-300)


def incoming(plan: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    """The plan with rows that sum to 1: what a unit sent out is spread over units of the result."""
    return plan / plan.sum(1, keepdim=True).clamp(min=1e-300)


def _masses(mass: Tensor | None, n: int, name: str, cost: Tensor) -> Float[Tensor, " n"]:
    if n == 0:
        raise ValueError(f"cost must have rows and columns, got shape {list(cost.shape)} (transport_plan)")
    if mass is None:
        return torch.full((n,), 1 / n, dtype=torch.float64)
    _check_finite(mass, name)
    if mass.shape != (n,) or (mass < 0).any() or mass.sum() <= 0:
        raise ValueError(f"{name} must hold {n} masses >= 0, got shape {list(mass.shape)}, least {mass.min():g}")
    return mass.double().cpu()


def _round(plan: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "n m"]:
    """The nearest thing with exact marginals: shrink rows and columns that hold too much, spread what is missing."""
    plan = plan * (a / plan.sum(1).clamp(min=1e-300)).clamp(max=1)[:, None]
    plan = plan * (b / plan.sum(0).clamp(min=1e-300)).clamp(max=1)[None]
    missing_a, missing_b = (a - plan.sum(1)).clamp(min=0), (b - plan.sum(0)).clamp(min=0)
    total = missing_a.sum()
    return plan if total <= 0 else plan + torch.outer(missing_a, missing_b) / total


def _check_finite(tensor: Tensor, name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or Inf: is a network broken, or a unit's activation overflowing?")
