"""A small bidirectional transformer from partly masked tokens to logits over the vocabulary."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.layers import Block, Blockwise, Head, Modulation, linear, table, time_features
from difftilt.process.protocol import Condition

CARD = Card(
    name="masked-transformer",
    entry="MaskedTransformer",
    paper="Sahoo et al., Simple and effective masked diffusion language models, arXiv 2406.07524",
)


class MaskedTransformer(Blockwise):
    """Tokens 0..vocab-1 and the mask symbol ``vocab`` in, logits over the vocabulary out; uniform before training.

    Args:
        vocab: number of real tokens.
        length: of a sequence, at most.
        width: of the token vectors; divisible by twice the heads.
        depth: blocks.
        heads: of every attention.
        ratio: hidden width of the MLPs over ``width``.
        classes: number of classes; the condition is then a label tensor (batch,) int64, where ``classes`` is the null
            label. 0 ignores the condition.
        words: what each token stands for, kept with the weights; empty where tokens are mere numbers.
        seed: of the weights.
    """

    _repeated_blocks = ("Block",)

    def __init__(
        self,
        vocab: int,
        length: int,
        *,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 3,
        classes: int = 0,
        words: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if width % (2 * heads):
            raise UserError(f"width {width} must be a multiple of twice the {heads} heads")
        if words and len(words) != vocab:
            raise UserError(f"words has {len(words)} entries for {vocab} tokens: name each token once")
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.length, self.words = vocab, length, tuple(words)
        self.symbols = table(vocab + 1, width, generator, std=1.0)
        self.positions = table(length, width, generator, std=1.0)
        self.time = nn.ModuleList([linear(width, width, generator), linear(width, width, generator)])
        self.labels = table(classes + 1, width, generator) if classes else None
        self.modulation = Modulation(width)
        self.blocks = nn.ModuleList([Block(width, heads, ratio, generator) for _ in range(depth)])
        self.head = Head(width, vocab)

    def forward(
        self, x_t: Shaped[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Condition = None
    ) -> Float[Tensor, "batch position vocab"]:
        """Logits; a relaxed state (batch, position, vocab + 1) mixes the symbols' vectors and passes gradients."""
        symbols = x_t.to(self.symbols.dtype) @ self.symbols if x_t.is_floating_point() else self.symbols[x_t]
        tokens = symbols + self.positions[: symbols.shape[1]]
        features = time_features(t, self.positions.shape[1]).to(self.positions.dtype)
        vector = self.time[1](F.silu(self.time[0](features)))
        if self.labels is not None:
            vector = vector + self.labels[condition]
        modulation = self.modulation(vector)
        for block in self.blocks:
            tokens = self.through(block, tokens, modulation)
        return self.head(tokens, vector)
