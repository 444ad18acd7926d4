import math
from typing import cast

import pytest
import torch
from torch import Tensor

from difftilt.checks.tilted_truths import ring_truth, sequence_reward, sequence_truth
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.models.markov import MarkovPosterior
from difftilt.models.process_reward import ProcessReward
from difftilt.process.gaussian import GaussianProcess
from difftilt.rewards import FunctionReward
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset, euler
from difftilt.sampling.rollout import rollout
from difftilt.statistics import enumerate_sequences
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture
from difftilt.training.protocol import Task
from difftilt.values import (
    ClosedForm,
    LatentReward,
    Learned,
    Lookahead,
    PosteriorMean,
    Rollout,
    Rows,
    SampledX0,
    fit_value,
    regression_loss,
)
from difftilt.values.estimates import lookahead_times
from difftilt.values.learned import Regression


def bound(task: Task, ledger: Ledger | None = None) -> LatentReward:
    return LatentReward(task.reward, task.model.decode, ("",), ledger or Ledger())


def rows(count: int, step: int = 0) -> Rows:
    return Rows(torch.arange(count), torch.zeros(count, dtype=torch.int64), step)


def test_at_the_end_every_estimate_is_the_reward() -> None:
    task = ring_truth().task
    reward, x = bound(task), torch.tensor([[1.0, 2.0], [-3.0, 0.5]])
    model, preset = denoiser(task.model), Preset("plain", task.sampler.kernel)
    values = (
        PosteriorMean(reward),
        SampledX0(reward, 3, 1.0, Noise(0)),
        Rollout(reward, model, preset, task.sampler.grid, 3, 1.0, Noise(0)),
        Lookahead(reward, model, 3),
    )
    for value in values:
        assert torch.equal(value(x, torch.zeros(2), None, None, rows(2, 16)).float(), x[:, 0])
    assert reward.ledger.reward_calls == 8
    assert torch.equal(ClosedForm(lambda x, t, c: x[:, 1])(x, torch.zeros(2), None, None, rows(2)), x[:, 1])


