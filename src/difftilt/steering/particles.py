"""The loop of particle steerers in parts: start, predict, propose, (value, weigh,) gather, finish.

Particles of all prompts stand in one flat batch, those of one prompt together. Noise is keyed by the slot, never by the
particle that stands in it, so copies of one parent part at the next stochastic step. The prediction that valued a state
is the one that its next step uses, so valuing new states costs no evaluation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from difftilt.errors import GuardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser, Network
from difftilt.rewards.protocol import Reward
from difftilt.sampling.presets import Preset, euler
from difftilt.sampling.protocol import Guide, Moment, NoiseSource, Step
from difftilt.sampling.rollout import start_state, step_noise
from difftilt.steering.protocol import Particles, Steered
from difftilt.steering.resampling import Ancestors
from difftilt.training.protocol import Task
from difftilt.trees import take, to_device, tree_map
from difftilt.values.estimates import LatentReward
from difftilt.values.protocol import Rows


@dataclass(frozen=True)
class Chain:
    """What stays in place while particles come and go.

    Attributes:
        denoise: counts evaluations.
        preset: its kernel draws and scores the steps.
        last: takes the place of the preset in the last step of a sampler with a clean end.
        grid: (steps + 1,) falling times.
        noise: source of all draws.
        slots: noise index of each slot, (groups · size,).
        group: prompt of each slot.
        size: particles per prompt.
        before: the ledger when the chain began.
    """

    denoise: Denoiser
    preset: Preset
    last: Preset | None
    grid: Float[Tensor, " times"]
    noise: NoiseSource
    slots: Int[Tensor, " particles"]
    group: Int[Tensor, " particles"]
    size: int
    before: Ledger

    @property
    def steps(self) -> int:
        """Steps on the grid."""
        return len(self.grid) - 1

    @property
    def ledger(self) -> Ledger:
        """What was spent since the chain began."""
        return self.denoise.ledger - self.before

    def time(self, position: int, x: Shaped[Tensor, "particles *shape"]) -> Float[Tensor, " particles"]:
        """Time of the grid point for every particle, in the precision that a rollout uses."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.full((len(x),), float(self.grid[position]), dtype=dtype, device=x.device)

    def rows(self, position: int) -> Rows:
        """Who the slots are, for a value."""
        return Rows(self.slots, self.group, position)

    def by_group(self, column: Shaped[Tensor, " particles"]) -> Shaped[Tensor, "groups size"]:
        """A column of all particles as a table with one row per prompt."""
        return column.reshape(-1, self.size)

    def uniform(self, purpose: str, position: int) -> Float[Tensor, "groups size"]:
        """One uniform per slot."""
        return self.by_group(self.noise.uniform(self.slots, (), purpose=purpose, step=position))


def start(
    task: Task,
    denoise: Denoiser,
    prompts: Sequence[str],
    size: int,
    noise: NoiseSource,
    index: Int[Tensor, " prompts"] | None = None,
) -> tuple[Chain, Particles]:
    """``size`` particles per prompt at the noise end, with equal weights.

    Args:
        task: gives the grid, the kernel and the shape of a latent; an ODE solver of its sampler is not used.
        denoise: the network.
        prompts: one group of particles each.
        size: particles per prompt.
        noise: of the whole call.
        index: global index of each prompt, 0, 1, ... by default; particle j of prompt i has the noise index i·size + j,
            so a batch of prompts gives what its prompts give one by one.
    """
    device = _device(task.model.network)
    every = torch.arange(len(prompts), device=device)
    place = torch.arange(size, device=device)
    index = every if index is None else index.to(device)
    slots = (index[:, None] * size + place).flatten()
    group = every.repeat_interleave(size)
    x = start_state(task.model.process, noise, slots, task.model.shape)
    log_weight = torch.zeros(len(slots), dtype=torch.float64, device=device)
    condition = take(to_device(task.model.encode(prompts), device), group)
    particles = Particles(x, group, condition, log_weight, memory={"origin": place.repeat(len(prompts))})
    preset = Preset("steering", task.sampler.kernel)
    last = euler() if task.sampler.clean_end else None
    return Chain(denoise, preset, last, task.sampler.grid, noise, slots, group, size, denoise.ledger.copy()), particles


def _device(network: Network) -> torch.device:
    """Where the network's weights lie; the CPU for one without weights."""
    weights = list(network.parameters()) if isinstance(network, nn.Module) else []
    return weights[0].device if weights else torch.device("cpu")


def bind(reward: Reward, task: Task, prompts: Sequence[str], denoise: Denoiser) -> LatentReward:
    """The reward of latents, counted in the denoiser's ledger.

    Raises:
        UserError: for a reward that scores sets.
    """
    if reward.capabilities.set_valued:
        raise UserError(f"particles are weighted one by one; {reward.name!r} scores sets: use a set search instead")
    return LatentReward(reward, task.model.decode, prompts, denoise.ledger)


def predicted(chain: Chain, particles: Particles, position: int) -> Particles:
    """The particles with the network's prediction at their present time; nothing is spent if they have it."""
    if particles.prediction is not None:
        return particles
    t = chain.time(position, particles.x)
    condition = chain.denoise.prepare(particles.x, t, particles.condition)
    return replace(particles, condition=condition, prediction=chain.denoise(particles.x, t, condition))


