"""Markov chains of finite length, tilted by a reward that is a sum over positions: exact at lengths beyond enumeration.

p*(x) ∝ p(x)·exp(Σ_i a_i[x_i]) of a chain p is again a chain, with transitions that differ from place to place. Its law,
its normaliser and its draws take O(length·vocab²), by backward messages (Rabiner 1989). Everything is float64, in log
space.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Chain:
    """A law of sequences: the first token, and each of the others given the one before.

    Attributes:
        initial: log-law of the first token, (vocab,).
        transition: log-law of token i + 1 given token i, (length - 1, vocab, vocab).
    """

    initial: Float[Tensor, " vocab"]
    transition: Float[Tensor, "moves vocab vocab"]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.transition) + 1

    def log_prob(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, " batch"]:
        """Log p(x), nats."""
        place = torch.arange(self.length - 1)
        return self.initial[tokens[:, 0]] + self.transition[place, tokens[:, :-1], tokens[:, 1:]].sum(1)

    def marginals(self) -> Float[Tensor, "position vocab"]:
        """Law of the token at each position."""
        laws = [self.initial.exp()]
        for step in self.transition.exp():
            laws.append(laws[-1] @ step)
        return torch.stack(laws)

    def draw(self, noise: Float[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
        """Sequences from uniform noise, one number for each token (inverse distribution function)."""
        tokens = [_invert(self.initial.expand(len(noise), -1), noise[:, 0])]
        for place, step in enumerate(self.transition):
            tokens.append(_invert(step[tokens[-1]], noise[:, place + 1]))
        return torch.stack(tokens, 1)


def chain_of(initial: Float[Tensor, " vocab"], transition: Float[Tensor, "vocab vocab"], length: int) -> Chain:
    """The chain with one table of probabilities for all moves."""
    return Chain(initial.double().log(), transition.double().log().expand(length - 1, -1, -1))


def tilt_chain(chain: Chain, scores: Float[Tensor, "*batch position vocab"]) -> tuple[Chain, Float[Tensor, "*batch"]]:
    """The chain times exp(Σ_i scores[i, x_i]), normalised, and the log of its normaliser.

    Args:
        chain: the base p.
        scores: a/β; -inf forbids a token at a position, which conditions on those that are left. With a leading batch
            the chain that is returned is that of its first row; the normaliser is that of each.

    Returns:
        The tilted chain, and log E_p exp(Σ_i scores[i, x_i]).
    """
    scores = scores.double()
    message, moves = torch.zeros_like(scores[..., 0, :]), list[Tensor]()
    for place in range(chain.length - 2, -1, -1):
        joint = chain.transition[place] + (scores[..., place + 1, :] + message)[..., None, :]
        message = joint.logsumexp(-1)
        moves.append(joint - message[..., None])
    first = chain.initial + scores[..., 0, :] + message
    log_z = first.logsumexp(-1)
    lead = (0,) * (scores.dim() - 2)
    steps = [move[lead] for move in reversed(moves)]
    tilted = Chain((first - log_z[..., None])[lead], torch.stack(steps) if steps else chain.transition)
    return tilted, log_z


def _invert(log_law: Float[Tensor, "batch vocab"], level: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    cumulative = log_law.exp().cumsum(-1)
    # against the running total itself, so that rounding cannot push a level past the last token with mass
    reached = cumulative <= (level.double() * cumulative[:, -1])[:, None]
    return reached.sum(-1).clamp(max=log_law.shape[1] - 1)
