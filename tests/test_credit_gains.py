"""Gains and turning points on hand-made sequences, and what theory says of them on random ones."""

import pytest
import torch
from torch import Tensor

from difftilt.credit.gains import (
    Assignment,
    Definition,
    balanced,
    gains,
    per_step,
    step_rewards,
    turning_points,
)
from difftilt.credit.group import Normaliser

HAND = torch.tensor([[1.0, 0.8, 1.1, 1.0, 1.4]], dtype=torch.float64)
RISING = torch.tensor([[0.0, 0.1, 0.3, 0.6]], dtype=torch.float64)
OVERSHOOT = torch.tensor([[0.0, 2.0, 1.5, 1.8, 1.0]], dtype=torch.float64)
BOTH: tuple[Definition, ...] = ("basic", "consistent")


def walks(count: int = 10_000, steps: int = 6) -> Tensor:
    steps_of = torch.randn(count, steps + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return steps_of.cumsum(1)


def places(rewards: Tensor, definition: Definition, dead_zone: float = 0.0) -> list[int]:
    return turning_points(rewards, definition, dead_zone)[0].nonzero()[:, 0].tolist()


def credit(rewards: Tensor, definition: Definition, **more: object) -> list[float]:
    found = step_rewards(rewards, turning_points(rewards, definition), **more)  # type: ignore[arg-type]
    return [round(value, 9) for value in found[0].tolist()]


def test_gains_telescope_without_rounding() -> None:
    rewards = walks().float()
    assert torch.equal(gains(rewards).sum(1), rewards[:, -1].double() - rewards[:, 0].double())


def test_every_step_is_compared_in_its_own_groups() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, 5.0], [0.0, 2.0], [0.0, 4.0]])
    found = per_step(values, torch.tensor([7, 7, 2, 2]), Normaliser(eps=1e-4))
    one = 1 / (1 + 1e-4)
    torch.testing.assert_close(found, torch.tensor([[-one, 0.0], [one, 0.0], [0.0, -one], [0.0, one]]))


def test_the_hand_sequence_has_the_turning_points_of_the_paper() -> None:
    assert places(HAND, "basic") == [1, 3]
    assert places(HAND, "consistent") == [1]  # nothing is left after step 3
    assert places(HAND, "reversal") == [1, 2, 3]
    for definition in BOTH:
        assert credit(HAND, definition) == [-0.2, 0.6, -0.1, 0.4]
        assert credit(-HAND, definition) == [0.2, -0.6, 0.1, -0.4]


@pytest.mark.parametrize("definition", BOTH)
def test_of_a_sequence_that_rises_throughout_only_the_first_step_turns(definition: Definition) -> None:
    assert places(RISING, definition) == [0]
    assert credit(RISING, definition) == [0.6, 0.2, 0.3]


def test_the_assignments() -> None:
    assert credit(HAND, "consistent", assignment="bonus", weight=0.5) == [-0.2, 0.6, -0.1, 0.4]
    assert credit(HAND, "basic", assignment="bonus", weight=2.0) == [-0.2, 1.5, -0.1, 1.2]
    assert credit(HAND, "basic", assignment="released", weight=2.0) == [0.4, 1.0, 0.4, 1.2]


def test_the_basic_rule_allows_an_overshoot_and_the_consistent_rule_does_not() -> None:
    assert places(OVERSHOOT, "basic") == [0, 2]
    assert credit(OVERSHOOT, "basic")[2] == -0.8 + 0.3
    assert places(OVERSHOOT, "consistent") == []


def test_on_random_walks_consistent_points_are_basic_ones_of_larger_credit_and_the_same_sign() -> None:
    rewards = walks()
    basic, consistent = (turning_points(rewards, definition) for definition in BOTH)
    d, onwards = gains(rewards), rewards[:, -1:] - rewards[:, :-1]
    assert bool((basic | ~consistent).all())
    assert 0.01 < float(consistent.double().mean()) < float(basic.double().mean())
    assert bool((onwards.abs() > d.abs())[consistent].all())
    assert bool((onwards.sign() == d.sign())[consistent].all())
    # the basic rule guarantees neither
    assert 0.01 < float((onwards.sign() != d.sign())[basic].double().mean()) < 0.1
    assert 0.2 < float((onwards.abs() <= d.abs())[basic].double().mean()) < 0.4


