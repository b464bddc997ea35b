"""Which open data is near K examples of a task, without telling the same thing twice.

    q = mean of the shots' unit embeddings      take the nearest to q; of near-duplicates only the nearest to q stays

Source: Yang et al. 2024, section 3.3, and the official script data_aug, whose nearest set is not sorted before the
duplicates go: here it is, so the nearest stays.
"""

from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.hyperparameters import Range


def nearest_data(
    data: Float[Tensor, "samples d"],
    shots: Float[Tensor, "shots d"],
    *,
    n_data: Annotated[int, Range(0, 10_000_000)] = 1000,
    dedup_distance: Annotated[float, Range(0, 2)] = 0.1,
) -> Int[Tensor, " kept"]:
    """Fetch the open samples nearest to the shots, without near-duplicates.

    Args:
        data: embeddings of the open data.
        shots: embeddings of the K examples; their number counts towards n_data.
        n_data: size of the training set, shots included; the duplicates go out of it without being replaced.
        dedup_distance: a sample goes if a nearer one, itself kept or not, is closer to it than this cosine distance.

    Returns:
        Indices into data, nearest first.

    Raises:
        ValueError: no shots, embeddings of different widths, or such that are no numbers.
    """
    if not len(shots) or data.shape[1] != shots.shape[1]:
        raise ValueError(
            f"shots must be at least one embedding of the data's width {data.shape[1]}, got {list(shots.shape)} "
            "(nearest_data)"
        )
    for name, rows in (("data", data), ("shots", shots)):
        if not torch.isfinite(rows).all():
            bad = int((~torch.isfinite(rows)).any(1).nonzero()[0])
            raise ValueError(f"{name} must be finite, row {bad} is not (nearest_data)")
    data, shots = F.normalize(data, dim=1), F.normalize(shots, dim=1)
    distance = (data - shots.mean(0)).norm(dim=1)
    order = distance.sort(stable=True).indices[: max(n_data - len(shots), 0)]
    rows = data[order]
    close = (1 - rows @ rows.T < dedup_distance).tril(-1).any(1)
    return order[~close]
