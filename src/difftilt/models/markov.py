"""Short sequences from a Markov chain: the exact masked posterior, and the whole law by enumeration.

Tokens are 0..vocab-1, the mask symbol is ``vocab``. Masks do not depend on what they hide, so the law of a sequence
given a partly masked one is the chain's own, conditioned on the visible tokens, whatever the noise level.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.mlp import MLP
from difftilt.process.protocol import Condition

CARD = Card(
    name="markov",
    entry="MarkovPosterior",
    paper="Markov chain with its exact masked posterior and a zero-initialised residual network; no paper.",
)

_MOST_SEQUENCES = 1_000_000


class MarkovPosterior(nn.Module):
    """Logits log p(x_i = v | visible tokens) by forward-backward, plus a residual network that starts at zero.

    Args:
        initial: (vocab,), law of the first token.
        transition: (vocab, vocab), row u is the law of the token after u.
        length: of a sequence.
        hidden: width of the residual network's two hidden layers.
        residual: False gives the exact posterior, bit for bit.
        seed: of the residual network's weights.
    """

    initial: Tensor
    transition: Tensor

    def __init__(
        self,
        initial: Float[Tensor, " vocab"],
        transition: Float[Tensor, "vocab vocab"],
        length: int,
        *,
        hidden: int = 64,
        residual: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rows = torch.cat([initial[None], transition]).double()
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(-1), torch.ones(len(rows)).double(), atol=1e-5):
            raise UserError("initial and every row of transition must be probabilities that sum to 1")
        self.vocab = len(initial)
        self.length = length
        self.residual = residual
        self.register_buffer("initial", initial.double().clone())
        self.register_buffer("transition", transition.double().clone())
        self.network = MLP(length * (self.vocab + 1), length * self.vocab, hidden=hidden, zero=True, seed=seed)

    def forward(
        self, x_t: Shaped[Tensor, "batch ..."], t: Float[Tensor, " batch"], condition: Condition = None
    ) -> Float[Tensor, "batch position vocab"]:
        """Logits over the vocabulary; a relaxed state (batch, position, vocab + 1) is read by its argmax in the base.

        The residual sees a relaxed state as it is, so gradients with respect to the state pass through it alone.
        """
        visible = x_t.argmax(-1) if x_t.is_floating_point() else x_t
        base = self.log_posterior(visible).to(torch.float32)
        if not self.residual:
            return base
        symbols = x_t if x_t.is_floating_point() else nn.functional.one_hot(x_t, self.vocab + 1).float()
        return base + self.network(symbols, t).view_as(base)

    def log_posterior(self, x_t: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position vocab"]:
        """Log p(x_i = v | visible tokens), float64; impossible tokens get the log of the smallest normal number.

        Forward and backward messages are normalised at each position: f_i ∝ e_i·(Tᵀ f_{i-1}), b_i ∝ T (e_{i+1}·b_{i+1})
        with e_i the indicator of the visible token, or 1 at a mask; the posterior is ∝ f_i·b_i (Rabiner 1989).
        """
        every = torch.ones(1, self.vocab, dtype=torch.float64, device=x_t.device)
        evidence = torch.cat([torch.eye(self.vocab, dtype=torch.float64, device=x_t.device), every])[x_t]
        forward = [_normalised(evidence[:, 0] * self.initial)]
        for i in range(1, self.length):
            forward.append(_normalised(evidence[:, i] * _step(forward[-1], self.transition)))
        backward = [every.expand(len(x_t), -1)]
        for i in range(self.length - 1, 0, -1):
            backward.append(_normalised(_step(evidence[:, i] * backward[-1], self.transition.T)))
        posterior = _normalised(torch.stack(forward, 1) * torch.stack(backward[::-1], 1))
        return posterior.clamp(min=torch.finfo(torch.float32).tiny).log()

    def sequences(self) -> Int[Tensor, "sequences position"]:
        """All vocab^length sequences, in lexicographic order.

        Raises:
            UserError: if there are more than a million.
        """
        count = self.vocab**self.length
        if count > _MOST_SEQUENCES:
            raise UserError(f"{self.vocab}^{self.length} sequences are too many to enumerate: shorten them")
        place = self.vocab ** torch.arange(self.length - 1, -1, -1, device=self.initial.device)
        return torch.arange(count, device=self.initial.device)[:, None] // place % self.vocab

    def index(self, x_0: Int[Tensor, "batch position"]) -> Int[Tensor, " batch"]:
        """Row of each sequence in :meth:`sequences`."""
        return (x_0 * self.vocab ** torch.arange(self.length - 1, -1, -1, device=x_0.device)).sum(-1)

    def log_prob(self, x_0: Int[Tensor, "batch position"]) -> Float[Tensor, " batch"]:
        """Log p(x_0) under the chain, float64, nats."""
        moves = self.transition.log()[x_0[:, :-1], x_0[:, 1:]].sum(-1)
        return self.initial.log()[x_0[:, 0]] + moves

    def tilted(self, rewards: Float[Tensor, " sequences"], temperature: float) -> Float[Tensor, " sequences"]:
        """Log p*(x) ∝ log p(x) + r(x)/temperature for all sequences, normalised, float64."""
        return (self.log_prob(self.sequences()) + rewards.double() / temperature).log_softmax(-1)

    def soft_value(
        self, x_t: Int[Tensor, "batch position"], rewards: Float[Tensor, " sequences"], temperature: float
    ) -> Float[Tensor, " batch"]:
        """β·log E[exp(r(x_0)/β) | visible tokens of x_t], float64; of the all-mask state it is β·log Z."""
        sequences = self.sequences()
        fits = ((x_t[:, None] == sequences) | (x_t[:, None] == self.vocab)).all(-1)
        log_prob = torch.where(fits, self.log_prob(sequences), -torch.inf).log_softmax(-1)
        return temperature * (log_prob + rewards.double() / temperature).logsumexp(-1)


def _normalised(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _step(message: Float[Tensor, "batch vocab"], matrix: Float[Tensor, "vocab vocab"]) -> Float[Tensor, "batch vocab"]:
    """Σ_u message_u·matrix_{u·}. A sum of products, not a matrix product: its rounding does not depend on the batch."""
    return (message[..., None] * matrix).sum(-2)
