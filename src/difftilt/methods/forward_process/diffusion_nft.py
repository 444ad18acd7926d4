"""DiffusionNFT: the reward decides how much a re-noised sample attracts, and how much it repels (arXiv 2509.16117).

A reward becomes the probability r that a sample is good. The clean sample is re-noised by the ordinary forward process,
and two mirror images of one network around the behaviour velocity are regressed on it:

    v⁺ = beta·v + (1 - beta)·v_old,   v⁻ = (1 + beta)·v_old - beta·v,   L = r·|v⁺ - u|² + (1 - r)·|v⁻ - u|²

with u = eps - x_0. The minimiser is v_old + (2/beta)·E[r·(u - v_old) | x_t]: no likelihood, no trajectory, any sampler.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as Settings
from difftilt.credit.group import Scale, group_advantage
from difftilt.credit.optimality import OptimalityMode, optimality
from difftilt.models.protocol import Lagging, RoleSpec
from difftilt.objectives.kl import velocity_gap
from difftilt.objectives.nft import nft_loss
from difftilt.process.gaussian import GaussianPrediction
from difftilt.rewards.protocol import Samples
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.drawing import drawn
from difftilt.training.experience import Experience, scored_experience
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.training.renoising import (
    ForwardConfig,
    ForwardProcess,
    frozen,
    lagging,
    predicted,
    random_levels,
    renoised,
)
from difftilt.training.surrogate import KL_GATE
from difftilt.trees import take

CARD = Card(
    name="diffusion-nft",
    entry="DiffusionNFT",
    paper="Zheng et al. 2025, DiffusionNFT: Online Diffusion Reinforcement with Forward Process, arXiv 2509.16117",
    needs=("gaussian process", "per-sample reward"),
    laws=("constant_reward", "batch_split"),
)


class RegressionConfig(Settings):
    """The regression and the behaviour policy: what is this method's own. Defaults are the authors' code's."""

    nft_beta: float = Field(default=1.0, gt=0)
    """Mixing of the two branches; the update is proportional to 1/nft_beta."""
    max_advantage: float = Field(default=5.0, gt=0)
    """Advantage at which a sample is certainly good; also multiplies the loss. The paper's text uses 1."""
    advantage_mode: OptimalityMode = "all"
    """Part of the advantage that is kept."""
    timestep_fraction: float = Field(default=0.99, gt=0, le=1)
    """Share of the solver's times that each sample is trained at, drawn anew for each."""
    space: Literal["x0", "velocity"] = "x0"
    """Space of the regression: x0 with the self-normaliser (the code), or plain velocity (the paper's text)."""
    behaviour_decay: Literal[0, 1, 2] = 1
    """Schedule of d in behaviour <- d·behaviour + (1 - d)·current after n optimiser steps: 0: d = 0;
    1: d = min(0.001·n, 0.5); 2: d = 0 for n < 75, then min(0.0075·(n - 75), 0.999)."""


class Config(ForwardConfig, RegressionConfig):
    """Defaults of the authors' code, but for the number of samples."""

    advantage_std: Scale = "global"
    """What a centred reward is divided by. Not ``group`` where many groups have no variance."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """Weight of the mean squared velocity difference to the reference."""


def behaviour_decay(schedule: int, n: int) -> float:
    """D after n optimiser steps, see :class:`Config`."""
    if schedule == 0:
        return 0.0
    if schedule == 1:
        return min(0.001 * n, 0.5)
    return 0.0 if n < 75 else min(0.0075 * (n - 75), 0.999)


class DiffusionNFT(ForwardProcess[Config]):
    """Sample with ``behaviour``, score, re-noise, regress both branches.

    Attributes:
        anchor: role that the penalty pulls to. ``edges.extras`` may hold its factor of each row, ``kl_gate``.
    """

    sampled_role = "behaviour"
    anchor: str = "reference"

    def __init__(self, config: Config, task: Task) -> None:
        super().__init__(config, task, CARD.name)

    def roles(self) -> Mapping[str, RoleSpec]:
        """``behaviour`` samples and anchors the branches; ``ema`` is evaluated."""
        decay = partial(behaviour_decay, self.config.behaviour_decay)
        return {"behaviour": Lagging("current", decay), **super().roles()}

    def collect(self, run: Run) -> Experience:
        """Draw groups from ``behaviour`` without guidance; one edge for each time a sample is trained at."""
        config = self.config
        batch = run.prompts(config.groups, config.group_size)
        x_0, samples, scores = drawn(run, batch, partial(self.finished, run))
        # every sample has its own times: a random subset of the solver's
        edges = random_levels(run.noise, self.grid, config.timestep_fraction, batch.index)
        return self.credited(run, scored_experience(batch, x_0, edges, scores, samples.media), samples)

    def credited(self, run: Run, experience: Experience, samples: Samples) -> Experience:
        """The record with the label of each sample, from its reward against those of its group."""
        assert experience.rewards is not None
        credit = partial(group_advantage, std=self.config.advantage_std)
        return self.labelled(experience, run.jointly(credit, experience.rewards, experience.group))

    def labelled(self, experience: Experience, advantage: Float[Tensor, " samples"]) -> Experience:
        """The record with the optimality that belongs to the advantage of each sample."""
        config = self.config
        return replace(experience, label=optimality(advantage, config.max_advantage, config.advantage_mode))

    def phases(self, run: Run) -> Sequence[Phase]:
        """One: the regression."""
        return [Phase("current", partial(self._loss, run), unit="sample", updates=self.config.updates)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        config = self.config
        assert rows.x_0 is not None
        assert rows.label is not None
        x_t = renoised(run.denoiser("current").process, rows, noise)
        # frozen passes come first, so that nothing stands between the forward pass with gradient and its backward pass
        penalty = self._penalty(run, x_t, rows) if config.kl_weight else None
        # where behaviour still equals current, one forward pass serves both (the loss detaches the old one)
        old = lagging(run, "behaviour", x_t, rows)
        prediction = predicted(run, "current", x_t, rows)
        policy = nft_loss(
            prediction,
            prediction if old is None else old,
            rows.x_0,
            rows.label,
            nft_beta=config.nft_beta,
            max_advantage=config.max_advantage,
            space=config.space,
        )
        terms = {"policy": Term(policy.value)}
        if penalty is not None:
            terms["kl"] = Term(penalty(prediction), config.kl_weight)
        return Loss(terms, {"optimality": rows.label})

    def _penalty(self, run: Run, x_t: Tensor, rows: Experience) -> Callable[[GaussianPrediction], Tensor]:
        """What maps the prediction to gate·(squared velocity gap to the anchor) of each row.

        Where the gate is 0 the anchor is not evaluated, and value and gradient are exactly 0.
        """
        gate = rows.edges.extras.get(KL_GATE)
        if gate is None:
            return partial(velocity_gap, reference=frozen(run, self.anchor, x_t, rows))
        held = gate.nonzero()[:, 0]
        reference = frozen(run, self.anchor, x_t[held], rows.rows(held)) if len(held) else None

        def penalty(prediction: GaussianPrediction) -> Tensor:
            none = 0 * prediction.velocity.flatten(1).sum(1)
            if reference is None:
                return none
            gap = velocity_gap(take(prediction, held), reference) * gate[held]
            return torch.zeros_like(none).index_put((held,), gap.to(none))

        return penalty
