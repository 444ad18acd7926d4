"""Optimal transport in one dimension, its slices, and the energy distance. Sums in float64."""

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, " rows"]
OtherValues = Float[Tensor, " others"]


def wasserstein_1d(
    x: Values,
    y: OtherValues,
    *,
    order: float = 1.0,
    x_weights: Values | None = None,
    y_weights: OtherValues | None = None,
) -> Float[Tensor, ""]:
    """(∫ |F_x^-1(u) - F_y^-1(u)|^order du)^(1/order), exact for sets of any size.

    Args:
        x: samples on the line.
        y: samples of the other law.
        order: at least 1.
        x_weights: of x, non-negative, need not be normalised; None is equal weights.
        y_weights: of y.
    """
    x, x_level = _quantiles(x, x_weights)
    y, y_level = _quantiles(y, y_weights)
    levels = torch.cat([x_level, y_level]).sort().values
    width = levels.diff(prepend=levels.new_zeros(1))
    # a level belongs to the first sample whose cumulative weight reaches it
    gap = _read(x, x_level, levels) - _read(y, y_level, levels)
    return (width * gap.abs() ** order).sum() ** (1 / order)


def _quantiles(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sorted values and their cumulative weights, which end at 1."""
    ordered, place = values.double().sort()
    weight = torch.ones_like(ordered) if weights is None else weights.double()[place]
    level = weight.cumsum(0)
    return ordered, level / level[-1]


def _read(values: Tensor, level: Tensor, at: Tensor) -> Tensor:
    return values[torch.searchsorted(level, at).clamp(max=len(values) - 1)]


def random_directions(count: int, dim: int, generator: torch.Generator) -> Float[Tensor, "count dim"]:
    """Unit vectors, uniform on the sphere, float64."""
    drawn = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def sliced_wasserstein(
    x: Float[Tensor, "rows dim"],
    y: Float[Tensor, "others dim"],
    directions: Float[Tensor, "count dim"],
    *,
    order: float = 2.0,
) -> Float[Tensor, ""]:
    """(mean over directions of W_order^order of the projections)^(1/order) (Bonneel et al. 2015)."""
    along_x, along_y = x.double() @ directions.double().T, y.double() @ directions.double().T
    pairs = zip(along_x.T, along_y.T, strict=True)
    each = torch.stack([wasserstein_1d(one, other, order=order) for one, other in pairs])
    return (each**order).mean() ** (1 / order)


def energy_distance(x: Float[Tensor, "rows dim"], y: Float[Tensor, "others dim"]) -> Float[Tensor, ""]:
    """sqrt(2 E|x - y| - E|x - x'| - E|y - y'|) over all pairs (Szekely and Rizzo 2013); 0 only for equal laws."""
    x, y = x.double(), y.double()
    squared = 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    return squared.clamp(min=0).sqrt()
