"""MoLA: mixtures of LoRA experts, with another number of experts in every layer of the model.

    p = softmax(x Rᵀ)   [T, N_j]          S_t = the K_j largest of p_t          g_ti = p_ti / Σ_S p_t
    y_t = W x_t + (alpha / r) Σ_{i in S_t} g_ti B_i A_i x_t

Each linear layer of transformer layer j has its own router R [N_j, d_in] and N_j experts. `MoLA.allocate` cuts the
layers into equal blocks, one for each number in the allocation. The paper's allocations for 32 layers in four blocks,
`ALLOCATIONS`, have 160 experts for each kind of linear layer (8-8-8-8 has 256); its finding is that 2-4-6-8 is best,
for the experts of low layers turn out nearly alike.

Balance: N Σ f P for each router, f the share of the picks (it sums to 1, so an even load gives 1). The official code
pools the routers of a layer first, as if expert 3 of every matrix were one expert: `layer_balance_loss`.

Limits: with K_j = 1 of several a divided weight is the constant 1, and the router would learn nothing from the task;
so there g is p itself (the official code divides). N_j = 1 is a plain LoRA, N_j = K_j weighs all experts.

Paper: Gao et al. 2024, equations 2 to 4; balance after the official code, where it is off by default.
"""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.adapters._attach import Target, _build, find_hosts, place, refuse_nesting
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.lora_experts import LoRAExperts
from notebook_kit.routers import TopK, pooled_balance_loss

ALLOCATIONS = {
    "inverted triangle": (2, 4, 6, 8),
    "triangle": (8, 6, 4, 2),
    "hourglass": (8, 2, 2, 8),
    "rectangle": (5, 5, 5, 5),
    "full": (8, 8, 8, 8),
}


@method(family="mixtures", paper="mola")
class MoLA(LoRAExperts):
    """LoRA experts beside a frozen linear layer, of which each token uses the k most probable.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_experts: N of this layer; 1 is a plain LoRA.
        k: experts a token, at most n_experts.
        rank: of each expert.
        alpha: strength; the scale is alpha / rank.
        dropout: share of the entries of x that the experts do not see in training; 0.05 in the official script.
        balance_coef: times the balance loss, 1 at an even load; 0.001 where the official code uses it.
        dispatch: how it is computed; the result is the same.

    Raises:
        ValueError: k above n_experts, or rank above min(d_in, d_out).

    Source: Gao et al. 2024, equations 2 to 4.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_experts: Annotated[int, Range(1, 256)] = 5,
        k: Annotated[int, Range(1, 64)] = 2,
        rank: Annotated[int, Range(1, 1024, log=True)] = 8,
        alpha: Annotated[float, Range(0.125, 4096, log=True)] = 16,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        balance_coef: Annotated[float, Range(0, 1)] = 0.0,
        dispatch: Annotated[str, Choice("auto", "masked", "sorted", "gathered")] = "auto",
    ):
        rules = {"k": k, "normalize": k > 1 or n_experts == 1, "balance_coef": balance_coef / k}
        parts = {"n_experts": n_experts, "rank": rank, "scaling": alpha / rank}
        router = partial(TopK, n_experts=n_experts, **rules)
        super().__init__(host, router=router, dropout=dropout, dispatch=dispatch, **parts)
        self.k = k

    @classmethod
    def allocate(
        cls,
        model: nn.Module,
        allocation: str | Sequence[int],
        *,
        targets: Target | Sequence[Target],
        k: int | Sequence[int] = 2,
        rank: int | Sequence[int] = 8,
        seed: int = 0,
        **values: Any,
    ) -> list[str]:
        """Attach MoLA with another number of experts in each block of layers, and freeze the rest.

        Args:
            model: its layers are told apart by the first number in a module's name ("model.layers.3.mlp.up_proj").
            allocation: experts for each block of equally many layers, a name of `ALLOCATIONS`, or one for each layer.
            targets: as `attach` takes them.
            k: experts a token; one number (a layer of fewer experts uses all of them), or one for each block.
            rank: of each expert, one number or one for each block.
            seed: of the initial values.
            values: further hyperparameters of MoLA.

        Returns:
            Names of the modules that carry MoLA.

        Raises:
            ValueError: as `attach`; the blocks do not divide the layers, or a list has another length.
        """
        numbers = ALLOCATIONS.get(allocation) if isinstance(allocation, str) else list(allocation)
        if numbers is None:
            raise ValueError(f"allocation must be one of {', '.join(ALLOCATIONS)}, or numbers, got {allocation!r}")
        ks = [min(k, n) for n in numbers] if isinstance(k, int) else list(k)
        ranks = [rank] * len(numbers) if isinstance(rank, int) else list(rank)
        if not len(numbers) == len(ks) == len(ranks):
            raise ValueError(f"allocation, k and rank need equal lengths, got {len(numbers)}, {len(ks)}, {len(ranks)}")
        refuse_nesting(model)
        hosts = find_hosts(model, cls, targets)
        block = _blocks(list(hosts), len(numbers))
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            built = {}
            for name, host in hosts.items():
                own = {"n_experts": numbers[block[name]], "k": ks[block[name]], "rank": ranks[block[name]]}
                built[name] = _build(cls, name, host, own | values)
        place(model, built)
        return list(built)


def share_out(weights: Sequence[float], total: int) -> list[int]:
    """Deal a fixed number of experts to blocks in proportion to weights, at least one to each.

    Args:
        weights: of the blocks, positive.
        total: experts, at least one a block.

    Returns:
        Numbers that add up to total.

    Raises:
        ValueError: fewer experts than blocks, or a weight that is not positive.
    """
    if total < len(weights) or min(weights, default=0) <= 0:
        raise ValueError(f"{total} experts for {len(weights)} blocks of weights {list(weights)} (share_out)")
    exact = [(total - len(weights)) * weight / sum(weights) for weight in weights]
    numbers = [1 + int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))  # largest remainder first
    for i in by_rest[: total - sum(numbers)]:
        numbers[i] += 1
    return numbers


def layer_balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Sum over layers of N Σ f P, the routers of a layer pooled as in the official code; 1 a layer at an even load.

    Args:
        model: carries MoLA, and has been run.

    Raises:
        ValueError: no MoLA remembers a routing.
    """
    layers: dict[int, list] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoLA) and module.routing is not None:
            layers.setdefault(layer_number(name), []).append(module.routing)
    if not layers:
        raise ValueError(f"no MoLA in {type(model).__name__} remembers a routing: run the model first")
    losses = []
    for routings in layers.values():
        probs = torch.cat([r.probs for r in routings])
        real = torch.cat([r.experts[:, 0] >= 0 for r in routings])
        losses.append(pooled_balance_loss(probs, torch.cat([r.experts for r in routings]).clamp_min(0), mask=real))
    return torch.stack(losses).sum()


def layer_number(name: str) -> int:
    """The first number in a module's name.

    Raises:
        ValueError: there is none.
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if found is None:
        raise ValueError(f"{name!r} names no layer: MoLA.allocate reads the layer from the first number in a name")
    return int(found[1])


def _blocks(names: Sequence[str], n_blocks: int) -> dict[str, int]:
    """The block of each module: its layers in order, cut into equal parts."""
    layers = sorted({layer_number(name) for name in names})
    if len(layers) % n_blocks:
        raise ValueError(f"an allocation of {n_blocks} blocks must divide {len(layers)} layers (MoLA)")
    each = len(layers) // n_blocks
    return {name: layers.index(layer_number(name)) // each for name in names}
