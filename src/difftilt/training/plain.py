"""Plain sampling with the weights of a role: what evaluations, the arena and forward-process methods draw with."""

from jaxtyping import Shaped
from torch import Tensor

from difftilt.sampling.protocol import NoiseSource, Sampler
from difftilt.sampling.rollout import sample, start_state
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Run


def draw(
    run: Run, role: str, sampler: Sampler, batch: PromptBatch, noise: NoiseSource
) -> Shaped[Tensor, "samples *shape"]:
    """Finished samples of the weights of ``role``, counted in the run's ledger."""
    denoise = run.denoiser(role, sampler.guidance)
    x_t = start_state(denoise.process, noise, batch.index, run.task.model.shape, batch.condition)
    return sample(denoise, sampler, x_t, batch.condition, noise=noise, index=batch.index)
