"""Time grids: explicit float64 tensors that fall from noise to data, pinned for rollout and replay alike."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import VariancePreserving


def shifted(t: Float[Tensor, " times"], shift: float) -> Float[Tensor, " times"]:
    """Time shift t ← shift·t / (1 + (shift - 1)·t): shift > 1 spends more steps near the noise."""
    return shift * t / (1 + (shift - 1) * t)


def uniform_grid(steps: int, shift: float = 1.0) -> Float[Tensor, " times"]:
    """(steps + 1,) times from 1 to 0, equally spaced before the shift.

    >>> uniform_grid(4, shift=3.0)
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least one step, got steps={steps}")
    return shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)


def timestep_grid(process: VariancePreserving, steps: int, offset: int = 1, clean_end: bool = True) -> Tensor:
    """The ``leading`` grid of DDIM/DDPM samplers: timesteps i·(N // steps) + offset, falling, then the data end.

    Args:
        process: gives N and the translation to t.
        steps: network evaluations.
        offset: ``steps_offset`` of the scheduler; 1 for Stable Diffusion.
        clean_end: True ends at t = 0 (``set_alpha_to_one``); False at timestep 0, t = 1/N.

    Returns:
        (steps + 1,) float64 times. With ``offset`` 0 and not ``clean_end`` the last step has no length: it is
        deterministic and cannot be trained.
    """
    stride = process.steps // steps
    timesteps = torch.arange(steps, dtype=torch.float64).flip(0) * stride + offset
    if int(timesteps[0]) >= process.steps:
        raise ValueError(f"offset {offset} with {steps} steps runs past the last timestep {process.steps - 1}")
    end = 0.0 if clean_end else 1.0 / process.steps
    return torch.cat([process.time(timesteps), torch.tensor([end], dtype=torch.float64)])


def check_grid(grid: Float[Tensor, "*rows times"]) -> None:
    """Raise ``ValueError`` unless times fall (weakly) inside [0, 1] along the last axis."""
    if bool((grid[..., 1:] > grid[..., :-1]).any()) or bool((grid < 0).any()) or bool((grid > 1).any()):
        raise ValueError(f"a time grid must fall from at most 1 to at least 0, got {grid.tolist()}")
