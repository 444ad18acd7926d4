"""Laws on finite sets: histograms, enumerated sequences, total variation."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Law = Float[Tensor, " outcomes"]


def histogram(codes: Int[Tensor, " rows"], outcomes: int, weights: Float[Tensor, " rows"] | None = None) -> Law:
    """Share of each outcome 0..outcomes-1 among the rows, float64; weights need not be normalised."""
    counted = torch.bincount(codes, None if weights is None else weights.double(), minlength=outcomes).double()
    return counted / counted.sum()


def total_variation(p: Law, q: Law) -> Float[Tensor, ""]:
    """Half the sum of |p - q|, in [0, 1]."""
    return (p.double() - q.double()).abs().sum() / 2


def kl_divergence(p: Law, q: Law) -> Float[Tensor, ""]:
    """Sum of p·log(p/q) in nats: 0 where p is 0, infinite where only q is."""
    p, q = p.double(), q.double()
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def enumerate_sequences(vocab: int, length: int) -> Int[Tensor, "outcomes length"]:
    """All vocab^length sequences; row i is the one with code i (:func:`sequence_codes`).

    >>> enumerate_sequences(2, 2).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    letters = [torch.arange(vocab)] * length
    return torch.cartesian_prod(*letters).reshape(-1, length)


def sequence_codes(tokens: Int[Tensor, "rows length"], vocab: int) -> Int[Tensor, " rows"]:
    """The sequence read as a number in base ``vocab``, first position most significant.

    Raises:
        ValueError: if a token lies outside 0..vocab-1: its code would be that of another sequence.
    """
    if bool(((tokens < 0) | (tokens >= vocab)).any()):
        raise ValueError(f"tokens must lie in 0..{vocab - 1}; masked or foreign symbols have no code")
    place = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1, device=tokens.device)
    return (tokens * place).sum(1)


def empirical(tokens: Int[Tensor, "rows length"], vocab: int, weights: Float[Tensor, " rows"] | None = None) -> Law:
    """Histogram of sequences over all vocab^length of them."""
    return histogram(sequence_codes(tokens, vocab), vocab ** tokens.shape[1], weights)


def tilted(law: Law, reward: Law, temperature: float) -> Law:
    """p*(x) proportional to p(x)·exp(r(x)/temperature), float64."""
    return (law.double().log() + reward.double() / temperature).softmax(0)
