"""A language model that reads a picture's tokens before the words: how likely an answer is, and what it writes.

    [picture tokens ; prompt ; answer ; end]      loss = mean over answer and end of -log P(token | all before it)

Rows of a batch may have prompts and answers of different lengths. Padding stands behind, where causal attention hides
it from every word that counts; so a row is answered as if it were alone.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class PictureLanguage(nn.Module):
    """Base of the models that answer in words about pictures.

    Args:
        language_model: of transformers, with inputs_embeds.
        tokens: with encode, decode, pad and end, such as `WordTokens`.
    """

    def __init__(self, language_model: nn.Module, tokens):
        super().__init__()
        self.language_model, self.tokens = language_model, tokens

    def text_loss(self, seen: Tensor, prompts: Sequence[str], answers: Sequence[str]) -> Float[Tensor, " batch"]:
        """Cross-entropy of each answer and its end, after picture and prompt, in nats per token.

        Args:
            seen: picture tokens.
            prompts: what comes before the answer.
            answers: what should come.
        """
        told = [[*self.tokens.encode(answer), self.tokens.end] for answer in answers]
        asked = [self.tokens.encode(prompt) for prompt in prompts]
        logits = self._read(seen, [a + t for a, t in zip(asked, told, strict=True)])
        target = self.padded(told, fill=-100)
        # The token that foretells the answer's first, and those after it; beyond a short answer any will do.
        first = torch.tensor([seen.shape[1] + len(before) - 1 for before in asked], dtype=torch.int64)
        place = (first[:, None] + torch.arange(target.shape[1])).clamp_max(logits.shape[1] - 1).to(logits.device)
        target = target.to(logits.device)
        picked = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2]))
        loss = F.cross_entropy(picked.mT, target, reduction="none", ignore_index=-100)
        return loss.sum(1) / (target >= 0).sum(1)

    @torch.no_grad()
    def write(self, seen: Tensor, prompts: Sequence[str], *, max_new_tokens: int = 1) -> list[str]:
        """Continue each prompt with the likeliest words, to the end or max_new_tokens."""
        ids, new = [self.tokens.encode(prompt) for prompt in prompts], [[] for _ in prompts]
        for _ in range(max_new_tokens):
            if not ids or all(self.tokens.end in written for written in new):
                break
            last = torch.tensor([seen.shape[1] + len(row) - 1 for row in ids], device=seen.device)
            words = self._read(seen, ids)[torch.arange(len(ids), device=seen.device), last].argmax(-1)
            for row, word in enumerate(words.tolist()):
                ids[row], new[row] = [*ids[row], word], [*new[row], word]
        return [self.tokens.decode(written) for written in new]

    def _read(self, seen: Tensor, ids: list[list[int]]) -> Float[Tensor, "batch places vocabulary"]:
        """Logits after every picture token and word, padded behind."""
        words = self.language_model.get_input_embeddings()(self.padded(ids).to(seen.device))
        seen = seen.to(words)
        return self.language_model(inputs_embeds=torch.cat([seen, words], 1), use_cache=False).logits.float()

    def padded(self, ids: list[list[int]], *, fill: int | None = None) -> Int[Tensor, "rows length"]:
        """Rows of ids, filled up behind to the longest; by the vocabulary's padding where no other fill is given."""
        if not ids:
            return torch.zeros(0, 1, dtype=torch.int64)
        rows = [torch.tensor(row, dtype=torch.int64) for row in ids]
        fill = self.tokens.pad if fill is None else fill
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
