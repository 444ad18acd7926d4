"""A reward of token sequences that is small enough to enumerate, and differentiable on relaxed tokens."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from difftilt.card import Card
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="tokens",
    entry="token_weights",
    paper="Sum of letter weights with a pair term, so that positions are coupled and the tilted law can be enumerated.",
    needs=("tokens",),
)

Pairs = Literal["equal", "ordered"]


class TokenWeights:
    """Σ_i weight[x_i] + bonus·#{i : (x_i, x_{i+1}) is a counted pair}.

    On relaxed tokens, float (batch, position, vocab), it is the expectation under independent positions, so that
    one-hot rows score as the tokens they stand for and gradients flow.

    Attributes:
        weights: of each letter, (vocab,).
        pairs: ``equal`` counts x_i = x_{i+1}; ``ordered`` counts x_i < x_{i+1}.
        bonus: per counted pair.
    """

    name = "token_weights"
    capabilities = Capabilities(differentiable=True)

    def __init__(self, weights: Float[Tensor, " vocab"], pairs: Pairs = "equal", bonus: float = 0.5) -> None:
        self.weights = weights
        self.pairs: Pairs = pairs
        self.bonus = bonus

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        soft = self._relaxed(samples.media)
        table = torch.ones(soft.shape[-1], soft.shape[-1]).to(soft)
        counted = table.triu(1) if self.pairs == "ordered" else table.diag().diag()
        neighbours = ((soft[:, :-1] @ counted) * soft[:, 1:]).sum((1, 2))
        return (soft @ self.weights.to(soft)).sum(1) + self.bonus * neighbours

    def _relaxed(self, media: Tensor) -> Float[Tensor, "batch position vocab"]:
        vocab = len(self.weights)
        if media.is_floating_point():
            if media.dim() != 3 or media.shape[-1] != vocab:
                raise ValueError(
                    f"relaxed tokens are (batch, position, {vocab}), not {tuple(media.shape)}: "
                    "drop the channel of the mask symbol before scoring"
                )
            return media
        if bool((media < 0).any()) or bool((media >= vocab).any()):
            raise ValueError(f"tokens must lie in 0..{vocab - 1}: masked positions cannot be scored")
        return one_hot(media, vocab).to(self.weights)


def token_weights(weights: list[float], pairs: Pairs = "equal", bonus: float = 0.5) -> TokenWeights:
    """The reward from plain values, as a recipe writes it."""
    return TokenWeights(torch.tensor(weights, dtype=torch.float32), pairs, bonus)
