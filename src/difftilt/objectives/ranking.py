"""Cross-entropies between the soft ranking of a group by its rewards and by the scores of a model.

The members of a group stand in decreasing order of reward, 1 the best. The suffix {i..k} has the targets
q_i = softmax(r/tau) and the model's shares softmax(s), both over that suffix alone (GDRO, arXiv 2601.02036):

    L = Σ_i [ log Σ_{m >= i} exp(s_m) - Σ_{j >= i} q_i(j)·s_j ],    i = 1..k-1, or i = 1 alone.

The gradient by s of one suffix is softmax(s) - q_i, so all are least at s_i - s_j = (r_i - r_j)/tau. At tau 0 the
target is the suffix's own first member: Plackett and Luce's likelihood of the ranking, and Diffusion-DPO at k = 2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.statistics.folds import compact, segment_max, segment_min, segment_rank

Suffixes = Literal["all", "first"]
"""All k - 1 suffixes of a ranked group, or the whole group alone (the top-1 version)."""


@dataclass(frozen=True)
class Table:
    """Where each row stands when every group is one line, best member first.

    Attributes:
        place: of each row in the flattened (groups, members).
        filled: (groups, members), False where a group has fewer members than the largest.
    """

    place: Int[Tensor, " rows"]
    filled: Bool[Tensor, "groups members"]

    def lines(self, values: Shaped[Tensor, " rows"]) -> Shaped[Tensor, "groups members"]:
        """Rows as lines, 0 where there is no member; gradients pass."""
        return values.new_zeros(self.filled.numel()).scatter(0, self.place, values).view_as(self.filled)

    def rows(self, lines: Shaped[Tensor, "groups members"]) -> Shaped[Tensor, " rows"]:
        """Lines as rows."""
        return lines.reshape(-1)[self.place]


def ranked(rewards: Float[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Table:
    """The members of each group in decreasing order of reward; equal ones in order of row."""
    index, count = compact(group)
    rank = segment_rank(-rewards, index, count)
    members = int(rank.max()) + 1 if len(rank) else 0
    place = index * members + rank
    filled = torch.zeros(count * members, dtype=torch.bool, device=place.device).index_fill(0, place, True)
    return Table(place, filled.reshape(count, members))


def best_members(rewards: Float[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """True for the one row of each group with the highest reward, the first of them where several have it."""
    index, count = compact(group)
    return segment_rank(-rewards, index, count) == 0


def spread(values: Float[Tensor, " rows"], group: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Largest less smallest value in the row's own group."""
    index, count = compact(group)
    return (segment_max(values, index, count) - segment_min(values, index, count))[index]


def suffix_cross_entropy(
    scores: Float[Tensor, " rows"],
    rewards: Float[Tensor, " rows"],
    group: Int[Tensor, " rows"],
    *,
    tau: float,
    suffixes: Suffixes = "all",
) -> Float[Tensor, " rows"]:
    """L of every group as rows: the row of member j holds log Σ_{m >= j} exp(s_m) - s_j·Σ_{i <= j} q_i(j).

    Their sum over a group is L; a single row means nothing. Computed in float64; only ``scores`` has a gradient.

    Args:
        scores: s, the implicit rewards.
        rewards: r, in units of tau.
        group: label of each row's group; groups may differ in size.
        tau: temperature of the targets. At 0 a suffix whose best member is tied with the next is left out, for which
            of them would be the target is arbitrary.
        suffixes: see :data:`Suffixes`.
    """
    table = ranked(rewards, group)
    s, r = table.lines(scores.double()), table.lines(rewards.detach().double())
    with torch.no_grad():
        used = _used(r, table.filled, tau, suffixes)
        target = _targets(r, table.filled, used, tau)
    partition = torch.where(used, _suffix_logsumexp(s, table.filled), 0.0)
    return table.rows(partition - target * s).to(scores.dtype)


def _used(r: Tensor, filled: Bool[Tensor, "groups members"], tau: float, suffixes: Suffixes) -> Tensor:
    """Which members begin a suffix that counts: those with another one behind them."""
    used = torch.zeros_like(filled)
    used[:, :-1] = filled[:, 1:]
    if suffixes == "first":
        used[:, 1:] = False
    if tau == 0:
        used[:, :-1] &= r[:, :-1] > r[:, 1:]
    return used


def _members(filled: Bool[Tensor, "groups members"]) -> Bool[Tensor, "groups members members"]:
    """[group, i, j]: j belongs to the suffix that begins at i. Missing members begin a suffix of themselves."""
    every = torch.ones(filled.shape[1], filled.shape[1], dtype=torch.bool, device=filled.device)
    return (every.triu() & filled[:, None, :]) | torch.eye(len(every), dtype=torch.bool, device=filled.device)


def _suffix_logsumexp(s: Tensor, filled: Bool[Tensor, "groups members"]) -> Float[Tensor, "groups members"]:
    return torch.where(_members(filled), s[:, None, :], -torch.inf).logsumexp(2)


def _targets(r: Tensor, filled: Tensor, used: Tensor, tau: float) -> Float[Tensor, "groups members"]:
    """Σ_{i <= j} q_i(j) over the suffixes that count."""
    if tau == 0:
        return used.double()
    q = torch.where(_members(filled), r[:, None, :] / tau, -torch.inf).softmax(2)
    return (q * used[:, :, None]).sum(1)
