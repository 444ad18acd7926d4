"""Which value a particle steerer asks, by name: the settings they share."""

from typing import Literal

from pydantic import Field

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.process.gaussian import GaussianProcess
from difftilt.steering.chain import Chain
from difftilt.values.estimates import LatentReward, Lookahead, PosteriorMean, Rollout, SampledX0
from difftilt.values.learned import Regression
from difftilt.values.protocol import Value


class Valued(Config):
    """Settings of the intermediate reward."""

    value: Literal["posterior_mean", "x0_samples", "lookahead", "rollout", "learned"] = "posterior_mean"
    """Intermediate reward: of the point prediction, of draws from it (tokens), of a few deterministic evaluations ahead
    (continuous), of completed chains (costly), or a network fitted to rollouts."""
    x0_samples: int = Field(default=4, ge=1)
    """Clean samples per state for ``x0_samples`` and ``rollout``."""
    value_temperature: float | None = Field(default=None, gt=0)
    """Temperature of the log mean exp over them, and of a learned value; None is ``temperature``, the soft value, or 1
    where that is 0; 1 is the form of the FK paper."""
    lookahead: int = Field(default=6, ge=1)
    """Evaluations of ``lookahead``; 1 is ``posterior_mean``."""
    clock: int | None = Field(default=None, ge=1)
    """``lookahead`` rounds its times down to multiples of 1/clock, as a sampler of so many integer times does."""
    regression: Regression = "stationary"
    """What ``learned`` regresses on: ``stationary``, ``exponential`` (the soft value), ``mean`` (E[r | x_t])."""
    bootstrap: int = Field(default=0, ge=0)
    """Next states whose value by the network itself is the target of a state before the end; 0 takes the reward of its
    rollout, the published code's bootstrapped form draws 10."""
    fit_samples: int = Field(default=1024, ge=2)
    """Rollouts that ``learned`` is fitted to, of all prompts together."""
    fit_updates: int = Field(default=1000, ge=1)
    """Optimiser steps of that fit."""
    fit_batch: int = Field(default=256, ge=1)
    """States of each."""
    fit_lr: float = Field(default=3e-3, gt=0)
    """Learning rate at the start of the fit (Adam, cosine decay)."""
    fit_hidden: int = Field(default=64, ge=1)
    """Width of the value network."""

    @property
    def reads_prediction(self) -> bool:
        """Whether the value reads the network's prediction at the state."""
        return self.value in ("posterior_mean", "x0_samples", "lookahead")


def value_price(config: Valued, left: int) -> Ledger:
    """What valuing one state costs beside its own prediction, ``left`` steps before the end; at the end the reward."""
    if left == 0 or config.value == "posterior_mean":
        return Ledger(reward_calls=1)
    if config.value == "lookahead":
        return Ledger(nfe=config.lookahead - 1, reward_calls=1)
    if config.value == "learned":
        return Ledger(auxiliary_calls=1)
    nfe = config.x0_samples * left if config.value == "rollout" else 0
    return Ledger(nfe=nfe, reward_calls=config.x0_samples)


def branching_price(config: Valued, children: int, steps: int) -> Ledger:
    """What one particle costs whose every step draws and values so many children, and goes on from one of them."""
    valued = sum((value_price(config, left) for left in range(steps)), Ledger()) * children
    # where the value reads a child's prediction, the chosen one's is used by its step
    own = 1 + children * (steps - 1) if config.reads_prediction else steps
    return Ledger(nfe=own) + valued


def value_of(config: Valued, reward: LatentReward, chain: Chain, temperature: float) -> Value:
    """The value that the settings name.

    Args:
        config: the settings; a value to be learned is not among what is made here.
        reward: of latents.
        chain: whose states are valued.
        temperature: of the soft mean.

    Raises:
        UserError: for a value that the model's process does not offer.
    """
    continuous = isinstance(chain.denoise.process, GaussianProcess)
    if config.value == "posterior_mean":
        return PosteriorMean(reward)
    if config.value == "lookahead":
        if not continuous:
            raise UserError(
                "steerer.value = lookahead follows the ODE, and tokens have none: use x0_samples, rollout or "
                "posterior_mean"
            )
        return Lookahead(reward, chain.denoise, config.lookahead, config.clock)
    if config.value == "x0_samples":
        if continuous:
            raise UserError(
                "steerer.value = x0_samples draws tokens; this model is continuous: use rollout or posterior_mean"
            )
        return SampledX0(reward, config.x0_samples, temperature, chain.noise)
    assert config.value == "rollout"
    draws, clean = config.x0_samples, chain.last is not None
    return Rollout(reward, chain.denoise, chain.preset, chain.grid, draws, temperature, chain.noise, clean_end=clean)