@pytest.mark.parametrize("definition", ["basic", "consistent", "reversal"])
def test_only_signs_matter(definition: Definition) -> None:
    rewards = walks(1000)
    found = turning_points(rewards, definition)
    assert torch.equal(turning_points(3 * rewards + 2, definition), found)
    assert torch.equal(turning_points(-rewards, definition), found)


def test_zero_is_no_sign_and_a_dead_zone_is_a_wider_zero() -> None:
    assert places(torch.zeros(1, 5), "basic") == []
    returning = torch.tensor([[1.0, 0.8, 1.1, 1.0]])  # F = R_0: there is no global trend
    assert places(returning, "basic") == []
    noisy = torch.tensor([[0.0, -0.001, 0.4, 0.399, 1.0]])
    assert places(noisy, "consistent") == [1]
    assert places(noisy, "consistent", dead_zone=0.01) == []


def test_a_turning_point_from_which_nothing_follows_is_credited_with_nothing() -> None:
    rewards = torch.tensor([[0.0, -1.0, 1.0, 0.5, 0.8, 1.0]])
    turning = torch.tensor([[False, False, False, False, True]])
    level = torch.tensor([[0.0, -1.0, 1.0, 0.5, 1.0, 1.0]])
    assert float(step_rewards(level, turning)[0, 4]) == 0.0
    assert float(step_rewards(rewards, turning)[0, 4]) == pytest.approx(0.2)


@pytest.mark.parametrize("assignment", ["replace", "bonus", "released"])
def test_balancing_keeps_the_largest_of_the_assigned_values_of_each_sign(assignment: Assignment) -> None:
    rewards = walks(500)
    rewards = torch.cat([rewards, rewards + torch.arange(7)])  # more of them rise
    turning = turning_points(rewards, "consistent")
    plain = step_rewards(rewards, torch.zeros_like(turning), assignment)
    brought = step_rewards(rewards, turning, assignment) - (0 if assignment == "replace" else plain)
    kept = balanced(turning, brought)
    for sign in (1, -1):
        own, held = brought.sign() == sign, kept & (brought.sign() == sign)
        dropped = turning & own & ~kept
        assert int(held.sum()) == int((turning & (brought.sign() != sign)).sum()) or not bool(dropped.any())
        if bool(dropped.any()):
            assert float(brought[held].abs().min()) >= float(brought[dropped].abs().max())
    assert bool((turning & ~kept).any())
    result = step_rewards(rewards, turning, assignment, balance=True)
    assert torch.equal(result[~kept], plain[~kept])
    assert torch.equal(result[kept], step_rewards(rewards, turning, assignment)[kept])


def test_balancing_ranks_by_the_assigned_value_and_not_by_the_gain() -> None:
    rewards = torch.tensor(
        [
            [0.0, -0.1, 0.1, 2.0],  # turns at 1: gain 0.2, assigned 2.1
            [0.0, -0.1, 0.8, 1.0],  # turns at 1: gain 0.9, assigned 1.1
            [0.0, 0.1, -0.3, -0.4],  # turns at 1: assigned -0.5
        ]
    )
    turning = turning_points(rewards, "consistent")
    found = step_rewards(rewards, turning, balance=True)[:, 1]
    torch.testing.assert_close(found, torch.tensor([2.1, 0.9, -0.5], dtype=torch.float64), atol=1e-6, rtol=0)


def test_where_one_sign_is_absent_all_are_kept() -> None:
    rewards = RISING.repeat(3, 1)
    turning = turning_points(rewards, "consistent")
    assert torch.equal(balanced(turning, gains(rewards)), turning)
