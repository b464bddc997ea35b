"""MeteoRA: all the LoRA adapters there are in one model, and a small gate in every linear layer that picks per token.

    z = x Gᵀ   [T, L]          S_t = the k largest of z_t          w_t = softmax(z_t,S / temperature)
    y_t = W x_t + Σ_{i in S_t} w_ti s_i B_i A_i x_t                s_i = alpha_i / r_i of adapter i
    loss = gate_loss_coef * mean over tokens and gates of CE(z_t, adapter of token t's sample)

`MeteoRA.embed` puts a bank of ordinary LoRA adapters (peft folders, models that carry them, tensors) into a model.
Adapters and W are frozen; the gates are trained on a mix of all tasks, with the task loss and the loss above.
Adapters of lower rank are filled up with zeros, which changes nothing; a layer that an adapter leaves alone gets B = 0.

With k = 1 the weight is 1, and the gate learns from its own loss only. The temperature acts on the weights of the
picked, not on who is picked: 1 for single tasks, 15 to 30 for prompts that chain 3 to 10 tasks.

Paper: Xu, Lai, Huang 2024, section 3. The paper trains the gates; the released script unfreezes the adapters too
(train_adapters=True), uses gate_loss_coef 50, and draws G from N(0, 1) or, loading several adapters, as nn.Linear
does, as here. The code shifts the labels with the language model's; give token labels shifted if you want that.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.adapters._adapter import sizes
from notebook_kit.adapters._attach import _build, find_hosts, place, refuse_nesting
from notebook_kit.adapters.read import AdapterFactors, Source, read_adapter
from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.labelled_router import LabelledRouter, Rows
from notebook_kit.mixtures.lora_experts import LoRAExperts
from notebook_kit.routers._claims import top_k


class AdapterGate(LabelledRouter):
    """The k adapters of largest logit, weighed by a softmax over these; its loss says which one was meant.

    Args:
        d_model: width of the tokens.
        n_experts: L, adapters in the bank.
        k: adapters a token.
        temperature: of the softmax over the picked.
        gate_loss_coef: times the cross entropy to the labels.
    """

    def __init__(self, d_model: int, n_experts: int, *, k=2, temperature=1.0, gate_loss_coef=1.0):
        super().__init__(d_model, n_experts)
        self.check_k(k)
        self.k, self.temperature, self.gate_loss_coef = k, temperature, gate_loss_coef

    def choose(
        self, z: Float[Tensor, "tokens experts"], p: Float[Tensor, "tokens experts"]
    ) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
        """Return the k largest logits' experts, and a softmax over these logits divided by the temperature."""
        experts = top_k(z.detach(), self.k)
        return (z.gather(1, experts) / self.temperature).softmax(1), experts

    def loss(
        self, z: Float[Tensor, "tokens experts"], weights: Float[Tensor, "tokens k"], rows: Rows
    ) -> Float[Tensor, ""]:
        """Return this gate's share of the mean cross entropy to the labels, over tokens and gates.

        Args:
            z: logits.
            weights: not looked at.
            rows: labels are the adapters of the tokens' samples, -1 for none; None: no gate loss.

        Raises:
            ValueError: a label that is no adapter of the bank.
        """
        if rows.labels is None or not self.gate_loss_coef:
            return z.new_zeros(())
        labels = rows.labels if rows.mask is None else rows.labels.where(rows.mask, -1)
        if len(labels) and not (int(labels.min()) >= -1 and int(labels.max()) < self.n_experts):
            raise ValueError(f"labels must be in [-1, {self.n_experts - 1}], got {labels.unique().tolist()} (MeteoRA)")
        total = F.cross_entropy(z, labels, ignore_index=-1, reduction="sum")
        return self.gate_loss_coef / rows.n_layers * total / (labels >= 0).sum().clamp_min(1)


