"""Exact laws of masked chains by enumeration: every state of a short sequence, pushed through the sampler's own kernel.

States are sequences over ``vocab`` letters and the mask (index ``vocab``), numbered lexicographically with the first
position most significant. Positions change independently within one step, so a transition row is a product of L small
laws; splitting the product into two halves turns one step of the recursion into a matrix product, and 4096 states take
milliseconds. All laws are float64.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
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


@dataclass(frozen=True)
class StateTable:
    """A function of the states of an enumerated chain, at the times that its sampler visits.

    Attributes:
        symbols: letters and the mask.
        grid: falling times.
        table: (times, symbols^length), float64, states in lexicographic order.
    """

    symbols: int
    grid: Float[Tensor, " times"]
    table: Float[Tensor, "times states"]

    def __call__(self, x_t: Int[Tensor, "batch position"], t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Its value for each row.

        Raises:
            ValueError: for a time that is not on the grid.
        """
        gap, row = (t.double()[:, None] - self.grid).abs().min(1)
        if bool((gap > 1e-6).any()):
            raise ValueError(f"the sampler has the times {self.grid.tolist()}; got t={t.tolist()}")
        return self.table[row, sequence_codes(x_t, self.symbols)]


def chain_mean(
    network: Network,
    process: MaskedProcess,
    length: int,
    grid: Float[Tensor, " times"],
    rewards: Float[Tensor, " sequences"],
) -> StateTable:
    """E[r(x_0) | x_t] under the chain; arguments as in :func:`chain_expectation`."""
    return StateTable(process.vocab + 1, grid, chain_expectation(network, process, length, grid, rewards))


def chain_soft_value(
    network: Network,
    process: MaskedProcess,
    length: int,
    grid: Float[Tensor, " times"],
    rewards: Float[Tensor, " sequences"],
    temperature: float,
) -> StateTable:
    """β·log E[exp(r(x_0)/β) | x_t] under the chain, in units of the reward; β is the temperature.

    States that hold a mask at t = 0 are never reached and have -inf.
    """
    # shifted by the largest reward, so that no exponential overflows
    largest = rewards.double().max()
    h = chain_expectation(network, process, length, grid, ((rewards.double() - largest) / temperature).exp())
    return StateTable(process.vocab + 1, grid, largest + temperature * h.log())


def decoded_law(
    network: Network, process: MaskedProcess, length: int, value: StateTable, temperature: float
) -> Float[Tensor, " sequences"]:
    """Law of sequences that follow p(x_s | x_t)·exp(v(x_s, s)/β) at every step: many children by ``value``.

    With the soft value it is the tilted law; with any other it shows that value's bias without sampling error.

    Args:
        network: ``(tokens, t, None) -> logits``.
        process: gives the vocabulary and the mask probability.
        length: positions L.
        value: of all states at all times; at t = 0 the reward itself.
        temperature: β.
    """
    symbols, times = process.vocab + 1, value.grid.tolist()
    law = torch.zeros(symbols**length, dtype=torch.float64)
    law[-1] = 1.0
    for position, (t, s) in enumerate(pairwise(times), 1):
        left, right = transition(network, process, length, t, s)
        here = value.table[position].double() / temperature
        lift = (here - here.max()).exp()
        total = (left @ lift.reshape(left.shape[1], -1) * right).sum(-1)
        # a state without weight has no successor either
        share = torch.where(law > 0, law / total, 0.0)
        law = (left.T @ (share[:, None] * right)).flatten() * lift
    return law[sequence_codes(enumerate_sequences(process.vocab, length), symbols)]
