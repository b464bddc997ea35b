"""Niches as numbers of a score matrix: what each model gets, whom it attracts, what is covered; and how two mix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.merging.flat_space import Flat

Scores = Float[Tensor, "models points"]


def competition(scores: Scores, alpha: float) -> Scores:
    """What each model gets of each point, s_ij / z_j^α; points that nobody solves pay nothing."""
    z = scores.sum(0)
    return scores / torch.where(z > 0, z, 1.0) ** alpha


def fitness(scores: Scores, alpha: float = 1.0) -> Float[Tensor, " models"]:
    """f_i = Σ_j s_ij / z_j^α: what each model gets of all points."""
    return competition(scores, alpha).sum(1)


def attraction(scores: Scores, parent: int, alpha: float = 1.0) -> Float[Tensor, " models"]:
    """g(A, ·): how much each model gets where `parent` gets less."""
    shares = competition(scores, alpha)
    return (shares - shares[parent]).clamp(min=0).sum(1)


def coverage(scores: Scores) -> float:
    """Share of the points that at least one model solves (counts its best score)."""
    return float(scores.max(0).values.mean())


def diversity(scores: Scores) -> float:
    """How unlike the models' scores are: entropy of the share that solves a point, mean over points, 0 to 1 bit."""
    p = scores.mean(0).clamp(0, 1)
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean() / torch.log(torch.tensor(2.0)))


def mix(a: Flat, b: Flat, w: Float[Tensor, " models"], k: Int[Tensor, " models"], angle: str = "global") -> Flat:
    """Slerp between rows, with t = w before position k and 1 − w from k on.

    A straight line where sin Ω ≤ 1e-6, or where a side is all zeros and has no angle.

    Args:
        a: parents A.
        b: parents B.
        w: mixing weight of each pair.
        k: split point of each pair; d or more is no split.
        angle: Ω between the whole vectors, "global", or between their parts, "part".
    """
    d, w, k = a.shape[1], w.to(a.device), k.to(a.device)
    if angle == "global" or int(k.min()) >= d:
        dots, norms = (a * b).sum(1), a.norm(dim=1) * b.norm(dim=1)
        first = _coefficients(dots, norms, w)
        second = _coefficients(dots, norms, 1 - w)
    else:
        before = torch.arange(d, device=a.device) < k[:, None]
        parts = []
        for mask, t in ((before, w), (~before, 1 - w)):
            x, y = a * mask, b * mask
            parts.append(_coefficients((x * y).sum(1), x.norm(dim=1) * y.norm(dim=1), t))
        first, second = parts
    child = torch.empty_like(a)
    for row, split in enumerate(k.clamp(max=d).tolist()):
        for where, (ca, cb) in ((slice(0, split), first), (slice(split, d), second)):
            torch.add(ca[row] * a[row, where], b[row, where], alpha=float(cb[row]), out=child[row, where])
    return child


def _coefficients(dot: Tensor, norms: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    omega = torch.arccos((dot / norms.clamp(min=1e-30)).double().clamp(-1, 1))
    sine, t = omega.sin(), t.double()
    arc = (sine > 1e-6) & (norms > 0)
    safe = torch.where(arc, sine, 1.0)
    a = torch.where(arc, torch.sin((1 - t) * omega) / safe, 1 - t)
    b = torch.where(arc, torch.sin(t * omega) / safe, t)
    return a.to(dot.dtype), b.to(dot.dtype)
