"""Reverse steps as distributions. Drawing and scoring share the one formula that the kernel put into the step.

``std`` is the standard deviation of one whole step, never a rate.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.process.gaussian import expand
from difftilt.process.masked import gumbel
from difftilt.process.protocol import NoiseLaw
from difftilt.sampling.protocol import Reduction
from difftilt.trees import Batched


def reduce_dims(x: Shaped[Tensor, "batch *shape"], reduce: Reduction, mask: Tensor | None = None) -> Tensor:
    """Sum or mean of x over all dimensions but the first, keeping only those where ``mask`` is True."""
    flat = x.flatten(1)
    if mask is None:
        return flat.sum(1) if reduce == "sum" else flat.mean(1)
    keep = mask.flatten(1)
    total = torch.where(keep, flat, 0).sum(1)
    return total if reduce == "sum" else total / keep.sum(1)


def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """-(x - mean)²/(2 std²) - log std - log(2π)/2 of every element, in nats."""
    return -(((x - mean) / std) ** 2) / 2 - std.log() - 0.5 * math.log(2 * math.pi)


def divergence(mean: Tensor, std: Tensor, other_mean: Tensor, other_std: Tensor) -> Tensor:
    """KL(N(mean, std²) || N(other_mean, other_std²)) of every element, in nats."""
    ratio = (std / other_std) ** 2
    gap = ((mean - other_mean) / other_std) ** 2
    return (gap + ratio - 1 - ratio.log()) / 2


@dataclass(frozen=True)
class GaussianStep(Batched):
    """x_s ~ N(mean, std² I). Rows with std 0 draw their mean and have no density.

    Attributes:
        mean: (batch, *shape), float32 or better.
        std: (batch,).
        deterministic: no row has a density.
    """

    mean: Float[Tensor, "batch *shape"]
    std: Float[Tensor, " batch"]
    deterministic: bool = False
    noise_law: NoiseLaw = "normal"

    @property
    def varies(self) -> Bool[Tensor, " batch"]:
        return self.std > 0

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape[1:])

    def draw(self, noise: Float[Tensor, "batch *noise"]) -> Float[Tensor, "batch *shape"]:
        """Mean + std·noise."""
        return self.mean + expand(self.std, self.mean) * noise

    def log_prob(
        self,
        x_s: Float[Tensor, "batch *shape"],
        *,
        reduce: Reduction,
        mask: Bool[Tensor, "batch *shape"] | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> Float[Tensor, " batch"]:
        """-(x_s - mean)²/(2 std²) - log std - log(2π)/2 per dimension, reduced as named."""
        if self.deterministic:
            raise ValueError(
                "a deterministic step has no density: make the step stochastic or leave it out of the loss"
            )
        elementwise = log_density(x_s, self.mean, expand(self.std, self.mean))
        if clamp is not None:
            elementwise = elementwise.clamp(*clamp)
        return reduce_dims(elementwise, reduce, mask)

    def squared_error(self, x_s: Float[Tensor, "batch *shape"], *, reduce: Reduction) -> Float[Tensor, " batch"]:
        """-(x_s - mean)²: what coefficient-preserving sampling scores in place of a density."""
        return reduce_dims(-((x_s - self.mean) ** 2), reduce)

    def kl(self, other: Self, *, reduce: Reduction) -> Float[Tensor, " batch"]:
        """KL(self || other): |Δmean|²/(2 std²) for equal std, else with the terms of the variance ratio."""
        if self.deterministic or other.deterministic:
            raise ValueError("a deterministic step has no density, hence no KL")
        own, theirs = expand(self.std, self.mean), expand(other.std, self.mean)
        return reduce_dims(divergence(self.mean, own, other.mean, theirs), reduce)

    def shift(self, delta: Float[Tensor, "batch *shape"]) -> Self:
        """The step with its mean moved by ``delta``."""
        return replace(self, mean=self.mean + delta)

    def floored(self, floor: float) -> Self:
        """The step with its std raised to at least ``floor``; 0 leaves it as it is."""
        if floor <= 0:
            return self
        return replace(self, std=self.std.clamp(min=floor), deterministic=False)

    def only(self, rows: Bool[Tensor, " batch"], otherwise: Self) -> Self:
        """This step where ``rows`` is True, ``otherwise`` elsewhere: a window that differs between samples."""
        mean = torch.where(expand(rows.float(), self.mean) > 0, self.mean, otherwise.mean)
        std = torch.where(rows, self.std, otherwise.std)
        return replace(self, mean=mean, std=std, deterministic=self.deterministic and otherwise.deterministic)


@dataclass(frozen=True)
class CategoricalStep(Batched):
    """Every position draws its next symbol independently; the mask is the last symbol.

    Attributes:
        log_probs: (batch, position, vocab + 1), normalised; -inf where a symbol cannot come.
        state: the relaxed state that the step starts from, (batch, position, vocab + 1); None for hard states.
    """

    log_probs: Float[Tensor, "batch position symbols"]
    state: Float[Tensor, "batch position symbols"] | None = None
    deterministic: bool = False
    noise_law: NoiseLaw = "uniform"

    @property
    def varies(self) -> Bool[Tensor, " batch"]:
        # a visible token is carried over with probability 1
        return (self.log_probs.amax(-1) < 0).any(-1)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return tuple(self.log_probs.shape[1:])

    def draw(self, noise: Float[Tensor, "batch position symbols"]) -> Int[Tensor, "batch position"]:
        """Gumbel-max: argmax of log p - log(-log u)."""
        return (self.log_probs + gumbel(noise)).argmax(-1)

    def relaxed_draw(
        self, noise: Float[Tensor, "batch position symbols"], temperature: float
    ) -> Float[Tensor, "batch position symbols"]:
        """Gumbel-softmax over all symbols, the mask included, with the noise of :meth:`draw`.

        A relaxed state with mask mass m becomes (1 - m)·state + m·draw (DRAKES, arXiv 2410.13643).
        """
        # a finite floor: -inf logits give NaN gradients in the softmax
        drawn = ((self.log_probs.clamp(min=-1e6) + gumbel(noise)) / temperature).softmax(-1)
        if self.state is None:
            return drawn
        mass = self.state[..., -1:]
        return (1 - mass) * self.state + mass * drawn

    def log_prob(
        self,
        x_s: Int[Tensor, "batch position"],
        *,
        reduce: Reduction,
        mask: Bool[Tensor, "batch position"] | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log p of the symbols of x_s. The mean is over all positions, whether they could change or not."""
        each = self.log_probs.gather(-1, x_s[..., None])[..., 0]
        return reduce_dims(each if clamp is None else each.clamp(*clamp), reduce, mask)

    def kl(self, other: Self, *, reduce: Reduction) -> Float[Tensor, " batch"]:
        """Σ_v p(v)·(log p(v) - log q(v)), 0 where p(v) = 0; relaxed positions count by their mask mass."""
        impossible = self.log_probs == -torch.inf
        gap = torch.where(impossible, 0, self.log_probs) - torch.where(impossible, 0, other.log_probs)
        each = (self.log_probs.exp() * gap).sum(-1)
        return reduce_dims(each if self.state is None else each * self.state[..., -1], reduce)

    def shift(self, delta: Float[Tensor, "batch position symbols"]) -> Self:
        """The step with ``delta`` added to its logits, normalised again."""
        return replace(self, log_probs=(self.log_probs + delta).log_softmax(-1))


