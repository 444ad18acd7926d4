"""What a policy over initial noise has drawn: a bounded memory with the density that every draw was made under."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.sampling.protocol import NoiseSource
from difftilt.trees import Batched


@dataclass(frozen=True)
class Draws(Batched):
    """Draws of several prompts side by side, oldest first; noise, reward and reference are always of one rollout.

    Attributes:
        z: noise.
        reward: of what the generator made of it.
        log_prob: reference log-density, reduced as the ratio is.
        live: False for what must not be learned from: a missing reward, or a ratio that has left its interval.
        number: how many draws of its prompt came before.
    """

    z: Float[Tensor, "prompts draws *shape"]
    reward: Float[Tensor, "prompts draws"]
    log_prob: Float[Tensor, "prompts draws"]
    live: Bool[Tensor, "prompts draws"]
    number: Int[Tensor, "prompts draws"]

    def beside(self, others: "Draws") -> "Draws":
        """These and then the others, prompt by prompt."""
        names = [field.name for field in fields(self)]
        return Draws(*(torch.cat([getattr(self, name), getattr(others, name)], 1) for name in names))

    def columns(self, place: Int[Tensor, "prompts picked"]) -> "Draws":
        """The draws at these places of each prompt."""
        rows = torch.arange(len(place), device=place.device)[:, None]
        return Draws(*(getattr(self, field.name)[rows, place] for field in fields(self)))

    def newest(self, capacity: int) -> "Draws":
        """The last ``capacity`` that were made, without columns in which nothing is alive."""
        recent = self.number[0] > self.number[0, -1] - capacity
        place = (recent & self.live.any(0)).nonzero()[:, 0]
        return self.columns(place.expand(len(self.reward), -1))

    def only(self, live: Bool[Tensor, "prompts draws"]) -> "Draws":
        """The same, with nothing alive that is not in ``live``."""
        return replace(self, live=self.live & live)

    def picked(self, count: int, index: Int[Tensor, " prompts"], noise: NoiseSource, step: int) -> "Draws":
        """At most ``count`` of the live draws of each prompt, at random; where there are fewer, dead ones fill up.

        The choice of a prompt does not depend on the other prompts: a draw is keyed by its number.
        """
        # numbers of one prompt stay apart from those of another
        key = (index[:, None] * (1 << 32) + self.number).flatten()
        uniform = noise.uniform(key, (), purpose="reuse", step=step).reshape(self.number.shape)
        order = torch.where(self.live, uniform, 2.0).argsort(dim=1, stable=True)
        return self.columns(order[:, :count])
