"""Gaussians with a mean and a standard deviation of every element: laws of initial noise that can be learned."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.sampling.noise import copies
from difftilt.sampling.protocol import NoiseSource, Reduction
from difftilt.sampling.steps import divergence, log_density, reduce_dims
from difftilt.trees import Batched, take


@dataclass(frozen=True)
class DiagonalGaussian(Batched):
    """z ~ N(mean, diag(std²)), one law per row.

    Attributes:
        mean, std: (rows, *shape); std positive.
    """

    mean: Float[Tensor, "rows *shape"]
    std: Float[Tensor, "rows *shape"]

    @staticmethod
    def prior(rows: int, shape: tuple[int, ...], device: torch.device | str = "cpu") -> "DiagonalGaussian":
        """The law of pure noise, N(0, I)."""
        mean = torch.zeros(rows, *shape, device=device)
        return DiagonalGaussian(mean, torch.ones_like(mean))

    def draw(self, noise: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows *shape"]:
        """Mean + std·noise."""
        return self.mean + self.std * noise

    def draws(
        self, index: Int[Tensor, " rows"], count: int, noise: NoiseSource, purpose: str, step: int = 0
    ) -> Float[Tensor, "rows count *shape"]:
        """``count`` draws of every law; draw j of the law with index i has the noise index i·count + j."""
        rows, numbers = copies(index, count)
        normal = noise.normal(numbers, tuple(self.mean.shape[1:]), purpose=purpose, step=step)
        return take(self, rows).draw(normal).unflatten(0, (len(index), count))

    def log_prob(self, z: Float[Tensor, "rows *shape"], *, reduce: Reduction) -> Float[Tensor, " rows"]:
        """Log density in nats; ``mean`` divides it by the number of elements."""
        return reduce_dims(log_density(z, self.mean, self.std), reduce)

    def kl_to_prior(self, *, reduce: Reduction) -> Float[Tensor, " rows"]:
        """KL(self || N(0, I)) in nats: (mean² + std² - 1 - 2·log std)/2 of every element."""
        still = torch.zeros_like(self.mean)
        return reduce_dims(divergence(self.mean, self.std, still, still + 1), reduce)

    def gap_to_prior(self, *, reduce: Reduction) -> Float[Tensor, " rows"]:
        """mean² + (std - 1)² of every element: like the KL near the prior, but finite where std falls to 0."""
        return reduce_dims(self.mean**2 + (self.std - 1) ** 2, reduce)


def radius(z: Float[Tensor, "rows *shape"]) -> Float[Tensor, " rows"]:
    """|z|/sqrt(elements), 1 ± 1/sqrt(2·elements) under N(0, I): far from 1 no generator has seen such noise."""
    return z.flatten(1).norm(dim=1) / z[0].numel() ** 0.5
