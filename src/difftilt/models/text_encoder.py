"""A small text encoder over a closed vocabulary."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.card import Card
from difftilt.errors import UserError, quoted
from difftilt.leaves import nearest
from difftilt.models.layers import Attention, linear, table

CARD = Card(
    name="text-encoder",
    entry="TextEncoder",
    paper="Vaswani et al. 2017, Attention is all you need, arXiv 1706.03762 (encoder, norms before the layers)",
)


class TextEncoder(nn.Module):
    """Words -> one vector per token and their mean.

    Args:
        vocabulary: known words; token 0 is padding, token i + 1 is word i.
        length: most words of a prompt.
        width: of the tokens; divisible by ``heads``.
        depth: transformer layers.
        heads: of every attention.
        seed: of the weights.
    """

    def __init__(
        self, vocabulary: Sequence[str], length: int, *, width: int = 96, depth: int = 2, heads: int = 4, seed: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"width {width} must be a multiple of the {heads} heads")
        generator = torch.Generator().manual_seed(seed)
        self.places = {word: place for place, word in enumerate(vocabulary, start=1)}
        self.length = length
        self.words = table(len(self.places) + 1, width, generator, std=1.0)
        self.positions = table(length, width, generator, std=1.0)
        self.layers = nn.ModuleList([_Layer(width, heads, generator) for _ in range(depth)])

    def tokenise(self, prompts: Sequence[str]) -> Int[Tensor, "prompts length"]:
        """Token numbers, 0 behind the last word.

        Raises:
            UserError: for a word that is not in the vocabulary, or a prompt with too many.
        """
        rows = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            words = prompt.split()
            strange = [word for word in words if word not in self.places]
            if strange:
                close = nearest(strange[0], self.places)
                raise UserError(f"prompt {quoted(prompt)}: {quoted(strange[0])} is not in the vocabulary; {close}")
            if len(words) > self.length:
                raise UserError(f"prompt {quoted(prompt)} has {len(words)} words; the text encoder reads {self.length}")
            row[: len(words)] = torch.tensor([self.places[word] for word in words], dtype=torch.int64)
        return rows

    def forward(
        self, tokens: Int[Tensor, "prompts length"]
    ) -> tuple[Float[Tensor, "prompts length width"], Bool[Tensor, "prompts length"], Float[Tensor, "prompts width"]]:
        """Token vectors, which of them are words, and the mean over these (zero for the empty prompt)."""
        keep = tokens > 0
        x = self.words[tokens] + self.positions
        for layer in self.layers:
            x = layer(x, keep)
        x = F.layer_norm(x, x.shape[-1:]) * keep[..., None]
        return x, keep, x.sum(1) / keep.sum(1, keepdim=True).clamp(min=1)

    def read(self, tokens: Int[Tensor, "prompts length"]) -> dict[str, Tensor]:
        """What a denoiser reads: ``text`` (prompts, length, width), ``text_keep`` (prompts, length), and their mean."""
        text, keep, pooled = self(tokens)
        return {"text": text, "text_keep": keep, "vector": pooled}

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The same of prompts."""
        return self.read(self.tokenise(prompts))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = Attention(width, heads, generator)
        self.mlp = nn.Sequential(
            linear(width, 2 * width, generator), nn.GELU("tanh"), linear(2 * width, width, generator)
        )

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        x = x + self.attention(F.layer_norm(x, x.shape[-1:]), keep=keep)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))
