"""What `diagonal_fisher` pulls back through a network: gradients of log-likelihoods with respect to its outputs.

With z the logits of one position and p = softmax(z), ∇_z log p(c) = e_c − p. All estimators of the Fisher are the
mean square of Jᵀu, J = ∂z/∂θ, over some vectors u:

    exact      u = √p_c (e_c − p), for every position and class c alone
    sampled    u = e_ĉ − p at all positions at once, ĉ ~ p, divided by √n_samples
    empirical  u = e_y − p at all positions at once, y the labels (−100: none)
    regression (unit variance): u = e_k; a standard normal draw; y − z
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label that transformers and torch use for "no label"


@dataclass
class PulledBack:
    """The vectors u of one batch, made piece by piece.

    Args:
        z: outputs.
        kept: positions that count; padding does not.
        estimator: "exact", "sampled" or "empirical".
        head: "classes" or "regression".
        answers: for "sampled" and "empirical": a class or a vector of residuals for each draw and position.
    """

    z: Float[Tensor, "n positions outputs"]
    kept: Bool[Tensor, "n positions"]
    estimator: str
    head: str
    answers: Int[Tensor, "n draws positions"] | Float[Tensor, "n draws positions outputs"] | None = None

    def __len__(self) -> int:
        """How many vectors each example has."""
        return self.z[0].numel() if self.answers is None else self.answers.shape[1]

    def piece(self, rows: slice, vectors: slice) -> Float[Tensor, "n vectors positions outputs"]:
        """Return some of the vectors of some of the examples."""
        z, kept = self.z[rows], self.kept[rows]
        p = z.softmax(-1) if self.head == "classes" else None
        u = self._alone(z, p, vectors) if self.answers is None else self._at_once(p, self.answers[rows, vectors])
        return u * kept[:, None, :, None]

    def _alone(self, z: Tensor, p: Tensor | None, vectors: slice) -> Tensor:
        n, positions, outputs = z.shape
        index = torch.arange(positions * outputs, device=z.device)[vectors]
        position, c = index // outputs, index % outputs
        row = F.one_hot(c, outputs).to(z).expand(n, -1, -1)
        if p is not None:
            row = (row - p[:, position]) * p[:, position, c].sqrt()[..., None]
        u = z.new_zeros(n, len(index), positions, outputs)
        u[:, torch.arange(len(index), device=z.device), position] = row
        return u

    def _at_once(self, p: Tensor | None, answers: Tensor) -> Tensor:
        if p is None:
            u = answers
        else:
            labelled = answers != IGNORED
            u = F.one_hot(answers.clamp(min=0), p.shape[-1]).to(p.dtype) - p[:, None]
            u = u * labelled[..., None]
        return u / self.answers.shape[1] ** 0.5


def pulled_back(
    z: Float[Tensor, "n positions outputs"],
    kept: Bool[Tensor, "n positions"],
    labels: Tensor | None,
    *,
    estimator: str,
    head: str,
    n_samples: int,
    generator: torch.Generator,
) -> PulledBack:
    """Choose the answers of a batch: none (all of them), drawn from the model, or the labels.

    Raises:
        ValueError: "empirical" without labels, or labels that do not fit the outputs.
    """
    n, positions, outputs = z.shape
    answers = None
    if estimator == "sampled" and head == "classes":
        p = z.float().softmax(-1).reshape(-1, outputs).cpu()  # where the generator is
        drawn = torch.multinomial(p, n_samples, replacement=True, generator=generator)
        answers = drawn.reshape(n, positions, n_samples).transpose(1, 2).to(z.device)
    elif estimator == "sampled":
        answers = torch.randn(n, n_samples, positions, outputs, generator=generator).to(z)
    elif estimator == "empirical":
        if labels is None:
            raise ValueError("the empirical Fisher needs labels: batches of (x, y), or mappings with 'labels'")
        expected = n * positions * (1 if head == "classes" else outputs)
        if labels.numel() != expected:
            raise ValueError(f"labels of shape {list(labels.shape)} do not fit outputs of shape {list(z.shape)}")
        if head == "classes":
            answers = labels.long().reshape(n, 1, positions)
            if int(answers.max()) >= outputs:
                raise ValueError(f"labels must be under {outputs}, the number of classes, got {int(answers.max())}")
        else:
            answers = (labels.reshape(z.shape).to(z.dtype) - z)[:, None]
    return PulledBack(z, kept, estimator, head, answers)
