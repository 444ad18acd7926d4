"""Fitting noise-aware rewards on recorded trajectories, from nearly clean predictions to very noisy ones.

Every level learns, from the x0-prediction at its step, the score that the frozen original reward gives to the final
sample of the same trajectory (TTSnap, arXiv 2511.22242). It starts from the weights of the cleaner level before it,
with a new optimiser and a new schedule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import NoiseSource
from difftilt.trees import take
from difftilt.values.estimates import LatentReward
from difftilt.values.noise_aware import Regressor, Verifier
from difftilt.values.trajectories import Recorded

EPS = 1e-6
"""Added to the standard deviation of a batch."""


class Curriculum(Config):
    """Settings of the fit; the defaults for a fine-tuned reward are the paper's."""

    images: int = Field(default=8, ge=1)
    """Trajectories per training prompt."""
    first_level: int | None = Field(default=None, ge=0)
    """Step of the first, cleanest level; later steps keep the reward as it is. Null is 14 of 20, in proportion."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the trajectories in every level."""
    batch: int = Field(default=100, ge=2)
    """Trajectories per update."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """Of AdamW, for a copy of a reward that is a network; falls linearly to half of it in every level."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of AdamW."""
    max_grad_norm: float = Field(default=5.0, gt=0)
    """Gradients are scaled down to this norm."""
    regression_weight: float = Field(default=1.0, ge=0)
    """Of the mean squared error."""
    preference_weight: float = Field(default=0.0, ge=0)
    """Of the Bradley-Terry loss on pairs of one prompt; batches then hold whole prompts, as far as they fit."""
    preference_temperature: float = Field(default=0.5, gt=0)
    """Of that loss, in units of the reward."""
    standardise: bool = False
    """Bring predictions and labels of a batch to mean 0 and deviation 1 before both losses."""
    validation_images: int = Field(default=16, ge=2)
    """Further trajectories of each of up to 32 training prompts, on which the fit is judged."""
    hidden: int = Field(default=64, ge=1)
    """Units of both hidden layers of the regressor that stands in for a reward that is no network."""
    regressor_learning_rate: float = Field(default=5e-3, gt=0)
    """Learning rate of the regressor."""
    warm_up_epochs: int = Field(default=30, ge=1)
    """Passes of the regressor over final samples, before the levels: it has no weights to start from."""
    prompted: bool = True
    """The regressor also reads the class or the vector of the prompt; it then serves no class it was not fitted on."""


def level_loss(
    predicted: Float[Tensor, " rows"], label: Float[Tensor, " rows"], prompt: Int[Tensor, " rows"], config: Curriculum
) -> Float[Tensor, ""]:
    """Squared error, and -log sigmoid((f_w - f_l)/temperature) averaged over the pairs of one prompt with y_w > y_l.

    Args:
        predicted: f, by the verifier.
        label: y, by the frozen reward of the final sample.
        prompt: of each row.
        config: weights of both, and whether f and y are standardised first.
    """
    if config.standardise:
        predicted, label = (_standard(predicted), _standard(label))
    loss = config.regression_weight * (predicted - label).square().mean()
    if config.preference_weight == 0:
        return loss
    ordered = (prompt[:, None] == prompt) & (label[:, None] > label)
    gap = (predicted[:, None] - predicted)[ordered] / config.preference_temperature
    # a batch without a pair has nothing to say: 0, with a gradient
    return loss + config.preference_weight * torch.nn.functional.softplus(-gap).sum() / max(len(gap), 1)


def _standard(column: Tensor) -> Tensor:
    return (column - column.mean()) / (column.std(correction=0) + EPS)


@dataclass(frozen=True)
class Level:
    """One step of the curriculum.

    Attributes:
        step: whose predictions it learns from.
        epochs: passes over the trajectories.
    """

    step: int
    epochs: int


