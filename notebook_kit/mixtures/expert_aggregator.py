"""Meta-DMoE's aggregator and its training: a transformer over expert tokens, trained through the student's step.

    F = [E_1(x), ..., E_M(x)]                 tokens, no position and no expert embedding: the order does not matter
    F ← F + MSA(LN F);  F ← F + MLP(LN F)     depth blocks, MLP of width 2d with GELU
    A(F) = mean over the tokens

Source: Zhong et al. 2022, section 3.2; n3il666/Meta-DMoE, src/transformer.py (16 heads, dropout 0.1).
"""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.hyperparameters import Range


class ExpertAggregator(nn.Module):
    """Pre-norm transformer blocks over one token for each expert, then the mean.

    Args:
        d_features: d.
        depth: number of blocks.
        n_heads: of the attention; divides d.
        dropout: in attention and MLP.

    Raises:
        ValueError: heads that do not divide the width.
    """

    def __init__(
        self,
        d_features: int,
        *,
        depth: Annotated[int, Range(1, 12)] = 1,
        n_heads: Annotated[int, Range(1, 64)] = 4,
        dropout: Annotated[float, Range(0, 0.9)] = 0.1,
    ):
        super().__init__()
        if d_features % n_heads:
            raise ValueError(f"n_heads must divide the width {d_features}, got {n_heads} (ExpertAggregator)")
        self.blocks = nn.ModuleList(_Block(d_features, n_heads, dropout) for _ in range(depth))

    def forward(self, tokens: Float[Tensor, "batch experts d"]) -> Float[Tensor, "batch d"]:
        """Aggregate.

        Args:
            tokens: features, one row for each expert that takes part.
        """
        for block in self.blocks:
            tokens, _ = block(tokens)
        return tokens.mean(1)

    def attention(self, tokens: Float[Tensor, "batch experts d"]) -> Float[Tensor, "batch experts experts"]:
        """The last block's attention, mean over heads: row i says whom expert i's token listens to.

        Args:
            tokens: features.
        """
        for block in self.blocks:
            tokens, weights = block(tokens)
        return weights


class _Block(nn.Module):
    def __init__(self, d: int, n_heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(2))
        self.qkv, self.out, self.n_heads = nn.Linear(d, 3 * d), nn.Linear(d, d), n_heads
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * d, d))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, m, d = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, m, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * (d // self.n_heads) ** -0.5).softmax(-1)
        x = x + self.drop(self.out((weights @ v).transpose(1, 2).reshape(b, m, d)))
        return x + self.drop(self.mlp(self.norms[1](x))), weights.mean(1)


def meta_train(
    model,
    episodes: Callable[[torch.Generator], tuple],
    *,
    steps: Annotated[int, Range(1, 1_000_000)] = 600,
    lr: Annotated[float, Range(0, 1)] = 1e-3,
    aggregator_lr: Annotated[float, Range(0, 1)] = 3e-4,
    decay: Annotated[float, Range(0.01, 1)] = 0.96,
    epoch: Annotated[int, Range(1, 1_000_000)] = 100,
    seed: int = 0,
) -> list[float]:
    """Meta-train student, head and aggregator in place, by Adam; experts are not touched.

    Args:
        model: a `MetaDMoE`.
        episodes: draws (support, query, query labels, expert of that domain or None), all of one domain.
        steps: episodes.
        lr: of student and head (their slr).
        aggregator_lr: of the aggregator (their tlr).
        decay: factor of both rates after each epoch.
        epoch: episodes in an epoch.
        seed: of the episodes.

    Returns:
        The outer loss of every episode.

    Raises:
        ValueError: the loss is no number any more.
    """
    from notebook_kit.mixtures.meta_dmoe import evaluating

    own = [*model.student.parameters(), *model.head.parameters()]
    groups = [{"params": own, "lr": lr}, {"params": list(model.aggregator.parameters()), "lr": aggregator_lr}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, epoch, decay)
    generator, history = torch.Generator().manual_seed(seed), []
    with evaluating(model):
        for step in range(1, steps + 1):
            support, query, labels, expert = episodes(generator)
            loss = model.episode_loss(support, query, labels, expert=expert)
            if not torch.isfinite(loss):
                raise ValueError(f"the outer loss is {loss.item()} in episode {step}: lower inner_lr={model.inner_lr}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            history.append(loss.item())
    return history


def pretrain_aggregator(
    model,
    head: nn.Module,
    batches: Callable[[torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: Annotated[int, Range(1, 1_000_000)] = 300,
    lr: Annotated[float, Range(0, 1)] = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train the aggregator in place to name the class from all experts' features.

    Args:
        model: a `MetaDMoE`.
        head: from aggregated features to class logits, such as LayerNorm and Linear; trained too.
        batches: draws pictures and labels of all source domains.
        steps: optimiser steps.
        lr: rate of Adam.
        seed: of the batches and of dropout.

    Returns:
        The loss of every step.
    """
    from notebook_kit.training import fit

    both = nn.ModuleList([model.aggregator, head])

    def loss(parts, batch):
        return F.cross_entropy(parts[1](parts[0](model.expert_features(batch[0]))), batch[1])

    return fit(both, batches, loss, steps=steps, lr=lr, seed=seed, progress=False)["loss"].tolist()
