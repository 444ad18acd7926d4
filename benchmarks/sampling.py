"""Sampling: recorded rollouts and completions over bare forwards, steering over plain samples, the noise alone."""

import time
from dataclasses import replace

import torch

from benchmarks.paired import Subject
from benchmarks.workload import NetworkClock, Size, forwards, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.completion import Start, complete, remaining
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import flow_sde
from difftilt.sampling.protocol import Trajectory
from difftilt.sampling.rollout import Plan, rollout, sample, start_state
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Steered


def rollout_overhead(size: Size) -> Subject:
    """Flow-SDE with every step recorded, from drawing the start to the edges, over the same number of forwards."""
    plan = Plan(record=torch.ones(size.steps, dtype=torch.bool))
    what = f"Flow-SDE rollout of {size.steps} steps, all recorded with their log-probabilities, noise included"
    subject = _sampling("rollout", 1.05, what, size, plan)
    assert subject.extra == {"nfe": size.batch * size.steps, "edges": size.batch * size.steps}
    return subject


def tree_overhead(size: Size) -> Subject:
    """The same where every state splits in two at the first two steps, with correlated noise of the siblings."""
    plan = Plan(record=torch.ones(size.steps, dtype=torch.bool), branch={0: 2, 1: 2}, spread=4.0)
    what = f"Flow-SDE trees of {size.steps} steps from {size.batch} roots to {4 * size.batch} leaves, all recorded"
    subject = _sampling("tree", 1.15, what, size, plan)
    assert subject.extra["nfe"] == size.batch * (1 + 2 + 4 * (size.steps - 2))
    return subject


def _sampling(name: str, bound: float, what: str, size: Size, plan: Plan) -> Subject:
    """One rollout by a plan over as many bare forwards as its ledger counts."""
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    denoise = denoiser(task.model, forward_batch=size.batch)
    index = torch.arange(size.batch) * plan.leaves
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
    calls = outcome.ledger.nfe // size.batch
    return Subject(
        name=name,
        bound=bound,
        program=what,
        floor=f"{calls} forwards of the same network on the same shapes, without gradient",
        run_program=program,
        run_floor=lambda: forwards(network, inputs, calls),
        shapes=shapes_of(size, network),
        extra={"nfe": outcome.ledger.nfe, "edges": len(outcome.edges.step)},
        phases={"rollout": taken, "network": inside},
    )


def branch_saving(size: Size) -> Subject:
    """BranchGRPO's default tree, 16 leaves from one root in 20 steps, against 16 chains: 203 evaluations, not 320.

    As many roots as rows of a network call, so that no call is filled up.
    """
    size = replace(size, batch=max(4, size.batch // 8), steps=20)
    task = make_task(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    denoise = denoiser(task.model, forward_batch=size.batch)
    record = torch.ones(size.steps, dtype=torch.bool)
    tree = Plan(record=record, branch={0: 2, 3: 2, 6: 2, 9: 2}, spread=4.0)

    def run(plan: Plan, rows: int) -> Trajectory:
        noise, index = Noise(0), torch.arange(rows) * plan.leaves
        label = torch.zeros(rows, dtype=torch.int64)
        with torch.no_grad():
            x = start_state(task.model.process, noise, index, size.latent)
            grid = task.sampler.grid
            return rollout(denoise, flow_sde(), grid, x, label, noise=noise, index=index, plan=plan)

    outcome = run(tree, size.batch)
    assert (outcome.ledger.nfe, len(outcome.edges.step)) == (203 * size.batch, 218 * size.batch)
    return Subject(
        name="branch_saving",
        bound=None,
        program=f"{size.batch} trees of 16 leaves, 20 steps, splits at 0, 3, 6, 9: 203 evaluations each",
        floor="as many leaves as chains: 320 evaluations each, recorded in the same way",
        run_program=lambda: run(tree, size.batch),
        run_floor=lambda: run(Plan(record=record), 16 * size.batch),
        shapes=shapes_of(size, network),
        extra={"nfe": 203 * size.batch, "floor_nfe": 320 * size.batch},
        phases={},
    )


def completion_overhead(size: Size) -> Subject:
    """Completions of a state of every time together, each by the rest of the grid."""
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    denoise = denoiser(task.model, forward_batch=size.batch)
    grid = task.sampler.grid
    starts = [
        Start(inputs.x_t, inputs.label, tuple(remaining(grid, position).tolist())) for position in range(size.steps)
    ]
    calls = size.steps * (size.steps + 1) // 2

    def program() -> None:
        before = denoise.ledger.copy()
        with torch.no_grad():
            complete(denoise, starts)
        assert (denoise.ledger - before).nfe == calls * size.batch

    return Subject(
        name="completion",
        bound=1.15,
        program=f"ODE completions of {size.batch} states at each of {size.steps} times, batched over the times",
        floor=f"{calls} forwards of the same network on the same shapes, without gradient",
        run_program=program,
        run_floor=lambda: forwards(network, inputs, calls),
        shapes=shapes_of(size, network),
        extra={"nfe": calls * size.batch},
        phases={},
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
