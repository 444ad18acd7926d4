"""Fréchet distance of a changing set to a fixed reference: one eigen-decomposition for all sets that differ by a row.

A set is known by its count, mean and centred scatter S, in float64. With the root R of the reference's covariance,

    d² = |mean - mean_r|² + tr C + tr C_r - 2 tr A^(1/2),   A = R C R,

and leaving a row out or replacing it changes A by rank 1 or 2. Since sqrt(a) = (2/π) ∫_0^∞ a/(a + y²) dy,

    tr A'^(1/2) - tr A^(1/2) = -(2/π) ∫_0^∞ y² D(y²) dy,   D(z) = tr (A' + z)^-1 - tr (A + z)^-1 = d/dz log det M(z)

for A' = A + U K U^T, with the small matrix M(z) = I + K U^T (A + z)^-1 U. In s = log y the integrand is analytic for
|Im s| < π/2 and falls like exp(-|s|), so the trapezoidal rule with step h errs by about exp(-π²/h) (Trefethen and
Weideman 2014): all rows together cost a few matrix products.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError

Spread = Literal["full", "diagonal", "none"]
"""What is compared beside the means: covariances, variances of each dimension, or nothing."""

STEP = 0.4
"""Of the rule in log y: exp(-π²/0.4) = 2e-11."""
LOWEST, HIGHEST = 1e-8, 1e3
"""Ends of the rule in units of the largest root; both tails are geometric and added in closed form."""


@dataclass(frozen=True)
class SetMoments:
    """Count, mean (dim,) and centred scatter Σ (x - mean)(x - mean)^T (dim, dim) of a set, float64."""

    count: int
    mean: Float[Tensor, " dim"]
    scatter: Float[Tensor, "dim dim"]

    @classmethod
    def of(cls, features: Float[Tensor, "rows dim"]) -> "SetMoments":
        """Of the rows."""
        rows = features.double()
        mean = rows.mean(0)
        return cls(len(rows), mean, (rows - mean).T @ (rows - mean))

    def replaced(self, old: Float[Tensor, " dim"], new: Float[Tensor, " dim"]) -> "SetMoments":
        """Of the set with ``new`` for its row ``old``, of one row too: from b·b^T - a·a^T about the former mean."""
        a, b = old.double() - self.mean, new.double() - self.mean
        step = (b - a) / self.count
        change = torch.outer(b, b) - torch.outer(a, a) - self.count * torch.outer(step, step)
        return SetMoments(self.count, self.mean + step, self.scatter + change)

    def on(self, device: torch.device) -> "SetMoments":
        """The same on a device."""
        return SetMoments(self.count, self.mean.to(device), self.scatter.to(device))


@dataclass(frozen=True)
class FrechetReference:
    """What a set is compared with: mean and covariance, float64, and how covariances are read.

    With shrinkage s every covariance C, the reference's and the set's, becomes (1 - s)·C + s·v·I with the mean variance
    v = tr C_r/dim of the reference: regular for any number of rows, and equal laws keep distance 0.

    Attributes:
        mean: (dim,).
        covariance: (dim, dim), before shrinkage.
        spread: what is compared beside the means.
        shrinkage: s, in [0, 1].
    """

    mean: Float[Tensor, " dim"]
    covariance: Float[Tensor, "dim dim"]
    spread: Spread = "full"
    shrinkage: float = 0.0

    def on(self, device: torch.device) -> "FrechetReference":
        """The same on a device; itself where it is there already."""
        if self.mean.device == device:
            return self
        return replace(self, mean=self.mean.to(device), covariance=self.covariance.to(device))

    @property
    def level(self) -> float:
        """s·v: what shrinkage adds to every variance."""
        return self.shrinkage * float(self.covariance.trace()) / len(self.mean)

    @cached_property
    def shrunk(self) -> Float[Tensor, "dim dim"]:
        """The covariance after shrinkage."""
        eye = torch.eye(len(self.mean), dtype=torch.float64, device=self.mean.device)
        return (1 - self.shrinkage) * self.covariance + self.level * eye

    @cached_property
    def root(self) -> Float[Tensor, "dim dim"]:
        """Symmetric root R of the shrunk covariance; directions without variance are exactly 0."""
        values, vectors = spectrum(self.shrunk)
        return vectors * values.sqrt() @ vectors.T

    @cached_property
    def constant(self) -> float:
        """Tr of the shrunk covariance, and what shrinkage adds to the trace of the set's."""
        return float(self.shrunk.trace()) + self.level * len(self.mean)

    def distance(self, moments: SetMoments) -> float:
        """Squared Fréchet distance of a set with these moments; at least two rows unless only means are compared."""
        moments = moments.on(self.mean.device)
        gap = (moments.mean - self.mean).square().sum()
        if self.spread == "none":
            return float(gap)
        weight = (1 - self.shrinkage) / (moments.count - 1)
        if self.spread == "diagonal":
            own = (weight * moments.scatter.diagonal().clamp(min=0) + self.level).sqrt()
            return float(gap + (own - self.shrunk.diagonal().sqrt()).square().sum())
        trace = weight * moments.scatter.trace() + self.constant
        values = without_noise(torch.linalg.eigvalsh(self.product(moments.scatter, weight)))
        return float(gap + trace - 2 * values.sqrt().sum())

    def product(self, scatter: Float[Tensor, "dim dim"], weight: float) -> Float[Tensor, "dim dim"]:
        """R (weight·scatter + s·v·I) R."""
        return weight * (self.root @ scatter @ self.root) + self.level * self.shrunk


