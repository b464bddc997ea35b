"""A bank: LoRAs that were trained apart, stood side by side in one model, with a router that sends tokens among them.

    y_t = W x_t + Σ_{i in S_t} w_ti s_i B_i A_i x_t          A [N, r, d_in], B [N, d_out, r], s_i = alpha_i / r_i

Nothing is trained here. Ranks and scales may differ (short factors are filled up with zeros), and so may the layers
that an expert changes: where it changes nothing, its A and B are zero.
A router of a bank has one row v_i [d_in] for each expert, its prototype, which comes with the expert. The rule that
`Phatgoose` and `Arrow` share, from logits z = (their local score) + (a global vote, see `Glider`):

    p = softmax(z)     S = the k largest, or the smallest set that holds top_p     w = p_S / (Σ_S p + epsilon)
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from notebook_kit.adapters import read_adapter
from notebook_kit.adapters._attach import place, refuse_nesting
from notebook_kit.adapters.read import AdapterFactors, Source
from notebook_kit.mixtures.lora_experts import LoRAExperts
from notebook_kit.routers import Router
from notebook_kit.routers._claims import top_k
from notebook_kit.routers.top_p import nucleus
from notebook_kit.routing import Routing

Prototypes = Sequence[Mapping[str, Tensor]]


class BankRouter(Router):
    """Base of the routers among ready-made experts: a local score of each token, and a vote on top.

    Args:
        d_model: width of the tokens.
        n_experts: N.
        k: experts a token.
        top_p: below 1, take instead the smallest set of experts that holds this share of the probability.
        epsilon: added to the sum that divides the weights.
    """

    def __init__(self, d_model: int, n_experts: int, *, k: int, top_p: float = 1.0, epsilon: float = 0.0):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        self.k, self.top_p, self.epsilon = k, top_p, epsilon
        self.vote: Tensor | None = None  # [N], or [batch, N] for a batch of sequences: the global router's

    def local(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score the experts by the token alone."""
        return super().logits(x)

    def logits(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens experts"]:
        """Score the experts: the local score, and the vote if there is one."""
        z = self.local(x)
        if self.vote is None:
            return z
        vote = self.vote.to(z)
        if vote.ndim == 2 and len(vote) != len(z):
            if not len(vote) or len(z) % len(vote):
                raise ValueError(f"{len(z)} tokens do not divide among {len(vote)} queries ({self._name})")
            vote = vote.repeat_interleave(len(z) // len(vote), 0)
        return z + vote

    def route(self, logits: Float[Tensor, "tokens experts"], *, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
        """Decide from the logits.

        Args:
            logits: z.
            mask: True for real tokens.
        """
        p = logits.float().softmax(1)
        if self.top_p < 1:
            picks, kept = nucleus(p.detach(), self.top_p)
        else:
            picks = top_k(logits.detach().float(), self.k)  # by z: p may round to ties
            kept = torch.ones_like(picks, dtype=torch.bool)
        if mask is not None:
            kept = kept & mask[:, None]
        weights = p.gather(1, picks) * kept
        total = weights.sum(1, keepdim=True) + self.epsilon
        weights = weights / total.where(total > 0, 1)
        return Routing(logits, p, weights, picks.where(kept, -1), p.new_zeros(()))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + (f"top_p={self.top_p:g}" if self.top_p < 1 else f"k={self.k}")


class BankLayer(LoRAExperts):
    """One linear layer of a bank: the frozen host, and every expert's factors for it.

    Args:
        host: nn.Linear or transformers' Conv1D.
        factors: for each expert B [d_out, r_i], A [r_i, d_in] and the scale; None where it changes nothing.
        router: d_in -> router of as many experts.
        dropout: share of the entries of x that the experts do not see in training.
    """

    def __init__(
        self,
        host: nn.Module,
        factors: Sequence[tuple[Tensor, Tensor, float] | None],
        router: Callable[[int], Router],
        dropout: float = 0.0,
    ):
        rank = max(part[1].shape[0] for part in factors if part is not None)
        super().__init__(host, n_experts=len(factors), rank=rank, scaling=1.0, router=router, dropout=dropout)
        with torch.no_grad():
            self.A.zero_()
            for i, part in enumerate(factors):
                if part is not None:
                    B, A, scale = part
                    self.A[i, : len(A)], self.B[i, :, : len(A)], self.scaling[i] = A, B, scale


def attach_bank(
    model: nn.Module,
    experts: Sequence[Source],
    router: Callable[[int], Router],
    *,
    prototypes: Mapping[str, Float[Tensor, "experts d_in"]] | None = None,
    dropout: float = 0.0,
) -> dict[str, BankLayer]:
    """Put a bank of LoRAs around every layer that one of them changes; everything is frozen.

    Args:
        model: that all of them were trained on; changed in place, `detach` takes the bank out again.
        experts: what `read_adapter` reads: peft folders, models that carry LoRA, (tensors, scaling).
        router: d_in -> a router of len(experts) experts.
        prototypes: for each layer the rows of the router's weight; None leaves the router as it was made.
        dropout: see `BankLayer`.

    Returns:
        The bank's layers by name.

    Raises:
        ValueError: no expert; a layer that the model lacks, or of another shape; no prototypes for a layer.
    """
    bank = read_bank(experts)
    names = sorted({name for expert in bank for name in expert.factors})
    modules, state = dict(model.named_modules()), model.state_dict()
    for expert in bank:
        expert.keys_in(state)  # raises where it does not fit
    refuse_nesting(model)
    built = {}
    for name in [name for name in modules if name in names]:
        layer = BankLayer(modules[name], [_parts(expert, name) for expert in bank], router, dropout)
        if prototypes is not None:
            if name not in prototypes:
                raise ValueError(f"there are no prototypes for {name}, only for {', '.join(prototypes)}")
            with torch.no_grad():
                layer.router.weight.copy_(prototypes[name])
        built[name] = layer
    place(model, built)
    for layer in built.values():
        for parameter in (layer.A, layer.B, *layer.router.parameters()):
            parameter.requires_grad_(False)
    return built


def read_bank(experts: Sequence[Source]) -> list[AdapterFactors]:
    """Read every expert of a bank.

    Raises:
        TypeError: one adapter instead of a sequence.
        ValueError: none at all.
    """
    if isinstance(experts, (str, Mapping, nn.Module)):
        raise TypeError(f"experts must be a sequence of adapters, got one {type(experts).__name__}; write [adapter]")
    if not len(experts):
        raise ValueError("a bank needs at least one expert, got none")
    return [read_adapter(expert) for expert in experts]


def stack_prototypes(prototypes: Prototypes) -> dict[str, Float[Tensor, "experts d_in"]]:
    """Turn each expert's own rows (layer to v [d_in]) into each layer's; zeros where an expert has none."""
    rows = {name: row for own in prototypes for name, row in own.items()}
    return {
        name: torch.stack([own.get(name, torch.zeros_like(row)).to(row) for own in prototypes])
        for name, row in rows.items()
    }


def _parts(expert: AdapterFactors, name: str) -> tuple[Tensor, Tensor, float] | None:
    if name not in expert.factors:
        return None
    left, right = expert.factors[name]
    scale = expert.scalings.get(name, 1.0) or 1.0
    return left / scale, right, scale
