"""Sampling: a recorded rollout over bare forwards, steering over plain samples, and the noise alone."""

import time
from dataclasses import replace

import torch

from benchmarks.paired import Subject
from benchmarks.workload import NetworkClock, Size, forwards, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import flow_sde
from difftilt.sampling.protocol import Trajectory
from difftilt.sampling.rollout import Plan, rollout, sample, start_state
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Steered


def rollout_overhead(size: Size) -> Subject:
    """Flow-SDE with every step recorded, from drawing the start to the edges, over the same number of forwards."""
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    denoise = denoiser(task.model, forward_batch=size.batch)
    plan = Plan(record=torch.ones(size.steps, dtype=torch.bool))
    index = torch.arange(size.batch)
    clock, taken, inside = NetworkClock(network), list[float](), list[float]()

    def program() -> Trajectory:
        clock.read()
        began = time.perf_counter()
        noise = Noise(0)
        with torch.no_grad():
            x = start_state(task.model.process, noise, index, size.latent)
            grid = task.sampler.grid
            outcome = rollout(denoise, flow_sde(), grid, x, inputs.label, noise=noise, index=index, plan=plan)
        taken.append(time.perf_counter() - began)
        inside.append(clock.read())
        return outcome

    outcome = program()
    assert outcome.ledger.nfe == size.batch * size.steps
    assert len(outcome.edges.step) == size.batch * size.steps
    return Subject(
        name="rollout",
        bound=1.05,
        program=f"Flow-SDE rollout of {size.steps} steps, all recorded with their log-probabilities, noise included",
        floor=f"{size.steps} forwards of the same network on the same shapes, without gradient",
        run_program=program,
        run_floor=lambda: forwards(network, inputs, size.steps),
        shapes=shapes_of(size, network),
        extra={"nfe": outcome.ledger.nfe},
        phases={"rollout": taken, "network": inside},
    )


def fk_overhead(size: Size) -> Subject:
    """FK steering with as many particles as the batch, weighed and resampled at every step but the first."""
    # the weighting points fall on every grid point of five steps
    size = replace(size, steps=5)
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    denoise = denoiser(task.model, forward_batch=size.batch)
    steerer = FKSteering(FKSteeringConfig(particles=size.batch, resample="always"))
    index, spent = torch.arange(size.batch), [0.0]
    clock, inside, taken, scored = NetworkClock(network), list[float](), list[float](), list[float]()

    def brightness(samples: Samples) -> torch.Tensor:
        began = time.perf_counter()
        scores = samples.media.flatten(1).mean(1)
        spent[0] += time.perf_counter() - began
        return scores

    reward = FunctionReward("brightness", brightness)

    def program() -> Steered:
        clock.read()
        spent[0], began = 0.0, time.perf_counter()
        outcome = steerer.steer(task, denoise, reward, ["3"], Noise(0))
        taken.append(time.perf_counter() - began - spent[0])
        scored.append(spent[0])
        inside.append(clock.read())
        return outcome

    def floor() -> torch.Tensor:
        noise = Noise(0)
        with torch.no_grad():
            x = start_state(task.model.process, noise, index, size.latent)
            return sample(denoise, task.sampler, x, inputs.label, noise=noise, index=index)

    outcome = program()
    assert outcome.ledger.nfe == size.batch * size.steps
    assert len(outcome.ess) == size.steps
    return Subject(
        name="fk_steering",
        bound=1.10,
        program=f"FK steering of one prompt with {size.batch} particles, weighed and resampled at every grid point",
        floor=f"plain sampling of {size.batch} samples with the same kernel and grid",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, network) | {"particles": size.batch},
        extra={"nfe": outcome.ledger.nfe, "reward_calls": outcome.ledger.reward_calls},
        phases={"rollout": taken, "reward": scored, "network": inside},
    )


def noise_cost(size: Size) -> Subject:
    """The counter-based normals against PyTorch's own generator, which knows neither samples nor steps."""
    index, noise, generator = torch.arange(size.batch), Noise(0), torch.Generator().manual_seed(0)
    calls = 20

    def program() -> None:
        for step in range(calls):
            noise.normal(index, size.latent, purpose="step", step=step)

    def floor() -> None:
        for _ in range(calls):
            torch.randn(size.batch, *size.latent, generator=generator)

    numbers = size.latent[0] * size.latent[1] * size.latent[2]
    return Subject(
        name="noise",
        bound=None,
        program=f"{calls} draws of {size.batch} × {numbers} normals as a function of seed, sample and step",
        floor=f"{calls} draws of the same shape by torch.randn",
        run_program=program,
        run_floor=floor,
        shapes={"rows": size.batch, "numbers": numbers},
        extra={"calls": calls},
        phases={},
    )
