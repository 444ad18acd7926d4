"""A small diffusion transformer for images, with time, class, vector and text conditioning."""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.layers import Block, Blockwise, Head, Modulation, linear, table, time_features
from difftilt.process.protocol import Condition

CARD = Card(
    name="dit",
    entry="DiT",
    paper="Peebles and Xie, Scalable diffusion models with transformers, arXiv 2212.09748",
)

_SMALLEST_TIME = 0.05


class DiT(Blockwise):
    """Patches of an image as tokens; output of the image's shape, zero before training (see ``form``).

    The condition is a mapping with the parts that the network was built for: ``label`` (batch,) int64, where
    ``classes`` is the null label; ``vector`` (batch, vector); ``text`` (batch, token, text), read by cross-attention
    in every block, with ``text_keep`` (batch, token) bool, False at padding, optional. A network with classes alone
    takes the label tensor itself, one with a vector alone the vector; one with nothing ignores the condition.

    Args:
        channels: of the image.
        size: height and width in pixels.
        patch: side of a patch; divides ``size``.
        width: of the tokens; divisible by ``heads``. 128 with depth 4 has about 1.2 million parameters.
        depth: blocks.
        heads: of every attention.
        ratio: hidden width of the MLPs over ``width``.
        classes: number of classes, 0 for none.
        vector: size of the condition vector, 0 for none.
        text: width of the text tokens, 0 for none.
        form: ``direct`` leaves the meaning of the output to the caller; ``x0_velocity`` predicts the clean image inside
            and returns the velocity of rectified flow, (x_t - x0hat)/max(t, 0.05).
        seed: of the weights.
    """

    _repeated_blocks = ("Block",)

    def __init__(
        self,
        channels: int,
        size: int,
        patch: int,
        *,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 3,
        classes: int = 0,
        vector: int = 0,
        text: int = 0,
        form: Literal["direct", "x0_velocity"] = "direct",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size % patch or width % (2 * heads):
            raise UserError(
                f"patch {patch} must divide size {size}; width {width} must be a multiple of twice the {heads} heads"
            )
        generator = torch.Generator().manual_seed(seed)
        self.patch, self.form, self.classes = patch, form, classes
        self.embed = linear(channels * patch**2, width, generator)
        self.positions = table((size // patch) ** 2, width, generator)
        self.time = nn.ModuleList([linear(width, width, generator), linear(width, width, generator)])
        self.labels = table(classes + 1, width, generator) if classes else None
        self.vector = linear(vector, width, generator) if vector else None
        self.reads_text = text > 0
        self.modulation = Modulation(width)
        self.blocks = nn.ModuleList([Block(width, heads, ratio, generator, text or None) for _ in range(depth)])
        self.head = Head(width, channels * patch**2)

    def forward(
        self,
        x_t: Float[Tensor, "batch channel height width"],
        t: Float[Tensor, " batch"],
        condition: Condition = None,
    ) -> Float[Tensor, "batch channel height width"]:
        """Raw output, of the shape of x_t."""
        given = self._parts(condition)
        vector = self._vector(t, given)
        # (batch, rows·columns, channel·patch²): pixel_unshuffle gathers each patch into channels
        patches = F.pixel_unshuffle(x_t, self.patch)
        tokens = self.embed(patches.flatten(2).transpose(1, 2)) + self.positions
        modulation = self.modulation(vector)
        text, keep = (given.get("text"), given.get("text_keep")) if self.reads_text else (None, None)
        for block in self.blocks:
            tokens = self.through(block, tokens, modulation, text, keep)
        image = self.head(tokens, vector).transpose(1, 2).reshape(patches.shape)
        output = F.pixel_shuffle(image, self.patch)
        if self.form == "direct":
            return output
        return (x_t - output) / t.clamp(min=_SMALLEST_TIME).to(x_t)[:, None, None, None]

    def _parts(self, condition: Condition) -> Mapping[str, Tensor]:
        """The condition as a mapping, refused if a part that the network was built for is missing."""
        needed = [
            name
            for name, has in (
                ("label", self.labels is not None),
                ("vector", self.vector is not None),
                ("text", self.reads_text),
            )
            if has
        ]
        if not needed:
            return {}
        if isinstance(condition, Tensor) and len(needed) == 1:
            return {needed[0]: condition}
        given = cast("Mapping[str, Tensor]", condition if isinstance(condition, Mapping) else {})
        missing = [name for name in needed if name not in given]
        if missing:
            raise ValueError(f"the condition lacks {', '.join(missing)}; this network was built with {needed}")
        return given

    def _vector(self, t: Tensor, given: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
        """Sum of the time, class and vector embeddings."""
        features = time_features(t, self.positions.shape[1]).to(self.positions.dtype)
        vector = self.time[1](F.silu(self.time[0](features)))
        if self.labels is not None:
            vector = vector + self.labels[given["label"]]
        if self.vector is not None:
            vector = vector + self.vector(given["vector"])
        return vector
