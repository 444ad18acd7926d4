"""A small network that scores noisy states: what a process reward is fitted with."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.layers import linear, table, time_features
from difftilt.process.protocol import Condition

CARD = Card(
    name="process-reward",
    entry="ProcessReward",
    paper="A few strided convolutions or a perceptron with time features, as arXiv 2602.04928 needs one.",
)

_SMALLEST = 4
"""Side at which a feature map is flattened."""


class ProcessReward(nn.Module):
    """r(x_t, t, condition), one number for each state, in units of the reward.

    States with at least two dimensions of 8 or more at their end (images, frames of a video) go through convolutions of
    stride 2 until a side is at most 4, each with a bias made of time and condition; all others through a perceptron,
    tokens as one-hot vectors.
    The output is ``offset + scale·network``, buffers that :meth:`calibrate` sets to the mean and spread of the rewards.

    Args:
        shape: of one state; for images (..., height, width), all dimensions before them are channels.
        classes: number of classes; the condition is then an int64 tensor (batch,), where ``classes`` is the null label.
        vector: width of a condition vector: the entry ``vector`` of a mapping, or a float tensor (batch, vector).
        symbols: number of tokens, the mask among them; 0 for continuous states.
        hidden: width of the hidden layers (SiLU), and of the last feature maps.
        features: time features, even.
        seed: of the weights.
    """

    offset: Tensor
    scale: Tensor
    ceiling: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        *,
        classes: int = 0,
        vector: int = 0,
        symbols: int = 0,
        hidden: int = 64,
        features: int = 16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.features, self.classes, self.vector = tuple(shape), features, classes, vector
        self.symbols = symbols
        self.labels = table(classes + 1, features, generator, std=1.0) if classes else None
        self.embed = linear(features * (2 if classes else 1) + vector, hidden, generator)
        size, convolutions, biases = _trunk((*shape, symbols) if symbols else shape, hidden, generator)
        self.convolutions, self.biases = nn.ModuleList(convolutions), nn.ModuleList(biases)
        self.first = linear(size + hidden, hidden, generator)
        self.second = linear(hidden, hidden, generator)
        self.last = linear(hidden, 1, generator)
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("ceiling", torch.zeros(()))

    def calibrate(self, reward: Float[Tensor, " samples"]) -> None:
        """Take the units of these rewards: their mean, their spread and the largest of them."""
        spread = reward.double().std(correction=0)
        self.offset.copy_(reward.double().mean())
        self.scale.copy_(torch.where(spread > 0, spread, 1.0))
        self.ceiling.copy_(reward.max())

    def read(self, condition: Condition) -> Tensor | None:
        """What it reads of a condition, one row per sample: the class, the vector or nothing."""
        if self.classes:
            return labels_of(condition)
        return vector_of(condition) if self.vector else None

    def forward(
        self, x_t: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition = None
    ) -> Float[Tensor, " batch"]:
        """The score of each state."""
        dtype = self.first.weight.dtype
        x_t = F.one_hot(x_t, self.symbols).to(dtype) if self.symbols else x_t
        inner, embedded = x_t.to(dtype), self._embedded(t.to(dtype), condition)
        if len(self.convolutions):
            inner = inner.flatten(1, -3)
        for convolution, bias in zip(self.convolutions, self.biases, strict=True):
            inner = F.silu(convolution(inner) + bias(embedded)[:, :, None, None])
        inner = torch.cat([inner.flatten(1), embedded], -1)
        out = self.last(F.silu(self.second(F.silu(self.first(inner)))))[:, 0]
        return (self.offset + self.scale * out).to(x_t.dtype)

    def _embedded(self, t: Tensor, condition: Condition) -> Float[Tensor, "batch hidden"]:
        """Time and condition as one vector."""
        parts = [time_features(t, self.features)]
        if self.labels is not None:
            parts.append(self.labels[condition])
        if self.vector:
            found = vector_of(condition)
            assert found is not None
            parts.append(found.to(t))
        return F.silu(self.embed(torch.cat(parts, -1)))


def process_reward_for(
    shape: Sequence[int], condition: Condition, *, symbols: int = 0, hidden: int = 64, seed: int = 0
) -> ProcessReward:
    """A network for states of this shape and conditions like these.

    Args:
        shape: of one state.
        condition: encoded prompts, all labels among them where they are classes.
        symbols: number of tokens with the mask; 0 for continuous states.
        hidden: width.
        seed: of the weights.

    Raises:
        UserError: for a condition that holds neither a class nor a vector.
    """
    classes, vector = sizes_of(condition)
    if condition is not None and not classes and not vector:
        raise UserError(
            "a process reward reads a class, a vector, or a mapping with 'vector' (a pooled text); the model's "
            f"condition is a {type(condition).__name__}: give a saved network of your own"
        )
    return ProcessReward(shape, classes=classes, vector=vector, symbols=symbols, hidden=hidden, seed=seed)


def sizes_of(condition: Condition) -> tuple[int, int]:
    """Number of classes and width of the vector that a condition needs; 0 for what it does not hold."""
    labels, vector = labels_of(condition), vector_of(condition)
    return 0 if labels is None else int(labels.max()) + 1, 0 if vector is None else vector.shape[1]


def labels_of(condition: Condition) -> Int[Tensor, " batch"] | None:
    """The class of each row, where the condition is one."""
    whole = isinstance(condition, Tensor) and condition.dim() == 1 and not condition.is_floating_point()
    return condition if whole else None


def vector_of(condition: Condition) -> Float[Tensor, "batch width"] | None:
    """The vector of each row, where the condition has one."""
    found = condition.get("vector") if isinstance(condition, dict) else condition
    return found if isinstance(found, Tensor) and found.is_floating_point() and found.dim() == 2 else None


def _trunk(
    shape: Sequence[int], hidden: int, generator: torch.Generator
) -> tuple[int, list[nn.Module], list[nn.Module]]:
    """(size of the flattened features, convolutions, their biases); none for small or flat states."""
    if len(shape) < 3 or min(shape[-2:]) <= _SMALLEST:
        return math.prod(shape), [], []
    channels, sides = math.prod(shape[:-2]), list(shape[-2:])
    convolutions: list[nn.Module] = []
    biases: list[nn.Module] = []
    while min(sides) > _SMALLEST:
        sides = [(side + 1) // 2 for side in sides]
        width = hidden if min(sides) <= _SMALLEST else max(hidden // 2, 1)
        convolutions.append(_convolution(channels, width, generator))
        biases.append(linear(hidden, width, generator))
        channels = width
    return channels * math.prod(sides), convolutions, biases


def _convolution(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    """3 by 3 of stride 2 without a bias, weights uniform on ±1/sqrt(9·inputs)."""
    # on the meta device the constructor draws nothing from the global generator
    layer = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False, device="meta").to_empty(device="cpu")
    bound = 1 / math.sqrt(9 * inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
    return layer
