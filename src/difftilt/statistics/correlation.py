"""Correlation of two columns."""

import torch
from jaxtyping import Float
from torch import Tensor


def correlation(x: Float[Tensor, "*lists rows"], y: Float[Tensor, "*lists rows"]) -> Float[Tensor, "*lists"]:
    """Pearson's correlation over the last dimension, float64; NaN where a column does not vary."""
    x, y = (column.double() - column.double().mean(-1, keepdim=True) for column in torch.broadcast_tensors(x, y))
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