def first_level(config: Curriculum, steps: int) -> int:
    """Step of the cleanest level on a grid of so many steps.

    Raises:
        UserError: if it is beyond the grid.
    """
    first = 14 * steps // 20 if config.first_level is None else config.first_level
    if first >= steps:
        raise UserError(f"first_level = {first} lies beyond the last step, {steps - 1}, of this sampler")
    return first


def levels_of(config: Curriculum, steps: int, earliest: int, verifier: Verifier) -> list[Level]:
    """The first level and all noisier ones down to ``earliest``; a regressor begins with the final samples.

    Raises:
        UserError: if there is none.
    """
    first = first_level(config, steps)
    if first < earliest:
        raise UserError(
            f"first_level = {first} comes before the first prune step, {earliest}: nothing would be learned; raise it, "
            "prune earlier, or take value = posterior_mean"
        )
    down = [Level(step, config.epochs) for step in range(first, earliest - 1, -1)]
    return [Level(steps - 1, config.warm_up_epochs), *down] if isinstance(verifier, Regressor) else down


def fit_curriculum(
    verifier: Verifier,
    levels: Sequence[Level],
    recorded: Recorded,
    latent: LatentReward,
    label: Float[Tensor, " samples"],
    config: Curriculum,
    noise: NoiseSource,
) -> Iterator[int]:
    """Fit the levels in turn, each from the weights of the one before; yields the step of each when it is done.

    Args:
        verifier: trained in place: whoever wants the weights of a level copies them when it is yielded.
        levels: from clean to noisy.
        recorded: trajectories with the predictions of all levels.
        latent: makes of latents what a reward sees; counts the rows that the verifier sees as auxiliary calls.
        label: score of the final sample of each by the frozen reward.
        config: losses and optimiser.
        noise: of the order of the rows.
    """
    if isinstance(verifier, Regressor):
        verifier.calibrate(recorded.x_0, recorded.condition, label)
    for number, level in enumerate(levels):
        fit_level(verifier, level, recorded, latent, label, config, Apart(noise, f"level {number}"))
        yield level.step


def fit_level(
    verifier: Verifier,
    level: Level,
    recorded: Recorded,
    latent: LatentReward,
    label: Float[Tensor, " samples"],
    config: Curriculum,
    noise: NoiseSource,
) -> None:
    """Train the verifier on the predictions of one step, with a new optimiser; as :func:`fit_curriculum`."""
    rate = config.regressor_learning_rate if isinstance(verifier, Regressor) else config.learning_rate
    parameters = [parameter for parameter in verifier.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)
    orders = [order_of(recorded.prompt, config, noise, level.step, epoch) for epoch in range(level.epochs)]
    batches = [rows for order in orders for rows in order.split(config.batch)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, max(len(batches) - 1, 1))
    for rows in batches:
        with torch.enable_grad():
            loss = level_loss(
                predict(verifier, level.step, take(recorded, rows), latent), label[rows], recorded.prompt[rows], config
            )
            optimizer.zero_grad()
            loss.backward()
        clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()


def predict(verifier: Verifier, step: int, recorded: Recorded, latent: LatentReward) -> Float[Tensor, " samples"]:
    """What the verifier says of the predictions at a step, counted."""
    x0 = recorded.predictions[step]
    latent.ledger.auxiliary_calls += len(x0)
    return verifier(x0, recorded.condition, lambda: latent.samples(x0, recorded.prompt))


def order_of(
    prompt: Int[Tensor, " samples"], config: Curriculum, noise: NoiseSource, step: int, epoch: int
) -> Int[Tensor, " samples"]:
    """Rows in a new order; with the preference loss those of a prompt stay together."""
    label = f"epoch {epoch}"
    index = torch.arange(len(prompt), device=prompt.device)
    order = noise.uniform(index, (), purpose=label, step=step).argsort()
    if config.preference_weight == 0:
        return order
    return order[noise.uniform(prompt, (), purpose=f"{label} prompts", step=step)[order].argsort(stable=True)]
