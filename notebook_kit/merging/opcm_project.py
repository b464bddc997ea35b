"""One matrix of OPCM: what of an expert's update D lies outside the directions that the merge M uses; see `opcm`."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from notebook_kit.merging.matrices import thin_svd

Matrix = Float[Tensor, "m n"]


class Projected(NamedTuple):
    """What is left of one matrix of an expert, and what was taken."""

    update: Tensor
    split_rank: int
    removed: float


def split_rank(sigma: Float[Tensor, " r"], alpha: float) -> int:
    """How many leading singular values are protected: up to where their share of the sum exceeds alpha."""
    above = (sigma.cumsum(0) > alpha * sigma.sum()).nonzero()
    return int(above[0]) if alpha < 1 and len(above) else int((sigma > 0).sum())


def project(d: Matrix, m: Matrix, alpha: float, block: str = "corner") -> Projected:
    """Remove from D what lies on M's directions.

    Args:
        d: D, an expert's update.
        m: M, the merge's, up to a factor.
        alpha: share of M's spectrum that is protected.
        block: "corner" or "cross".
    """
    if not m.any() or not d.any():
        return Projected(d, 0, 0.0)
    u, sigma, vh = thin_svd(m)
    r = split_rank(sigma, alpha)
    rows = u.T @ d  # [k, n]
    diagonal = (rows * vh).sum(dim=1, keepdim=True)
    if block == "corner":
        taken = diagonal * vh
        taken[:r] = (rows[:r] @ vh[:r].T) @ vh[:r]
        update = d - u @ taken
    else:
        update = d - u[:, :r] @ rows[:r]
        update -= (update @ vh[:r].T) @ vh[:r]
        update -= u[:, r:] @ (diagonal * vh)[r:]
    energy = d.square().sum()
    return Projected(update, r, float((d - update).square().sum() / energy))
