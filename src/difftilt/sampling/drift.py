r"""Drift: how far a model has moved from its reference, in nats, by one definition for all methods.

A reverse diffusion of a Gaussian process that keeps the marginals is dx = (velocity - g²/2·score) dt + g dw. Two models
that share g differ in their path measures by Girsanov's ∫ |Δdrift|²/(2g²) dt. With x_t fixed everything is proportional
to Δepsilon: Δscore = -Δepsilon/sigma and Δvelocity = w·Δepsilon, w = (alpha·sigma_dot - sigma·alpha_dot)/alpha, hence

    rate(g) = (w + g²/(2·sigma))²/(2g²)·|Δepsilon|²,   smallest at g² = 2·sigma·w, where it is (w/sigma)·|Δepsilon|².

That g is the diffusion coefficient of the forward process; in :class:`FlowSDE` it is a² = 2, and any other a gives the
same integral times (1 + a²/2)²/(2a²) >= 1. For rectified flow the rate is (alpha/sigma)·|Δvelocity|². All of them bound
KL(samples || reference samples) from above, and the smallest is attained if both models are exact denoisers of their
own samples (Song et al. 2021, Maximum likelihood training of score-based diffusion models).

Tokens need no bound over g: the path KL is the sum of exact categorical step KLs.
"""

import math
from itertools import pairwise

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.models.protocol import Denoiser
from difftilt.process.masked import MaskedProcess
from difftilt.process.protocol import Condition, Process
from difftilt.sampling.kernels import FlowSDE, Unmasking
from difftilt.sampling.protocol import Kernel, NoiseSource
from difftilt.sampling.solvers import columns

TIGHTEST = FlowSDE(a=math.sqrt(2))
"""The kernel whose Girsanov bound is tightest."""


def canonical_kernel(process: Process) -> Kernel:
    """The kernel that drift is measured under: :data:`TIGHTEST`, or unmasking for tokens."""
    return Unmasking() if isinstance(process, MaskedProcess) else TIGHTEST


def path_kl(
    denoise: Denoiser,
    reference: Denoiser,
    x_0: Shaped[Tensor, "batch *shape"],
    condition: Condition,
    grid: Float[Tensor, "*rows times"],
    noise: NoiseSource,
    index: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Monte-Carlo path KL of a model to its reference at each of its samples, in nats, (batch,).

    Σ_i KL(step of the model || step of the reference) at x_t ~ q(x_t | x_0), summed over dimensions, with one
    evaluation of each model per step. The average over samples of the model estimates KL(paths || reference paths);
    a single row is not a divergence of anything. All steps have a density, the last included.

    Args:
        denoise: the model.
        reference: the frozen model, of the same process.
        x_0: finished samples of the model.
        condition: one row per sample, without per-trajectory state.
        grid: falling times, (times,) or (batch, times), float64.
        noise: of this iteration.
        index: global index of each sample.
    """
    process = denoise.process
    kernel = canonical_kernel(process)
    draw = noise.normal if process.noise_law == "normal" else noise.uniform
    clock = torch.float64 if x_0.dtype == torch.float64 else torch.float32
    times = [column.to(x_0.device, clock) for column in columns(grid, len(x_0))]
    total = torch.zeros(len(x_0), device=x_0.device)
    own = theirs = condition
    for i, (t, s) in enumerate(pairwise(times)):
        x_t = process.corrupt(x_0, t, draw(index, tuple(x_0.shape[1:]), purpose="drift", step=i))
        own, theirs = denoise.prepare(x_t, t, own), reference.prepare(x_t, t, theirs)
        step = kernel(denoise(x_t, t, own), x_t, t, s)
        total = total + step.kl(kernel(reference(x_t, t, theirs), x_t, t, s), reduce="sum")
    return total
