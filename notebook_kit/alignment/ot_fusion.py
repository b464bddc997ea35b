"""Optimal-transport fusion: carry one network over into another's units by transport plans, then average the two."""

from collections.abc import Iterable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.barrier import interpolate
from notebook_kit.alignment.transport import transport_plan
from notebook_kit.alignment.transport_features import Features, record_features
from notebook_kit.alignment.transport_flow import RESIDUAL, Flow
from notebook_kit.alignment.transport_walks import compare, flow_through
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


class Transported(dict[str, Tensor]):
    """Weights of b in a's shapes, with the plans that brought them there.

    Attributes:
        plans: layer name to the plan between its units, Float[units_b, units_a].
    """

    def __init__(self, weights=(), *, plans: dict[str, Float[Tensor, "units_b units_a"]] | None = None):
        super().__init__(weights)
        self.plans = dict(plans or {})


@method(family="alignment", paper=("ot-fusion", "otfusion"))
@torch.no_grad()
def ot_fusion(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable | None = None,
    *,
    method: Annotated[str, Choice("sinkhorn", "exact")] = "sinkhorn",
    epsilon: Annotated[float, Range(1e-4, 10, log=True)] = 0.08,
    align: Annotated[str, Choice("activation", "weight")] = "activation",
    residual: Annotated[str, Choice(*RESIDUAL)] = "mean",
    qk: Annotated[str, Choice("separate", "shared", "joint")] = "separate",
    t: Annotated[float, Range(0, 1)] = 0.5,
    max_iter: Annotated[int, Range(10, 100_000, log=True)] = 500,
    features: Features | None = None,
) -> Transported:
    """Fuse two networks, of the same or of different widths, into one of the first one's shapes.

    Layer by layer, T [units_b, units_a] is the plan of least cost between the layer's units, and

        W̃_B = outᵀ(T) · W_B · in(T_before),    W = (1 − t)·W_A + t·W̃_B

    out(T) has columns that sum to 1 (a unit of the result is an average of b's units), in(T) rows that sum to 1 (what
    a unit of b sent out is spread over units of the result). The cost is the distance of two units' activations
    before the nonlinearity, as unit vectors over all samples and tokens (`align="activation"`), or of their incoming
    weights (`align="weight"`); it is divided by its largest entry, which gives ε its scale.

    In a transformer (`transport_walks` spells out the path): queries, keys and values have plans over all heads at
    once, and the output projection reads the values' plan. Norms take the plan of the stream they stand on and pass it
    on. Where a branch joins the residual stream two plans meet, and `residual` says what goes on:

        mean             ½(T_stream + T_branch)
        weighted_scalar  weighted by the mean size of a's activations on stream and branch
        weighted_matrix  the same, unit by unit
        branch, stream   one of the two;   identity: neither, unit i stays unit i

    Args:
        model_a: sets shapes, order and names of the result; not modified.
        model_b: of the same architecture and depth, any widths; carried over.
        batches: inputs to both: tensors, or mappings of keyword arguments; needed for activations and the weighted
            policies.
        method: "sinkhorn" for soft plans, "exact" for hard ones.
        epsilon: how soft: entropy against the largest cost, 1.
        align: compare units by activations or by incoming weights.
        residual: what becomes of two plans where a branch joins the stream.
        qk: queries and keys have "separate" plans, one "shared" plan (which cancels in q·k where it is hard), or one
            "joint" plan over the stacked [q; k].
        t: share of b; 0 is a, 1 is b carried over.
        max_iter: Sinkhorn's sweeps at the last epsilon.
        features: from `record_features(model_a, model_b, batches)`, to be recorded once for many calls.

    Returns:
        Transported: a state dict for model_a; `.plans` holds the plans. Fine-tune it from there: after
        `model_a.load_state_dict(result)` it is a model like any other.

    Raises:
        IncompatibleWeights: different architectures, depths, inputs or outputs.
        ValueError: no batches where activations are needed; an architecture without rules; NaN or Inf.
        RuntimeError: Sinkhorn did not converge.

    Limits: soft plans blur, so that fusing a network with itself gives it back only as ε falls. Known are MLP,
        nn.Sequential of linear and convolutional layers (re-estimate batch norm's statistics afterwards), ViT and BERT.
        For more than two networks carry each over with t=1 and average.

    Source: Imfeld et al. (2023), sections 3 and 4, after Singh and Jaggi (2019); graldij/transformer-fusion,
        `otfusion/otfusion_lib.py`. That code multiplies T by the one number n_A on both sides, which is right for equal
        widths only; ours is exact on duplicated units. It stacks weights as [q; k] and their activations as [k; q] in
        its joint mode; ours stacks both alike. Where heads differ in size, q and k are scaled by (d_B/d_A)^¼ here,
        so that the softmax sees logits of the same size.
    """
    compare(model_a, model_b)
    if features is None and (align == "activation" or residual.startswith("weighted")):
        if batches is None:
            wanted = 'align="activation"' if align == "activation" else f"residual={residual!r}"
            raise ValueError(
                f'{wanted} needs batches: pass inputs, or use align="weight" and residual="mean" (ot_fusion)'
            )
        features = record_features(model_a, model_b, batches)

    def plan(cost: Tensor) -> Tensor:
        return transport_plan(cost, method=method, epsilon=epsilon, max_iter=max_iter)

    flow = Flow(model_a, model_b, plan, features, by_weight=align == "weight", residual=residual, qk=qk)
    flow_through(flow)
    return Transported(interpolate(flow.a, flow.result(), t), plans=flow.plans)
