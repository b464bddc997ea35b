"""The straight-through estimator: choose the permutation by the loss in the middle, with gradients that ignore it."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from torch import Tensor

from notebook_kit.alignment.permutations import Permutations, permute
from notebook_kit.alignment.spec import PermutationSpec
from notebook_kit.alignment.weight_matching import weight_matching
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.weights import Weights, check


@method(family="alignment", paper="git-re-basin")
def straight_through(
    spec: PermutationSpec,
    a: Weights,
    b: Weights,
    loss: Callable[[dict[str, Tensor], Any], Tensor],
    batches: Iterable,
    *,
    steps: Annotated[int, Range(1, 100_000, log=True)] = 100,
    lr: Annotated[float, Range(1e-5, 10, log=True)] = 0.3,
    momentum: Annotated[float, Range(0, 0.99)] = 0.9,
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
    progress: bool = True,
) -> Permutations:
    """Find the permutations of b's units for which the midpoint of the two networks has the least loss.

    The loss is what we care about, but it has no gradient with respect to a permutation. So free weights θ stand in
    for it, and each step

        π ← weight matching of b to θ, begun at the last π          (project)
        g ← ∇_w L(w) at w = ½ (a + π(b))                           (look in the middle)
        θ ← SGD(θ, ½ g)                                            (as if π(b) were θ itself)

    From θ = a, the first π is that of weight matching. The π of least loss is kept.

    Args:
        spec: what may move together, from `permutation_spec`.
        a: state dict whose order is kept.
        b: state dict to be reordered, of the same keys and shapes.
        loss: (weights, batch) -> scalar that torch can differentiate in the weights, lower is better; see
            `torch.func.functional_call`.
        batches: what `loss` takes, in turn; each new π is judged by its mean loss over all of them.
        steps: of gradient descent.
        lr: learning rate of θ; the paper's 0.01 needs many more steps.
        momentum: of gradient descent.
        seed: of the visiting orders of weight matching.
        progress: show a bar.

    Returns:
        Permutations: name to index vector for `permute(spec, result, b)`. `.objective` is the score of the π kept so
        far, minus its mean loss, first that of weight matching, then after each step; it never falls.

    Raises:
        IncompatibleWeights: keys or shapes of a and b differ, or are not those of the spec.
        ValueError: no batches, or a loss that is NaN or infinite.

    Limits: hundreds of matchings and gradients, where the other ways need one. Permutations are chosen on `batches`:
        what is gained on them need not be there on others. Running statistics of batch norm are averaged as they are;
        let `loss` run the model in training mode to do without.

    Source: Ainsworth, Hayase and Srinivasa (2022), section 3.3 and algorithm 3; samuela/git-re-basin, which judges π
        by the loss of whole epochs.
    """
    from tqdm.auto import trange

    check(a, [b], names=["b"])
    spec.check(a, "a")
    batches = list(batches)  # they are gone through again and again
    if not batches:
        raise ValueError("straight_through needs at least one batch, got none (was a generator already used up?)")
    theta = {name: w.detach().clone() for name, w in a.items()}
    learned = [name for name, w in a.items() if w.is_floating_point() and name not in spec.passive]
    speed = {name: torch.zeros_like(theta[name]) for name in learned}
    found, best, history, judged = None, None, [], float("inf")

    def middle(permutations: Permutations) -> dict[str, Tensor]:
        moved = permute(spec, permutations, b)
        return {name: torch.lerp(w, moved[name], 0.5) if w.is_floating_point() else w for name, w in a.items()}

    for step in (bar := trange(steps, desc="straight_through", disable=not progress)):
        new = weight_matching(spec, theta, b, seed=seed + step, start=found)
        if found is None or _differ(found, new):
            with torch.no_grad():
                judged = float(torch.stack([loss(middle(new), batch) for batch in batches]).double().mean())
            if judged != judged or judged == float("inf"):
                raise ValueError(f"the loss in the middle is {judged} at step {step} (straight_through)")
            if best is None or judged < -history[-1]:
                best = new
        found = new
        history.append(max(-judged, history[-1] if history else -judged))
        if step == 0:
            history.append(history[0])
        w = middle(found)
        for name in learned:
            w[name].requires_grad_()
        value = loss(w, batches[step % len(batches)])
        gradients = torch.autograd.grad(value, [w[name] for name in learned], allow_unused=True)
        for name, g in zip(learned, gradients, strict=True):
            if g is not None:
                speed[name].mul_(momentum).add_(g, alpha=0.5)  # ½: the middle moves half as far as θ
                theta[name].sub_(speed[name], alpha=lr)
        if step % 10 == 0:
            bar.set_postfix(best=f"{-history[-1]:.3f}", refresh=False)
    return Permutations(best, signs=best.signs, objective=history)


def _differ(one: Permutations, two: Permutations) -> bool:
    if any(not torch.equal(one[perm], two[perm]) for perm in one):
        return True
    signs = one.signs.keys() | two.signs.keys()
    return any(not torch.equal(*(p.signs.get(perm, torch.ones(len(one[perm]))) for p in (one, two))) for perm in signs)
