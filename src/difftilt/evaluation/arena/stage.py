"""The ground that members of an arena share: the task, the held-out prompts, and base samples to measure drift from."""

import math
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.evaluation.arena.config import Arena, Member
from difftilt.evaluation.arena.cost import now
from difftilt.evaluation.arena.records import finite
from difftilt.models.ledger import Ledger
from difftilt.models.roles import CopiedRoles
from difftilt.recipes.building import build_task, laws_of
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics import frechet_distance
from difftilt.training.config import TrainingConfig
from difftilt.training.loop import Loop, assemble
from difftilt.training.measure import heldout_batch
from difftilt.training.plain import draw
from difftilt.training.protocol import Method, Task
from difftilt.training.run import LoopRun
from difftilt.training.world import World

ENDLESS = 2**31 - 1
"""Iterations of a loop that the arena itself stops."""


@dataclass(frozen=True)
class Sampling:
    """What plain sampling of all samples of an arena takes."""

    cost: Ledger
    seconds: float


@dataclass(frozen=True)
class Stage:
    """Builds what members run on; every run begins with a new copy of the pretrained model.

    Attributes:
        arena: budgets, seeds, testbed.
    """

    arena: Arena
    _base: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def task(self, member: Member) -> Task:
        """The task, refused if the member cannot run on it."""
        return build_task(self.arena.recipe(member))

    def run(self, task: Task, seed: int) -> LoopRun:
        """The untrained model with a ledger of its own."""
        if not isinstance(task.model.network, nn.Module):
            raise UserError(f"task {task.name} has no weights to train: its network is not an nn.Module")
        config = self.arena.config
        device = torch.device(config.device)
        roles = CopiedRoles(task.model.network.to(device).eval(), {})
        return LoopRun(task, roles, World(), Noise(seed), config.forward_batch, device)

    def loop(self, member: Member, seed: int) -> Loop:
        """The training of a member, ready to iterate; it never evaluates and never ends by itself."""
        assert member.method is not None
        task, config = self.task(member), self.arena.config
        settings = TrainingConfig(
            iterations=ENDLESS,
            seed=seed,
            forward_batch=config.forward_batch,
            optimizer=member.training.optimizer,
            evaluate_every=0,
            device=config.device,
        )
        method = cast(Method, member.method.build(task))
        return assemble(task, method, settings, None, laws_of(member.method), (), World())

    def sampling(self, run: LoopRun, role: str, sampler: Sampler) -> Sampling:
        """Cost and time of drawing all samples once."""
        run = replace(run, ledger=Ledger())
        with torch.no_grad():
            batch = heldout_batch(run, self.arena.config.samples)
            clock = self.arena.config.clock
            began = now(clock)
            draw(run, role, sampler, batch, noise_of(run.noise.seed))
        return Sampling(run.ledger, now(clock) - began)

    def drift(self, task: Task, samples: Samples, seed: int) -> dict[str, float]:
        """``distance``: Fréchet distance between the features of samples and of as many independent base samples.

        Squared feature units. Two sets of base samples are not at 0 either: the base's own value is the floor. Where
        the tilted law is known, ``to_target`` is the distance to that, in the testbed's own measure.
        """
        if seed not in self._base:
            self._base[seed] = self._base_features(seed)
        distance = float(frechet_distance(features_of(task, samples.media), self._base[seed]))
        return finite(
            {"distance": distance, **({} if task.truth is None else {"to_target": task.truth(samples.media)})}
        )

    def _base_features(self, seed: int) -> Float[Tensor, "samples dim"]:
        # a copy of its own: the task of a trained member holds weights that have moved
        task = self.task(self.arena.members[0])
        run = self.run(task, seed)
        with torch.no_grad():
            batch = heldout_batch(run, self.arena.config.samples)
            x_0 = draw(run, "reference", task.sampler, batch, base_noise(seed))
            return features_of(task, run.samples(x_0, batch, heldout=True).media)


def noise_of(seed: int) -> Noise:
    """The noise of every member's samples: that of any evaluation with this seed."""
    return Noise(seed).named("evaluation")


def base_noise(seed: int) -> Noise:
    """The noise of the base samples that drift is measured from."""
    return Noise(seed).named("base samples")


def features_of(task: Task, media: Tensor) -> Float[Tensor, "samples dim"]:
    """The task's features, float64; flattened media where it names none."""
    with torch.no_grad():
        found = media.flatten(1) if task.features is None else task.features(media)
    return found.double()


def search_bound(count: int) -> float:
    """Log n - (n - 1)/n: the largest KL of the best of n samples to one sample, in nats (arXiv 2401.01879)."""
    return math.log(count) - (count - 1) / count
