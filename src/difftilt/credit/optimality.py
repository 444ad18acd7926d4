"""From an advantage to the probability that a sample is a good one (DiffusionNFT, arXiv 2509.16117)."""

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

OptimalityMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
"""What is kept of the advantage: everything; its positive or negative part; 1 where it is positive; its sign."""


def optimality(
    advantage: Float[Tensor, " samples"], max_advantage: float = 5.0, mode: OptimalityMode = "all"
) -> Float[Tensor, " samples"]:
    """R = clamp(A/(2·max_advantage) + 1/2, 0, 1) of the kept part of A, itself clamped to ±max_advantage.

    A zero advantage gives 1/2, at which the two branches of the loss cancel. In the paper's form r is
    1/2 + clip((reward - mean)/Z, -1, 1)/2 with Z = max_advantage·std.

    Args:
        advantage: (samples,), centred per prompt; the paper divides by the std of the whole batch.
        max_advantage: the advantage that makes a sample certainly good; it also multiplies the loss.
        mode: see :data:`OptimalityMode`; after it all modes share the affine map.
    """
    kept = _kept(advantage, mode).clamp(-max_advantage, max_advantage)
    return (kept / (2 * max_advantage) + 0.5).clamp(0, 1)


def _kept(advantage: Tensor, mode: OptimalityMode) -> Tensor:
    match mode:
        case "all":
            return advantage
        case "positive_only":
            return advantage.clamp(min=0)
        case "negative_only":
            return advantage.clamp(max=0)
        case "one_only":
            # a NaN is neither good nor bad
            return torch.where(advantage.isnan(), advantage, (advantage > 0).to(advantage))
        case "binary":
            return torch.where(advantage.isnan(), advantage, advantage.sign())
        case _:
            assert_never(mode)
