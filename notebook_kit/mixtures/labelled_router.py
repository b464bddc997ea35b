"""A router whose loss reads what a linear layer cannot see: a label of each token, the sample it is of, and padding.

    z = x Wᵀ      weights, experts = choose(z, softmax z)      loss = loss(z, weights, what is told of the rows)

`sample_labels` tells the layers of a model. A subclass says how it chooses and what it loses.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.routers import Router
from notebook_kit.routing import Routing


@dataclass(frozen=True)
class Told:
    """What `sample_labels` says to a layer: see there; and how many layers hear it."""

    labels: Tensor | None = None
    mask: Tensor | None = None
    n_layers: int = 1


@dataclass(frozen=True)
class Rows:
    """What is told of each row: who is real, its label, the number of its sequence; and how many layers hear it."""

    mask: Bool[Tensor, " tokens"] | None = None
    labels: Int[Tensor, " tokens"] | None = None
    sequences: Int[Tensor, " tokens"] | None = None
    n_layers: int = 1


class LabelledRouter(Router):
    """Base of the routers whose loss reads a label of each token.

    Args:
        d_model: width of the tokens.
        n_experts: N.
    """

    def choose(
        self, z: Float[Tensor, "tokens experts"], p: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return weights and experts of every row, padding not yet taken out.

        Args:
            z: logits, float32.
            p: their softmax.
        """
        raise NotImplementedError(f"{self._name} does not say how it chooses")

    def loss(
        self, z: Float[Tensor, "tokens experts"], weights: Float[Tensor, "tokens k"], rows: Rows
    ) -> Float[Tensor, ""]:
        """Return the loss, times its coefficient.

        Args:
            z: logits, float32.
            weights: as chosen; 0 for padding.
            rows: what is told of them.
        """
        raise NotImplementedError(f"{self._name} does not say what it loses")

    def forward(
        self, x: Float[Tensor, "tokens d_model"], *, mask: Bool[Tensor, " tokens"] | None = None, **about
    ) -> Routing:
        """Route tokens.

        Args:
            x: tokens.
            mask: True for real tokens.
            about: labels, sequences and n_layers of `route`.
        """
        return self.route(self.logits(x), mask=mask, **about)

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        labels: Int[Tensor, " tokens"] | None = None,
        sequences: Int[Tensor, " tokens"] | None = None,
        n_layers: int = 1,
    ) -> Routing:
        """Decide from the logits.

        Args:
            logits: z.
            mask: True for real tokens.
            labels: of each token; None: none are known.
            sequences: number of each token's sample; None: each token is one.
            n_layers: routers that share the loss.
        """
        z = logits.float()
        p = z.softmax(1)
        weights, experts = self.choose(z, p)
        if mask is not None:
            weights, experts = weights * mask[:, None], experts.where(mask[:, None], -1)
        rows = Rows(mask, labels, sequences, n_layers)
        return Routing(logits, p, weights, experts, self.loss(z, weights, rows))
