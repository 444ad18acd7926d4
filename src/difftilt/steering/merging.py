"""Independent rounds of one steerer as one outcome."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from difftilt.steering.protocol import Steered


def merged(parts: Sequence[Steered]) -> Steered:
    """Independent rounds as one outcome.

    Where every round estimates Z, a round weighs as much as its estimate, and the estimates are averaged: the union is
    then weighted as one large sample is. A search keeps the best of all rounds. Otherwise rounds weigh alike, or by the
    number of their samples that have a score.
    """
    if len(parts) == 1:
        return parts[0]
    prompts = len(parts[0].log_z)
    log_z = torch.stack([part.log_z for part in parts])
    known = torch.stack([_known(part, prompts) for part in parts])
    share = torch.where(log_z.isnan(), known.log(), log_z).softmax(0)
    group = torch.cat([part.group for part in parts])
    # prompts outermost, as in one round
    order = group.argsort(stable=True)

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order]

    weight = torch.cat([part.weight * share[number, part.group] for number, part in enumerate(parts)])[order]
    group, rewards = group[order], column("rewards")
    best = _best(group, rewards, prompts)
    if all(part.search for part in parts):
        weight = torch.zeros_like(weight)
        weight[best] = 1.0
    invalid = [part.invalid for part in parts if part.invalid is not None]
    return replace(
        parts[0],
        x_0=column("x_0"),
        media=column("media"),
        group=group,
        weight=weight,
        rewards=rewards,
        best=best,
        log_z=log_z.logsumexp(0) - torch.tensor(len(parts)).double().log(),
        ess=torch.cat([part.ess for part in parts]),
        ancestors=torch.cat([part.ancestors for part in parts]),
        components={key: torch.cat([part.components[key] for part in parts])[order] for key in parts[0].components},
        invalid=torch.stack(invalid).sum(0) if invalid else None,
    )


def _known(part: Steered, prompts: int) -> Tensor:
    """Samples of each prompt that have a score, float64."""
    mine = part.group == torch.arange(prompts, device=part.group.device)[:, None]
    return (mine & ~part.rewards.isnan()).sum(1).double()


def _best(group: Tensor, rewards: Tensor, prompts: int) -> Int[Tensor, " prompts"]:
    """Row of the highest reward of each prompt."""
    known = torch.where(rewards.isnan(), -torch.inf, rewards.double())
    mine = group == torch.arange(prompts, device=group.device)[:, None]
    return torch.where(mine, known, -torch.inf).argmax(1)
