"""MoVA: a language model writes which vision experts it wants to look through, and a gate weighs what they see.

    coarse   letters = LM(picture through the adapter without experts, descriptions, question)  ->  M, at most 3 of K
    fine     tokens = MoVAdapter(base tokens, features of the chosen experts, M, question)
    answer   LM(tokens, question)

Only chosen experts run. Labels for the letters come from losses: an expert is wanted where it lowers the answer's loss
(`loss_labels`); they are learned as ordinary text, together with the answers.

Limits. Two passes of the language model for a question. Experts stay frozen. Pictures and tokens are on square grids.

Source: Zong et al. 2024; TempleX98/MoVA. The question's vector for the gate is BERT's [CLS] there; here it is the mean
of learned word vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from notebook_kit.catalog import method
from notebook_kit.hyperparameters import Range
from notebook_kit.mixtures.mova_adapter import MoVAdapter
from notebook_kit.mixtures.mova_text import read_letters, routing_prompt
from notebook_kit.mixtures.picture_language import PictureLanguage


@dataclass(frozen=True)
class MoVAAnswer:
    """What was answered, what the model wrote to choose experts, whom it got, and the gates of every block."""

    texts: list[str]
    letters: list[str]
    mask: Bool[Tensor, "batch experts"]
    gates: Float[Tensor, "blocks batch experts"]


@method(family="mixtures", paper="mova")
class MoVA(PictureLanguage):
    """A base encoder, frozen vision experts, the adapter between them, and the language model that chooses and answers.

    Args:
        base: pictures to tokens [batch, grid², d_base].
        experts: pictures to tokens [batch, any square, width]; frozen.
        language_model: of transformers, with inputs_embeds.
        tokens: with encode, decode, pad and end, such as `WordTokens`.
        descriptions: a few words on each expert.
        d_base: C.
        expert_widths: C_j.
        grid: base tokens along a side.
        d_text: width of the question's vector.
        n_routing_tokens: picture tokens in the routing pass, a square number.
        k: experts that may be chosen, and that the gate keeps.
        n_blocks: of the adapter.
        n_heads: of the adapter.
        gate_text: let the question into the gate.

    Raises:
        ValueError: experts, widths and descriptions of different numbers, or tokens that are no square.
    """

    def __init__(
        self,
        base: nn.Module,
        experts: Sequence[nn.Module],
        language_model: nn.Module,
        tokens,
        *,
        descriptions: Sequence[str],
        d_base: int,
        expert_widths: Sequence[int],
        grid: int,
        d_text: int = 32,
        n_routing_tokens: Annotated[int, Range(1, 1024)] = 4,
        k: Annotated[int, Range(1, 26)] = 3,
        n_blocks: Annotated[int, Range(1, 12)] = 3,
        n_heads: Annotated[int, Range(1, 64)] = 2,
        gate_text: bool = True,
    ):
        super().__init__(language_model, tokens)
        if not len(experts) == len(expert_widths) == len(descriptions):
            raise ValueError(
                f"{len(experts)} experts need as many widths and descriptions, got {len(expert_widths)} and "
                f"{len(descriptions)} (MoVA)"
            )
        self.routing_side = round(n_routing_tokens**0.5)
        if self.routing_side**2 != n_routing_tokens:
            raise ValueError(f"n_routing_tokens must be a square number, got {n_routing_tokens} (MoVA)")
        self.base = base
        self.experts = nn.ModuleList(experts).requires_grad_(False).eval()
        self.descriptions, self.widths, self.grid, self.k = list(descriptions), list(expert_widths), grid, k
        table = language_model.get_input_embeddings()
        self.text = nn.Embedding(table.num_embeddings, d_text, padding_idx=tokens.pad)
        shape = (d_base, list(expert_widths), d_text, table.embedding_dim, grid)
        self.adapter = MoVAdapter(*shape, k=k, n_blocks=n_blocks, n_heads=n_heads, gate_text=gate_text)
        self.runs = torch.zeros(len(experts), dtype=torch.int64)  # pictures that each expert has looked at

    def train(self, mode: bool = True) -> "MoVA":
        """Set the training mode of all but the experts."""
        super().train(mode)
        self.experts.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor, expert: int) -> Float[Tensor, "batch length width"]:
        """Run one expert and resize its tokens to the base grid, bilinearly."""
        if not len(images):
            return images.new_zeros(0, self.grid**2, self.widths[expert])
        self.runs[expert] += len(images)
        v = self.experts[expert](images)
        side = round(v.shape[1] ** 0.5)
        square = v.mT.reshape(len(v), v.shape[2], side, side).float()
        size = (self.grid, self.grid)
        return F.interpolate(square, size, mode="bilinear", align_corners=False).flatten(2).mT.to(v.dtype)

    def look(
        self, images: Tensor, questions: Sequence[str], mask: Bool[Tensor, "batch experts"], *, features=None
    ) -> tuple[Float[Tensor, "batch seen d"], Float[Tensor, "blocks batch experts"]]:
        """Make the picture tokens for the language model.

        Args:
            images: pictures.
            questions: one for each.
            mask: experts that may be looked through; the others are not run.
            features: of all experts for all pictures, if they are known: none is run.

        Returns:
            Tokens and gates.
        """
        mask = mask.to(images.device)
        if features is None:
            seen = [self.features(images[mask[:, j]], j) for j in range(len(self.experts))]
        else:
            seen = [v[mask[:, j]] for j, v in enumerate(features)]
        ids = self.padded([self.tokens.encode(question) for question in questions]).to(images.device)
        vectors = self.text(ids)  # padding's vector is zero
        text = vectors.sum(1) / (ids != self.tokens.pad).sum(1, keepdim=True).clamp(min=1).to(vectors)
        return self.adapter(self.base(images), seen, mask, text)

    def routing_look(self, images: Tensor, questions: Sequence[str]) -> Float[Tensor, "batch seen d"]:
        """The picture tokens of the routing pass: no expert, fewer tokens."""
        nobody = torch.zeros(len(images), len(self.experts), dtype=torch.bool, device=images.device)
        seen, _ = self.look(images, questions, nobody)
        side = self.grid // 2
        square = seen.mT.reshape(len(seen), seen.shape[2], side, side)
        return F.adaptive_avg_pool2d(square, min(self.routing_side, side)).flatten(2).mT

    @torch.no_grad()
    def route(self, images: Tensor, questions: Sequence[str]) -> tuple[Bool[Tensor, "batch experts"], list[str]]:
        """Coarse routing: let the language model write letters, and read them.

        Args:
            images: pictures.
            questions: one for each.
        """
        prompts = [routing_prompt(self.descriptions, question) for question in questions]
        letters = self.write(self.routing_look(images, questions), prompts, max_new_tokens=2 * self.k)
        rows = [read_letters(text, len(self.experts), at_most=self.k) for text in letters]
        mask = torch.stack(rows) if rows else torch.zeros(0, len(self.experts), dtype=torch.bool)
        return mask.to(images.device), letters

    @torch.no_grad()
    def forward(self, images: Tensor, questions: Sequence[str], *, mask=None, max_new_tokens: int = 1) -> MoVAAnswer:
        """Answer questions about pictures.

        Args:
            images: pictures.
            questions: one for each.
            mask: experts to use; None lets the language model choose.
            max_new_tokens: longest answer.
        """
        letters = [""] * len(images)
        if mask is None:
            mask, letters = self.route(images, questions)
        seen, gates = self.look(images, questions, mask)
        return MoVAAnswer(self.write(seen, questions, max_new_tokens=max_new_tokens), letters, mask, gates)
