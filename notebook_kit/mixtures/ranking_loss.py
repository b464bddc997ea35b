"""In-batch contrastive losses: of B texts, which is the partner of text i?

    S = scale · U_A U_Bᵀ [B, B];   mnr = mean_i CE(S_i, i)           the other B - 1 texts are negatives
    mnr_plus = ½ CE(S, rows) + ½ CE(Sᵀ, columns),  rows_i = argmax_j T_ij, columns_j = argmax_i T_ij,
    T = softmax((U_A U_Aᵀ + U_B U_Bᵀ) / 2)

With unit vectors T's largest entry is on the diagonal, and mnr_plus is symmetric mnr. With raw vectors a long vector
steals its neighbours' targets; that is the official default, so normalize=True is ours.

Source: Hallee et al. 2024, models/losses.py (`clip_loss`). In the commit that was read their `MNR_loss` takes the
cosine of row i with row i only, one number a row: it has no negatives. sentence-transformers' has, with scale 20.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.hyperparameters import Range


def mnr_loss(
    a: Float[Tensor, "pairs d"],
    b: Float[Tensor, "pairs d"],
    *,
    scale: Annotated[float, Range(0.01, 1000, log=True)] = 20.0,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    """Multiple-negatives ranking: each a_i must find its b_i in the batch.

    Args:
        a: embeddings of one side.
        b: of the other; row i belongs to row i.
        scale: of the similarities, one over a temperature.
        normalize: cosines; False takes raw dot products.
    """
    a, b = _rows(a, b, normalize)
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device))


def mnr_plus_loss(
    a: Float[Tensor, "pairs d"],
    b: Float[Tensor, "pairs d"],
    *,
    scale: Annotated[float, Range(0.01, 1000, log=True)] = 20.0,
    normalize: bool = True,
) -> Float[Tensor, ""]:
    """Ranking in both directions, with targets from the texts' similarity among themselves.

    Args:
        a: embeddings of one side.
        b: of the other.
        scale: of the similarities.
        normalize: cosines; False is the official default.
    """
    rows, columns = mnr_plus_targets(a, b, normalize=normalize)
    a, b = _rows(a, b, normalize)
    scores = scale * a @ b.T
    return (F.cross_entropy(scores, rows) + F.cross_entropy(scores.T, columns)) / 2


@torch.no_grad()
def mnr_plus_targets(
    a: Float[Tensor, "pairs d"], b: Float[Tensor, "pairs d"], *, normalize: bool = True
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """The partner that mnr_plus gives to each row and to each column.

    Args:
        a: embeddings of one side.
        b: of the other.
        normalize: cosines.
    """
    a, b = _rows(a, b, normalize)
    similar = ((a @ a.T + b @ b.T) / 2).softmax(1)
    own = similar.diagonal()
    pairs = torch.arange(len(a), device=a.device)
    # A tie with the pair's own partner is the partner's: rounding must not decide.
    rows = similar.argmax(1).where(similar.amax(1) > own * (1 + 1e-5), pairs)
    columns = similar.argmax(0).where(similar.amax(0) > own * (1 + 1e-5), pairs)
    return rows, columns if not normalize else pairs


def _rows(a: Tensor, b: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    a, b = a.float(), b.float()
    return (F.normalize(a, dim=-1), F.normalize(b, dim=-1)) if normalize else (a, b)