@dataclass(frozen=True)
class MixtureStep(Batched):
    """x_s ~ Σ_k w_k N(mean_k, std² I): the exact reverse step of a Gaussian-mixture model.

    The last coordinate of the normal noise picks the component through the normal distribution function, the others
    are its Gaussian noise, so that one tensor of normals fixes the draw.

    Attributes:
        log_weight: (batch, components), normalised.
        means: (batch, components, dim).
        std: (batch,), equal for all components.
    """

    log_weight: Float[Tensor, "batch components"]
    means: Float[Tensor, "batch components dim"]
    std: Float[Tensor, " batch"]
    deterministic: bool = False
    noise_law: NoiseLaw = "normal"

    @property
    def varies(self) -> Bool[Tensor, " batch"]:
        return self.std > 0

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return (self.means.shape[-1] + 1,)

    def draw(self, noise: Float[Tensor, "batch noise"]) -> Float[Tensor, "batch dim"]:
        """mean_k + std·noise with k the smallest index whose cumulative weight exceeds Φ(last coordinate)."""
        level = torch.special.ndtr(noise[:, -1:])
        component = (self.log_weight.exp().cumsum(-1) < level).sum(-1).clamp(max=self.means.shape[1] - 1)
        mean = self.means[torch.arange(len(noise), device=noise.device), component]
        return mean + self.std[:, None] * noise[:, :-1]

    def log_prob(
        self,
        x_s: Float[Tensor, "batch dim"],
        *,
        reduce: Reduction,
        mask: Bool[Tensor, "batch dim"] | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log Σ_k w_k N(x_s; mean_k, std²): of the whole vector; ``mean`` divides it by the dimension."""
        if mask is not None or clamp is not None:
            raise ValueError("the density of a mixture does not factor over dimensions: no mask and no clamp")
        dim = self.means.shape[-1]
        gap = ((x_s[:, None] - self.means) / self.std[:, None, None]).square().sum(-1)
        norm = dim * (self.std.log() + 0.5 * math.log(2 * math.pi))
        density = torch.logsumexp(self.log_weight - gap / 2, -1) - norm
        return density if reduce == "sum" else density / dim

    def kl(self, other: Self, *, reduce: Reduction) -> Float[Tensor, " batch"]:
        raise NotImplementedError("the KL of two mixtures has no closed form")

    def shift(self, delta: Float[Tensor, "batch dim"]) -> Self:
        """Every component moved by ``delta``."""
        return replace(self, means=self.means + delta[:, None])
