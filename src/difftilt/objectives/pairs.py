"""Losses on differences between two samples of one group: what a whole group shares cancels.

For the optimum of E[r] - beta·KL the log-ratio R of a sample is r/beta minus the log of a partition function that only
its group determines; in R_i - R_j it is gone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.process.gaussian import at_least_float32

Samples = Float[Tensor, " samples"]
Pairs = Float[Tensor, " pairs"]
Places = Int[Tensor, " pairs"]


def pairs_within(group: Int[Tensor, " samples"]) -> tuple[Places, Places]:
    """Every unordered pair of different samples of one group, once; samples of a group need not stand together.

    >>> pairs_within(torch.tensor([7, 3, 7, 7]))
    (tensor([0, 0, 2]), tensor([2, 3, 3]))
    """
    order = group.argsort(stable=True)
    size = torch.unique_consecutive(group[order], return_counts=True)[1]
    place = torch.arange(len(group), device=group.device)
    # behind each sample stand the rest of its group, in the sorted order
    rest = size.cumsum(0).repeat_interleave(size) - 1 - place
    first = place.repeat_interleave(rest)
    start = rest.cumsum(0) - rest
    second = first + 1 + torch.arange(len(first), device=group.device) - start[first]
    return order[first], order[second]


def ranked_pairs(reward: Samples, group: Int[Tensor, " samples"]) -> tuple[Places, Places]:
    """(better, worse) of every pair of one group; pairs with equal rewards are left out.

    >>> ranked_pairs(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([0, 0, 0]))
    (tensor([1, 1]), tensor([0, 2]))
    """
    first, second = pairs_within(group)
    gap = reward[first] - reward[second]
    better, worse = torch.where(gap > 0, first, second), torch.where(gap > 0, second, first)
    return better[gap != 0], worse[gap != 0]


def pessimistic_difference_error(
    value: Samples,
    clipped: Samples,
    reward: Samples,
    pairs: tuple[Places, Places],
    temperature: float,
) -> Pairs:
    """max((V_i - V_j - d)², (C_i - C_j - d)²) with d = (r_i - r_j)/temperature (PRDP, arXiv 2402.08714).

    An upper bound of the plain squared error: a step beyond the clip brings nothing. Where value and clipped are equal
    the gradient is that of the plain one.

    Args:
        value: V, the log-ratio of each sample, with gradient.
        clipped: C, the same with its steps clipped.
        reward: of each sample.
        pairs: places of the two members, see :func:`ranked_pairs`.
        temperature: beta, in units of the reward per unit of V.
    """
    one, other = pairs
    rewards = at_least_float32(reward).to(value)
    target = (rewards[one] - rewards[other]) / temperature
    errors = [((ratio[one] - ratio[other]) - target).square() for ratio in (value, clipped)]
    return torch.maximum(*errors)
