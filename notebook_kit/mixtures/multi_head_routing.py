"""Multi-head adapter routing: each task mixes a small inventory of LoRA skills, block by block, in the factors.

    w_q  = s / (Σ_S s + 1e-12),  s = sigmoid(Z_tq)                 [S]  for each task t and head q of h
    A_q  = Σ_S w_qS A_qS  [d_in/h, r],   B_q = Σ_S w_qS B_qS  [r, d_out/h]
    A    = A_1 above ... above A_h  [d_in, r],   B = B_1 beside ... beside B_h  [r, d_out]
    y    = W x + (x A B) / r

A [h, S, d_in/h, r] and B [h, S, r, d_out/h] are the S skills, Z [n_tasks, h, S] the router's logits: a task's own.
h = 1 is Polytropon. Sigmoids, not a softmax: several skills may be on at once, and only their proportions count.
What is mixed is the factors, so (Σ w A)(Σ w B) has cross terms; it is no mixture Σ w A B of the skills' changes.
Block q of the input and block q of the output share w_q, but every input block reaches every output block through the
r directions.
Parameters: S r (d_in + d_out) + n_tasks S h; more heads cost numbers in Z only.

Limits: linear hosts whose two sizes h divides; a task must be told (`choose_tasks`), there is no routing by content.
The gate of a token is the same at every position. Examples of one batch may belong to different tasks.

Paper: Caccia et al. 2022, section 3. peft's `poly` computes the same in evaluation; in training it samples
(stochastic=True here), mttl's main branch does not. The Indian-buffet prior on Z of the first Polytropon is left out,
as in the MHR paper.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters import Adapter, CannotFold
from notebook_kit.adapters._adapter import check_rank, exact, sizes
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range

TINY = 1e-12  # the papers' and peft's guard of the sum of the sigmoids


@method(family="mixtures", paper="mhr")
class MultiHeadRouting(Adapter):
    """Add a LoRA that each task mixes from shared skills, head by head: y = host(x) + (x A B) / rank.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_tasks: T, rows of the router.
        n_skills: S, LoRAs in the inventory.
        n_splits: h, heads that mix independently; divides d_in and d_out of the host.
        rank: r of each skill.
        stochastic: in training mix by a sample of RelaxedBernoulli(temperature 1, Z) for each example, as Polytropon
            and peft do; evaluation is always plain.

    Raises:
        ValueError: n_splits does not divide the host's sizes, rank is above min(d_in, d_out), or n_tasks < 1.

    Source: Caccia et al. 2022, equations 3 to 6; peft's PolyLayer for the initial values.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_tasks: int,
        n_skills: Annotated[int, Range(1, 64)] = 8,
        n_splits: Annotated[int, Range(1, 256)] = 8,
        rank: Annotated[int, Range(1, 256, log=True)] = 8,
        stochastic: bool = False,
    ):
        super().__init__(host)
        name = type(self).__name__
        check_rank(rank, host, name)
        d_in, d_out = sizes(host)
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be at least 1, got {n_tasks} ({name})")
        if d_in % n_splits or d_out % n_splits:
            raise ValueError(
                f"n_splits must divide the host's {d_in} inputs and {d_out} outputs, got {n_splits}; their common "
                f"divisors go up to {math.gcd(d_in, d_out)} ({name})"
            )
        self.rank, self.stochastic = rank, stochastic
        self.tasks: Tensor | int | None = None
        self.A = self.trainable(n_splits, n_skills, d_in // n_splits, rank)
        self.B = self.trainable(n_splits, n_skills, rank, d_out // n_splits)
        self.Z = nn.Parameter(torch.empty(n_tasks, n_splits, n_skills, device=self.A.device).uniform_(-1e-3, 1e-3))
        # Kaiming-uniform with a = √5 over the block's d_in/h inputs
        nn.init.uniform_(self.A, -((d_in // n_splits) ** -0.5), (d_in // n_splits) ** -0.5)

    @property
    def n_tasks(self) -> int:
        """Rows of the router."""
        return self.Z.shape[0]

    def weights(self, tasks: Int[Tensor, " batch"]) -> Float[Tensor, "batch heads skills"]:
        """The mixing weights w of these tasks, in float32; each head's sum to 1."""
        z = self.Z[tasks].float()
        if self.training and self.stochastic:
            noise = torch.rand_like(z).clamp(1e-7, 1 - 1e-7)  # a relaxed Bernoulli: logistic noise on the logit
            z = z + noise.log() - (-noise).log1p()
        s = z.sigmoid()
        return s / (s.sum(-1, keepdim=True) + TINY)

    def mixed(
        self, tasks: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch d_in rank"], Float[Tensor, "batch rank d_out"]]:
        """Mix the skills of each task into one A and one B."""
        w = self.weights(tasks).to(self.A.dtype)
        A = torch.einsum("bqs,qsdr->bqdr", w, self.A).flatten(1, 2)
        B = torch.einsum("bqs,qsrd->brqd", w, self.B).flatten(2, 3)
        return A, B

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return W x + (x A B) / r, with the A and B of each example's task."""
        y = self.host(x)
        if self._one_task() is not None:
            draws = self.training and self.stochastic  # a sample for each example
            ids = torch.full((len(x) if draws and x.ndim > 1 else 1,), self._one_task(), device=self.Z.device)
        else:
            ids = self.tasks
            if ids is None or len(ids) != len(x):
                name, got = type(self).__name__, "none was chosen" if ids is None else f"got {len(ids)}"
                raise ValueError(f"{name} needs the task of each of {len(x)} examples, {got}: choose_tasks(model, ids)")
        A, B = self.mixed(ids)
        if len(ids) == 1:
            return torch.add(y, F.linear(F.linear(x, A[0].T), B[0].T), alpha=1 / self.rank)
        rows = x[:, None] if x.ndim == 2 else x.flatten(1, -2)
        return torch.add(y, (rows @ A @ B).reshape(y.shape), alpha=1 / self.rank)

    def factors(self) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
        """Return Bᵀ / r and Aᵀ of the one task that is chosen.

        Raises:
            CannotFold: no single task is chosen.
        """
        task = self._one_task()
        if task is None:
            raise CannotFold("each task has its own weights: choose one first, choose_tasks(model, 0)")
        with torch.no_grad():
            s = self.Z[task].float().sigmoid()
            w = (s / (s.sum(-1, keepdim=True) + TINY)).to(exact(self.A).dtype)
            A = torch.einsum("qs,qsdr->qdr", w, exact(self.A)).flatten(0, 1)
            B = torch.einsum("qs,qsrd->rqd", w, exact(self.B)).flatten(1, 2)
        return B.T / self.rank, A.T

    def _one_task(self) -> int | None:
        if isinstance(self.tasks, int):
            return self.tasks
        return 0 if self.n_tasks == 1 and self.tasks is None else None

    def extra_repr(self) -> str:
        """Show the sizes in the printed model."""
        heads, skills = self.Z.shape[1:]
        return f"n_tasks={self.n_tasks}, n_skills={skills}, n_splits={heads}, rank={self.rank}"
