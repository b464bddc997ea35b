"""Which hidden channels of a dense model a domain needs: the masks from which Read-ME cuts its experts.

    a = silu(W_gate x) ⊙ W_up x   [tokens, D]     score_l^n(channel) = mean |a| over the tokens of domain n, in layer l
    m_l^n = the density·D channels of highest score        r_l = Π_n m_l^n (kept by all)        s_l^n = m_l^n - r_l

The residual r is computed for every token; an expert n adds its specific channels s^n.

Source: Cai et al. 2024, section 3; `get_activations.py` and `generate_mask.py` of their code, which keeps the channels
*above* the density·D-th value and so one too few; here it is exactly round(density D), of equal ones the lowest.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """Find the gated MLPs (gate_proj, up_proj, down_proj) of a transformers decoder, in order.

    Args:
        model: such as LlamaForCausalLM.

    Raises:
        ValueError: a layer has none, or there are no layers.
    """
    layers = getattr(getattr(model, "model", model), "layers", [])
    mlps = [getattr(layer, "mlp", None) for layer in layers]
    parts = ("gate_proj", "up_proj", "down_proj")
    if not mlps or not all(isinstance(getattr(mlp, part, None), nn.Linear) for mlp in mlps for part in parts):
        raise ValueError(
            f"{type(model).__name__} must have `model.layers` whose `mlp` holds {', '.join(parts)}, as Llama has"
        )
    return mlps


class Watch(ExitStack):
    """While open, keeps each MLP's input in `.inputs` and its hidden channels in `.channels`, one a layer.

    Args:
        mlps: from `gated_mlps`.
    """

    def __init__(self, mlps: list[nn.Module]):
        super().__init__()
        self.inputs: list[Tensor] = [torch.empty(0)] * len(mlps)
        self.channels: list[Tensor] = [torch.empty(0)] * len(mlps)
        for i, mlp in enumerate(mlps):
            handles = [
                mlp.gate_proj.register_forward_pre_hook(lambda _, args, i=i: self.inputs.__setitem__(i, args[0])),
                mlp.down_proj.register_forward_pre_hook(lambda _, args, i=i: self.channels.__setitem__(i, args[0])),
            ]
            for handle in handles:
                self.callback(handle.remove)


@torch.no_grad()
def channel_scores(
    model: nn.Module, domains: Mapping[str, Int[Tensor, "n length"]]
) -> Float[Tensor, "layers n_domains d_ff"]:
    """Measure how strongly each hidden channel fires on each domain: mean |a|, the input of `down_proj`.

    Args:
        model: dense; run in evaluation mode, left as it was.
        domains: name to token ids.

    Returns:
        Scores, not negative.

    Raises:
        ValueError: no domains, or a model without gated MLPs.
    """
    if not domains:
        raise ValueError("channel_scores needs at least one domain")
    mlps, was_training = gated_mlps(model), model.training
    scores = []
    try:
        model.eval()
        with Watch(mlps) as seen:
            for ids in domains.values():
                model(input_ids=ids, use_cache=False)
                scores.append(torch.stack([a.float().abs().flatten(0, -2).mean(0) for a in seen.channels]))
    finally:
        model.train(was_training)
    return torch.stack(scores, 1)


@method(family="mixtures", paper="read-me")
def keep_channels(
    scores: Float[Tensor, "layers n_domains d_ff"], *, density: Annotated[float, Range(0.01, 1.0)] = 0.5
) -> Bool[Tensor, "layers n_domains d_ff"]:
    """Keep each domain's channels of highest score, in each layer.

    Args:
        scores: from `channel_scores`.
        density: ρ, share of the channels that an expert has, residual included; at least one channel.

    Returns:
        m: exactly round(density d_ff) True in each row.

    Source: Cai et al. 2024, section 3.
    """
    count = max(round(density * scores.shape[-1]), 1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def split_channels(
    kept: Bool[Tensor, "*layers n_domains d_ff"],
) -> tuple[Bool[Tensor, "*layers d_ff"], Bool[Tensor, "*layers n_domains d_ff"]]:
    """Part masks into what all experts share and what is an expert's own.

    Args:
        kept: m, from `keep_channels`.

    Returns:
        Residual r and specific parts s; disjoint, r + s = m.
    """
    residual = kept.all(-2)
    return residual, kept & ~residual.unsqueeze(-2)