@method(family="mixtures", paper="meteora")
class MeteoRA(LoRAExperts):
    """A bank of LoRA adapters beside a frozen linear layer, behind a gate that picks k of them for each token.

    `attach` makes an empty bank (B = 0), `MeteoRA.embed` one of adapters that exist.

    Args:
        host: nn.Linear or transformers' Conv1D.
        n_experts: L, adapters in the bank.
        rank: of the largest adapter.
        alpha: strength of an empty bank; embedded adapters bring their own.
        k: adapters a token.
        temperature: of the softmax over the picked; high is even, and does not change who is picked.
        gate_loss_coef: times the supervised gate loss, where `sample_labels` gives labels; 50 in the official code.
        train_adapters: train A and B as well.
        dropout: share of the entries of x that the adapters do not see in training; 0.1 in the official code.
        dispatch: how it is computed; "gathered" is the official code's bmm. The result is the same.

    Raises:
        ValueError: k above n_experts, or rank above min(d_in, d_out).

    Source: Xu, Lai, Huang 2024, equations 3 to 6.
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        n_experts: Annotated[int, Range(1, 512)] = 4,
        rank: Annotated[int, Range(1, 1024, log=True)] = 8,
        alpha: Annotated[float, Range(0.125, 4096, log=True)] = 16,
        k: Annotated[int, Range(1, 512)] = 2,
        temperature: Annotated[float, Range(0.01, 1000, log=True)] = 1.0,
        gate_loss_coef: Annotated[float, Range(0, 100)] = 1.0,
        train_adapters: bool = False,
        dropout: Annotated[float, Range(0, 0.9)] = 0.0,
        dispatch: Annotated[str, Choice("auto", "masked", "sorted", "gathered")] = "auto",
    ):
        rules = {"k": k, "temperature": temperature, "gate_loss_coef": gate_loss_coef}
        parts = {"n_experts": n_experts, "rank": rank, "scaling": alpha / rank}
        router = partial(AdapterGate, n_experts=n_experts, **rules)
        super().__init__(host, router=router, dropout=dropout, dispatch=dispatch, **parts)
        self.k, self.names = k, tuple(map(str, range(n_experts)))
        self.A.requires_grad_(train_adapters)
        self.B.requires_grad_(train_adapters)

    @classmethod
    def embed(
        cls, model: nn.Module, bank: Mapping[str, Source] | Sequence[Source], *, seed: int = 0, **values: Any
    ) -> list[str]:
        """Put a bank of LoRA adapters into a model, with a new gate in every layer that one of them changes.

        Args:
            model: the adapters' base model, changed in place; everything but the gates is frozen.
            bank: adapters as `read_adapter` takes them (peft folders, models that carry LoRA, (tensors, scaling)), by
                name or in order. Ranks may differ.
            seed: of the gates.
            values: further hyperparameters of MeteoRA.

        Returns:
            Names of the modules that carry a gate.

        Raises:
            ValueError: an empty bank, an adapter that does not fit the model, or as `attach`. Nothing is changed then.
        """
        named = bank if isinstance(bank, Mapping) else dict(zip(map(str, range(len(bank))), bank, strict=True))
        if not named:
            raise ValueError("the bank holds no adapter (MeteoRA.embed)")
        adapters = {name: read_adapter(source) for name, source in named.items()}
        modules = dict.fromkeys(module for adapter in adapters.values() for module in adapter.factors)
        refuse_nesting(model)
        for module in set(modules) - {name for name, _ in model.named_modules()}:
            raise ValueError(f"the bank changes {module}, which {type(model).__name__} does not have (MeteoRA.embed)")
        hosts = find_hosts(model, cls, lambda name, module: name in modules)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            built = {name: _filled(cls, name, host, adapters, values) for name, host in hosts.items()}
        place(model, built)
        return list(built)


def _filled(
    cls: type[MeteoRA], name: str, host: nn.Module, adapters: Mapping[str, AdapterFactors], values: Mapping
) -> MeteoRA:
    """One layer of the bank: factors of each adapter, filled up with zeros to the largest rank."""
    parts = {label: adapter.factors[name] for label, adapter in adapters.items() if name in adapter.factors}
    rank = max(right.shape[0] for _, right in parts.values())
    layer = _build(cls, name, host, {"n_experts": len(adapters), "rank": rank, **values})
    d_in, d_out = sizes(host)
    layer.names = tuple(adapters)
    with torch.no_grad():
        layer.A.zero_()
        for i, label in enumerate(adapters):
            if label not in parts:
                continue
            left, right = parts[label]
            if left.shape[0] != d_out or right.shape[1] != d_in:
                came = [left.shape[0], right.shape[1]]
                raise ValueError(f"{label} changes {name} by a {came} matrix, the layer's is {[d_out, d_in]} (MeteoRA)")
            scale = adapters[label].scalings.get(name, 1.0) or 1.0
            layer.scaling[i] = scale
            layer.A[i, : len(right)].copy_(right)
            layer.B[i, :, : len(right)].copy_(left / scale)
    return layer
