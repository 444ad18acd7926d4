"""The one loop of particle steerers: propose N x M, value, select, gather.

A steerer says by its :class:`Rule` how many children a particle has, where states are valued and which of them go on.
Feynman-Kac steering, soft value-based decoding, beam search, pruning and best-of-n differ in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import RewardError
from difftilt.rewards.protocol import Samples
from difftilt.sampling.protocol import Guide
from difftilt.steering.chain import Chain
from difftilt.steering.particles import predicted, propose
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import distinct
from difftilt.steering.rule import Rule, Visit, best_rows
from difftilt.trees import take
from difftilt.values.estimates import LatentReward
from difftilt.values.protocol import Value, reads_prediction

Move = Callable[[Chain, Particles, int], tuple[Chain, Particles]]
"""``move(chain, particles, position)``: every particle at the next grid point, in place of :func:`propose`."""


@dataclass(frozen=True)
class Weighing:
    """What is logged at one visit, one entry per prompt."""

    ess: Float[Tensor, " prompts"]
    ancestors: Int[Tensor, " prompts"]


@dataclass
class _Counts:
    """What the loop notes on its way."""

    invalid: Int[Tensor, " prompts"]
    log: list[Weighing]
    copied: bool = False


def search(
    rule: Rule,
    chain: Chain,
    particles: Particles,
    reward: LatentReward,
    value: Value,
    *,
    guide: Guide | None = None,
    move: Move | None = None,
    progress: Progress | None = None,
) -> Steered:
    """Run the particles to t = 0.

    Args:
        rule: what to do where.
        chain: from ``particles.start``.
        particles: at the noise end.
        reward: what is steered to; scores every particle that reaches t = 0.
        value: of noisy states, asked where the rule visits before the end.
        guide: shifts the proposals, which pay for it in their log-weights.
        move: takes the place of the proposals.
        progress: told of every step.

    Raises:
        RewardError: if all scores of a prompt are missing at one visit.
    """
    counts = _Counts(chain.group.new_zeros(len(chain.home)), [])
    for position in range(chain.steps + 1):
        if position and move is not None:
            chain, particles = move(chain, particles, position - 1)
        elif position:
            branch = rule.branch(position - 1, chain.size)
            chain, particles = propose(
                chain, particles, position - 1, guide, branch=branch, parting=counts.copied and rule.copies
            )
        ess = None
        if position < chain.steps and rule.visits(position):
            if reads_prediction(value):
                particles = predicted(chain, particles, position)
            t = chain.time(position, particles.x)
            found = value(particles.x, t, particles.condition, particles.prediction, chain.rows(position))
            chain, particles, ess = _selected(rule, chain, particles, found, position, counts)
        if progress is not None and 0 < position < chain.steps:
            progress(position, chain.steps, ess)
    steered = _finish(rule, chain, particles, reward, counts)
    if progress is not None:
        progress(chain.steps, chain.steps, steered.ess[-1] if rule.visits(chain.steps) else None)
    return steered


def _selected(
    rule: Rule, chain: Chain, particles: Particles, scores: Tensor, position: int, counts: _Counts
) -> tuple[Chain, Particles, Tensor]:
    final = position == chain.steps
    scores = _counted(chain, scores.double(), position, counts)
    selected = rule.select(Visit(chain, particles, scores, position, final))
    settled = selected.chain
    counts.log.append(Weighing(selected.ess, distinct(settled.by_group(selected.particles.memory["origin"]))))
    counts.copied = True
    return settled, selected.particles, selected.ess


def _counted(chain: Chain, scores: Tensor, position: int, counts: _Counts) -> Tensor:
    """The scores with -inf for those that are missing, which are counted."""
    missing = chain.by_group(scores.isnan())
    number = missing.sum(-1)
    counts.invalid = counts.invalid + number
    if bool((number == chain.size).any()):
        prompt = int((number == chain.size).nonzero()[0, 0])
        raise RewardError(
            f"all {chain.size} scores of prompt {prompt} are missing at grid point {position} of {chain.steps} "
            f"({int(counts.invalid.sum())} missing in this call): the reward judges none of these samples; use more "
            "particles, or a reward that is defined for them"
        )
    return torch.where(scores.isnan(), -torch.inf, scores)


def _finish(rule: Rule, chain: Chain, particles: Particles, reward: LatentReward, counts: _Counts) -> Steered:
    """Score what has arrived, select for the last time, weigh."""
    samples: Samples = reward.samples(particles.x, particles.group)
    rewards, media = reward.score(samples), samples.media
    place = torch.arange(len(rewards), device=rewards.device)
    particles = replace(particles, memory={**particles.memory, "place": place})
    if rule.visits(chain.steps):
        chain, particles, _ = _selected(rule, chain, particles, rewards, chain.steps, counts)
    else:
        _counted(chain, rewards.double(), chain.steps, counts)
    rewards, media = take((rewards, media), particles.memory["place"])
    known = torch.where(rewards.isnan(), -torch.inf, rewards.double())
    weight, log_z = rule.weigh(chain, particles, known)
    log, prompts = counts.log, len(chain.home)
    return Steered(
        x_0=particles.x,
        media=media,
        group=particles.group,
        weight=weight,
        rewards=rewards,
        best=best_rows(chain, known),
        log_z=log_z,
        ess=torch.stack([one.ess for one in log]) if log else log_z.new_zeros(0, prompts),
        ancestors=torch.stack([one.ancestors for one in log]) if log else counts.invalid.new_zeros(0, prompts),
        ledger=chain.ledger,
        invalid=counts.invalid,
        search=rule.searches,
    )
