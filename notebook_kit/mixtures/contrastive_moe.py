"""Contrastive mixture of experts: one sentence encoder for several fields, each text sent to its field's experts.

    h = encoder(domain token, text)       every MLP N copies of the pretrained one, chosen by the text's domain a
    u = W_2 tanh(W_1 LN(mean h) + b_1) + b_2 [B, d]         trained with `mnr_loss` or `mnr_plus_loss`

A text costs as much as in the dense encoder; there are (N - 1) MLPs more in every converted layer. The domain may be
given as an index, or be read from the text's first token.

Limits. Someone must know the domain. Texts of different domains still share attention, embeddings and the pooling head.

Source: Hallee et al. 2024, Gleghorn-Lab/Mixture-of-Experts-Sentence-Similarity. Their older code has learned sentence
and token routers too, with a mutual-information loss; that loss detaches the router's logits, so it trains nothing.
"""

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Choice, Range
from notebook_kit.mixtures.enforced_experts import Domains, domain_tokens, upcycle


@method(family="mixtures", paper="contrastive-moe")
class ContrastiveMoE(nn.Module):
    """A pretrained BERT or ModernBERT whose MLPs were copied for each domain, with a pooling head.

    Args:
        encoder: a transformers encoder; copied.
        n_experts: N, number of domains.
        cls_id: id of the token that texts begin with; its embedding is where the domain tokens start.
        which: "all" layers, the "middle" one, or "none" (the dense encoder with the same head).
        layers: numbers of the layers instead of `which`.
        tokens: overwrite the first token by the domain's.
        glu: widen BERT's MLPs by a gate that starts at one.
        seed: of the pooling head.

    Raises:
        ValueError: an encoder of another kind, or a layer it has not.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_experts: Annotated[int, Range(1, 256)],
        *,
        cls_id: int = 0,
        which: Annotated[str, Choice("all", "middle", "none")] = "all",
        layers: Sequence[int] | None = None,
        tokens: bool = True,
        glu: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder, self.n_experts, self.tokens = copy.deepcopy(encoder), n_experts, tokens
        self.domains = Domains()
        n_layers = encoder.config.num_hidden_layers
        if layers is None:
            layers = {"all": range(n_layers), "middle": [n_layers // 2], "none": []}[which]
        self.layers = upcycle(self.encoder, n_experts, self.domains, layers=list(layers), glu=glu)
        self.first_domain_id = _add_tokens(self.encoder, n_experts, cls_id)
        d, weight = encoder.config.hidden_size, encoder.get_input_embeddings().weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.Tanh(), nn.Linear(d, d))
        self.head = head.to(weight)

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        domains: Int[Tensor, " batch"] | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch d"]:
        """Embed texts.

        Args:
            input_ids: texts, each with [CLS] or a domain token first.
            domains: of the texts, 0 to N - 1; None reads it from the first token.
            attention_mask: 1 for real tokens; None if all are.

        Returns:
            Embeddings, not normalised.

        Raises:
            ValueError: a domain that does not exist, or none given and none in the text; ids or a mask that do not fit.
        """
        domains = input_ids[:, 0] - self.first_domain_id if domains is None else domains
        if len(domains) != len(input_ids) or (len(domains) and not _inside(domains, self.n_experts)):
            raise ValueError(
                f"each of {len(input_ids)} texts needs a domain in [0, {self.n_experts - 1}]: give domains=, or begin "
                f"the text with the token {self.first_domain_id} + domain (ContrastiveMoE)"
            )
        known = self.first_domain_id + self.n_experts
        if input_ids.numel() and not (0 <= int(input_ids.min()) and int(input_ids.max()) < known):
            raise ValueError(f"token ids must be in [0, {known - 1}], domain tokens included (ContrastiveMoE)")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of the ids {list(input_ids.shape)}, got "
                f"{list(attention_mask.shape)} (ContrastiveMoE)"
            )
        if not len(input_ids):
            return self.head(self.encoder.get_input_embeddings().weight[:0])
        first = domain_tokens(input_ids, domains, self.first_domain_id) if self.tokens else input_ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.domains.of = domains
        try:
            h = self.encoder(input_ids=first, attention_mask=mask).last_hidden_state
        finally:
            self.domains.of = None
        m = mask.to(h.dtype)[..., None]
        return self.head((h * m).sum(1) / m.sum(1).clamp(min=1))

    @property
    def active_parameters(self) -> int:
        """Parameters of the encoder that one text meets; domain tokens and head are left out."""
        return self._encoder_parameters() - self._copies() * (self.n_experts - 1)

    @property
    def total_parameters(self) -> int:
        """All parameters of the encoder; domain tokens and head are left out."""
        return self._encoder_parameters()

    def _encoder_parameters(self) -> int:
        added = self.n_experts * self.encoder.config.hidden_size
        return sum(p.numel() for p in self.encoder.parameters()) - added

    def _copies(self) -> int:
        """Parameters of one expert, over all converted layers."""
        pattern = ".experts.0."
        return sum(p.numel() for name, p in self.encoder.named_parameters() if pattern in name)


def _inside(domains: Tensor, n: int) -> bool:
    return 0 <= int(domains.min()) and int(domains.max()) < n


@torch.no_grad()
def _add_tokens(encoder: nn.Module, n: int, cls_id: int) -> int:
    """Append n embeddings that equal [CLS]'s; returns the id of the first."""
    old = encoder.get_input_embeddings()
    if not 0 <= cls_id < old.num_embeddings:
        raise ValueError(f"cls_id must be in [0, {old.num_embeddings - 1}], got {cls_id} (ContrastiveMoE)")
    first = old.num_embeddings
    table = torch.cat([old.weight, old.weight[cls_id].expand(n, -1)])
    new = nn.Embedding(*table.shape, padding_idx=old.padding_idx, dtype=table.dtype, device=table.device)
    new.weight.copy_(table)
    new.weight.requires_grad_(old.weight.requires_grad)
    encoder.set_input_embeddings(new)
    encoder.config.vocab_size = first + n
    return first
