"""Self-refined adapter retrieval: a first guess of the class names an adapter, and the adapter may correct the guess.

    i_0 = task(argmax_c o_c)        i_{k+1} = task(argmax_c ℓ_c(i_k))        until i_{k+1} = i_k, `rounds` at most
    output = softmax(ℓ) + softmax(T · o)

o [n, classes] cosine logits of the prototypes; ℓ(i) [n, classes] the head's logits on the features of adapter i,
over all classes seen; task(c) the task that class c came with; T the number of tasks seen. ℓ in the output is the
last one computed. Nothing is trained and no label is used: the features of every adapter can be computed beforehand.
Paper: Sun et al. 2024 (MOS), section on self-refined adapter retrieval; official code sun-hailong/AAAI25-MOS,
`models/mos.py`. Limits: an adapter that is wrong and sure of itself confirms itself.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range


@dataclass(frozen=True)
class Retrieval:
    """What retrieval came to.

    Args:
        path: the adapter after each round; column 0 is the prototypes' guess, a settled image repeats its adapter.
        used: rounds that an image took, which is the number of adapters it asked.
        adapter: whose logits the answer is made of.
        output: the answer; its largest entry is the predicted class (a column, not a label).
    """

    path: Int[Tensor, "n rounds_and_1"]
    used: Int[Tensor, " n"]
    adapter: Int[Tensor, " n"]
    output: Float[Tensor, "n classes"]

    @property
    def column(self) -> Int[Tensor, " n"]:
        """The predicted class, as a column of the logits."""
        return self.output.argmax(1)


@method(family="expert_merging", paper="mos-model-surgery")
def refine_retrieval(
    adapted: Float[Tensor, "tasks n classes"],
    prototypes: Float[Tensor, "n classes"],
    tasks: Int[Tensor, " classes"],
    *,
    rounds: Annotated[int, Range(1, 64)] = 4,
    ensemble: bool = True,
) -> Retrieval:
    """Let a model choose its adapter, look at the class this gives, and choose again until it agrees with itself.

    Args:
        adapted: ℓ, the head's logits on each adapter's features.
        prototypes: o, cosine logits in [-1, 1].
        tasks: which task each class came with; also the number of its adapter.
        rounds: how many adapters an image may ask, at most; 1 keeps the prototypes' choice, which is no refinement.
        ensemble: add the prototypes' probabilities to the answer.

    Returns:
        Retrieval: path, rounds used, adapter, output.

    Raises:
        ValueError: shapes that do not fit, a task without an adapter, or logits with NaN or Inf.

    Source: Sun et al. 2024.
    """
    n_tasks, n, classes = adapted.shape
    if prototypes.shape != (n, classes) or tasks.shape != (classes,):
        raise ValueError(
            f"prototypes must be [{n}, {classes}] and tasks [{classes}] to fit adapted {list(adapted.shape)}, got "
            f"{list(prototypes.shape)} and {list(tasks.shape)} (refine_retrieval)"
        )
    if classes == 0 or int(tasks.min()) < 0 or int(tasks.max()) >= n_tasks:
        raise ValueError(f"tasks must name adapters 0 to {n_tasks - 1}, got {tasks.tolist()} (refine_retrieval)")
    if not (torch.isfinite(adapted).all() and torch.isfinite(prototypes).all()):
        raise ValueError("logits must be finite, got NaN or Inf (refine_retrieval)")
    rows = torch.arange(n, device=tasks.device)
    adapter = tasks[prototypes.argmax(1)]
    path, used, asked = [adapter], torch.zeros_like(adapter), adapter
    moving = torch.ones_like(adapter, dtype=torch.bool)
    for _ in range(rounds):
        asked = torch.where(moving, adapter, asked)
        used += moving
        adapter = torch.where(moving, tasks[adapted[adapter, rows].argmax(1)], adapter)
        moving = moving & (adapter != asked)
        path.append(adapter)
    # As the paper's code does: the answer is made of the last logits computed, not of the adapter named last.
    output = adapted[asked, rows].softmax(1)
    if ensemble:
        output = output + (n_tasks * prototypes).softmax(1)
    return Retrieval(torch.stack(path, 1), used, asked, output)
