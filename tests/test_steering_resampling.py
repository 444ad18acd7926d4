import math

import pytest
import torch
from torch import Tensor

from difftilt.sampling.noise import Noise
from difftilt.steering.potentials import PotentialName, begin, gain
from difftilt.steering.resampling import (
    RESAMPLERS,
    ResamplerName,
    distinct,
    effective_sample_size,
    log_mean_exp,
)

UNBIASED: tuple[ResamplerName, ...] = ("multinomial", "stratified", "systematic", "residual")
GROUPS, SIZE = 4000, 6
LOG_WEIGHT = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 0.9, 0.31], dtype=torch.float64) + 700.0


def draw(name: ResamplerName, log_weight: Tensor, groups: int = GROUPS) -> Tensor:
    noise = Noise(3).uniform(torch.arange(groups * len(log_weight)), (), purpose="test").reshape(groups, -1)
    return RESAMPLERS[name](log_weight.expand(groups, -1).contiguous(), noise)


def copies(ancestors: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ancestors, SIZE).sum(1).double()


@pytest.mark.parametrize("name", UNBIASED)
def test_expected_copies_are_size_times_weight(name: ResamplerName) -> None:
    found = copies(draw(name, LOG_WEIGHT))
    expected = SIZE * LOG_WEIGHT.softmax(-1)
    standard_error = found.std(0) / math.sqrt(GROUPS)
    # four standard errors of each of six counts, and rounding where the count never varies
    assert ((found.mean(0) - expected).abs() <= 4 * standard_error + 1e-6).all()


@pytest.mark.parametrize("name", [*UNBIASED, "greedy"])
def test_a_particle_without_weight_is_never_drawn(name: ResamplerName) -> None:
    assert copies(draw(name, LOG_WEIGHT))[:, 3].sum() == 0
    last = torch.tensor([0.1, 0.7, -torch.inf, 0.2, 0.3, -torch.inf], dtype=torch.float64)
    assert copies(draw(name, last))[:, 5].sum() == 0


@pytest.mark.parametrize(("name", "spread"), [("systematic", 1.0), ("stratified", 2.0)])
def test_copies_stay_near_their_expectation(name: ResamplerName, spread: float) -> None:
    gap = (copies(draw(name, LOG_WEIGHT)) - SIZE * LOG_WEIGHT.softmax(-1)).abs()
    assert gap.max() < spread


def test_residual_never_draws_less_than_the_whole_part() -> None:
    assert (copies(draw("residual", LOG_WEIGHT)) >= (SIZE * LOG_WEIGHT.softmax(-1)).floor()).all()


@pytest.mark.parametrize("name", ["systematic", "stratified", "residual"])
def test_equal_weights_keep_every_particle(name: ResamplerName) -> None:
    found = draw(name, torch.full((SIZE,), -3.0, dtype=torch.float64), 200)
    assert torch.equal(found, torch.arange(SIZE).expand(200, -1))


def test_effective_sample_size_and_distinct() -> None:
    log_weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0], [5.0, 5.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(effective_sample_size(log_weight.double()), torch.tensor([4.0, 1.0, 2.0]).double())
    assert distinct(torch.tensor([[0, 0, 2], [1, 1, 1], [2, 0, 1]])).tolist() == [2, 1, 3]
    assert float(log_mean_exp(torch.tensor([2000.0, 2000.0]))) == 2000.0


@pytest.mark.parametrize("potential", ["difference", "max", "sum", "reward_only", "importance"])
def test_gains_of_a_line_sum_to_the_final_reward(potential: PotentialName) -> None:
    rewards = Noise(0).normal(torch.arange(6), (50,), purpose="rewards") * 3
    lineage = begin(potential, 50, -0.75)
    total = torch.zeros(50, dtype=torch.float64)
    for time, reward in enumerate(rewards):
        step, lineage = gain(potential, lineage, reward, final=time == 5)
        total += step
    short = -0.75 if potential == "difference" else 0.0
    assert (total - (rewards[-1].double() - short)).abs().max() < 1e-6


def test_max_and_sum_count_what_came_before() -> None:
    rewards = torch.tensor([[1.0], [3.0], [2.0]])
    seen: dict[str, list[float]] = {}
    for potential in ("max", "sum", "reward_only", "difference", "importance"):
        lineage = begin(potential, 1, 0.0)
        seen[potential] = []
        for time, reward in enumerate(rewards):
            step, lineage = gain(potential, lineage, reward, final=time == 2)
            seen[potential].append(float(step))
    # the last entry pays r(x_0) = 2 minus what was given before
    assert seen["max"] == [1.0, 3.0, -2.0]
    assert seen["sum"] == [1.0, 4.0, -3.0]
    assert seen["reward_only"] == [1.0, 3.0, -2.0]
    assert seen["difference"] == [1.0, 2.0, -1.0]
    assert seen["importance"] == [0.0, 0.0, 2.0]
