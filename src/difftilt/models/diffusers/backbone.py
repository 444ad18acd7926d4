"""The network of a pipeline as difftilt sees it: its own time, t = 0 at the data, and a condition of named tensors."""

from collections.abc import Mapping
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.models.diffusers.schedules import Schedule
from difftilt.models.protocol import Stateful
from difftilt.process.gaussian import expand
from difftilt.process.protocol import Condition

KNOWN = "known"
"""Name in the state of a condition of known pixels, as channels (batch, channel, height, width) beside the latent's."""

DENOISER = "denoiser"
"""Name of the denoising network among those that are trained together."""


class Backbone(nn.Module):
    """The network of a pipeline as ``(x_t, t, condition) -> raw output``, with what else of the pipeline is trained.

    Args:
        network: UNet or transformer; its own precision is what it computes in.
        schedule: gives the network's clock, and how a consistency model mixes its output with the state.
        readers: text encoders that are trained with it, by their names in the pipeline; conditions are then tokens.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, readers: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule
        self.readers = nn.ModuleDict(dict(readers or {}))

    @property
    def inner(self) -> nn.Module:
        """The network of the pipeline itself, whose names of layers other libraries know; or it and the readers."""
        if not self.readers:
            return self.network
        return nn.ModuleDict({DENOISER: self.network, **self.readers})

    def networks(self) -> tuple[nn.Module, ...]:
        """All networks that are trained: denoisers in the order of :attr:`Adapter.denoisers`, then readers."""
        return (self.network, *self.readers.values())

    def forward(
        self, x_t: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition
    ) -> Float[Tensor, "batch *shape"]:
        told, seen = self.schedule.clock(t), x_t
        if isinstance(condition, Stateful):  # what both branches of guidance share
            if KNOWN in condition.state:
                seen = torch.cat([x_t, condition.state[KNOWN].to(x_t)], 1)
            condition = condition.condition
        if self.readers:
            condition = condition | self.read(condition)
        output = self.call(seen.to(self._speaker[0].dtype), told, condition)
        return output if self.schedule.mixing is None else self._mixed(output, x_t, t, told)

    def read(self, condition: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the readers make of the tokens of a condition, under the names that :meth:`call` knows."""
        raise NotImplementedError

    @cached_property
    def _speaker(self) -> tuple[nn.Parameter]:
        """A weight that has the network's precision, whatever that becomes later; in a tuple, not to be registered.

        Some networks keep a few weights in float32: their own word, which takes a walk over all weights, is better than
        the first weight's.
        """
        weights = list(self.network.parameters())
        dtype = getattr(self.network, "dtype", None) or weights[0].dtype
        return (next(weight for weight in weights if weight.dtype == dtype),)

    def call(self, x: Tensor, timestep: Float[Tensor, " batch"], condition: Mapping[str, Tensor]) -> Tensor:
        """The raw output, from what the network itself takes."""
        raise NotImplementedError

    def _mixed(self, output: Tensor, x_t: Tensor, t: Tensor, told: Tensor) -> Tensor:
        """c_out·x0 + c_skip·x_t, which is x_t at the data end whatever the network says (Song et al. 2023)."""
        schedule, half = self.schedule, 0.5  # standard deviation that the data is taken to have
        time = told * (schedule.mixing or 0.0)
        skip, out = half**2 / (time**2 + half**2), time / (time**2 + half**2).sqrt()
        x0 = schedule.process.predict(output, x_t, t, schedule.predicts).x0
        return expand(out, x0) * x0 + expand(skip, x0) * x_t
