"""PLeaS: merge the units that match, keep the others of both networks, and refit every layer by least squares."""

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.pleas_layers import build
from notebook_kit.alignment.pleas_pair import read_pair
from notebook_kit.alignment.pleas_plan import PleasPlan, plan_pleas
from notebook_kit.alignment.split_layer import Split, SplitLayer
from notebook_kit.alignment.taps import each
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range


@method(family="alignment", paper="pleas")
@torch.no_grad()
def pleas(
    model_a: nn.Module,
    model_b: nn.Module,
    batches: Iterable | None = None,
    *,
    budget: Annotated[float, Range(1, 2, step=0.05)] = 1.0,
    align: Annotated[str, Choice("activation", "weight", "none")] = "activation",
    least_squares: bool = True,
    ridge: Annotated[float, Range(1e-8, 100, log=True)] = 1e-3,
    allocation: Annotated[str, Choice("uniform", "late", "score")] = "uniform",
    heads: Annotated[str, Choice("shared", "separate")] = "shared",
    score: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """Join two networks into one that costs between one and two of them.

    1. Pair the units of each hidden layer (activation or weight matching). 2. Of each layer keep the worst share r of
    the pairs apart and merge the others: units [m | a | b], d(1 + r) of d. 3. Each layer starts as the block average

        W[m,m] = ½(A + B)   W[m,a] = ½A   W[m,b] = ½B        bias: ½(A + B)
        W[a,m] = A          W[a,a] = A    W[a,b] = 0         bias: A
        W[b,m] = B          W[b,a] = 0    W[b,b] = B         bias: B

    4. and is refitted: with X [rows, inputs] and Y [rows, outputs] what the two networks see and make on the batches,
    merged units as the mean of their pair, each group of rows solves

        min_W,b ‖X·Wᵀ + b − Y‖² + ridge·rows·‖W − W_average‖²

    At budget 2 the result is the mean of the two networks' outputs; at budget 1 it has the shape of one network.

    Args:
        model_a: an MLP or an nn.Sequential of linear and convolutional layers, batch norm, pooling, flattening.
        model_b: of the same architecture.
        batches: inputs to both, tensors: data, or without data any inputs alike (`noise_inputs`). None allows only
            align="weight" or "none" with least_squares=False.
        budget: multiply-adds of the result over those of one network; never exceeded.
        align: how units are paired; "none" pairs them in order.
        least_squares: refit; without it the block average stays.
        ridge: pull towards the block average.
        allocation: who is kept apart: the same share of "uniform"ly all layers, "late" layers first, or by "score".
        heads: "shared" averages the outputs; "separate" keeps both last layers, outputs [a's | b's], outside the
            budget: for two label spaces.
        score: model to a number, higher is better, for allocation="score".

    Returns:
        A new model of model_a's class whose layers are `SplitLayer`s; `split_widths` lists them.

    Raises:
        IncompatibleWeights: different architectures.
        ValueError: batches or score missing where they are needed; NaN or Inf.

    Limits: layers are fitted apart, each to what the two networks compute, not to what the result computes.

    Source: Nasery et al. (2024), sections 3 and 4; SewoongLab/PLeaS-Merging, which runs 400 steps of Adam from the
        block average over all layers where the same squares are solved exactly here. The pull towards the average in
        place of zero is this kit's: no fit is then worse than the average. Their head keeps a's bias and adds up
        separate halves; ours averages both.
    """
    needs = {
        'align="activation"': align == "activation",
        "least_squares=True": least_squares,
        "batch norm": any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model_a.modules()),
    }
    if batches is None and any(needs.values()):
        wanted = " and ".join(name for name, need in needs.items() if need)
        raise ValueError(f'{wanted} needs batches: pass inputs (noise_inputs, without data), or align="weight" (pleas)')
    if allocation == "score" and score is None:
        raise ValueError('allocation="score" needs score=... (model to a number)')
    batches = None if batches is None else list(each(batches, "pleas"))
    pair = read_pair(model_a, model_b, batches, heads=heads)

    def network(plan: PleasPlan) -> nn.Module:
        return build(pair, plan, heads, ridge if least_squares else None, batches)

    rated = None if score is None else lambda plan: float(score(network(plan)))
    return network(plan_pleas(pair, budget=budget, align=align, allocation=allocation, heads=heads, score=rated))


def noise_inputs(like: Float[Tensor, "n ..."], *, n: int | None = None, seed: int = 0) -> Float[Tensor, "m ..."]:
    """Inputs without data: independent noise with the overall mean and standard deviation of some inputs.

    Args:
        like: gives the shape, and two numbers: mean and deviation over everything.
        n: how many; as many by default.
        seed: of the noise.
    """
    shape = (len(like) if n is None else n, *like.shape[1:])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)
    return like.mean() + like.std() * noise.to(like.device)


def split_widths(model: nn.Module) -> dict[str, Split]:
    """Layer to its numbers of units, (merged, a's own, b's own), of a network that `pleas` made."""
    return {name: layer.outputs for name, layer in model.named_modules() if isinstance(layer, SplitLayer)}
