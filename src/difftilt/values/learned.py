"""Values learned by regression on noised samples or on states of base trajectories (FK steering 3c, SVDD-MC)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from difftilt.process.protocol import Condition, Prediction, Process
from difftilt.sampling.protocol import NoiseSource
from difftilt.trees import take
from difftilt.values.protocol import Rows

Regression = Literal["exponential", "stationary", "mean"]
"""Which conditional expectation the network learns, see :func:`regression_loss`."""

ValueFunction = Callable[[Tensor, Tensor, Condition], Tensor]
"""``(x_t, t, condition) -> (batch,)`` value in units of the reward."""


@dataclass(frozen=True)
class Learned:
    """A network's value of a state; counts no evaluations, for it is not the denoiser."""

    network: ValueFunction
    reads_prediction: ClassVar[bool] = False

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        return self.network(x_t, t, condition)


def regression_loss(
    value: Float[Tensor, " batch"],
    reward: Float[Tensor, " batch"],
    temperature: float,
    kind: Regression,
    ceiling: float,
) -> Float[Tensor, " batch"]:
    """Loss of each row, whose minimiser over functions of the state is the named value (β the temperature).

    exponential: (exp((r - c)/β) - exp((f - c)/β))², minimised by the soft value (FK steering 3c; SVDD eq. for MC).
    stationary: exp(d) - d - 1 with d = (r - f)/β, the exponential continued by its tangent above 8: the same minimiser,
    as E[exp((r - f)/β) | x_t] = 1, without the dominance of the largest rewards. (Capped instead, it would have no
    slope there, and the term -d would push f away from the largest rewards.) mean: (r - f)², minimised by E[r | x_t].

    Args:
        value: f(x_t, t).
        reward: r(x_0).
        temperature: β.
        kind: which loss.
        ceiling: c, one fixed number for the whole fit, e.g. the largest reward: a maximum per batch would bias f.
    """
    if kind == "mean":
        return (reward - value) ** 2
    if kind == "exponential":
        return (((reward - ceiling) / temperature).exp() - ((value - ceiling) / temperature).exp()) ** 2
    gap = (reward - value) / temperature
    below = gap.clamp(max=8.0)
    return below.exp() * (1 + gap - below) - gap - 1


def fit_value(
    network: nn.Module,
    process: Process,
    x_0: Shaped[Tensor, "samples *shape"],
    reward: Float[Tensor, " samples"],
    noise: NoiseSource,
    *,
    condition: Condition = None,
    temperature: float,
    kind: Regression = "stationary",
    updates: int = 1000,
    batch: int = 256,
    learning_rate: float = 3e-3,
    unit: float = 1.0,
    purpose: str = "value",
) -> list[float]:
    """Fit ``network(x_t, t, condition)`` in place on noised samples at uniform times; returns the loss of each update.

    Args:
        network: a ``models.process_reward.ProcessReward`` or any module of that signature.
        process: corrupts the samples.
        x_0: samples of the base model.
        reward: their rewards.
        noise: of the choice of rows, the times and the corruption.
        condition: one row per sample.
        temperature: β of the soft value.
        kind: see :func:`regression_loss`.
        updates: optimiser steps (Adam, cosine decay of the learning rate).
        batch: rows per update.
        learning_rate: at the start.
        unit: of the rewards, see :func:`noised_loss`.
        purpose: keeps the noise of this fit apart from that of others.
    """
    index, ceiling = torch.arange(batch, device=x_0.device), float(reward.max())

    def loss(update: int) -> Tensor:
        rows = chosen(len(x_0), index, noise, f"{purpose} rows", update)
        return noised_loss(
            network, process, x_0[rows], reward[rows], take(condition, rows), index, noise,
            temperature=temperature, kind=kind, ceiling=ceiling, unit=unit, purpose=purpose, step=update,
        ).mean()  # fmt: skip

    return descend(network, loss, updates, learning_rate)


def chosen(
    count: int, index: Int[Tensor, " batch"], noise: NoiseSource, purpose: str, update: int
) -> Int[Tensor, " batch"]:
    """A batch of rows of ``count``, drawn with replacement."""
    return (noise.uniform(index, (), purpose=purpose, step=update) * count).long()


def descend(network: nn.Module, loss: Callable[[int], Tensor], updates: int, learning_rate: float) -> list[float]:
    """Adam with a cosine decay of the learning rate on ``loss(update)``, a scalar; returns its values."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(updates, 1))
    losses: list[float] = []
    for update in range(updates):
        with torch.enable_grad():
            found = loss(update)
            optimizer.zero_grad()
            found.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(found.detach()))
    return losses


def noised_loss(
    network: nn.Module,
    process: Process,
    x_0: Shaped[Tensor, "rows *shape"],
    reward: Float[Tensor, " rows"],
    condition: Condition,
    index: Int[Tensor, " rows"],
    noise: NoiseSource,
    *,
    temperature: float,
    kind: Regression,
    ceiling: float,
    unit: float = 1.0,
    purpose: str = "value",
    step: int = 0,
) -> Float[Tensor, " rows"]:
    """The regression of each row at a time uniform on (0, 1).

    Args:
        network: (x_t, t, condition) -> (rows,).
        process: corrupts the samples.
        x_0: samples.
        reward: of each.
        condition: of each.
        index: keys the noise of each row.
        noise: of the times and the corruption.
        temperature: β of the soft value.
        kind: see :func:`regression_loss`.
        ceiling: see there.
        unit: of the rewards; the loss of ``mean`` is divided by its square, the others have none.
        purpose: of the noise.
        step: of the noise.
    """
    t = noise.uniform(index, (), purpose=f"{purpose} times", step=step)
    law = noise.normal if process.noise_law == "normal" else noise.uniform
    eps = law(index, tuple(x_0.shape[1:]), purpose=f"{purpose} corruption", step=step)
    value = network(process.corrupt(x_0, t, eps), t, condition)
    loss = regression_loss(value, reward.to(value), temperature, kind, ceiling)
    return loss / unit**2 if kind == "mean" else loss
