"""Exact laws of masked chains by enumeration: every state of a short sequence, pushed through the sampler's own kernel.

States are sequences over ``vocab`` letters and the mask (index ``vocab``), numbered lexicographically with the first
position most significant. Positions change independently within one step, so a transition row is a product of L small
laws; splitting the product into two halves turns one step of the recursion into a matrix product, and 4096 states take
milliseconds. All laws are float64.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.models.protocol import Network
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.kernels import Unmasking
from difftilt.statistics import enumerate_sequences, sequence_codes


def _joint(each: Float[Tensor, "states position symbols"]) -> Float[Tensor, "states joint"]:
    """The product law of some positions, over their joint values in lexicographic order."""
    joint = torch.ones(len(each), 1, dtype=each.dtype)
    for position in each.unbind(1):
        joint = (joint[:, :, None] * position[:, None]).flatten(1)
    return joint


@torch.no_grad()
def transition(
    network: Network, process: MaskedProcess, length: int, t: float, s: float
) -> tuple[Float[Tensor, "states left"], Float[Tensor, "states right"]]:
    """P(x_s | x_t) of one ancestral step for every state x_t, as the laws of its left and right half of positions.

    The full matrix is ``P[x, (l, r)] = left[x, l] · right[x, r]``; both factors are float64.
    """
    states = enumerate_sequences(process.vocab + 1, length)
    at = torch.full((len(states),), t)
    prediction = process.predict(network(states, at, None), states, at, "logits")
    step = Unmasking()(prediction, states, at, torch.full_like(at, s))
    each = step.log_probs.double().exp()
    # float32 log-probabilities sum to 1 up to 1e-7 only
    each = each / each.sum(-1, keepdim=True)
    return _joint(each[:, : length // 2]), _joint(each[:, length // 2 :])


def chain_law(
    network: Network, process: MaskedProcess, length: int, grid: Float[Tensor, " times"]
) -> Float[Tensor, " sequences"]:
    """Exact law of the sequences that the ancestral sampler draws on ``grid``.

    Forward recursion π_s(y) = Σ_x π_t(x)·P(y | x) from the all-mask state. It holds for any network, trained ones
    included, so a distance to a target needs no samples. Sequences are in the order of :func:`enumerate_sequences`.

    Args:
        network: ``(tokens, t, None) -> logits``.
        process: gives the vocabulary and the mask probability; its ``floor`` must be 0 or no mask may be left at the
            end.
        length: positions L; (vocab + 1)**L states are held in memory.
        grid: falling times, the last one 0.
    """
    symbols = process.vocab + 1
    law = torch.zeros(symbols**length, dtype=torch.float64)
    law[-1] = 1.0
    for t, s in zip(grid.tolist()[:-1], grid.tolist()[1:], strict=True):
        left, right = transition(network, process, length, t, s)
        law = (left.T @ (law[:, None] * right)).flatten()
    return law[sequence_codes(enumerate_sequences(process.vocab, length), symbols)]


def chain_expectation(
    network: Network,
    process: MaskedProcess,
    length: int,
    grid: Float[Tensor, " times"],
    terminal: Float[Tensor, " sequences"],
) -> Float[Tensor, "times states"]:
    """E[f(x_0) | x_t] under the chain, for every time of ``grid`` and every state, masked ones included.

    Backward recursion h_t(x) = Σ_y P(y | x)·h_s(y). States that hold a mask at t = 0 are never reached and have 0.

    Args:
        network: ``(tokens, t, None) -> logits``.
        process: gives the vocabulary and the mask probability.
        length: positions L.
        grid: falling times, the last one 0.
        terminal: f on all vocab^length sequences, in the order of :func:`enumerate_sequences`.
    """
    symbols = process.vocab + 1
    h = torch.zeros(symbols**length, dtype=torch.float64)
    h[sequence_codes(enumerate_sequences(process.vocab, length), symbols)] = terminal.double()
    found = [h]
    times = grid.tolist()
    for t, s in zip(times[-2::-1], times[:0:-1], strict=True):
        left, right = transition(network, process, length, t, s)
        h = (left @ h.reshape(left.shape[1], -1) * right).sum(-1)
        found.append(h)
    return torch.stack(found[::-1])
