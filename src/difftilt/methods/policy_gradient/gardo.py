"""GARDO: hold back only what the reward alone believes in (arXiv 2512.24138).

A KL penalty against reward hacking also slows down learning and keeps the policy from new modes. GARDO keeps it where
it is needed. With win rates w in the batch, samples of high uncertainty

    U_i = w(reward_i) - mean_n w(auxiliary_n,i) > quantile of U at 1 - k

are pulled to a reference that is itself replaced by the trained weights now and then; nobody else is. Advantages are
centred in the group and not divided by its std, and positive ones are multiplied by the distance of the sample to the
nearest other one of its group. The three parts are ``training.gating``; here they meet two losses, the clipped
surrogate of a chain and the regression of DiffusionNFT, neither of which knows of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from torch import Tensor

from difftilt.card import Card
from difftilt.credit.group import broadcast
from difftilt.errors import UserError
from difftilt.methods.forward_process.diffusion_nft import Config as NFTConfig
from difftilt.methods.forward_process.diffusion_nft import DiffusionNFT, RegressionConfig
from difftilt.models.protocol import RoleSpec
from difftilt.rewards.protocol import Samples
from difftilt.sampling.protocol import NoiseSource
from difftilt.training.drawing import rolled
from difftilt.training.experience import Experience, scored_experience
from difftilt.training.gating import ANCHOR, Gating, GatingConfig
from difftilt.training.policy_gradient import ChainConfig, ChainPolicyGradient
from difftilt.training.protocol import Loss, Method, Phase, Run, Task
from difftilt.training.surrogate import surrogate_loss

CARD = Card(
    name="gardo",
    entry="gardo",
    paper="GARDO: Reinforcing Diffusion Models without Reward Hacking, 2025, arXiv 2512.24138",
    needs=("stochastic kernel", "per-sample reward"),
    laws=("ratio_one", "constant_reward", "offset_per_prompt", "batch_split"),
)


class Config(ChainConfig, GatingConfig):
    """Rollout, surrogate, gate, reference and shaping."""

    base: Literal["flow-grpo", "diffusion-nft"] = "flow-grpo"
    """The loss that is regularised: the clipped surrogate of a chain, or the regression on the forward process."""
    share_start: bool = True
    """One initial noise for all samples of a group; not with ``diffusion-nft``, whose sampler adds no other."""
    nft: RegressionConfig | None = None
    """Of the regression; None is its defaults. Only with ``base: diffusion-nft``."""


def gardo(config: Config, task: Task) -> Method:
    """The method with the base that the configuration names."""
    return GatedChain(config, task) if config.base == "flow-grpo" else GatedRegression(config, task)


class GatedChain(ChainPolicyGradient[Config]):
    """The clipped surrogate of a chain, with a gated penalty and shaped advantages."""

    def __init__(self, config: Config, task: Task) -> None:
        if config.nft is not None:
            raise UserError("method.nft belongs to method.base: diffusion-nft; leave one of them out")
        super().__init__(config, task)
        self.gating = Gating(config, task, config.kl_weight)

    def roles(self) -> Mapping[str, RoleSpec]:
        """``ema`` for evaluation, ``anchor`` for the penalty."""
        return {**super().roles(), **self.gating.roles()}

    def collect(self, run: Run) -> Experience:
        """Roll out groups, score, credit; edges carry the advantage and the gate of their sample."""
        batch = run.prompts(self.config.groups, self.config.group_size)
        trajectory, samples, scores = rolled(run, batch, partial(self.roll, run))
        experience = scored_experience(batch, trajectory.x_0, trajectory.edges, scores, samples.media)
        credit = self.gating.credit(run, experience, samples)
        # a sample that teaches nothing is still pulled back where it is held
        counts = credit.advantage != 0 if credit.held is None else (credit.advantage != 0) | credit.held
        sample = experience.edges.sample
        edges = replace(experience.edges, advantage=broadcast(credit.advantage, sample), mask=counts[sample])
        return self.gating.gated(replace(experience, edges=edges), credit)

    def phases(self, run: Run) -> Sequence[Phase]:
        """The surrogate, after whose updates the reference may follow."""
        return [self.gating.watched(phase, run) for phase in super().phases(run)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        return self.gating.told(surrogate_loss(self.config, self.preset, run, rows, reference=ANCHOR), rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the gate and the reference."""
        return self.gating.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.gating.load_state_dict(state)


class GatedRegression(DiffusionNFT):
    """The regression of DiffusionNFT, with a gated penalty and shaped advantages."""

    anchor = ANCHOR

    def __init__(self, config: Config, task: Task) -> None:
        _check_regression(config)
        super().__init__(_regression(config), task)
        self.gating = Gating(config, task, config.kl_weight)

    def roles(self) -> Mapping[str, RoleSpec]:
        """``behaviour`` and ``ema`` of the base, ``anchor`` for the penalty."""
        return {**super().roles(), **self.gating.roles()}

    def credited(self, run: Run, experience: Experience, samples: Samples) -> Experience:
        """The record with labels from shaped advantages, and the gate of each sample."""
        credit = self.gating.credit(run, experience, samples)
        return self.gating.gated(self.labelled(experience, credit.advantage), credit)

    def phases(self, run: Run) -> Sequence[Phase]:
        """The regression, after whose updates the reference may follow."""
        return [self.gating.watched(phase, run) for phase in super().phases(run)]

    def _loss(self, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
        return self.gating.told(super()._loss(run, rows, noise), rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Of the gate and the reference."""
        return self.gating.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.gating.load_state_dict(state)


OF_CHAINS = ("kernel", "noise_level", "objective", "guard_divide_by_dt", "clip_range", "kl", "output", "window")
"""Settings that mean nothing to a regression."""


def _check_regression(config: Config) -> None:
    """Refuse what a regression would ignore."""
    if config.share_start:
        raise UserError(
            "method.base = diffusion-nft starts every sample from noise of its own, since an ODE makes one sample of "
            "one start: set method.share_start to false"
        )
    for name in OF_CHAINS:
        if getattr(config, name) != Config.model_fields[name].get_default():
            raise UserError(f"method.{name} belongs to a chain and does nothing with base diffusion-nft: leave it out")


def _regression(config: Config) -> NFTConfig:
    """The base's configuration: its own settings, and those that both bases share."""
    shared = set(NFTConfig.model_fields) & set(Config.model_fields)
    own = RegressionConfig() if config.nft is None else config.nft
    return NFTConfig(**config.model_dump(include=shared), **own.model_dump())
