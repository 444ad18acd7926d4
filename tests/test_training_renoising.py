"""Noise levels and re-noised states of finished samples, and the errors that are made of them."""

import pytest
import torch
from torch import Tensor

from difftilt.objectives.denoising import denoising_error, implicit_reward, true_in_space
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, RectifiedFlow, cosine_schedule
from difftilt.process.grid import uniform_grid
from difftilt.sampling.noise import Noise
from difftilt.training.experience import Experience, PromptBatch, scored_experience
from difftilt.training.renoising import levels, random_levels, renoised
from training_runs import make_experience, with_edges

NOISE = Noise(3)
GRID = uniform_grid(10)
PROCESSES = [RectifiedFlow(), cosine_schedule()]


def rows_of(step: Tensor, t: Tensor) -> Experience:
    """Every level of the hand-made samples as a row."""
    return with_edges(make_experience(), lambda edges: levels(step, t)).rows(torch.arange(step.numel()))


def test_levels_are_different_times_of_the_solver_and_never_the_data_end() -> None:
    edges = random_levels(NOISE, GRID, 0.3, torch.arange(50))
    step, t = edges.step.reshape(50, 3), edges.t.reshape(50, 3)
    assert torch.equal(t, GRID.float()[step])
    assert float(t.min()) > 0
    assert all(len(row.unique()) == 3 for row in step)
    assert len(step.sort(1).values.unique(dim=0)) > 10  # every sample has its own
    assert torch.equal(edges.sample, torch.arange(50).repeat_interleave(3))


def test_samples_with_one_key_share_their_times() -> None:
    group = torch.tensor([4, 9, 4, 9])
    step = random_levels(NOISE, GRID, 0.5, group).step.reshape(4, 5)
    assert torch.equal(step[0], step[2])
    assert torch.equal(step[1], step[3])
    assert not torch.equal(step[0], step[1])


def test_at_least_one_level_is_kept() -> None:
    assert len(random_levels(NOISE, GRID, 0.01, torch.arange(7)).t) == 7
    assert len(random_levels(NOISE, GRID, 1.0, torch.arange(7)).t) == 70


def test_noise_is_new_for_each_level_and_shared_where_the_key_is() -> None:
    step = torch.tensor([[0, 1]]).expand(12, 2)
    rows = rows_of(step, torch.ones(12, 2))  # at t = 1 rectified flow leaves nothing but the noise
    own = renoised(RectifiedFlow(), rows, NOISE).reshape(12, 2, 2)
    assert not torch.allclose(own[:, 0], own[:, 1])
    assert not torch.allclose(own[0], own[1])
    shared = renoised(RectifiedFlow(), rows, NOISE, key=rows.group).reshape(12, 2, 2)
    assert torch.equal(shared[0], shared[3])
    assert not torch.equal(shared[0], shared[4])
    assert not torch.equal(shared[0, 0], shared[0, 1])


def test_renoising_at_time_zero_gives_the_sample_back() -> None:
    rows = rows_of(torch.zeros(12, 1, dtype=torch.int64), torch.zeros(12, 1))
    assert rows.x_0 is not None
    assert torch.allclose(renoised(RectifiedFlow(), rows, NOISE), rows.x_0)


def test_a_record_without_scores_has_no_rewards() -> None:
    experience = make_experience()
    assert experience.x_0 is not None
    rows = torch.arange(12)
    batch = PromptBatch(rows, experience.group, experience.prompt, experience.condition)
    record = scored_experience(batch, experience.x_0, experience.edges, None)
    assert record.rewards is None
    assert record.components == {}


def states(process: GaussianProcess) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(6, 3, 4, generator=generator) for _ in range(2))
    t = torch.linspace(0.1, 0.9, 6)
    return x_0, eps, t, process.corrupt(x_0, t, eps)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_truth_has_no_error_and_a_shift_has_its_square(process: GaussianProcess) -> None:
    x_0, _, t, x_t = states(process)
    truth = GaussianPrediction(process, x_0, "x0", x_t, t)
    assert float(denoising_error(truth, x_0, space="x0").abs().max()) == 0
    moved = GaussianPrediction(process, x_0 + 0.5, "x0", x_t, t)
    assert torch.allclose(denoising_error(moved, x_0, space="x0").float(), torch.full((6,), 0.25))
    assert torch.allclose(denoising_error(moved, x_0, space="x0", reduce="sum").float(), torch.full((6,), 3.0))
    # a constant shift has mean absolute error 0.5: the self-normalised error is linear in it
    assert torch.allclose(denoising_error(moved, x_0, space="x0", normalised=True).float(), torch.full((6,), 0.5))


def test_velocity_error_of_rectified_flow_is_that_of_eps_minus_x0() -> None:
    x_0, eps, t, x_t = states(RectifiedFlow())
    guess = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    prediction = GaussianPrediction(RectifiedFlow(), guess, "velocity", x_t, t)
    expected = (guess - (eps - x_0)).square().flatten(1).mean(1)
    assert torch.allclose(denoising_error(prediction, x_0).float(), expected, rtol=1e-4)


def test_implicit_reward_is_the_gain_of_the_current_network_and_only_it_has_a_gradient() -> None:
    process = RectifiedFlow()
    x_0, eps, t, x_t = states(process)
    right = (eps - x_0).requires_grad_()
    wrong = (eps - x_0 + 1).requires_grad_()
    better = GaussianPrediction(process, right, "velocity", x_t, t)
    worse = GaussianPrediction(process, wrong, "velocity", x_t, t)
    gain = implicit_reward(better, worse, x_0)
    assert torch.allclose(gain, torch.ones(6), atol=1e-3)
    assert torch.equal(implicit_reward(worse, worse, x_0), torch.zeros(6))
    gain.sum().backward()
    assert wrong.grad is None
    assert right.grad is not None


def test_a_small_gain_survives_the_sum_over_many_dimensions() -> None:
    """Each error is near 65536, of which float32 keeps steps of 0.008; the gain is smaller than that."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps, gap = (torch.randn(4, 65536, generator=generator) for _ in range(3))
    process, t = RectifiedFlow(), torch.full((4,), 0.5)
    x_t = process.corrupt(x_0, t, eps)
    old = GaussianPrediction(process, eps - x_0 + gap, "velocity", x_t, t)
    current = GaussianPrediction(process, old.velocity - 1e-7 * gap.sign(), "velocity", x_t, t)
    truth = true_in_space(old, x_0, "velocity").double()
    ends = old.velocity.double(), current.velocity.double()
    expected = ((ends[0] - ends[1]) * (ends[0] + ends[1] - 2 * truth)).sum(1)
    assert float(expected.abs().max()) < 0.03
    found = implicit_reward(current, old, x_0, reduce="sum")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
