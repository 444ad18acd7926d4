"""Weights that agree with an oracle."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards import calibrate
from difftilt.sampling.noise import Noise
from difftilt.statistics import correlation


def metrics(rows: int = 40) -> Tensor:
    return Noise(0).normal(torch.arange(4), (rows,), purpose="metrics").double()


def test_it_is_the_best_of_all_weights_tried_one_by_one() -> None:
    a, b, c, noise = metrics()
    oracle = 0.4 * a - 0.2 * b + c + 0.7 * noise
    found = calibrate({"a": a, "b": b, "c": c}, oracle)
    tried = {
        w: float(torch.corrcoef(torch.stack([w[0] * a + w[1] * b + w[2] * c, oracle]))[0, 1])
        for w in product((0, 0.25, 0.5, 0.75, 1), repeat=3)
        if any(w)
    }
    assert found.correlation == pytest.approx(max(tried.values()))
    assert tried[tuple(found.weights.values())] == pytest.approx(found.correlation)
    assert found.weights["b"] == 0
    for name, column in {"a": a, "b": b, "c": c}.items():
        assert found.alone[name] == pytest.approx(float(torch.corrcoef(torch.stack([column, oracle]))[0, 1]))


def test_a_noiseless_oracle_gives_its_weights_and_the_largest_of_equal_ones() -> None:
    a, b, c, _ = metrics()
    found = calibrate({"a": a, "b": b, "c": c}, 3 * (0.25 * a + 0.5 * c) - 7)
    assert found.weights == {"a": 0.5, "b": 0, "c": 1}
    assert found.correlation == pytest.approx(1)


def test_a_reward_that_does_not_vary_is_carried_along() -> None:
    a, _, _, noise = metrics()
    found = calibrate({"a": a, "flat": torch.full_like(a, 0.3)}, a + 0.1 * noise)
    assert found.weights["a"] == 1
    assert math.isnan(found.alone["flat"])


@pytest.mark.parametrize(
    ("scores", "oracle", "message"),
    [
        ({}, torch.arange(4.0), "0 rewards"),
        ({str(i): torch.arange(4.0) for i in range(10)}, torch.arange(4.0), "10 rewards"),
        ({"a": torch.arange(3.0)}, torch.arange(4.0), r"a \(3,\), the oracle \(4,\)"),
        ({"a": torch.arange(2.0)}, torch.arange(2.0), "at least 3 samples"),
        ({"a": torch.tensor([0.0, torch.nan, 1.0])}, torch.arange(3.0), "scores of a are not all finite"),
        ({"a": torch.arange(3.0)}, torch.ones(3), "same score"),
        ({"a": torch.ones(3)}, torch.arange(3.0), "no reward varies"),
    ],
)
def test_what_cannot_be_fitted(scores: dict[str, Tensor], oracle: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(scores, oracle)


def test_correlation_of_columns_that_do_not_vary_is_unknown() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    found = correlation(x, torch.tensor([[2.0, 1.0, 0.0]]).expand(2, 3))
    assert found[0] == -1
    assert bool(found[1].isnan())
