"""A small multilayer perceptron on flat latents, with time features and an optional class."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from difftilt.card import Card
from difftilt.models.layers import linear, table, time_features
from difftilt.process.protocol import Condition

CARD = Card(
    name="mlp",
    entry="MLP",
    paper="A multilayer perceptron with sinusoidal time features; no paper.",
)


class MLP(nn.Module):
    """x_t of any shape is flattened, joined with time features and a class vector, and mapped to ``outputs`` numbers.

    Args:
        inputs: size of one flattened state.
        outputs: size of one output; None is ``inputs``.
        hidden: width of both hidden layers (SiLU).
        classes: number of classes; the condition is then an int64 tensor (batch,) of labels, where ``classes`` is the
            null label. 0 ignores the condition.
        features: time features, even.
        zero: start with zero output: the trainable part of a model whose base is exact.
        seed: of the weights.
    """

    _repeated_blocks = ()

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        *,
        hidden: int = 64,
        classes: int = 0,
        features: int = 16,
        zero: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.features = features
        self.labels = table(classes + 1, features, generator, std=1.0) if classes else None
        width = inputs + (2 if classes else 1) * features
        self.first = linear(width, hidden, generator)
        self.second = linear(hidden, hidden, generator)
        self.last = linear(hidden, outputs or inputs, None if zero else generator)

    def forward(
        self, x_t: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition = None
    ) -> Float[Tensor, "batch outputs"]:
        """Raw output, (batch, outputs)."""
        dtype = self.first.weight.dtype
        parts = [x_t.flatten(1).to(dtype), time_features(t.to(dtype), self.features)]
        if self.labels is not None:
            parts.append(self.labels[condition])
        inner = F.silu(self.second(F.silu(self.first(torch.cat(parts, dim=-1)))))
        return self.last(inner).to(x_t.dtype)
