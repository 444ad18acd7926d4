"""Completions against the plain ODE, against counted costs, and against the paper's schedules."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger
from difftilt.models.mixture import GaussianMixture, MixtureVelocity
from difftilt.models.protocol import Stateful
from difftilt.process import RectifiedFlow, uniform_grid
from difftilt.process.gaussian import as_gaussian
from difftilt.process.protocol import Condition
from difftilt.sampling.completion import ODE, Ahead, Granularity, Start, Strides, complete, remaining
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import flow_sde
from difftilt.sampling.rollout import Plan, rollout, start_state

PROCESS, NOISE, STEPS = RectifiedFlow(), Noise(3), 10
GRID = uniform_grid(STEPS, shift=3.0)


def denoise() -> NetworkDenoiser:
    mixture = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), 0.3, torch.tensor([0.4, 0.6]))
    network = MixtureVelocity(mixture, PROCESS)
    return NetworkDenoiser(network, PROCESS, "velocity", Ledger(), forward_batch=16)


def ode(x: Tensor, grid: Tensor) -> Tensor:
    index = torch.arange(len(x))
    return rollout(denoise(), ODE, grid, x, None, noise=NOISE, index=index).x_0


def noises(rows: int) -> Tensor:
    return start_state(PROCESS, NOISE, torch.arange(rows), (2,))


def start(x: Tensor, times: Tensor) -> Start:
    return Start(x, None, tuple(times.tolist()))


@torch.no_grad()
def test_starts_of_several_lengths_end_where_each_would_alone() -> None:
    x, model = noises(6), denoise()
    done = complete(model, [start(x, GRID[4:]), start(x, GRID[9:]), start(x[:3], GRID[10:])])
    assert torch.equal(done[0], ode(x, GRID[4:]))
    assert torch.equal(done[1], ode(x, GRID[9:]))
    assert torch.equal(done[2], x[:3])
    assert model.ledger.nfe == 6 * 6 + 6 * 1


@torch.no_grad()
def test_the_first_step_of_a_completion_is_paid_for_by_the_rollout() -> None:
    x, model = noises(8), denoise()
    ahead = Ahead(GRID, remaining, frozenset(range(STEPS)))
    edges = Plan(record=torch.ones(STEPS, dtype=torch.bool), score="none")
    path = rollout(model, flow_sde(), GRID, x, None, noise=NOISE, index=torch.arange(8), plan=edges, observe=ahead)
    done = complete(model, [ahead.starts[position] for position in range(STEPS)])
    assert model.ledger.nfe == 8 * (STEPS + STEPS * (STEPS - 1) // 2)
    assert path.edges.x_t is not None
    for position in range(STEPS):
        state = path.edges.x_t[path.edges.step == position]
        assert torch.equal(done[position], ode(state, GRID[position:]))


@torch.no_grad()
def test_without_noise_every_completion_is_the_sample() -> None:
    x, model = noises(8), denoise()
    ahead = Ahead(GRID, remaining, frozenset({0, 3, 9}))
    index = torch.arange(8)
    path = rollout(model, ODE, GRID, x, None, noise=NOISE, index=index, observe=ahead)
    for done in complete(model, list(ahead.starts.values())):
        assert torch.equal(done, path.x_0)


@pytest.mark.parametrize("skip", [1, 2, 3])
@pytest.mark.parametrize("position", [1, 4, 5, 9])
@torch.no_grad()
def test_a_granularity_costs_what_it_says_and_ends_with_a_prediction(skip: int, position: int) -> None:
    times = Granularity(skip)(GRID, position)
    expected = [position, position + 1, *range(position + 1 + skip, STEPS + 1, skip)]
    assert torch.equal(times, GRID[expected])
    x, model = noises(4), denoise()
    (done,) = complete(model, [start(x, times)], output="x0")
    assert model.ledger.nfe == 4 * -(-(STEPS - position) // skip)
    for t, s in pairwise(times[:-1]):
        x = ode(x, torch.stack([t, s]))
    t = times[-2].float().expand(4)
    assert torch.allclose(done, as_gaussian(denoise()(x, t, None)).x0, atol=1e-6)


@torch.no_grad()
def test_one_stride_is_the_prediction_and_all_strides_are_the_grid() -> None:
    assert torch.equal(Strides(99)(GRID, 3), GRID[3:])
    assert torch.equal(Strides(1)(GRID, 3), GRID[[3, 10]])
    assert torch.equal(Strides(2)(GRID, 4), GRID[[4, 7, 10]])
    x = noises(4)
    (done,) = complete(denoise(), [start(x, Strides(1)(GRID, 0))])
    assert torch.allclose(done, as_gaussian(denoise()(x, torch.ones(4), None)).x0, atol=1e-6)


class Counting:
    """Velocity that grows with the number of evaluations of its trajectory."""

    def prepare(self, x_t: Tensor, t: Tensor, condition: Condition) -> Stateful:
        state = condition.state + 1 if isinstance(condition, Stateful) else torch.ones(len(x_t))
        return Stateful(None, state)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Stateful)
        return x_t * condition.state[:, None]


@torch.no_grad()
def test_a_model_with_state_of_its_own_completes_as_each_would_alone() -> None:
    x, model = noises(4), NetworkDenoiser(Counting(), PROCESS, "velocity", Ledger(), forward_batch=16)
    together = complete(model, [start(x, GRID[1:]), start(x, GRID[6:])])
    alone = [complete(model, [start(x, GRID[first:])])[0] for first in (1, 6)]
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    plan, index = Plan(first=torch.tensor([0, 0, 5, 5])), torch.arange(4)
    with pytest.raises(ValueError, match="state"):
        rollout(model, ODE, GRID, x, None, noise=NOISE, index=index, plan=plan)
