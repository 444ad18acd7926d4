"""Selection of ancestors from log-weights, group by group, from uniform noise. Pure functions in float64 log space.

Log-weights, ancestors and noise have the shape (groups, size); ancestors are positions within the group, 0..size-1.
All but ``greedy`` are unbiased: the expected number of copies of particle i is size·W_i with W = softmax(log-weights).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

ResamplerName = Literal["multinomial", "stratified", "systematic", "residual", "greedy"]
Resampler = Callable[[Tensor, Tensor], Tensor]
"""``(log_weight, uniform noise) -> ancestors``, all (groups, size)."""

LogWeights = Float[Tensor, "groups size"]
Ancestors = Int[Tensor, "groups size"]


def effective_sample_size(log_weight: LogWeights) -> Float[Tensor, " groups"]:
    """1 / Σ W_i² of each group: ``size`` for equal weights, 1 if one particle has them all."""
    return 1 / log_weight.double().softmax(-1).square().sum(-1)


def log_mean_exp(log_weight: Float[Tensor, "*groups size"]) -> Float[Tensor, "*groups"]:
    """Log of the mean of exp over the last axis."""
    return log_weight.logsumexp(-1) - math.log(log_weight.shape[-1])


def _invert(mass: Float[Tensor, "groups size"], level: Float[Tensor, "groups size"]) -> Ancestors:
    """First i whose cumulative mass exceeds level·total: a particle without mass is never chosen."""
    cumulative = mass.cumsum(-1)
    # against the running total itself, so that rounding cannot push a level past the last particle with mass
    return torch.searchsorted(cumulative, level * cumulative[:, -1:], right=True).clamp(max=mass.shape[-1] - 1)


def multinomial(log_weight: LogWeights, noise: LogWeights) -> Ancestors:
    """Every slot draws from Categorical(W) with its own uniform (the reference's rule)."""
    return _invert(log_weight.double().softmax(-1), noise.double())


def stratified(log_weight: LogWeights, noise: LogWeights) -> Ancestors:
    """Slot j draws from the j-th of ``size`` equal strata of the cumulative weight (Kitagawa 1996)."""
    size = log_weight.shape[-1]
    place = torch.arange(size, dtype=torch.float64, device=log_weight.device)
    return _invert(log_weight.double().softmax(-1), (place + noise.double()) / size)


def systematic(log_weight: LogWeights, noise: LogWeights) -> Ancestors:
    """One uniform, that of the first slot, for all strata: copies differ from size·W by less than 1."""
    return stratified(log_weight, noise[:, :1].expand_as(noise))


def residual(log_weight: LogWeights, noise: LogWeights) -> Ancestors:
    """⌊size·W_i⌋ copies for certain, the remaining slots from Categorical of the fractions (Liu and Chen 1998)."""
    size = log_weight.shape[-1]
    expected = log_weight.double().softmax(-1) * size
    # equal weights must count as whole copies although size·(1/size) may round below 1
    sure = (expected + 1e-9).floor()
    slot = torch.arange(size, dtype=torch.float64, device=log_weight.device).expand_as(expected).contiguous()
    certain = torch.searchsorted(sure.cumsum(-1), slot, right=True)
    drawn = _invert((expected - sure).clamp(min=0), noise.double())
    return torch.where(slot < sure.sum(-1, keepdim=True), certain.clamp(max=size - 1), drawn)


def greedy(log_weight: LogWeights, noise: LogWeights) -> Ancestors:
    """Every slot takes the heaviest particle: the limit of temperature 0."""
    return log_weight.argmax(-1, keepdim=True).expand(log_weight.shape).contiguous()


RESAMPLERS: dict[ResamplerName, Resampler] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
    "greedy": greedy,
}


def distinct(labels: Int[Tensor, "groups size"]) -> Int[Tensor, " groups"]:
    """Number of different labels in each group."""
    ordered = labels.sort(-1).values
    return 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(-1)
