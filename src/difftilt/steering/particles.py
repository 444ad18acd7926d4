"""The parts of particle steerers: start, predict, propose, gather; ``steering.loop`` strings them together.

Particles of all prompts stand in one flat batch, those of one prompt together. Noise is keyed by the slot, never by the
particle that stands in it, so copies of one parent part at the next stochastic step. The prediction that valued a state
is the one that its next step uses, so valuing new states costs no evaluation.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.errors import GuardError, UserError
from difftilt.models.denoiser import device_of
from difftilt.models.protocol import Denoiser
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Reward
from difftilt.sampling.presets import Preset, euler
from difftilt.sampling.protocol import Guide, Moment, NoiseSource, Step
from difftilt.sampling.rollout import start_state, step_noise
from difftilt.sampling.steps import GaussianStep
from difftilt.steering.chain import Chain
from difftilt.steering.protocol import Particles
from difftilt.training.protocol import Task
from difftilt.trees import take, to_device, tree_map
from difftilt.values.estimates import LatentReward


def start(
    task: Task,
    denoise: Denoiser,
    prompts: Sequence[str],
    size: int,
    noise: NoiseSource,
    index: Int[Tensor, " prompts"] | None = None,
    *,
    places: int | None = None,
) -> tuple[Chain, Particles]:
    """``size`` particles per prompt at the noise end, with equal weights.

    Args:
        task: gives the grid, the kernel and the shape of a latent; an ODE solver of its sampler is not used.
        denoise: the network.
        prompts: one group of particles each.
        size: particles per prompt.
        noise: of the whole call.
        index: global index of each prompt, 0, 1, ... by default; place j of prompt i has the noise index i·places + j,
            so a batch of prompts gives what its prompts give one by one.
        places: most particles per prompt that will be settled at once; None is ``size``.
    """
    device = device_of(task.model.network)
    every = torch.arange(len(prompts), device=device)
    index = every if index is None else index.to(device)
    places = size if places is None else places
    home = index[:, None] * places + torch.arange(places, device=device)
    last = euler() if task.sampler.clean_end else None
    preset = Preset("steering", task.sampler.kernel)
    before = denoise.ledger.copy()
    chain = Chain(denoise, preset, last, task.sampler.grid, noise, home, home[:, :0].flatten(), every[:0], 0, before)
    chain = chain.settled(size)
    condition = take(to_device(task.model.encode(prompts), device), chain.group)
    x = start_state(task.model.process, noise, chain.slots, task.model.shape, condition)
    log_weight = torch.zeros(len(x), dtype=torch.float64, device=device)
    origin = torch.arange(size, device=device).repeat(len(prompts))
    return chain, Particles(x, chain.group, condition, log_weight, memory={"origin": origin})


def bind(reward: Reward, task: Task, prompts: Sequence[str], denoise: Denoiser) -> LatentReward:
    """The reward of latents, counted in the denoiser's ledger.

    Raises:
        UserError: for a reward that scores sets.
    """
    if reward.capabilities.of_sets:
        whole = reward.reward if isinstance(reward, Masked) else reward
        parts = whole.rewards.values() if isinstance(whole, WeightedSum) else (whole,)
        names = ", ".join(part.name for part in parts if part.capabilities.of_sets)
        raise UserError(f"particles are weighted one by one; {names} scores sets: leave it out, or use a set search")
    return LatentReward(reward, task.model.decode, prompts, denoise.ledger)


def predicted(chain: Chain, particles: Particles, position: int) -> Particles:
    """The particles with the network's prediction at their present time; nothing is spent if they have it."""
    if particles.prediction is not None:
        return particles
    t = chain.time(position, particles.x)
    condition = chain.denoise.prepare(particles.x, t, particles.condition)
    return replace(particles, condition=condition, prediction=chain.denoise(particles.x, t, condition))


def propose(
    chain: Chain,
    particles: Particles,
    position: int,
    guide: Guide | None = None,
    *,
    branch: int = 1,
    parting: bool = False,
) -> tuple[Chain, Particles]:
    """Draw the states at grid point ``position + 1``, ``branch`` from every particle, from one evaluation each.

    A guided proposal pays log p(x_s | x_t) - log tau(x_s | x_t), summed over the dimensions of a sample, into the
    log-weight; the kernel's own proposal pays nothing. A last step without noise has one child only: its draws are
    equal.

    Args:
        chain: what stays.
        particles: at grid point ``position``.
        position: index of the step.
        guide: shifts the law that draws.
        branch: children of every particle.
        parting: copies of one parent must part in this chain, so a deterministic kernel is refused.
    """
    if float(chain.grid[position]) == float(chain.grid[position + 1]):
        return replace(chain, branch=1), particles
    particles = predicted(chain, particles, position)
    assert particles.prediction is not None
    t, s = chain.time(position, particles.x), chain.time(position + 1, particles.x)
    last = position == chain.steps - 1
    clean = chain.last if last else None
    step = (chain.preset if clean is None else clean).step(particles.prediction, particles.x, t, s)
    if clean is None and step.deterministic and (parting or branch > 1 or guide is not None):
        raise UserError(
            "the task's kernel is deterministic, so copies of a particle would stay identical: use a stochastic one, "
            "such as DDIM with eta above 0 or FlowSDE"
        )
    if branch > 1 and last and _noiseless(step):
        branch = 1
    delta = None if guide is None or clean is not None else _delta(chain, particles, step, (t, s), position, guide)
    drawing = step if delta is None else step.shift(delta)
    chain = chain.branched(branch) if branch > 1 else replace(chain, branch=1)
    if branch > 1:
        again = torch.arange(len(particles.x), device=particles.x.device).repeat_interleave(branch)
        particles, step, drawing, delta = take((replace(particles, prediction=None), step, drawing, delta), again)
    x = drawing.draw(step_noise(drawing, chain.noise, chain.slots, position))
    moved = replace(particles, x=x, prediction=None)
    if delta is None:
        return chain, moved
    # a row that was not moved pays nothing; it may even be one without noise, which has no density
    still = (delta == 0).flatten(1).all(1)
    ratio = torch.where(still, 0.0, kernel_ratio(step, drawing, x))
    return chain, replace(moved, log_weight=particles.log_weight + ratio)


def _noiseless(step: Step) -> bool:
    """Whether all draws of a step are equal, as DDIM's to s = 0 are for any eta."""
    return step.deterministic or (isinstance(step, GaussianStep) and not bool(step.std.any()))


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


def gather(chain: Chain, particles: Particles, ancestors: Int[Tensor, "groups kept"]) -> Particles:
    """Everything that belongs to a particle, taken from its ancestor; noise stays with the slot.

    Args:
        chain: what stays.
        particles: all of them.
        ancestors: place among the ``chain.size`` rows of its own prompt that each slot takes over.
    """
    first = torch.arange(len(ancestors), device=ancestors.device)[:, None] * chain.size
    return take(particles, (first + ancestors).flatten())


def weighted(chain: Chain, particles: Particles, log_gain: Float[Tensor, " particles"]) -> Particles:
    """The particles with ``log_gain`` added to their log-weights; a particle that has no weight left stays without.

    Raises:
        GuardError: if a weight is not a number, or all weights of a prompt vanish.
    """
    dead = particles.log_weight == -torch.inf
    log_weight = torch.where(dead, -torch.inf, particles.log_weight + log_gain)
    largest = chain.by_group(log_weight).amax(-1)
    if not bool(largest.isfinite().all()):
        raise GuardError("the log-weights of a prompt are not finite: check the reward's range and the guide's scale")
    return replace(particles, log_weight=log_weight)
