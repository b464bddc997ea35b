"""Hash routing: a fixed table says which expert computes a token id. Nothing is learned, nothing has to be balanced.

    y_t = Σ_m E_{h_m(id_t)}(x_t)          h_m: id -> expert, fixed before training; every weight is 1

One hash (M = 1) is the plain layer: y_t = E_{h(id_t)}(x_t). MultiHash cuts each expert's hidden units into M segments
and lets every segment come from an expert of its own hash. Here a segment *is* an expert: for the paper's N experts of
f hidden units take n_experts = N M of f/M units, of which hash m has those from m N on; the sum is the same.

| table     | who shares an expert                                   | needs        |
|-----------|--------------------------------------------------------|--------------|
| random    | ids by lot                                             |              |
| balanced  | ids so that every expert gets equally many occurrences | `counts`     |
| bigram    | pairs (id before, id) by lot; a first token is alone   |              |
| clustered | similar ids: the paper's warning, it is uneven         | `embeddings` |
| dispersed | similar ids are kept apart                             | `embeddings` |

Limits. The layer must be told the token ids, `router(x, tokens=ids)`, `MoE(...)(x, tokens=ids)`; hidden states do not
tell. In generation with a cache a bigram's earlier id must be given (`previous=`). The paper's default is random too.

Source: Roller et al. 2021, sections 3.2 and 3.3. Bigrams are hashed to one of 65536 places of a random table.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.routers import hash_tables
from notebook_kit.routers.router import Router
from notebook_kit.routing import Routing

PLACES = 1 << 16  # of a bigram table


@method(family="routers", paper="hash-layers")
class HashRouter(Router):
    """Each token goes where a fixed table sends its id, with weight 1.

    Args:
        d_model: width of the tokens; plays no part.
        n_experts: experts in all, N M; a multiple of n_hashes.
        table: how the table is made, see above.
        n_hashes: M; more than one needs a table made by lot (random, bigram).
        vocab_size: number of ids.
        seed: of the lot.
        counts: how often each id occurs, for "balanced": `torch.bincount(ids, minlength=vocab_size)`.
        embeddings: of all ids, for "clustered" and "dispersed".

    Raises:
        ValueError: counts or embeddings are missing, not needed, or not one an id; n_hashes does not fit.
    """

    needs_tokens = True

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        *,
        table: Annotated[str, Choice("random", "balanced", "bigram", "clustered", "dispersed")] = "random",
        n_hashes: Annotated[int, Range(1, 64)] = 1,
        vocab_size: Annotated[int, Range(1, 10_000_000)] = 256,
        seed: Annotated[int, Range(0, 2**31 - 1)] = 0,
        counts: Int[Tensor, " ids"] | None = None,
        embeddings: Float[Tensor, "ids d"] | None = None,
    ):
        super().__init__(d_model, n_experts)
        del self.weight
        self.register_parameter("weight", None)
        if n_experts % n_hashes:
            raise ValueError(f"n_experts must be a multiple of n_hashes={n_hashes}, got {n_experts} (HashRouter)")
        if n_hashes > 1 and table not in ("random", "bigram"):
            raise ValueError(f"n_hashes={n_hashes} needs a table made by lot, random or bigram, got {table!r}")
        self._check(table, "counts", counts, ("balanced",), vocab_size)
        self._check(table, "embeddings", embeddings, ("clustered", "dispersed"), vocab_size)
        self.k, self.kind, self.vocab_size, each = n_hashes, table, vocab_size, n_experts // n_hashes
        self.needs_previous = table == "bigram"
        if table == "balanced":
            rows = [hash_tables.balanced_table(counts, each)]
        elif table in ("clustered", "dispersed"):
            rows = [getattr(hash_tables, f"{table}_table")(embeddings, each, seed)]
        else:
            size = PLACES if table == "bigram" else vocab_size
            rows = hash_tables.random_table(n_hashes * size, each, seed).split(size)
        # [M, ids]; in the state dict, so that a trained model keeps its experts' ids
        self.register_buffer("table", torch.stack([row + m * each for m, row in enumerate(rows)]))

    def _check(self, table: str, name: str, given: Tensor | None, users: tuple[str, ...], vocab_size: int) -> None:
        if (given is not None) != (table in users):
            needed = "needs" if table in users else "does not use"
            raise ValueError(f"the table {table!r} {needed} {name}= (HashRouter); {', '.join(users)} use it")
        if given is not None and len(given) != vocab_size:
            raise ValueError(f"{name} must have vocab_size={vocab_size} rows, got {len(given)} (HashRouter)")

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """There are none: zeros."""
        return x.new_zeros(len(x), self.n_experts)

    def forward(
        self,
        x: Float[Tensor, "tokens d_model"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
        previous: Int[Tensor, "*batch"] | None = None,
    ) -> Routing:
        """Route tokens by their ids; see `route`."""
        return self.route(self.logits(x), mask=mask, tokens=tokens, previous=previous)

    def route(
        self,
        logits: Float[Tensor, "tokens experts"],
        *,
        mask: Bool[Tensor, " tokens"] | None = None,
        tokens: Int[Tensor, "*batch"] | None = None,
        previous: Int[Tensor, "*batch"] | None = None,
    ) -> Routing:
        """Look the experts up.

        Args:
            logits: of what shape the answer is; their values play no part.
            mask: True for real tokens.
            tokens: ids, [tokens] (one sequence) or [sequences, length].
            previous: the id before each token, -1 for none; read by bigrams only. None: that of `tokens`.
        """
        self.check_logits(logits, mask)
        ids = self.check_tokens(tokens, len(logits), self.vocab_size, mask)
        if self.kind == "bigram":
            if previous is None:
                known = tokens if mask is None else tokens.where(mask.view_as(tokens), -1)
                previous = torch.cat([torch.full_like(known[..., :1], -1), known[..., :-1]], -1)
            before = self.check_tokens(previous, len(logits), self.vocab_size, mask, low=-1)
            # Fibonacci hashing: the upper 16 bits of key times 2^64 / golden ratio, modulo 2^64.
            ids = ((ids * (self.vocab_size + 1) + before + 1) * -7046029254386353131 >> 48) & (PLACES - 1)
        experts = self.table[:, ids].T
        probs = logits.new_zeros(logits.shape, dtype=torch.float32).scatter_(1, experts, 1 / self.k)
        weights = torch.ones_like(experts, dtype=torch.float32)
        if mask is not None:
            weights, experts = weights * mask[:, None], experts.where(mask[:, None], -1)
        return Routing(logits, probs, weights, experts, probs.new_zeros(()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, table={self.kind!r}, n_hashes={self.k}, vocab_size={self.vocab_size}"
