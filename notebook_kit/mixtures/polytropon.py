"""Polytropon: tasks share an inventory of LoRA skills, and each task learns how much of every skill it takes.

    w = s / Σ s,  s = sigmoid(Z_t)  [S]      A = Σ_S w_S A_S      B = Σ_S w_S B_S      y = W x + (x A B) / r

The one-headed case of `MultiHeadRouting`, which has the symbols. In training the paper samples s from a relaxed
Bernoulli with logits Z: noise that makes a skill's use on-or-off; hence stochastic=True here.

Paper: Ponti et al. 2022, section 2. Their Indian-buffet prior on Z is left out, as in peft and in the MHR paper.
"""

from typing import Annotated

from torch import nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.multi_head_routing import MultiHeadRouting


@method(family="mixtures", paper="polytropon")
class Polytropon(MultiHeadRouting):
    """Add a LoRA that each task mixes from shared skills: `MultiHeadRouting` with one head.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_tasks: T, rows of the router.
        n_skills: S, LoRAs in the inventory.
        rank: r of each skill.
        stochastic: sample the skills in training, as the paper and peft do.

    Raises:
        ValueError: rank above min(d_in, d_out), or n_tasks < 1.

    Source: Ponti et al. 2022, equation 5.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_tasks: int,
        n_skills: Annotated[int, Range(1, 64)] = 8,
        rank: Annotated[int, Range(1, 256, log=True)] = 8,
        stochastic: bool = True,
    ):
        super().__init__(host, n_tasks=n_tasks, n_skills=n_skills, n_splits=1, rank=rank, stochastic=stochastic)
