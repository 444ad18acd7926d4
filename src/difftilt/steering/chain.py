"""What stays in place while particles come and go: the network, the grid, and the noise of every place."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import NoiseSource
from difftilt.values.protocol import Rows


@dataclass(frozen=True)
class Chain:
    """What stays in place while particles come and go.

    Attributes:
        denoise: counts evaluations.
        preset: its kernel draws and scores the steps.
        last: takes the place of the preset in the last step of a sampler with a clean end.
        grid: (steps + 1,) falling times.
        noise: source of all draws.
        home: noise index of every place of every prompt, (groups, places).
        slots: noise index of each row now, (groups · size,).
        group: prompt of each row.
        size: rows per prompt.
        branch: children that every parent has just had; the rows of one parent stand together.
        before: the ledger when the chain began.
    """

    denoise: Denoiser
    preset: Preset
    last: Preset | None
    grid: Float[Tensor, " times"]
    noise: NoiseSource
    home: Int[Tensor, "groups places"]
    slots: Int[Tensor, " particles"]
    group: Int[Tensor, " particles"]
    size: int
    before: Ledger
    branch: int = 1

    @property
    def steps(self) -> int:
        """Steps on the grid."""
        return len(self.grid) - 1

    @property
    def ledger(self) -> Ledger:
        """What was spent since the chain began."""
        return self.denoise.ledger - self.before

    def time(self, position: int, x: Shaped[Tensor, "particles *shape"]) -> Float[Tensor, " particles"]:
        """Time of the grid point for every particle, in the precision that a rollout uses."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.full((len(x),), float(self.grid[position]), dtype=dtype, device=x.device)

    def rows(self, position: int) -> Rows:
        """Who the rows are, for a value."""
        return Rows(self.slots, self.group, position)

    def by_group(self, column: Shaped[Tensor, " particles"]) -> Shaped[Tensor, "groups size"]:
        """A column of all particles as a table with one row per prompt."""
        return column.reshape(-1, self.size)

    def uniform(self, purpose: str, position: int) -> Float[Tensor, "groups size"]:
        """One uniform per row."""
        return self.by_group(self.noise.uniform(self.slots, (), purpose=purpose, step=position))

    def branched(self, count: int) -> "Chain":
        """Every row ``count`` times; child j of the row in slot i has the noise index i·count + j."""
        child = torch.arange(count, device=self.slots.device).repeat(len(self.slots))
        slots = self.slots.repeat_interleave(count) * count + child
        group = self.group.repeat_interleave(count)
        return replace(self, slots=slots, group=group, size=self.size * count, branch=count)

    def settled(self, size: int, slots: Int[Tensor, "groups size"] | None = None) -> "Chain":
        """``size`` rows per prompt, in the first places, or in slots of their own."""
        kept = self.home[:, :size] if slots is None else slots
        group = torch.arange(len(self.home), device=self.group.device).repeat_interleave(size)
        return replace(self, slots=kept.flatten(), group=group, size=size, branch=1)
