"""Meta-DMoE: domain experts teach one small student, in one gradient step, what an unseen domain looks like.

    t = A(E_1(x), ..., E_M(x))                            aggregator: a transformer over the experts' features, mean
    θ' = θ - inner_lr ∇_θ mean (f_θ(x_S) - t)²            unlabelled support pictures of one domain
    min over θ, h, A of  CE(h(f_θ'(x_Q)), y_Q)            query pictures of the same domain, through the step

In meta-training the expert that saw the episode's domain is left out of A (mask), so that the domain is as good as
unseen. The gradient to A goes through the step: with inner rate η, dθ'/dt = 2η for f = θx, x = 1. At test time the
experts see one batch; what is deployed is the student.

Limits. It helps where a batch of pictures says something about the domain that one picture does not. Nets run in
evaluation mode while they are adapted (frozen batch norm and dropout). The head is not adapted.

Source: Zhong et al. 2022, algorithm 1; n3il666/Meta-DMoE, which takes learn2learn's MAML for the step. `inner_lr` is
their ilr.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.expert_aggregator import ExpertAggregator


@method(family="mixtures", paper="meta-dmoe")
class MetaDMoE(nn.Module):
    """A student that is adapted to a batch by one step towards what frozen domain experts see in it.

    Args:
        experts: feature extractors from pictures to [batch, d], each trained on domains of its own; frozen here.
        student: f, to features of the same width d.
        head: h, from features to class logits.
        aggregator: A, or None for an untrained `ExpertAggregator` of the head's width.
        inner_lr: η, rate of the adaptation step.
        inner_steps: steps of the adaptation; 0 leaves the student as it is.
        first_order: drop the second derivatives: A gets no gradient then.
        mask: leave the expert of the episode's own domain out in meta-training.

    Raises:
        ValueError: no expert.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        student: nn.Module,
        head: nn.Linear,
        *,
        aggregator: nn.Module | None = None,
        inner_lr: Annotated[float, Range(0, 1)] = 1e-3,
        inner_steps: Annotated[int, Range(0, 20)] = 1,
        first_order: bool = False,
        mask: bool = True,
    ):
        super().__init__()
        if not len(experts):
            raise ValueError("experts must hold at least one feature extractor (MetaDMoE)")
        self.experts = nn.ModuleList(experts).requires_grad_(False).eval()
        self.student, self.head = student, head
        like = {"device": head.weight.device, "dtype": head.weight.dtype}
        self.aggregator = ExpertAggregator(head.in_features).to(**like) if aggregator is None else aggregator
        self.inner_lr, self.inner_steps = inner_lr, inner_steps
        self.first_order, self.mask = first_order, mask

    def train(self, mode: bool = True) -> "MetaDMoE":
        """Set the training mode of all but the experts, which stay as they were trained."""
        super().train(mode)
        self.experts.eval()
        return self

    @torch.no_grad()
    def expert_features(self, x: Tensor) -> Float[Tensor, "batch experts d"]:
        """Stack every expert's features of the same pictures, one token for each expert.

        Raises:
            ValueError: experts of different widths.
        """
        features = [expert(x) for expert in self.experts]
        shapes = [list(f.shape) for f in features]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"experts must give features of one width [batch, d], got {shapes} (MetaDMoE)")
        return torch.stack(features, 1)

    def target(self, x: Tensor, *, left_out: int | None = None) -> Float[Tensor, "batch d"]:
        """Aggregate what the experts see.

        Args:
            x: pictures.
            left_out: expert whose token is dropped, or None.

        Raises:
            ValueError: no such expert, or nobody is left.
        """
        tokens = self.expert_features(x)
        if left_out is not None:
            keep = [i for i in range(len(self.experts)) if i != left_out]
            if len(keep) != len(self.experts) - 1 or not keep:
                raise ValueError(
                    f"left_out must be one of {len(self.experts)} experts with another one left, got {left_out} "
                    "(MetaDMoE); with one expert set mask=False"
                )
            tokens = tokens[:, keep]
        return self.aggregator(tokens)

    def adapt(
        self,
        support: Tensor,
        *,
        left_out: int | None = None,
        target: Float[Tensor, "batch d"] | None = None,
        keep_graph: bool = False,
    ) -> dict[str, Tensor]:
        """Take the inner steps and return the student's adapted parameters; the student itself is not changed.

        Args:
            support: unlabelled pictures of one domain.
            left_out: expert to leave out.
            target: t, when it is known already.
            keep_graph: so that a loss of the result reaches θ and A.

        Raises:
            ValueError: no picture to adapt to.
        """
        weights = dict(self.student.named_parameters())
        if not self.inner_steps:
            return weights
        if not len(support):
            raise ValueError("support must hold at least one picture (MetaDMoE)")
        target = self.target(support, left_out=left_out) if target is None else target
        second = keep_graph and not self.first_order
        target = target if second else target.detach()
        with torch.enable_grad():
            for _ in range(self.inner_steps):
                features = functional_call(self.student, weights, (support,))
                if features.shape != target.shape:
                    raise ValueError(
                        f"the student's features must have the shape of the experts' {list(target.shape)}, got "
                        f"{list(features.shape)} (MetaDMoE)"
                    )
                loss = F.mse_loss(features, target)
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=second, allow_unused=True)
                steps = zip(weights.items(), grads, strict=True)
                weights = {name: w if g is None else w - self.inner_lr * g for (name, w), g in steps}
        return weights if keep_graph else {name: w.detach().requires_grad_() for name, w in weights.items()}

    def forward(self, x: Tensor, *, weights: dict[str, Tensor] | None = None) -> Float[Tensor, "batch classes"]:
        """Predict with the student alone.

        Args:
            x: pictures.
            weights: from `adapt`; None is the student before the step.
        """
        return self.head(self.student(x) if weights is None else functional_call(self.student, weights, (x,)))

    def episode_loss(
        self, support: Tensor, query: Tensor, labels: Int[Tensor, " query"], *, expert: int | None = None
    ) -> Float[Tensor, ""]:
        """The outer loss: adapt to the support pictures, then cross-entropy of the query pictures.

        Args:
            support: pictures of one domain; their labels are not used.
            query: pictures of the same domain.
            labels: of the query pictures.
            expert: the one that was trained on this domain; with `mask` it is left out.
        """
        weights = self.adapt(support, left_out=expert if self.mask else None, keep_graph=True)
        return F.cross_entropy(self(query, weights=weights), labels)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and put its modes back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
