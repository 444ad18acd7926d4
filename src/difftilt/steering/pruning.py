"""Pruning on a schedule: who survives, what it costs, and the same search over recorded scores.

The live search (``Pruning``, a rule of ``steering.loop``) and the simulator (``replay``) choose by the same functions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.chain import Chain
from difftilt.steering.protocol import Particles, Steered
from difftilt.steering.rule import Selected, Visit, best_alone, settle
from difftilt.steering.selection import fused, kept, survivors
from difftilt.values.noise_aware import Term

Scores = Float[Tensor, "terms prompts candidates"]


@dataclass(frozen=True)
class Schedule:
    """When candidates are pruned, and how many stay.

    Attributes:
        steps: S, network calls of a finished sample.
        at: rising steps s_1 < ... < s_J in 0..S-1; a state is scored after the call of its step.
        keep: fraction of the present candidates that each of them keeps, in (0, 1].
    """

    steps: int
    at: tuple[int, ...] = ()
    keep: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.at) != len(self.keep):
            raise UserError(f"prune_steps = {self.at} need one fraction each, keep has {len(self.keep)}: {self.keep}")
        if any(one >= other for one, other in pairwise(self.at)) or not all(0 <= s < self.steps for s in self.at):
            raise UserError(
                f"prune_steps = {self.at} must rise and lie in 0..{self.steps - 1}, the steps of the sampler"
            )
        if not all(0 < share <= 1 for share in self.keep):
            raise UserError(f"keep = {self.keep}: every fraction must be above 0 and at most 1")

    def sizes(self, count: int) -> tuple[int, ...]:
        """Candidates before the first pruning, and after each.

        >>> Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5)).sizes(13)
        (13, 5, 2, 1)
        """
        return tuple(accumulate(self.keep, kept, initial=count))

    def spent(self, count: int) -> tuple[int, int]:
        """Network calls and scores of ``count`` candidates of one prompt, exact.

        >>> Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5)).spent(13)
        (77, 21)
        """
        return int(self._total(self.sizes(count), 1, 0, -1)), int(self._total(self.sizes(count), 0, 1, -1))

    def cost(self, step: float, check: float, start: int = -1) -> float:
        """Expected cost per candidate: Σ_j A_{j-1}((s_j - s_{j-1})·x + y) + A_J((S-1-s_J)·x + y), A_j = a_1···a_j.

        The formula of TTSnap (arXiv 2511.22242); A_j are fractions, so rounding of counts is not in it.

        Args:
            step: x, of one network call.
            check: y, of one score.
            start: s_0. A score at step s needs s + 1 calls, which is -1; the published simulator takes 0, one call too
                few for every candidate.

        >>> default = Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5))
        >>> round(default.cost(9.9, 1.2), 1), round(default.cost(9.9, 1.2, start=0), 1)
        (61.8, 51.9)
        """
        shares = accumulate(self.keep, lambda share, fraction: share * fraction, initial=1.0)
        return self._total(tuple(shares), step, check, start)

    def affordable(self, budget: float, step: float, check: float, start: int = -1) -> int:
        """floor(budget/cost) candidates."""
        return math.floor(budget / self.cost(step, check, start))

    def _total(self, sizes: Sequence[float], step: float, check: float, start: int) -> float:
        passed = pairwise((start, *self.at, self.steps - 1))
        return sum(size * ((s - before) * step + check) for size, (before, s) in zip(sizes, passed, strict=True))


@dataclass(frozen=True)
class Pruning:
    """The rule: the best part of each prompt goes on, every survivor with the noise of its own place.

    Attributes:
        schedule: where and how many.
    """

    schedule: Schedule
    copies: bool = field(default=False, init=False)
    searches: bool = field(default=True, init=False)

    def branch(self, position: int, size: int) -> int:
        """One child each."""
        return 1

    def visits(self, position: int) -> bool:
        """At the prune steps."""
        return position in self.schedule.at

    def select(self, visit: Visit) -> Selected:
        """Drop the others from the batch."""
        chain, fraction = visit.chain, self.schedule.keep[self.schedule.at.index(visit.position)]
        places = survivors(chain.by_group(visit.scores), fraction)
        slots = chain.by_group(chain.slots).gather(-1, places)
        _, particles = settle(chain, visit.particles, places)
        count = places.shape[-1]
        ess = torch.full((len(chain.home),), float(count), dtype=torch.float64, device=places.device)
        return Selected(chain.settled(count, slots), particles, ess)

    def weigh(
        self, chain: Chain, particles: Particles, rewards: Float[Tensor, " particles"]
    ) -> tuple[Float[Tensor, " particles"], Float[Tensor, " prompts"]]:
        """All on the best."""
        return best_alone(chain, rewards)


def rejudged(steered: Steered, terms: Mapping[str, Term]) -> Steered:
    """A search whose best is chosen by the ranks of several terms among all samples of each prompt, equally many."""
    prompts = len(steered.best)
    table = torch.stack([term.sign * steered.components[name].double() for name, term in terms.items()])
    scores = _known(fused(table.unflatten(1, (prompts, -1))))
    best = scores.argmax(-1) + torch.arange(prompts, device=scores.device) * scores.shape[1]
    weight = torch.zeros_like(steered.weight)
    weight[best] = 1.0
    return replace(steered, best=best, weight=weight)


@dataclass(frozen=True)
class Replayed:
    """Who survived in a replay.

    Attributes:
        survivors: for each pruning the candidates left, in ascending order, (prompts, kept).
        best: the candidate that is chosen at the end.
    """

    survivors: tuple[Int[Tensor, "prompts kept"], ...]
    best: Int[Tensor, " prompts"]


def replay(schedule: Schedule, values: Sequence[Scores], rewards: Scores) -> Replayed:
    """The search over recorded scores in place of generation.

    Args:
        schedule: where and how many.
        values: what the verifier said at each prune step.
        rewards: of the finished samples; several terms are fused by ranks, there as at the prunings.
    """
    prompts, count = rewards.shape[1:]
    alive = torch.arange(count, device=rewards.device).expand(prompts, count)
    stages: list[Tensor] = []
    for value, fraction in zip(values, schedule.keep, strict=True):
        alive = alive.gather(-1, survivors(_known(fused(_of(value, alive))), fraction))
        stages.append(alive)
    last = _known(fused(_of(rewards, alive))).argmax(-1, keepdim=True)
    return Replayed(tuple(stages), alive.gather(-1, last)[:, 0])


def _of(scores: Scores, places: Int[Tensor, "prompts kept"]) -> Float[Tensor, "terms prompts kept"]:
    return scores.gather(-1, places.expand(len(scores), *places.shape))


def _known(scores: Tensor) -> Tensor:
    """Missing scores come last, as in the loop."""
    return torch.where(scores.isnan(), -torch.inf, scores)


def budget_curve(
    schedule: Schedule,
    values: Sequence[Scores],
    rewards: Scores,
    counts: Sequence[int],
    noise: NoiseSource,
    repeats: int = 20,
) -> Float[Tensor, "counts terms"]:
    """Mean reward of the chosen sample for each number of candidates, float64.

    Args:
        schedule: where and how many.
        values: one for each prune step.
        rewards: of the finished samples.
        counts: numbers of candidates, as ``schedule.affordable`` gives them.
        noise: picks the subsets of candidates.
        repeats: random subsets of every prompt that are averaged.

    Raises:
        UserError: if a number is not in 1..candidates.
    """
    prompts, most = rewards.shape[1:]
    if not all(1 <= count <= most for count in counts):
        raise UserError(f"budgets afford {list(counts)} candidates, the record holds {most}: change the budgets")
    index, rows = torch.arange(prompts, device=rewards.device), list[Tensor]()
    for count in counts:
        total = rewards.new_zeros(len(rewards), dtype=torch.float64)
        for repeat in range(repeats):
            subset = noise.uniform(index, (most,), purpose="subset", step=repeat).argsort(-1)[:, :count]
            chosen = replay(schedule, [_of(value, subset) for value in values], _of(rewards, subset)).best
            total = total + _of(rewards, subset.gather(-1, chosen[:, None])).double().mean((1, 2))
        rows.append(total / repeats)
    return torch.stack(rows)
