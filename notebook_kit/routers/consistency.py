"""Two passes through different experts must agree: the symmetric Kullback-Leibler divergence of their predictions.

    CR = ½ [KL(p‖q) + KL(q‖p)] = ½ Σ_v (p_v - q_v)(log p_v - log q_v)      p = softmax(a), q = softmax(b)
    L = CE(a, y) + CE(b, y) + α CR                                         means over the real tokens

Source: Zuo et al. 2021, equations 4 and 5 (α is `consistency_coef`). Their code sums over tokens, the cross-entropy
too; VITA-Group's re-implementation halves the two cross-entropies and doubles CR.
"""

from typing import Annotated

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range


@method(family="routers", paper="thor")
def consistency_loss(
    a: Float[Tensor, "*batch classes"],
    b: Float[Tensor, "*batch classes"],
    *,
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Measure how far two predictions disagree: the mean of ½ (KL(p‖q) + KL(q‖p)) in nats.

    Args:
        a: logits of one pass.
        b: logits of the other; the gradient flows through both.
        mask: True for real tokens.

    Returns:
        Scalar, 0 where the predictions are the same.
    """
    log_p, log_q = a.float().log_softmax(-1), b.float().log_softmax(-1)
    each = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    return _mean(each, mask)


@method(family="routers", paper="thor")
def two_pass_loss(
    a: Float[Tensor, "*batch classes"],
    b: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    consistency_coef: Annotated[float, Range(0, 100)] = 5.0,
    label_smoothing: Annotated[float, Range(0, 1)] = 0.1,
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """THOR's loss of two independent passes: both cross-entropies, and the price of disagreeing.

    Args:
        a: logits of one pass.
        b: logits of the other.
        targets: classes.
        consistency_coef: α, times CR; 5 in the paper's script.
        label_smoothing: of the cross-entropies; 0.1 in the paper's script.
        mask: True for real tokens.

    Returns:
        Scalar.
    """
    classes = a.shape[-1]
    errors = [
        F.cross_entropy(
            logits.float().reshape(-1, classes), targets.reshape(-1), reduction="none", label_smoothing=label_smoothing
        ).reshape(targets.shape)
        for logits in (a, b)
    ]
    return _mean(errors[0] + errors[1], mask) + consistency_coef * consistency_loss(a, b, mask=mask)


def _mean(values: Tensor, mask: Tensor | None) -> Float[Tensor, ""]:
    if mask is not None:
        values = values[mask]
    return values.sum() / max(values.numel(), 1)
