"""What is particular to a steerer of particles: a rule, what it sees where states are valued, and ready parts of it.

``steering.loop`` asks the rule; ``steering.selection`` and ``steering.resampling`` are the choices that it makes.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.steering.chain import Chain
from difftilt.steering.particles import gather
from difftilt.steering.protocol import Particles


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
