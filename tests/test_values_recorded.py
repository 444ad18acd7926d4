"""States of rollouts as a data set, and values fitted to them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from difftilt.checks.tilted_truths import ring_truth, sequence_truth
from difftilt.models.denoiser import denoiser
from difftilt.models.process_reward import ProcessReward
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample_by_kernel, start_state
from difftilt.training.protocol import Task
from difftilt.trees import take
from difftilt.values import States, fit_states, record_states, regression_loss, value_correlations
from difftilt.values.recorded import bootstrapped


def record(task: Task, rows: int, draws: int = 0, reward: float = 1.0) -> States:
    index = torch.arange(rows)
    x = start_state(task.model.process, Noise(0), index, task.model.shape)
    return record_states(
        denoiser(task.model), task.sampler, x, None, lambda x_0: reward * x_0[:, 0].float(),
        noise=Noise(0), index=index, draws=draws,
    )  # fmt: skip


@pytest.mark.parametrize("truth", [ring_truth, sequence_truth])
def test_states_are_those_of_plain_sampling_and_further_draws_are_free(truth: type) -> None:
    task, index = truth().task, torch.arange(5)
    model = denoiser(task.model)
    x = start_state(task.model.process, Noise(0), index, task.model.shape)
    states = record_states(
        model, task.sampler, x, None, lambda x_0: x_0[:, 0].float(), noise=Noise(0), index=index, draws=3
    )
    grid = task.sampler.grid
    assert model.ledger.nfe == 5 * (len(grid) - 1)
    torch.testing.assert_close(states.t, grid.repeat_interleave(5).float())
    torch.testing.assert_close(states.s[:-5], grid[1:].repeat_interleave(5).float())
    x_0 = sample_by_kernel(denoiser(task.model), task.sampler, x, None, noise=Noise(0), index=index).x_0
    assert torch.equal(states.x[-5:], x_0)
    assert torch.equal(states.x[:5], x)
    assert torch.equal(states.reward, x_0[:, 0].float().repeat(len(grid)))
    ahead = states.ahead
    assert ahead is not None
    assert torch.equal(ahead[-5:], x_0[:, None].expand_as(ahead[-5:]))
    # other draws than the one that the chain took, and not equal to one another
    early = ahead[-15:-10].flatten(1)
    assert len({tuple(row) for row in early.tolist()}) == 5


def test_further_draws_follow_the_step() -> None:
    """The mean of many draws is the mean of the next states of as many chains from one state."""
    task = ring_truth().task
    task = replace(task, sampler=replace(task.sampler, kernel=FlowSDE(0.7)))
    states = record(task, 1, draws=4000)
    assert states.ahead is not None
    x, t, s = states.x[:1], states.t[:1], states.s[:1]
    step = FlowSDE(0.7)(denoiser(task.model)(x, t, None), x, t, s)
    error = (states.ahead[0].mean(0) - step.mean[0]).abs().max()
    assert float(error) < 4 * float(step.std[0]) / math.sqrt(4000)


def test_rollouts_without_a_score_teach_nothing() -> None:
    task = ring_truth().task
    x = start_state(task.model.process, Noise(0), torch.arange(20), (2,))
    states = record_states(
        denoiser(task.model), task.sampler, x, None, lambda x_0: torch.where(x_0[:, 0] < 0, torch.nan, x_0[:, 0]),
        noise=Noise(0), index=torch.arange(20),
    )  # fmt: skip
    assert 0 < len(states.t) < 20 * 17
    assert bool((states.reward >= 0).all())
    assert bool((states.x[states.t == 0][:, 0] >= 0).all())


def test_a_bootstrapped_target_averages_next_values_and_has_no_gradient() -> None:
    states = record(ring_truth().task, 4, draws=6)
    assert states.ahead is not None
    weight = torch.tensor([0.7, -0.2], requires_grad=True)

    def value(x: Tensor, t: Tensor, condition: object) -> Tensor:
        return x @ weight + t

    soft, mean = (bootstrapped(value, states, 0.5, kind) for kind in (True, False))
    ahead = states.ahead @ weight.detach() + states.s[:, None]
    end = states.t == 0
    torch.testing.assert_close(mean[~end], ahead.mean(1)[~end].double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(soft[~end], 0.5 * (ahead.double() / 0.5).exp().mean(1).log()[~end], rtol=1e-5, atol=1e-5)
    assert torch.equal(soft[end].float(), states.reward[end])
    assert not soft.requires_grad


@pytest.mark.parametrize("draws", [0, 4])
def test_a_fit_follows_the_reward_towards_the_data(draws: int) -> None:
    states = record(ring_truth().task, 256, draws)
    network = ProcessReward((2,), seed=0)
    network.calibrate(states.reward)
    losses = fit_states(
        network, states, Noise(1), temperature=2.0, kind="mean", updates=80, batch=64, learning_rate=1e-2
    )
    assert len(losses) == 80
    found = list(value_correlations(network, states).values())
    assert found[-1] > 0.95
    assert found[-1] > found[8] > found[1]


def test_no_loss_lets_go_of_a_value_that_is_far_too_low() -> None:
    """Stationary, 20 temperatures below the reward: convex, so every row pulls its value towards its reward."""
    value = torch.linspace(-1, 3, 401, dtype=torch.float64)
    loss = regression_loss(value, torch.full_like(value, 1.0), 0.05, "stationary", 1.0)
    assert bool((loss.diff()[value[1:] <= 1.0] < 0).all())
    assert bool((loss.diff()[value[:-1] >= 1.0] > 0).all())
    assert bool((loss.diff().diff() >= -1e-9 * loss[:-2]).all())


def test_states_of_one_time_stand_together() -> None:
    states = record(ring_truth().task, 3)
    last = take(states, torch.arange(48, 51))
    assert list(value_correlations(lambda x, t, c: x[:, 0], last).values()) == pytest.approx([1.0])
