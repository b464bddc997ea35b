"""Glider: a token sees its own features, a task description sees the whole; add both votes.

    local    l_i = LN(u) · LN(v_i) / √d_in         each token, each layer (`Phatgoose`; or `Arrow`)
    global   c_i = cos(e_i, q)                     once for a sequence, the same in all layers
    both     z_i = l_i + a c_i                     p = softmax(z), the k largest divided by their sum (+ 1e-6)
    a        = gamma [max_i c_i > threshold] + beta

e_i [d_e] embeds the description of the task that expert i was made for, q that of the task at hand. If some expert's
task is nearly the query's, gamma makes the global vote decide; else beta is a gentle nudge. a = 0 is the local router
alone; for a -> ∞ all tokens take the k experts of the largest c.

The paper lets a large language model write the descriptions and a text model embed them. Both are outside this kit:
`embed` is any callable from texts to vectors, and descriptions may be given as vectors. The default,
`character_ngrams`, counts spelling: it knows "rotate" from "rotated", and nothing of meaning.

Limits: the rule for a has a jump at the threshold, and it is the largest c that decides, right or wrong.
Paper: Li et al. 2024, section 4; UNITES-Lab/glider holds one q for each evaluation task and sets a by hand in its
scripts (100 for tasks that experts were made for, 3 for others, 1000 in some).
"""

import copy
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters.read import Source
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.adapter_bank import Prototypes, attach_bank, read_bank, stack_prototypes
from notebook_kit.mixtures.arrow import Arrow, arrow_prototypes
from notebook_kit.mixtures.phatgoose import Phatgoose

Texts = Sequence[str]
Embedder = Callable[[Texts], Tensor]


def character_ngrams(texts: Texts, *, n: int = 3, dim: int = 512) -> Float[Tensor, "texts dim"]:
    """Embed texts by the counts of their character n-grams, hashed into `dim` places, of unit length.

    Args:
        texts: any.
        n: characters in a gram; words are padded by spaces.
        dim: places; two grams may share one.
    """
    rows = torch.zeros(len(texts), dim)
    for row, text in zip(rows, texts, strict=True):
        padded = f" {' '.join(text.lower().split())} "
        for i in range(max(len(padded) - n + 1, 1)):
            row[zlib.crc32(padded[i : i + n].encode()) % dim] += 1
    return F.normalize(rows, dim=1)


def global_scale(
    similarity: Float[Tensor, "*batch experts"],
    *,
    gamma: Annotated[float, Range(0, 10_000)] = 100.0,
    beta: Annotated[float, Range(0, 10_000)] = 3.0,
    threshold: Annotated[float, Range(-1, 1)] = 0.8,
) -> Float[Tensor, "*batch"]:
    """Say how much the global vote weighs: gamma [max c > threshold] + beta.

    Args:
        similarity: c.
        gamma: added where an expert's task is nearly the query's.
        beta: always.
        threshold: what "nearly" means.
    """
    return gamma * (similarity.amax(-1) > threshold).to(similarity.dtype) + beta


