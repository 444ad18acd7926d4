"""Windows: pure functions of iteration and noise, that never reach the untrained last step."""

import math
from itertools import groupby

import pytest
import torch

from difftilt.errors import UserError
from difftilt.sampling.noise import Noise
from difftilt.sampling.windows import Motion, moving_start, random_start, random_steps, window_mask


def starts(count: int, positions: int, every: int, stride: int, motion: Motion) -> list[tuple[int, int]]:
    """(start, iterations it stays), in order."""
    path = [moving_start(i, positions, every, stride, motion) for i in range(count)]
    return [(start, len(list(run))) for start, run in groupby(path)]


def test_a_window_is_a_run_of_steps() -> None:
    assert window_mask(6, 2, 3).tolist() == [False, False, True, True, True, False]


def test_a_sliding_window_visits_every_start_and_rolls_back() -> None:
    assert starts(12, 3, 2, 1, "sliding") == [(0, 2), (1, 2), (2, 2), (0, 2), (1, 2), (2, 2)]
    assert starts(8, 5, 2, 2, "sliding") == [(0, 2), (2, 2), (4, 2), (0, 2)]


@pytest.mark.parametrize("motion", ["sliding", "decay", "exponential_decay"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_moving_window_is_always_whole_and_before_the_last_step(motion: Motion, width: int, stride: int) -> None:
    steps, seen = 10, set[int]()
    for iteration in range(400):
        start = moving_start(iteration, steps - width, 5, stride, motion)
        mask = window_mask(steps, start, width)
        assert int(mask.sum()) == width
        assert not mask[-1]
        seen.add(start)
    assert seen == set(range(0, steps - width, stride))


def test_exponential_decay_stays_as_its_formula_says() -> None:
    expected = [(start, math.ceil(25 * math.exp(-0.1 * max(0, start - 13)))) for start in range(20)]
    assert expected[13:16] == [(13, 25), (14, 23), (15, 21)]
    assert starts(sum(stay for _, stay in expected), 20, 25, 1, "exponential_decay") == expected


def test_linear_decay_falls_from_every_to_one() -> None:
    path = starts(1000, 9, 25, 1, "decay")[:9]
    assert path == [(start, 25 - 3 * start) for start in range(9)]


def test_one_position_never_moves() -> None:
    for motion in ("sliding", "decay", "exponential_decay"):
        assert starts(60, 1, 25, 1, motion) == [(0, 60)]


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="narrower"):
        moving_start(0, 0, 25)
    with pytest.raises(UserError, match="narrower"):
        random_start(Noise(0), 3, 5, 3)


def test_random_starts_are_uniform_and_fixed_by_the_iteration() -> None:
    path = torch.tensor([random_start(Noise(1).at(i), 2, 8, 3) for i in range(800)])
    share = torch.bincount(path, minlength=8) / 800
    assert path.min() == 2
    assert path.max() == 5
    # four standard errors of a share of 1/4
    assert (share[2:6] - 0.25).abs().max() < 4 * math.sqrt(0.25 * 0.75 / 800)
    assert random_start(Noise(1).at(7), 2, 8, 3) == int(path[7])


@pytest.mark.parametrize(("steps", "fraction", "count"), [(10, 0.6, 6), (5, 0.6, 3), (100, 0.29, 29), (4, 0.1, 1)])
def test_every_sample_trains_the_same_number_of_random_steps(steps: int, fraction: float, count: int) -> None:
    index = torch.arange(500)
    drawn = random_steps(Noise(2), index, steps, fraction)
    assert torch.equal(drawn.sum(1), torch.full((500,), count))
    share, expected = drawn.double().mean(0), count / steps
    assert (share - expected).abs().max() < 4.5 * math.sqrt(expected * (1 - expected) / 500)
    order = index.flip(0)
    assert torch.equal(random_steps(Noise(2), order, steps, fraction), drawn[order])
