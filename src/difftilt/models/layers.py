"""Layers that the small networks share. Weights come from a generator: building a network touches nothing global."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """Linear layer with weights uniform on ±1/sqrt(inputs) and zero bias; zero weights without a generator."""
    # on the meta device the constructor draws nothing from the global generator
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        if generator is not None:
            layer.weight.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
    return layer


def table(rows: int, width: int, generator: torch.Generator, std: float = 0.02) -> nn.Parameter:
    """Learned vectors (rows, width), normal with the given standard deviation."""
    return nn.Parameter(torch.randn(rows, width, generator=generator) * std)


def time_features(t: Float[Tensor, " batch"], width: int) -> Float[Tensor, "batch width"]:
    """Sine and cosine of t at ``width``/2 angular frequencies from 1 to 100, spaced geometrically."""
    frequencies = torch.logspace(0, 2, width // 2, dtype=t.dtype, device=t.device)
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention of ``x`` to itself or to ``context``; the output projection starts at zero if asked."""

    def __init__(
        self, width: int, heads: int, generator: torch.Generator, context: int | None = None, zero: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.query = linear(width, width, generator)
        self.key_value = linear(context or width, 2 * width, generator)
        self.output = linear(width, width, None if zero else generator)

    def forward(
        self,
        x: Float[Tensor, "batch position width"],
        context: Float[Tensor, "batch token context"] | None = None,
        keep: Bool[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch position width"]:
        """``keep`` is False for tokens of the context that are padding; a row without any token attends to nothing."""
        source = x if context is None else context
        query = self._split(self.query(x))
        key, value = (self._split(part) for part in self.key_value(source).chunk(2, -1))
        bias = None
        if keep is not None:
            # a large finite bias: a row that is padding altogether stays finite and is zeroed below
            bias = torch.where(keep, 0.0, -1e9).to(x)[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = mixed.transpose(1, 2).flatten(2)
        if keep is not None:
            mixed = mixed * keep.any(1)[:, None, None].to(mixed)
        return self.output(mixed)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Transformer block with adaptive layer norm: a shared modulation plus a table of its own.

    Adaptive norms are those of arXiv 2212.09748, the shared projection that of arXiv 2310.00426.

    Args:
        width: of the tokens.
        heads: of the attention.
        ratio: hidden width of the MLP over ``width``.
        generator: for the weights.
        context: width of the text tokens that it attends to across; None has no cross-attention.
    """

    def __init__(
        self, width: int, heads: int, ratio: int, generator: torch.Generator, context: int | None = None
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, generator)
        self.across = None if context is None else Attention(width, heads, generator, context, zero=True)
        self.mlp = nn.Sequential(
            linear(width, ratio * width, generator), nn.GELU("tanh"), linear(ratio * width, width, generator)
        )
        self.own = nn.Parameter(torch.cat([torch.zeros(2, width), torch.ones(1, width)]).repeat(2, 1) * 1.0)

    def forward(
        self,
        x: Float[Tensor, "batch position width"],
        modulation: Float[Tensor, "batch six width"],
        text: Float[Tensor, "batch token context"] | None = None,
        keep: Bool[Tensor, "batch token"] | None = None,
    ) -> Float[Tensor, "batch position width"]:
        """``modulation`` holds shift, scale and gate of the attention, then of the MLP."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (modulation + self.own).unsqueeze(2).unbind(1)
        x = x + gate * self.attention(_norm(x) * (1 + scale) + shift)
        if self.across is not None and text is not None:
            x = x + self.across(_norm(x), text, keep)
        return x + gate_mlp * self.mlp(_norm(x) * (1 + scale_mlp) + shift_mlp)


class Blockwise(nn.Module):
    """A network whose blocks can be evaluated again in the backward pass in place of keeping what they computed."""

    def __init__(self) -> None:
        super().__init__()
        self._evaluate: Callable[..., Any] | None = None

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any]) -> None:
        """Let ``gradient_checkpointing_func(block, *arguments)`` evaluate the blocks where gradients are on.

        The name is that of the networks of ``diffusers``.
        """
        self._evaluate = gradient_checkpointing_func

    def through(self, block: nn.Module, *arguments: Any) -> Tensor:
        """The block's result."""
        if self._evaluate is None or not torch.is_grad_enabled():
            return block(*arguments)
        return self._evaluate(block, *arguments)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Modulation(nn.Module):
    """Condition vector -> (batch, 6, width), one projection for all blocks, zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.project = linear(width, 6 * width, None)

    def forward(self, vector: Float[Tensor, "batch width"]) -> Float[Tensor, "batch six width"]:
        return self.project(F.silu(vector)).unflatten(-1, (6, self.width))


class Head(nn.Module):
    """Normalise, modulate by the condition vector, project; output starts at zero."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.modulate = linear(width, 2 * width, None)
        self.project = linear(width, outputs, None)

    def forward(
        self, x: Float[Tensor, "batch position width"], vector: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch position outputs"]:
        shift, scale = self.modulate(F.silu(vector))[:, None].chunk(2, -1)
        return self.project(_norm(x) * (1 + scale) + shift)