@method(family="mixtures", paper="glider")
class Glider(nn.Module):
    """A bank of LoRAs behind a local router in every layer and one global vote for the task.

    Args:
        model: that the experts were trained on; copied.
        experts: what `read_adapter` reads.
        tasks: for each expert what its task is: a text, or rows of embeddings [N, d_e].
        gates: for each expert its layers' gates (`phatgoose_gates`); not needed with local="arrow".
        embed: texts -> vectors; for `tasks` and queries that are texts.
        local: the router of the tokens.
        weight: a, if it is to be fixed; None is the rule of gamma, beta and threshold.
        gamma: added to a where an expert's task is nearly the query's.
        beta: always in a.
        threshold: of max c.
        k: experts a token.
        top_p: below 1, take instead the smallest set that holds this share.
        temperature: of Arrow.

    Raises:
        ValueError: as many tasks or gates as experts are needed, or a k that is too large.

    Source: Li et al. 2024, equations 2 to 5.
    """

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[Source],
        tasks: Texts | Float[Tensor, "experts d_e"],
        *,
        gates: Prototypes | None = None,
        embed: Embedder = character_ngrams,
        local: Annotated[str, Choice("phatgoose", "arrow")] = "phatgoose",
        weight: Annotated[float | None, Range(0, 10_000)] = None,
        gamma: Annotated[float, Range(0, 10_000)] = 100.0,
        beta: Annotated[float, Range(0, 10_000)] = 3.0,
        threshold: Annotated[float, Range(-1, 1)] = 0.8,
        k: Annotated[int, Range(1, 64)] = 2,
        top_p: Annotated[float, Range(0.05, 1)] = 1.0,
        temperature: Annotated[float, Range(0.01, 100, log=True)] = 1.0,
    ):
        super().__init__()
        bank = read_bank(experts)
        if local == "phatgoose" and gates is None:
            raise ValueError(
                "local='phatgoose' needs gates=, one dict of each expert: phatgoose_gates; or local='arrow'"
            )
        rows = [arrow_prototypes(expert) for expert in bank] if local == "arrow" else gates
        for name, found in (("tasks", tasks), ("gates", rows)):
            if len(found) != len(bank):
                raise ValueError(f"{name} must have one entry per expert, {len(bank)}, got {len(found)} (Glider)")
        self.model, self.embed, self.n_experts = copy.deepcopy(model), embed, len(bank)
        self.weight, self.gamma, self.beta, self.threshold = weight, gamma, beta, threshold
        extra = {"k": k, "top_p": top_p} | ({"temperature": temperature} if local == "arrow" else {})
        kind = Arrow if local == "arrow" else Phatgoose
        self.layers = attach_bank(
            self.model, bank, lambda d_in: kind(d_in, len(bank), **extra), prototypes=stack_prototypes(rows)
        )
        self.register_buffer("tasks", self._vectors(tasks))
        self.similarity: Tensor | None = None

    def forward(self, *inputs, query: str | Tensor | None = None, **named):
        """Run the model, with the vote of a query if one is given.

        Args:
            inputs: of the model.
            query: the task at hand, see `ask`; None keeps the last one (at first none: the local router alone).
            named: of the model.
        """
        if query is not None:
            self.ask(query)
        return self.model(*inputs, **named)

    def ask(self, query: str | Texts | Float[Tensor, "*batch d_e"] | None) -> Float[Tensor, "*batch experts"] | None:
        """Let the task at hand vote in all layers from now on.

        Args:
            query: a text, or a vector [d_e]; a list of texts or [batch, d_e] for one query a sequence; None: no vote.

        Returns:
            The similarities c.
        """
        if query is None:
            self.similarity = vote = None
        else:
            vectors = self._vectors([query])[0] if isinstance(query, str) else self._vectors(query)
            vectors = vectors.to(self.tasks)
            if vectors.shape[-1] != self.tasks.shape[1]:
                raise ValueError(
                    f"a query must have the width of the tasks' embeddings, {self.tasks.shape[1]}, got "
                    f"{vectors.shape[-1]} (Glider)"
                )
            self.similarity = F.normalize(vectors, dim=-1) @ F.normalize(self.tasks, dim=-1).T
            vote = self.scale(self.similarity)[..., None] * self.similarity
        for layer in self.layers.values():
            layer.router.vote = vote
        return self.similarity

    def scale(self, similarity: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
        """Say how much the vote weighs: a."""
        if self.weight is not None:
            return similarity.new_full(similarity.shape[:-1], float(self.weight))
        return global_scale(similarity, gamma=self.gamma, beta=self.beta, threshold=self.threshold)

    def _vectors(self, texts: Texts | Tensor) -> Tensor:
        return (texts if isinstance(texts, Tensor) else self.embed(list(texts))).float()
