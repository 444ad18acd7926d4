"""Rewards of images that need no network: ink and mirror symmetry."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from difftilt.card import Card
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="image",
    entry="ImageReward",
    paper="Compressibility-like rewards without a network, in the manner of DDPO (arXiv 2305.13301).",
    needs=("images",),
)


@dataclass(frozen=True)
class ImageReward:
    """A differentiable property of images in [0, 1], (batch, channel, height, width).

    Attributes:
        kind: ``ink`` is the mean brightness (or darkness), in [0, 1]; ``symmetry`` is minus the mean absolute
            difference to the image mirrored left to right, in [-1, 0].
        dark: ink is dark on a bright ground: 1 - value is counted.
    """

    kind: Literal["ink", "symmetry"] = "ink"
    dark: bool = False

    @property
    def name(self) -> str:
        return self.kind

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(differentiable=True)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        x = samples.media
        if x.dim() != 4 or not x.is_floating_point():
            raise ValueError(f"images are float (batch, channel, height, width), not {x.dtype} {tuple(x.shape)}")
        if self.kind == "symmetry":
            return -(x - x.flip(-1)).abs().flatten(1).mean(1)
        return (1 - x if self.dark else x).flatten(1).mean(1)


def ink(*, dark: bool = False) -> ImageReward:
    """Mean brightness, or darkness."""
    return ImageReward("ink", dark)


def symmetry() -> ImageReward:
    """Minus the mean absolute difference to the mirror image; 0 for a symmetric image."""
    return ImageReward("symmetry")