def spectrum(matrix: Float[Tensor, "dim dim"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, "dim dim"]]:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix; what rounding may have made is set to 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return without_noise(values), vectors


def without_noise(values: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Ascending eigenvalues, 0 where rounding may have made them: its root would be 1e-8 of the largest root."""
    noise = values.shape[-1] * torch.finfo(values.dtype).eps * values[..., -1:].clamp(min=0)
    return torch.where(values > noise, values, 0.0)


FEW = 1024
"""Numbers in a batch of small matrices whose eigenvalues are found one by one sooner than by the rule."""


@dataclass(frozen=True)
class Change:
    """Rank-1 changes ``weight · row row^T``, one for each row, in the eigenbasis of the matrix that changes."""

    weight: float
    rows: Float[Tensor, "rows dim"]

    @property
    def trace(self) -> Float[Tensor, " rows"]:
        """Of each change."""
        return self.weight * self.rows.square().sum(1)

    @property
    def matrices(self) -> Float[Tensor, "rows dim dim"]:
        """The changes themselves."""
        return self.weight * self.rows[:, :, None] * self.rows[:, None, :]


def root_trace_change(
    eigenvalues: Float[Tensor, " dim"], less: Change, more: Change | None = None
) -> Float[Tensor, " rows"]:
    """Tr (A + change)^(1/2) - tr A^(1/2) for every row of the changes: by the rule of this module, unless they are few.

    Args:
        eigenvalues: of A, at least 0.
        less: with a negative weight; A less this is positive semi-definite.
        more: with a positive weight, or None.
    """
    if less.rows.numel() * len(eigenvalues) <= FEW:
        changed = eigenvalues.diag() + less.matrices + (0 if more is None else more.matrices)
        return without_noise(torch.linalg.eigvalsh(changed)).sqrt().sum(1) - eigenvalues.sqrt().sum()
    moved = less.trace if more is None else less.trace + more.trace
    top = float(eigenvalues.max()) + (0.0 if more is None else float(more.trace.max()))
    if top <= 0:
        return torch.zeros_like(moved)
    first, last = math.floor(math.log(LOWEST) / STEP), math.ceil(math.log(HIGHEST) / STEP)
    y = math.sqrt(top) * torch.exp(STEP * torch.arange(first, last + 1, dtype=torch.float64, device=moved.device))
    z = y.square()
    inverse = 1 / (eigenvalues[:, None] + z)
    slope, det = _log_det_of(inverse, less, more)
    # y²·D is a difference of sums of y²/(λ + y²) over interlacing eigenvalues, so it lies in [-1, 1], and det M is at
    # least z/(top + z): where rounding says otherwise, the change takes a direction out of the set
    values = (z * slope / torch.maximum(det, z / (top + z))).clamp(-1, 1) * y
    beyond = -moved / y[-1] + values[:, 0]
    return -(2 / math.pi) * STEP * (values.sum(1) + beyond / math.expm1(STEP))


def _log_det_of(
    inverse: Float[Tensor, "dim nodes"], less: Change, more: Change | None
) -> tuple[Float[Tensor, "rows nodes"], Float[Tensor, "rows nodes"]]:
    """(derivative of det M(z), det M(z)) for each row, from q = Σ u²/(λ + z) and its derivative -Σ u²/(λ + z)²."""
    squared = inverse.square()

    def forms(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return (one * other) @ inverse, (one * other) @ squared

    q, p = forms(less.rows, less.rows)
    det, slope = 1 + less.weight * q, -less.weight * p
    if more is None:
        return slope, det
    q_more, p_more = forms(more.rows, more.rows)
    q_both, p_both = forms(less.rows, more.rows)
    det_more, slope_more = 1 + more.weight * q_more, -more.weight * p_more
    both = less.weight * more.weight
    return slope * det_more + det * slope_more + 2 * both * q_both * p_both, det * det_more - both * q_both.square()


class FrechetState:
    """Squared Fréchet distance of a set of rows of a pool, kept up to date while rows are exchanged.

    Attributes:
        pool: (rows, dim) features, float64.
        members: row in the pool of each member.
        reference: what the set is compared with, on the device of the pool.
    """

    def __init__(
        self, features: Float[Tensor, "rows dim"], members: Int[Tensor, " members"], reference: FrechetReference
    ) -> None:
        self.pool = features.double()
        self.members = members.clone()
        self.reference = reference
        self._moments = SetMoments.of(self.pool[members])
        self._found: tuple[Tensor, Tensor] | None = None
        self._value: float | None = None

    @property
    def value(self) -> float:
        """Of the present set, found once."""
        if self._value is None:
            self._value = self._distance()
        return self._value

    def _distance(self) -> float:
        if self.reference.spread != "full":
            return self.reference.distance(self._moments)
        weight = (1 - self.reference.shrinkage) / (self._moments.count - 1)
        trace = weight * self._moments.scatter.trace() + self.reference.constant
        return float(self._gap(self._moments.mean[None])[0] + trace - 2 * self._present(weight)[0].sqrt().sum())

    def leave_one_out(self) -> Float[Tensor, " members"]:
        """Of the set without each member.

        Raises:
            UserError: for fewer than three members, or two where only means are compared: the rest has no spread.
        """
        least = 2 if self.reference.spread == "none" else 3
        if len(self.members) < least:
            raise UserError(f"a set of {len(self.members)} without one has no Fréchet distance: give at least {least}")
        n, gap = self._moments.count, self.pool[self.members] - self._moments.mean
        means = self._moments.mean - gap / (n - 1)
        if self.reference.spread == "none":
            return self._gap(means)
        weight = (1 - self.reference.shrinkage) / (n - 2)
        if self.reference.spread == "diagonal":
            return self._gap(means) + self._variances(weight, -n / (n - 1) * gap.square())
        found = spectrum(self.reference.product(self._moments.scatter, weight))
        return self._gap(means) + self._covariances(weight, found, Change(-n / (n - 1), gap))

    def swapped(self, places: Int[Tensor, " swaps"], rows: Int[Tensor, " swaps"]) -> Float[Tensor, " swaps"]:
        """Of the set with row ``rows[k]`` of the pool as the member at ``places[k]``, each exchange on its own."""
        n, old, new = self._moments.count, self.pool[self.members[places]], self.pool[rows]
        means = self._moments.mean + (new - old) / n
        if self.reference.spread == "none":
            return self._gap(means)
        out = Change(-n / (n - 1), old - self._moments.mean)
        into = Change((n - 1) / n, new - self._moments.mean + out.rows / (n - 1))
        weight = (1 - self.reference.shrinkage) / (n - 1)
        if self.reference.spread == "diagonal":
            change = out.weight * out.rows.square() + into.weight * into.rows.square()
            return self._gap(means) + self._variances(weight, change)
        return self._gap(means) + self._covariances(weight, self._present(weight), out, into)

    def swap(self, place: int, row: int) -> None:
        """Make the row of the pool the member at that place."""
        self._moments = self._moments.replaced(self.pool[self.members[place]], self.pool[row])
        self.members[place] = row
        self._found = self._value = None

    def _present(self, weight: float) -> tuple[Tensor, Tensor]:
        """Spectrum of A of the present set, found once."""
        if self._found is None:
            self._found = spectrum(self.reference.product(self._moments.scatter, weight))
        return self._found

    def _gap(self, means: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
        return (means - self.reference.mean).square().sum(1)

    def _variances(self, weight: float, change: Float[Tensor, "rows dim"]) -> Float[Tensor, " rows"]:
        scatter = (self._moments.scatter.diagonal() + change).clamp(min=0)
        own = (weight * scatter + self.reference.level).sqrt()
        return (own - self.reference.shrunk.diagonal().sqrt()).square().sum(1)

    def _covariances(self, weight: float, found: tuple[Tensor, Tensor], *changes: Change) -> Float[Tensor, " rows"]:
        """Tr C + tr C_r - 2 tr A^(1/2) after each change of the scatter."""
        values, vectors = found
        turned = self.reference.root @ vectors
        roots = values.sqrt().sum() + root_trace_change(
            values, *(replace(change, weight=weight * change.weight, rows=change.rows @ turned) for change in changes)
        )
        scatter = self._moments.scatter.trace() + sum(change.trace for change in changes)
        return weight * scatter + self.reference.constant - 2 * roots
