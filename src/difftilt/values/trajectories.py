"""Plain samples of a model with the x0-predictions on their way: what learned values are fitted on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Condition
from difftilt.sampling.protocol import Moment, NoiseSource, Sampler
from difftilt.sampling.rollout import sample_by_kernel, start_state
from difftilt.trees import Batched, take


@dataclass(frozen=True)
class Recorded(Batched):
    """Whole trajectories of the model.

    Attributes:
        x_0: final samples.
        prompt: row of each one's prompt.
        condition: one row per sample.
        predictions: step -> x0-prediction after the call of that step.
    """

    x_0: Shaped[Tensor, "samples *shape"]
    prompt: Int[Tensor, " samples"]
    condition: Condition
    predictions: Mapping[int, Tensor]


def record(
    denoise: Denoiser,
    sampler: Sampler,
    shape: tuple[int, ...],
    condition: Condition,
    prompts: Int[Tensor, " prompts"],
    images: int,
    noise: NoiseSource,
    steps: Sequence[int],
) -> Recorded:
    """``images`` plain samples of each prompt, with the x0-predictions on their way.

    Args:
        denoise: the network.
        sampler: gives kernel and grid.
        shape: of one latent.
        condition: encoded prompts.
        prompts: rows of ``condition`` to sample for.
        images: of each.
        noise: of the whole record; sample j of the i-th prompt has the index i·images + j.
        steps: whose predictions are kept.
    """
    kept: dict[int, Tensor] = {}

    def observe(moment: Moment, x_s: Tensor) -> None:
        if int(moment.position) in steps:
            kept[int(moment.position)] = moment.prediction.x0

    index = torch.arange(len(prompts) * images, device=prompts.device)
    own = prompts.repeat_interleave(images)
    rows = take(condition, own)
    start = start_state(denoise.process, noise, index, shape, rows)
    path = sample_by_kernel(denoise, sampler, start, rows, noise=noise, index=index, observe=observe)
    return Recorded(path.x_0, own, rows, kept)