def test_posterior_mean_asks_the_reward_of_x0hat() -> None:
    task = ring_truth().task
    x, t = torch.tensor([[1.0, 2.0], [-3.0, 0.5]]), torch.full((2,), 0.5)
    prediction = denoiser(task.model)(x, t, None)
    expected = ring_mixture().posterior_mean(cast(GaussianProcess, task.model.process), x, t)[:, 0]
    torch.testing.assert_close(PosteriorMean(bound(task))(x, t, None, prediction, rows(2)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("soft", [True, False])
def test_many_draws_of_one_masked_position_give_the_exact_value(soft: bool) -> None:
    """With one mask left the marginal is the whole posterior, so draws estimate the soft value without bias."""
    task = sequence_truth().task
    network = cast(MarkovPosterior, task.model.network)
    x = torch.tensor([[0, 3, 2, 2, 2, 1], [0, 1, 2, 3, 2, 2]])
    t, count, temperature = torch.full((2,), 0.5), 4000, 0.5
    prediction = denoiser(task.model)(x, t, None)
    value = SampledX0(bound(task), count, temperature, Noise(0), soft)(x, t, None, prediction, rows(2))
    rewards = sequence_reward(enumerate_sequences(3, 6))
    exact = network.soft_value(x, rewards, temperature if soft else 1e6)
    # rewards lie in [0, 3]: the mean of exp(r/0.5) relative to its size has a standard error below 1.5/sqrt(count)
    torch.testing.assert_close(value, exact, rtol=0, atol=4 * 1.5 * temperature / math.sqrt(count) + 1e-3)


def test_completed_chains_give_the_soft_value_of_the_ring() -> None:
    task = ring_truth().task
    model, preset = denoiser(task.model), Preset("plain", task.sampler.kernel)
    count, temperature, step = 4000, 2.0, 8
    x, t = torch.tensor([[1.0, 0.5], [-2.0, 0.3], [0.0, 0.0]]), torch.full((3,), 0.5)
    with torch.no_grad():
        value = Rollout(bound(task), model, preset, task.sampler.grid, count, temperature, Noise(0))
        found = value(x, t, None, model(x, t, None), rows(3, step))
    assert model.ledger.nfe == 3 + 3 * count * 8
    process = cast(GaussianProcess, task.model.process)
    exact = ring_mixture().soft_value_linear(process, x, t, torch.tensor([1.0, 0.0]), temperature)
    # the relative standard deviation of exp(x_1/2), x_1 within ±4, is below 2
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=4 * 2 * temperature / math.sqrt(count))


def test_completions_do_not_meet_the_noise_of_the_chain() -> None:
    task = ring_truth().task
    model, preset = denoiser(task.model), Preset("plain", task.sampler.kernel)
    x, t = torch.zeros(4, 2), torch.ones(4)
    with torch.no_grad():
        own = rollout(model, preset, task.sampler.grid, x, None, noise=Noise(0), index=torch.arange(4)).x_0[:, 0]
        value = Rollout(bound(task), model, preset, task.sampler.grid, 1, 1.0, Noise(0))
        seen = [value(x, t, None, model(x, t, None), rows(4, step)) for step in (0, 1)]
    assert not torch.isclose(seen[0].float(), own).any()
    assert not torch.isclose(seen[0], seen[1]).any()


@pytest.mark.parametrize("kind", ["exponential", "stationary", "mean"])
def test_minimiser_of_each_regression(kind: Regression) -> None:
    reward, temperature = torch.tensor([0.0, 0.0, 1.0]).double(), 0.4
    value = torch.linspace(0, 1, 2001).double()
    loss = torch.stack([regression_loss(value, r.expand(2001), temperature, kind, 1.0) for r in reward]).mean(0)
    soft = temperature * math.log((2 + math.exp(1 / temperature)) / 3)
    assert abs(float(value[loss.argmin()]) - (1 / 3 if kind == "mean" else soft)) <= 5e-4


@pytest.mark.long
def test_a_fitted_value_is_nearer_to_the_soft_value_than_the_posterior_mean() -> None:
    task, temperature = ring_truth().task, 2.0
    process, mixture = cast(GaussianProcess, task.model.process), ring_mixture()
    index = torch.arange(8192)
    x_0 = mixture.sample(Noise(1).normal(index, (3,), purpose="data"))
    network = ProcessReward((2,), seed=0)
    fit_value(network, process, x_0, x_0[:, 0], Noise(2), temperature=temperature, updates=1200)
    t = Noise(3).uniform(torch.arange(512), (), purpose="time") * 0.8 + 0.1
    x_t = process.corrupt(x_0[:512], t, Noise(3).normal(torch.arange(512), (2,), purpose="noise"))
    exact = mixture.soft_value_linear(process, x_t, t, torch.tensor([1.0, 0.0]), temperature)
    with torch.no_grad():
        learned = Learned(network)(x_t, t, None, None, rows(512))
        plain = PosteriorMean(bound(task))(x_t, t, None, denoiser(task.model)(x_t, t, None), rows(512))
    assert (learned - exact).square().mean() < 0.5 * (plain - exact).square().mean()


def test_a_value_network_reads_tokens() -> None:
    network = ProcessReward((6,), symbols=4)
    x = torch.tensor([[0, 3, 2, 2, 3, 1], [0, 1, 2, 2, 3, 1]])
    found = Learned(network)(x, torch.full((2,), 0.5), None, None, rows(2))
    assert found.shape == (2,)
    assert found[0] != found[1]


def test_a_lookahead_nears_the_whole_solution_of_the_ode() -> None:
    """The end of the ODE over the sampler's own grid, against the estimate after T' evaluations off it."""
    task, steps, at = exact_chain(ring_mixture(), lambda x: x[:, 0], 30), 30, 10
    model, grid = denoiser(task.model), task.sampler.grid
    process = task.model.process
    index = torch.arange(200)
    with torch.no_grad():
        eps = Noise(0).normal(index, (2,), purpose="corruption")
        clean = ring_mixture().means[index % 8] + 0.3 * Noise(0).normal(index, (2,), purpose="data")
        t = torch.full((200,), float(grid[at]))
        x_t = process.corrupt(clean, t, eps)
        end = rollout(model, euler(), grid[at:], x_t, None, noise=Noise(0), index=index).x_0
        seen: list[Tensor] = []
        reward = LatentReward(FunctionReward("keep", lambda s: keep(seen, s.media)), task.model.decode, ("",), Ledger())
        for count in (1, 2, 3, 6, 10):
            before = model.ledger.nfe
            prediction = model(x_t, t, None)
            Lookahead(reward, model, count, clock=steps)(x_t, t, None, prediction, rows(200, at))
            assert model.ledger.nfe - before == 200 * count
    gaps = [float((x - end).norm(dim=1).mean()) for x in seen]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.3
    assert gaps[-1] < 0.05


def keep(seen: list[Tensor], media: Tensor) -> Tensor:
    seen.append(media)
    return media[:, 0]


def test_times_of_a_lookahead() -> None:
    assert lookahead_times(0.5, 1, None) == [0.5]
    assert lookahead_times(0.6, 3, None) == pytest.approx([0.6, 0.4, 0.2])
    # 3/30 in four parts: 2.25, 1.5 and 0.75 of 30 round down to 2, 1 and 0; equal ones and the end are left out
    assert lookahead_times(0.1, 4, 30) == pytest.approx([0.1, 2 / 30, 1 / 30])
    # a grid point that float arithmetic puts just below its multiple of 1/clock
    assert lookahead_times(2 * (1 / 30) * 3, 2, 30) == pytest.approx([0.2, 0.1])
