"""Small networks side by side: one set of weights per row, evaluated and trained together, nothing shared."""

import math
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class SideBySide(nn.Module):
    """A multilayer perceptron of three hidden layers (ReLU) for every row; its output starts as a constant.

    An optimiser that acts element by element trains each of them as if it were alone.

    Args:
        rows: number of networks.
        inputs: numbers each one sees.
        hidden: width.
        seeds: one per row; equal seeds give equal weights, whatever the other rows are.
    """

    def __init__(self, inputs: int, hidden: int, seeds: Int[Tensor, " rows"]) -> None:
        super().__init__()
        rows, sizes = len(seeds), [inputs, hidden, hidden, hidden]
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        weights: list[Tensor] = []
        for fan_in, fan_out in pairwise(sizes):
            scale = 1 / math.sqrt(fan_in)
            drawn = [torch.rand(fan_in, fan_out, generator=generator) for generator in generators]
            weights.append((2 * torch.stack(drawn) - 1) * scale)
        self.weights = nn.ParameterList([*weights, torch.zeros(rows, hidden, 1)])
        self.biases = nn.ParameterList([torch.zeros(rows, size) for size in (*sizes[1:], 1)])

    def forward(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, " rows"]:
        """One number per row."""
        for place, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.einsum("ri,rio->ro", x, weight) + bias
            if place < len(self.weights) - 1:
                x = x.relu()
        return x[:, 0]

    @torch.no_grad()
    def begin_at(self, level: Float[Tensor, " rows"], rows: Bool[Tensor, " rows"] | None = None) -> None:
        """Let the outputs of these rows (None: of all) be their ``level``: their last weights become zero."""
        chosen = torch.ones_like(level, dtype=torch.bool) if rows is None else rows
        self.weights[-1][chosen] = 0.0
        self.biases[-1][chosen] = level[chosen, None]
