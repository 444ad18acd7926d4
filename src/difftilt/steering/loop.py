"""The one loop of particle steerers: propose N x M, value, select, gather.

A steerer says by its :class:`Rule` how many children a particle has, where states are valued and which of them go on.
Feynman-Kac steering, soft value-based decoding, beam search, pruning and best-of-n differ in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import RewardError
from difftilt.rewards.protocol import Samples
from difftilt.sampling.protocol import Guide
from difftilt.steering.particles import Chain, gather, predicted, propose
from difftilt.steering.protocol import Particles, Progress, Steered
from difftilt.steering.resampling import distinct
from difftilt.trees import take
from difftilt.values.estimates import LatentReward
from difftilt.values.protocol import Value, reads_prediction


@dataclass(frozen=True)
class Visit:
    """What a rule sees where states are valued.

    Attributes:
        chain: its ``branch`` rows of one parent stand together.
        particles: all of them.
        scores: value of each, r(x_0) at the end, float64; -inf where it is missing.
        position: grid point.
        final: at t = 0.
    """

    chain: Chain
    particles: Particles
    scores: Float[Tensor, " particles"]
    position: int
    final: bool


@dataclass(frozen=True)
class Selected:
    """Who goes on.

    Attributes:
        chain: settled.
        particles: that many.
        ess: for each prompt how many of the valued states counted, in the sense of the rule; for the log.
    """

    chain: Chain
    particles: Particles
    ess: Float[Tensor, " prompts"]


class Rule(Protocol):
    """What is particular to a steerer. Made anew for each call: it may count while the loop runs."""

    @property
    def copies(self) -> bool:
        """Whether copies of one particle go on side by side after a visit: then they must be able to part."""
        ...

    @property
    def searches(self) -> bool:
        """Whether the final weights only name the best."""
        ...

    def branch(self, position: int, size: int) -> int:
        """Children of each of ``size`` particles per prompt in the step from grid point ``position``."""
        ...

    def visits(self, position: int) -> bool:
        """Whether the states at this grid point are valued and selected from."""
        ...

    def select(self, visit: Visit) -> Selected:
        """Choose; called at t = 0 if ``visits`` says so for the last grid point."""
        ...

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """Normalised weight of each finished particle, and log Z of each prompt (NaN where the method has none).

        ``rewards`` are -inf where they are missing.
        """
        ...


Move = Callable[[Chain, Particles, int], tuple[Chain, Particles]]
"""``move(chain, particles, position)``: every particle at the next grid point, in place of :func:`propose`."""


@dataclass(frozen=True)
class Unselective:
    """Nothing is valued before the end.

    Attributes:
        best: at the end the weight of each prompt goes to its best particle; else all weigh alike.
    """

    best: bool = True
    copies: bool = False

    @property
    def searches(self) -> bool:
        """It does where the best takes all."""
        return self.best

    def branch(self, position: int, size: int) -> int:
        """One child each."""
        return 1

    def visits(self, position: int) -> bool:
        """Nowhere."""
        return False

    def select(self, visit: Visit) -> Selected:
        """Everybody goes on."""
        return Selected(visit.chain, visit.particles, visit.chain.by_group(visit.scores)[:, 0] * 0 + visit.chain.size)

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """All on the best, or equal weights."""
        return best_alone(chain, rewards) if self.best else all_alike(chain, rewards)


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


def best_rows(chain: Chain, rewards: Float[Tensor, " particles"]) -> Int[Tensor, " prompts"]:
    """Row of the highest reward of each prompt."""
    best = chain.by_group(rewards).argmax(-1)
    return best + torch.arange(len(best), device=best.device) * chain.size


def best_alone(chain: Chain, rewards: Float[Tensor, " particles"]) -> tuple[Tensor, Tensor]:
    """The weights of a search: all on the best of each prompt; no log Z."""
    weight = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    weight[best_rows(chain, rewards)] = 1.0
    return weight, weight.new_full((len(chain.home),), torch.nan)


def all_alike(chain: Chain, rewards: Float[Tensor, " particles"]) -> tuple[Tensor, Tensor]:
    """Equal weights for those of each prompt whose reward is known; no log Z."""
    known = chain.by_group((rewards > -torch.inf).double())
    return (known / known.sum(-1, keepdim=True)).flatten(), known.new_full((len(chain.home),), torch.nan)


def settle(chain: Chain, particles: Particles, kept: Int[Tensor, "groups kept"]) -> tuple[Chain, Particles]:
    """The chosen rows of each prompt, in the first places of it."""
    return chain.settled(kept.shape[1]), gather(chain, particles, kept)