def propose(
    chain: Chain, particles: Particles, position: int, guide: Guide | None = None, *, parting: bool = False
) -> Particles:
    """Draw every particle's state at grid point ``position + 1``.

    A guided proposal pays log p(x_s | x_t) - log tau(x_s | x_t), summed over the dimensions of a sample, into the
    log-weight; the kernel's own proposal pays nothing.

    Args:
        chain: what stays.
        particles: at grid point ``position``.
        position: index of the step.
        guide: shifts the law that draws.
        parting: copies of one parent must part in this chain, so a deterministic kernel is refused.
    """
    if float(chain.grid[position]) == float(chain.grid[position + 1]):
        return particles
    particles = predicted(chain, particles, position)
    assert particles.prediction is not None
    t, s = chain.time(position, particles.x), chain.time(position + 1, particles.x)
    if position == chain.steps - 1 and chain.last is not None:
        step = chain.last.step(particles.prediction, particles.x, t, s)
        return replace(particles, x=step.draw(step_noise(step, chain.noise, chain.slots, position)), prediction=None)
    step = chain.preset.step(particles.prediction, particles.x, t, s)
    if step.deterministic and (parting or guide is not None):
        raise UserError(
            "the task's kernel is deterministic, so copies of a particle would stay identical: use a stochastic one, "
            "such as DDIM with eta above 0 or FlowSDE"
        )
    delta = None if guide is None else _delta(chain, particles, step, (t, s), position, guide)
    drawing = step if delta is None else step.shift(delta)
    x = drawing.draw(step_noise(drawing, chain.noise, chain.slots, position))
    moved = replace(particles, x=x, prediction=None)
    if delta is None:
        return moved
    # a row that was not moved pays nothing; it may even be one without noise, which has no density
    still = (delta == 0).flatten(1).all(1)
    ratio = torch.where(still, 0.0, kernel_ratio(step, drawing, x))
    return replace(moved, log_weight=particles.log_weight + ratio)


def _delta(
    chain: Chain, particles: Particles, step: Step, times: tuple[Tensor, Tensor], position: int, guide: Guide
) -> Tensor | None:
    assert particles.prediction is not None
    moment = Moment(particles.prediction, particles.x, *times, particles.condition, step, chain.slots, position)
    with torch.enable_grad():
        delta = guide(moment)
    return None if delta is None else delta.detach()


def kernel_ratio(base: Step, proposal: Step, x_s: Shaped[Tensor, "particles *shape"]) -> Float[Tensor, " particles"]:
    """Log p(x_s) - log tau(x_s) in float64, summed over the dimensions of a sample.

    For Gaussians of equal variance std² with means m and m' it is (|x - m'|² - |x - m|²) / (2·std²).
    """
    x = _double(x_s)
    return tree_map(_double, base).log_prob(x, reduce="sum") - tree_map(_double, proposal).log_prob(x, reduce="sum")


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf


def gather(chain: Chain, particles: Particles, ancestors: Ancestors) -> Particles:
    """Everything that belongs to a particle, taken from its ancestor; noise stays with the slot.

    Args:
        chain: what stays.
        particles: all of them.
        ancestors: position within its own group that each slot takes over, (groups, size).
    """
    first = torch.arange(len(ancestors), device=ancestors.device)[:, None] * chain.size
    return take(particles, (first + ancestors).flatten())


def weighted(chain: Chain, particles: Particles, log_gain: Float[Tensor, " particles"]) -> Particles:
    """The particles with ``log_gain`` added to their log-weights.

    Raises:
        GuardError: if a weight is not a number, or all weights of a prompt vanish.
    """
    log_weight = particles.log_weight + log_gain
    largest = chain.by_group(log_weight).amax(-1)
    if not bool(largest.isfinite().all()):
        raise GuardError("the log-weights of a prompt are not finite: check the reward's range and the guide's scale")
    return replace(particles, log_weight=log_weight)


@dataclass(frozen=True)
class Weighing:
    """What is logged at one weighting time, one entry per prompt."""

    ess: Float[Tensor, " prompts"]
    ancestors: Int[Tensor, " prompts"]


@dataclass(frozen=True)
class Outcome:
    """What a loop hands to :func:`finish`.

    Attributes:
        particles: finished.
        rewards: r(x_0) of each.
        weight: normalised in each group, float64.
        log_z: per prompt.
        weighings: in order of time.
    """

    particles: Particles
    rewards: Float[Tensor, " particles"]
    weight: Float[Tensor, " particles"]
    log_z: Float[Tensor, " prompts"]
    weighings: Sequence[Weighing]


def best_rows(chain: Chain, rewards: Float[Tensor, " particles"]) -> Int[Tensor, " prompts"]:
    """Row of the highest reward of each prompt."""
    best = chain.by_group(rewards).argmax(-1)
    return best + torch.arange(len(best), device=best.device) * chain.size


def finish(chain: Chain, outcome: Outcome, media: Tensor) -> Steered:
    """The record of a steering call."""
    prompts = len(outcome.log_z)
    weighings = outcome.weighings
    ess = torch.stack([w.ess for w in weighings]) if weighings else outcome.log_z.new_zeros(0, prompts)
    ancestors = (
        torch.stack([w.ancestors for w in weighings]) if weighings else torch.zeros(0, prompts, dtype=torch.int64)
    )
    return Steered(
        outcome.particles.x,
        media,
        outcome.particles.group,
        outcome.weight,
        outcome.rewards,
        best_rows(chain, outcome.rewards),
        outcome.log_z,
        ess,
        ancestors,
        chain.ledger,
    )
