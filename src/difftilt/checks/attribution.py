"""How much of a credit is the doing of a step's own noise, and how steady the gradient is that it makes."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.training.loop import Loop

Gradients = Float[Tensor, "iterations parameters"]


def explained(credit: Float[Tensor, "groups size"], noise: Float[Tensor, "groups size dim"]) -> float:
    """R² of a linear fit of the credit on the noise, one fit in each group.

    Σ_groups |fitted|²/Σ_groups |credit - mean of its group|²; 0/0, where no group has any variance, is NaN. Groups need
    far more members than the noise has dimensions: :func:`chance` is what unrelated numbers have.
    """
    total = (credit - credit.mean(1, keepdim=True)).double().square().sum()
    return fitted_squares(credit, noise) / float(total) if total > 0 else float("nan")


def fitted_squares(credit: Float[Tensor, "groups size"], noise: Float[Tensor, "groups size dim"]) -> float:
    """Σ_groups |fitted|²: the sum of squares that a linear fit of the credit on the noise explains."""
    y, x = (credit - credit.mean(1, keepdim=True)).double(), (noise - noise.mean(1, keepdim=True)).double()
    return float((torch.linalg.qr(x).Q.mT @ y[..., None]).square().sum())


def chance(size: int, dim: int) -> float:
    """Expected R² of noise that means nothing: dim regressors among the size - 1 deviations of a group."""
    return dim / (size - 1)


def unrelated(noise: Float[Tensor, "groups size dim"]) -> Float[Tensor, "groups size dim"]:
    """Each member with the noise of another of its group."""
    return noise.roll(1, 1)


def gradient_at(loop: Loop, iteration: int) -> Float[Tensor, " parameters"]:
    """The gradient of one iteration at the present weights, flattened, float64; zero where nothing flowed."""
    loop.run.begin(iteration)
    loop.updater.fresh = True
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    (phase,) = loop.method.phases(loop.run)
    loop.updater.run_phase(phase, experience, loop.run.noise)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in loop.run.roles.parameters("current")]
    return torch.cat([part.reshape(-1) for part in parts]).double()


def signal_to_noise(gradients: Gradients) -> float:
    """Squared mean over variance of the gradient of an iteration."""
    signal = _inner(gradients, gradients)
    return signal / (float(gradients.square().sum(1).mean()) - signal)


def cosine(one: Gradients, other: Gradients) -> float:
    """Between the expected gradients of two methods on the same iterations, without the bias of their noise."""
    return _inner(one, other) / (_inner(one, one) * _inner(other, other)) ** 0.5


def _inner(one: Gradients, other: Gradients) -> float:
    """Mean of <g, g'> over pairs of different iterations: the noise of an iteration is in no pair twice."""
    pairs = one @ other.T
    return float((pairs.sum() - pairs.diagonal().sum()) / (len(one) * (len(one) - 1)))
