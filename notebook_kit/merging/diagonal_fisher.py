"""The diagonal Fisher: how much a model's answer hangs on each of its parameters.

    F = 1/N Σ_n Σ_c p(c|x_n) · (∇_θ log p(c|x_n))²                    [shape of θ]

p(c|x): the model's OWN distribution over the answers; labels are not used. The square is taken for each example and
each answer, before any sum: a squared batch gradient is something else. Matena and Raffel, 2021, section 3.1.

Where there are several positions (a language model's tokens), log p is the sum over positions. Its cross terms vanish
in expectation: "sampled" draws a token at each position and goes back once; "exact" goes back once for each position
and class.

Ports differ: fusion_bench puts √p · log p of a whole batch into one backward pass and squares that, so that examples
and classes get cross terms. mmatena/model_merging does as we do.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from notebook_kit.hyperparameters import Choice, Range, hyperparameters, validate
from notebook_kit.merging.examples import in_turn, inputs_of, one_of, outputs_of, rows_of, side_by_side, which_count
from notebook_kit.merging.pulled_back import pulled_back

NUMBERS = 1 << 22  # gradient entries held at a time: more is slower


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    estimator: Annotated[str, Choice("exact", "sampled", "empirical")] = "exact",
    head: Annotated[str, Choice("classes", "regression")] = "classes",
    logits: Callable[[Any], Tensor] | None = None,
    n_samples: Annotated[int, Range(1, 1000)] = 1,
    seed: Annotated[int, Range(0, 999)] = 0,
    vectorized: bool = True,
) -> dict[str, Tensor]:
    """Measure how much a model's predictions hang on each parameter.

    Args:
        model: any module; it is run in evaluation mode and left as it was.
        batches: tensors x, tuples (x, y), or mappings of arguments (of which "labels" are y and "attention_mask" says
            which positions count); examples along the first axis.
        estimator: the expectation over answers: exact, from samples, or at the true labels y.
        head: "classes" for logits, "regression" for outputs with unit variance.
        logits: output of the model -> outputs [n, classes] or [n, positions, classes], such as one task's columns;
            None takes the output, or its `.logits`.
        n_samples: draws for each example ("sampled").
        seed: of the draws.
        vectorized: examples side by side (vmap); off: one after another, for models whose flow depends on the data.

    Returns:
        dict: F, in float32 at least, for each parameter that requires a gradient; a tied weight's under all its names.

    Raises:
        ValueError: no example, no labels for "empirical", outputs of another shape, a setting out of range.
        RuntimeError: the model cannot be vectorized.

    Source:
        Matena and Raffel, 2021, arXiv 2111.09832, section 3.1; mmatena/model_merging, fisher.py.
    """
    settings = {"estimator": estimator, "head": head, "n_samples": n_samples, "seed": seed, "vectorized": vectorized}
    validate(hyperparameters(diagonal_fisher), settings)
    theta = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not theta:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient (diagonal_fisher)")
    draws = {"n_samples": n_samples, "generator": torch.Generator().manual_seed(seed)}
    each = side_by_side if vectorized else in_turn
    size = sum(p.numel() for p in theta.values())
    total = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in theta.items()}
    n = 0

    def outputs(theta: dict[str, Tensor], args: tuple, kwargs: dict) -> Tensor:
        args, kwargs = tuple(one_of(a) for a in args), {name: one_of(a) for name, a in kwargs.items()}
        return outputs_of(functional_call(model, theta, args, kwargs), logits)

    def squares(args: tuple, kwargs: dict, u: Tensor) -> dict[str, Tensor]:
        _, back = vjp(lambda theta: outputs(theta, args, kwargs), theta)
        gradients = vmap(lambda row: back(row)[0])(u)
        return {name: g.to(total[name].dtype).square().sum(0) for name, g in gradients.items()}

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            args, kwargs, labels, count = inputs_of(batch)
            with torch.no_grad():
                z = each(lambda args, kwargs: outputs(theta, args, kwargs), args, kwargs)
            kept, labels = which_count(model, kwargs, labels, z)
            vectors = pulled_back(z, kept, labels, estimator=estimator, head=head, **draws)
            width = max(1, min(len(vectors), NUMBERS // size))
            rows = max(1, NUMBERS // (size * width))
            for i in range(0, count, rows):
                where = slice(i, min(i + rows, count))
                part = [a[where] for a in args], {name: rows_of(a, where) for name, a in kwargs.items()}
                for j in range(0, len(vectors), width):
                    u = vectors.piece(where, slice(j, j + width))
                    for name, square in each(squares, *part, u).items():
                        total[name] += square.sum(0)
            n += count
    finally:
        for module, mode in modes.items():
            module.training = mode
    if n == 0:
        raise ValueError("batches hold no example (diagonal_fisher)")
    first = {id(p): name for name, p in model.named_parameters()}
    fisher = {name: tensor / n for name, tensor in total.items()}
    names = [(name, first[id(p)]) for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    return {name: fisher[source] for name, source in names}
