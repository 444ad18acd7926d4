"""The generator as a black box: initial noise in, rewarded samples out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.denoiser import NetworkDenoiser, device_of
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.gaussian import GaussianProcess
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.noise import Apart, copies
from difftilt.sampling.protocol import NoiseSource, Sampler
from difftilt.sampling.rollout import begun, sample
from difftilt.steering.budget import price
from difftilt.steering.particles import bind
from difftilt.training.protocol import Task
from difftilt.trees import leaves, take, to_device
from difftilt.values.estimates import LatentReward


@dataclass(frozen=True)
class Generator:
    """The black box: initial noise in, rewarded samples out; the sampler's ODE solver, or its kernel.

    Attributes:
        task: model and sampler.
        denoise: counts evaluations.
        reward: of latents.
        condition: of each prompt.
        index: global index of each prompt.
        noise: of the whole call; stochastic samplers draw from it.
    """

    task: Task
    denoise: Denoiser
    reward: LatentReward
    condition: Condition
    index: Int[Tensor, " prompts"]
    noise: NoiseSource

    @torch.no_grad()
    def __call__(self, z: Float[Tensor, "prompts draws *shape"], label: str) -> tuple[Tensor, Samples, Tensor]:
        """Clean latents, what the reward saw, and rewards (prompts, draws)."""
        rows, numbers = copies(self.index, z.shape[1])
        # the noise that is learned is unscaled; the process scales it
        source, condition = Apart(self.noise, f"generator {label}"), take(self.condition, rows)
        x = begun(self.task.model.process, z.flatten(0, 1), condition)
        x_0 = sample(self.denoise, self.task.sampler, x, condition, noise=source, index=numbers)
        samples = self.reward.samples(x_0, rows)
        return x_0, samples, self.reward.score(samples).reshape(z.shape[:2])

    def price(self, draws: int) -> Ledger:
        """The most that a call can cost, all prompts together."""
        rows = draws * len(self.index)
        return price(self.denoise, self.reward.reward, rows * self.evaluations, rows)

    @cached_property
    def evaluations(self) -> int:
        """What one sample costs without guidance; a solver is asked by a run on an empty network that counts."""
        sampler, process = self.task.sampler, self.denoise.process
        if sampler.solver is None:
            return int((sampler.grid[1:] < sampler.grid[:-1]).sum())
        counting = NetworkDenoiser(lambda x, t, condition: torch.zeros_like(x), process, "x0", Ledger())
        with torch.no_grad():
            sampler.solver(counting, torch.zeros(1, *self.task.model.shape), None, sampler.grid)
        return counting.ledger.nfe

    def context(self) -> Float[Tensor, "prompts features"]:
        """The encoded prompts as vectors: means over positions; labels are left out, for each prompt learns alone."""
        parts = [
            leaf.reshape(len(leaf), -1, leaf.shape[-1]).mean(1) for leaf in leaves(self.condition) if _encoded(leaf)
        ]
        return torch.cat([torch.zeros(len(self.index), 0, device=self.index.device), *parts], 1).float()


def _encoded(leaf: Tensor) -> bool:
    return leaf.is_floating_point() and leaf.dim() > 1


def sampled_by(sampler: Sampler) -> dict[str, float | str]:
    """What makes samples of noise, beside the model and its guidance, as numbers and texts that can be compared.

    A kernel is left out where a solver takes its place. Times are compared to six digits.
    """
    times = " ".join(f"{time:.6f}" for time in sampler.grid.flatten().tolist())
    grid = hashlib.sha256(times.encode()).hexdigest()[:8]
    rule: dict[str, float | str] = {"solver": _named(sampler.solver)}
    if sampler.solver is None:
        rule |= {"kernel": _named(sampler.kernel), "clean_end": float(sampler.clean_end)}
    return {"steps": float(sampler.grid.shape[-1] - 1), "grid": grid, **rule}


def _named(part: object) -> str:
    """Class and settings, without the place in memory that plain classes print."""
    return repr(part) if part is None or is_dataclass(part) else type(part).__qualname__


def generator_of(
    task: Task,
    denoise: Denoiser,
    reward: Reward,
    prompts: Sequence[str],
    noise: NoiseSource,
    index: Int[Tensor, " prompts"] | None,
) -> Generator:
    """The black box of a call.

    Raises:
        UserError: if the model samples tokens.
    """
    if not isinstance(denoise.process, GaussianProcess):
        raise UserError(
            f"initial noise is learned of Gaussian processes; {task.name!r} samples tokens: use svdd or fk-steering"
        )
    device = device_of(task.model.network)
    index = torch.arange(len(prompts), device=device) if index is None else index.to(device)
    condition = to_device(task.model.encode(prompts), device)
    return Generator(task, denoise, bind(reward, task, prompts, denoise), condition, index, noise)
