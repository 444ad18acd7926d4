"""Distances between two sets of feature vectors, and the diversity of one. Sums in float64."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difftilt.errors import UserError

Points = Float[Tensor, "rows dim"]
Others = Float[Tensor, "others dim"]
Kernel = Callable[[Tensor, Tensor], Tensor]
"""``(rows, dim), (others, dim) -> (rows, others)``, positive definite."""


def frechet_from_moments(
    mean_x: Float[Tensor, " dim"],
    cov_x: Float[Tensor, "dim dim"],
    mean_y: Float[Tensor, " dim"],
    cov_y: Float[Tensor, "dim dim"],
) -> Float[Tensor, ""]:
    """|mean_x - mean_y|² + tr(C_x + C_y - 2 (C_x C_y)^(1/2)): squared 2-Wasserstein distance of two Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of C_x C_y, found from the similar symmetric
    matrix C_x^(1/2) C_y C_x^(1/2); eigenvalues that rounding made negative are set to 0 (Heusel et al. 2017).
    """
    values, vectors = torch.linalg.eigh(cov_x.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_y.double() @ root).clamp(min=0)
    gap = (mean_x.double() - mean_y.double()).square().sum()
    return gap + cov_x.double().trace() + cov_y.double().trace() - 2 * product.sqrt().sum()


def frechet_distance(x: Points, y: Others) -> Float[Tensor, ""]:
    """:func:`frechet_from_moments` of two samples with unbiased covariances; at least 2 rows each.

    With fewer rows than dimensions the trace of the root is found without a covariance: for centred rows X and Y,
    C_x C_y has the non-zero eigenvalues of M M^T/((n - 1)(m - 1)) with M = X Y^T, so it is the sum of the singular
    values of M over the root of (n - 1)(m - 1).
    """
    x, y = x.double(), y.double()
    if max(len(x), len(y)) >= x.shape[1]:
        return frechet_from_moments(x.mean(0), covariance(x), y.mean(0), covariance(y))
    gap, x, y = (x.mean(0) - y.mean(0)).square().sum(), x - x.mean(0), y - y.mean(0)
    n, m = len(x) - 1, len(y) - 1
    root = torch.linalg.svdvals(x @ y.T).sum() / (n * m) ** 0.5
    return gap + x.square().sum() / n + y.square().sum() / m - 2 * root


def covariance(x: Points) -> Float[Tensor, "dim dim"]:
    """Unbiased covariance of the rows."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def rbf_kernel(bandwidth: float) -> Kernel:
    """exp(-|x - y|² / (2·bandwidth²)).

    Raises:
        UserError: unless the bandwidth is finite and above 0.
    """
    if not 0 < bandwidth < math.inf:
        raise UserError(f"bandwidth = {bandwidth:g}: a width of an RBF kernel must be finite and above 0")
    return lambda x, y: (-torch.cdist(x, y).square() / (2 * bandwidth**2)).exp()


def polynomial_kernel(degree: int = 3) -> Kernel:
    """(x·y/dim + 1)^degree, the kernel of KID (Binkowski et al. 2018)."""
    return lambda x, y: (x @ y.T / x.shape[1] + 1) ** degree


def mmd_squared(x: Points, y: Others, kernel: Kernel, *, unbiased: bool = True) -> Float[Tensor, ""]:
    """E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al. 2012).

    Unbiased leaves the pairs of a sample with itself out, may be negative, and has mean 0 for equal laws.
    """
    x, y = x.double(), y.double()
    within = mean_within(kernel(x, x), unbiased) + mean_within(kernel(y, y), unbiased)
    return within - 2 * kernel(x, y).mean()


def mean_within(gram: Float[Tensor, "rows rows"], unbiased: bool) -> Float[Tensor, ""]:
    """Mean of the kernel over pairs of rows; unbiased without the pairs of a row with itself."""
    size = len(gram)
    return (gram.sum() - gram.trace()) / (size * (size - 1)) if unbiased else gram.mean()


def kernel_distance(x: Points, y: Others) -> Float[Tensor, ""]:
    """KID: the unbiased squared MMD with the cubic polynomial kernel."""
    return mmd_squared(x, y, polynomial_kernel())


def vendi_score(features: Points, kernel: Kernel | None = None) -> Float[Tensor, ""]:
    """Effective number of different samples, in [1, rows]: exp of the entropy of the eigenvalues of K/rows.

    Args:
        features: (rows, dim).
        kernel: with k(x, x) = 1; None is the cosine of the features (Friedman and Dieng 2023).
    """
    if kernel is None:
        unit = torch.nn.functional.normalize(features.double(), dim=1)
        # X X^T and X^T X have the same eigenvalues but for zeros, which have no entropy
        gram = unit.T @ unit if unit.shape[1] < len(unit) else unit @ unit.T
    else:
        gram = kernel(features.double(), features.double())
    eigenvalues = torch.linalg.eigvalsh(gram / len(features)).clamp(min=0)
    return torch.special.entr(eigenvalues).sum().exp()


def coverage(reference: Points, samples: Others, neighbours: int = 5) -> Float[Tensor, ""]:
    """Share of reference points with a sample within the distance of their k-th neighbour (Naeem et al. 2020)."""
    return covered(reference, samples, neighbour_radius(reference, neighbours)).any(1).double().mean()


def neighbour_radius(reference: Points, neighbours: int = 5) -> Float[Tensor, " rows"]:
    """Distance of each reference point to its k-th neighbour among the references, float64."""
    reference = reference.double()
    # the nearest of a point to its own set is itself, so the k-th neighbour is the (k + 1)-th smallest
    return torch.cdist(reference, reference).kthvalue(neighbours + 1, dim=1).values


def covered(reference: Points, samples: Others, radius: Float[Tensor, " rows"]) -> Bool[Tensor, "rows others"]:
    """Whether each sample lies within the radius of each reference point."""
    return torch.cdist(reference.double(), samples.double()) <= radius[:, None]


def mode_shares(samples: Points, modes: Float[Tensor, "modes dim"], radius: float) -> Float[Tensor, " modes"]:
    """Share of the samples whose nearest mode it is and that lie within ``radius`` of it; the rest is off-mode."""
    distance, nearest = torch.cdist(samples.double(), modes.double()).min(dim=1)
    counted = torch.bincount(nearest[distance <= radius], minlength=len(modes))
    return counted.double() / len(samples)
