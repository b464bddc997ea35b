"""What is kept of a class when its images may not be: Gaussians of its features, to draw from later.

    class c:  Σ_k π_k N(μ_k, Σ_k),   Σ_k = cov + 1e-4 I

One component (its covariance in full, or only the diagonal), or a few found by k-means, each with a diagonal.
MOS (2412.09441) calls the drawing classifier alignment; the idea is SLCA's (Zhang et al. 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

FLOOR = 1e-4
KINDS = ("covariance", "variance", "centroids")


@dataclass(frozen=True)
class ClassGaussian:
    """A mixture of k Gaussians in d dimensions.

    Args:
        share: π, adds up to 1.
        mean: μ.
        factor: lower triangular L with Σ = L Lᵀ.
    """

    share: Float[Tensor, " k"]
    mean: Float[Tensor, "k d"]
    factor: Float[Tensor, "k d d"]

    @property
    def centre(self) -> Float[Tensor, " d"]:
        """The mean of the whole class."""
        return self.share @ self.mean

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """Draw n feature vectors."""
        component = torch.multinomial(self.share.cpu(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.mean.shape[1], generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean[component] + torch.einsum("nij,nj->ni", self.factor[component], noise)


def fit_gaussian(
    features: Float[Tensor, "n d"], kind: str = "covariance", *, n_centroids: int = 10, seed: int = 0
) -> ClassGaussian:
    """Describe a class by one Gaussian, or by a few.

    Args:
        features: of the class's images, at least two.
        kind: "covariance" (one, in full), "variance" (one, diagonal) or "centroids" (k-means, each diagonal).
        n_centroids: of k-means; fewer where there are fewer than two images for each.
        seed: of k-means.

    Raises:
        ValueError: fewer than two rows, or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r} (fit_gaussian)")
    if len(features) < 2:
        raise ValueError(f"a class needs at least 2 images to have a spread, got {len(features)} (fit_gaussian)")
    groups = [features]
    if kind == "centroids":
        nearest = _k_means(features, min(n_centroids, len(features) // 2), seed)
        groups = [features[nearest == k] for k in nearest.unique()]
    covariance = torch.stack([_covariance(group) for group in groups])
    if kind != "covariance":
        covariance = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
    covariance = covariance + FLOOR * torch.eye(features.shape[1]).to(features)
    share = torch.tensor([len(group) / len(features) for group in groups]).to(features)
    mean = torch.stack([group.mean(0) for group in groups])
    return ClassGaussian(share, mean, torch.linalg.cholesky(covariance))


def align_head(
    weight: Float[Tensor, "classes d"],
    bias: Float[Tensor, " classes"],
    gaussians: Sequence[ClassGaussian],
    *,
    epochs: int,
    draws: int,
    generator: torch.Generator,
    lr: float = 0.005,
) -> tuple[Float[Tensor, "classes d"], Float[Tensor, " classes"]]:
    """Train a linear head over all classes on features drawn from them: the classes meet although no image was kept.

    Args:
        weight, bias: of the head; not modified.
        gaussians: one a class, in the order of the head's rows.
        epochs: each draws anew; cosine to 0.
        draws: of each class an epoch, and the size of a batch.
        generator: of the draws.
        lr: of SGD with momentum 0.9 and weight decay 5e-4.

    Returns:
        The new weight and bias.
    """
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    targets = torch.arange(len(gaussians), device=weight.device).repeat_interleave(draws)
    for _ in range(epochs):
        drawn = torch.cat([gaussian.sample(draws, generator) for gaussian in gaussians])
        for batch in torch.randperm(len(drawn), generator=generator).split(draws):
            loss = F.cross_entropy(F.linear(drawn[batch], weight, bias), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return weight.detach(), bias.detach()


def _covariance(group: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    centred = group - group.mean(0)
    return centred.T @ centred / max(len(group) - 1, 1)


def _k_means(features: Float[Tensor, "n d"], k: int, seed: int, rounds: int = 20) -> Tensor:
    """Lloyd's rounds from k rows drawn at random; the index of each row's centre."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    centres = features[order[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(features, centres).argmin(1)
        # A centre that lost all its rows stays where it is.
        centres = torch.stack(
            [features[nearest == i].mean(0) if (nearest == i).any() else centres[i] for i in range(k)]
        )
    return nearest
