"""What answers on the other side: a reward that is asked in bytes and answers in bytes, whatever carries them."""

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Literal

import torch
from pydantic import Field

from difftilt import __version__
from difftilt.config import Config
from difftilt.errors import RewardError, UserError
from difftilt.leaves import load
from difftilt.rewards.base import as_reward, scores_samples
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward
from difftilt.rewards.scoring import call
from difftilt.rewards.served.wire import FORMAT, WireError, pack_scores, unpack_samples

MAX_BYTES = 256 * 2**20
"""Largest request by default: 64 float32 images of 3 × 512 × 512 are 201 MB."""


class Description(Config):
    """What a service says of itself; a client asks before any work."""

    service: Literal["difftilt reward"] = "difftilt reward"
    """Tells a reward server from any other."""
    name: str
    """Of the reward."""
    version: str = __version__
    """Of difftilt."""
    format: int = FORMAT
    """Of the archives that travel."""
    max_bytes: int = Field(default=MAX_BYTES, ge=1)
    """Largest request that is read."""
    set_valued: bool = False
    """Scores sets: one number per group."""
    differentiable: bool = False
    """The reward is, where it lives; no gradient crosses to another process."""
    missing: bool = False
    """NaN says that a sample has no score."""
    cost: float = 0.0
    """Of one call, in network evaluations."""
    tolerance: float | None = None
    """Fall of its mean at which a monitor speaks."""


class RefusedError(Exception):
    """A request that is answered with a sentence in place of scores.

    Attributes:
        kind: ``request`` for bytes that are no samples, ``reward`` for a reward that fails, ``user`` for what the
            reward says is wrong with the run.
    """

    def __init__(self, kind: Literal["request", "reward", "user"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Service:
    """A reward that answers one request after the other; safe to call from several threads.

    Args:
        reward: what scores.
        max_bytes: largest request, told to clients.

    Raises:
        UserError: for a reward that cannot be served.
    """

    def __init__(self, reward: Reward, max_bytes: int = MAX_BYTES) -> None:
        check_servable(reward)
        self.reward, self.max_bytes = reward, max_bytes
        self._one_at_a_time = Lock()

    def describe(self) -> Description:
        """Name, capabilities, version and limits."""
        can = self.reward.capabilities
        return Description(
            name=self.reward.name,
            max_bytes=self.max_bytes,
            set_valued=can.set_valued,
            differentiable=can.differentiable,
            missing=can.missing,
            cost=can.cost,
            tolerance=can.tolerance,
        )

    def answer(self, body: bytes) -> bytes:
        """Scores of the samples in ``body``; a reward that is not safe for threads may be here.

        Raises:
            RefusedError: for bytes that are no samples, or a reward that raises or returns anything but numbers of the
                right shape. Numbers that are not finite pass: the client, who sees all samples, names the rows.
        """
        try:
            samples = unpack_samples(body)
        except WireError as error:
            raise RefusedError("request", f"the request is no archive of samples: {error}") from error
        try:
            with self._one_at_a_time, torch.no_grad():
                return pack_scores(call(self.reward, self.reward.name, samples))
        except RewardError as error:
            raise RefusedError("reward", str(error)) from error
        except UserError as error:
            raise RefusedError("user", str(error)) from error


def check_servable(reward: Reward) -> None:
    """Refuse a reward whose scores need more than the samples of one request, or more than scores."""
    can = reward.capabilities
    if can.pooled:
        raise UserError(
            f"reward {reward.name!r} scores all samples as one set, which no single request holds: use it in the "
            "process of the run"
        )
    if can.trained:
        raise UserError(f"reward {reward.name!r} learns beside the model: use it in the process of the run")
    if not isinstance(reward, WeightedSum):
        return
    if reward.normalise is not None:
        raise UserError(
            f"reward {reward.name!r} standardises by {reward.normalise}, which no single request holds: serve its "
            "parts, and weigh them in the run"
        )
    for part in reward.rewards.values():
        check_servable(part)


def make_reward(name: str, settings: Mapping[str, Any]) -> Reward:
    """The reward that ``package.module:Name`` stands for: a plain function of samples, or what makes a reward.

    Raises:
        UserError: if there is no such thing, or it takes other settings.
    """
    entry: Callable[..., Any] = load("rewards", name)
    if scores_samples(entry):
        made: Any = entry
    else:
        try:
            made = entry(**settings)
        except TypeError as error:
            raise UserError(f"reward {name!r} cannot be made with the settings {dict(settings)}: {error}") from error
    return as_reward(made)
