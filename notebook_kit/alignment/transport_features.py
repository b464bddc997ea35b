"""What two networks, of whatever widths, compute at every layer: the features that transport plans compare."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from notebook_kit.alignment.taps import each, listening, run
from notebook_kit.alignment.transport import ground_cost

WATCHED = (nn.Linear, nn.Conv2d, nn.Embedding)


class Features:
    """What two networks compute at every layer on the same inputs.

    Args:
        a: module name to its outputs (to its inputs for a LayerNorm), Float[rows, units]; rows are samples and tokens.
        b: the same of the other network.
    """

    def __init__(self, a: dict[str, Tensor], b: dict[str, Tensor]):
        self.a, self.b = a, b
        self._costs: dict[tuple, Tensor] = {}

    def cost(self, *names: str, joint: bool = False) -> Float[Tensor, "units_b units_a"]:
        """Ground cost of one layer's units; of several layers, stacked as more samples, or as more units if joint."""
        unknown = [name for name in names if name not in self.a or name not in self.b]
        if unknown:
            raise ValueError(f"these features know no layer {unknown[0]!r}: were they recorded on other networks?")
        key = (*names, joint)
        if key not in self._costs:
            self._costs[key] = ground_cost(
                *(torch.cat([side[name] for name in names], int(joint)) for side in (self.b, self.a))
            )
        return self._costs[key]


@torch.no_grad()
def record_features(model_a: nn.Module, model_b: nn.Module, batches: Iterable) -> Features:
    """Run two networks on the same inputs and keep what their layers compute.

    Args:
        model_a: one network.
        model_b: the other, of any width.
        batches: inputs: tensors, or mappings of keyword arguments. A few hundred are enough; all is kept in memory.

    Raises:
        ValueError: no inputs; NaN or Inf shows when a cost is asked for.
    """
    batches = list(each(batches, "record_features"))
    return Features(*(_outputs(model, batches) for model in (model_a, model_b)))


def _outputs(model: nn.Module, batches: list) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def keep(name):
        def hook(module, args, output):
            x = args[0] if isinstance(module, nn.LayerNorm) else output
            x = x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, (*WATCHED, nn.LayerNorm))
    ]
    with listening(model, handles):
        for batch in batches:
            run(model, batch)
    return {name: torch.cat(rows) for name, rows in seen.items()}
