"""Edges of the Gaussian processes and grids; what can be measured as one number is in ``checks/process.py``."""

import pytest
import torch
from torch import Tensor

from difftilt.process import (
    GaussianPrediction,
    RectifiedFlow,
    VariancePreserving,
    linear_schedule,
    scaled_linear_schedule,
    timestep_grid,
    uniform_grid,
)
from difftilt.process.grid import check_grid
from difftilt.trees import take

FLOW = RectifiedFlow()


def rows(*values: float) -> Tensor:
    return torch.tensor(values).double()


def test_velocity_target_is_exact_at_both_ends() -> None:
    x_0, noise = torch.tensor([[2.0], [2.0]]), torch.tensor([[0.5], [0.5]])
    assert torch.equal(FLOW.target("velocity", x_0, torch.tensor([0.0, 1.0]), noise), noise - x_0)
    assert torch.equal(FLOW.target("v", x_0, torch.tensor([0.0, 1.0]), noise), torch.tensor([[0.5], [-2.0]]))


def test_ends_of_the_schedules() -> None:
    process = linear_schedule()
    assert float(process.alpha(rows(0.0))) == 1.0
    assert float(process.sigma(rows(0.0))) == 0.0
    assert torch.equal(process.alpha(rows(1.0)) ** 2, process.alpha(process.time(torch.tensor([999]))) ** 2)


def test_a_time_on_the_table_belongs_to_the_interval_that_a_falling_step_crosses() -> None:
    process = VariancePreserving(rows(0.9, 0.5, 0.1))
    left = process.knots[1:] - process.knots[:-1]
    for dtype in (torch.float32, torch.float64):
        on_table = process.time(torch.arange(3)).to(dtype)
        assert torch.allclose(process.log_abar(on_table)[1].double(), 3 * left, rtol=1e-6)


def test_float32_times_see_the_same_slope_as_float64() -> None:
    process = scaled_linear_schedule()
    times = process.time(torch.arange(1000))
    exact, rounded = process.log_abar(times)[1], process.log_abar(times.float())[1].double()
    # a neighbouring interval's slope differs by 1e-3 and more; rounding by 1e-6
    assert float((rounded / exact - 1).abs().max()) < 5e-4


def test_sampling_may_start_from_unit_noise() -> None:
    table, noise = rows(0.9, 0.5), torch.ones(2, 3)
    assert torch.equal(VariancePreserving(table, prior_std=1.0).prior(noise), noise)
    torch.testing.assert_close(VariancePreserving(table).prior(noise), noise * 0.5**0.5)


@pytest.mark.parametrize("table", [[0.5, 0.6], [1.0, 0.5], [0.5, 0.0], [[0.9, 0.5]]])
def test_impossible_tables_are_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(torch.tensor(table))


def test_half_precision_is_raised_and_rows_are_gathered() -> None:
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    prediction = FLOW.predict(x, x, torch.tensor([0.2, 0.5, 0.7]), "velocity")
    assert prediction.x0.dtype == torch.float32
    picked = take(prediction, torch.tensor([2, 0]))
    assert torch.equal(picked.x0, prediction.x0[[2, 0]])
    assert isinstance(picked, GaussianPrediction)


def test_logits_and_draws_are_refused() -> None:
    x, t = torch.zeros(1, 2), torch.tensor([0.5])
    with pytest.raises(ValueError, match="no logits"):
        FLOW.predict(x, x, t, "logits")
    with pytest.raises(ValueError, match="no logits"):
        FLOW.target("logits", x, t, x)
    with pytest.raises(TypeError, match="completing the chain"):
        FLOW.predict(x, x, t, "x0").draw_x0(x)


def test_prior_is_noise_of_the_last_sigma() -> None:
    noise = torch.ones(2, 3)
    assert torch.equal(FLOW.prior(noise), noise)
    assert torch.allclose(linear_schedule().prior(noise), torch.full((2, 3), (1 - 4.0358e-5) ** 0.5))


def test_stable_diffusion_grid() -> None:
    grid = timestep_grid(scaled_linear_schedule(), 50)
    timesteps = scaled_linear_schedule().timestep(grid)
    assert torch.allclose(timesteps[:3], rows(981.0, 961.0, 941.0))
    assert torch.allclose(timesteps[-2:], rows(1.0, -1.0))
    without_offset = timestep_grid(scaled_linear_schedule(), 50, offset=0, clean_end=False)
    assert float(without_offset[-1] - without_offset[-2]) == 0.0


def test_impossible_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="past the last timestep"):
        timestep_grid(linear_schedule(1000), 1000, offset=1)
    with pytest.raises(ValueError, match="at least one step"):
        uniform_grid(0)
    for grid in (rows(0.2, 0.5), rows(1.1, 0.0), torch.stack([rows(1.0, 0.5), rows(0.4, 0.6)])):
        with pytest.raises(ValueError, match="time grid"):
            check_grid(grid)


def test_shift_is_the_published_one() -> None:
    assert torch.allclose(uniform_grid(4, 3.0), rows(1.0, 0.9, 0.75, 0.5, 0.0))
