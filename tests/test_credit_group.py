from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from difftilt.credit import (
    History,
    Normaliser,
    aggregate,
    best_worst,
    broadcast,
    constant_groups,
    group_advantage,
    leave_one_out,
    optimality,
    push,
    push_and_normalise,
    standardise,
    zero_std_fraction,
)
from difftilt.credit.group import Scale

GROUP = torch.tensor([4, 1, 4, 9, 1, 4, 1])
REWARDS = torch.tensor([1.0, 0.0, 2.0, 7.0, 3.0, 6.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("ddof", [0, 1])
def test_group_std_equals_numpy_by_hand(ddof: int) -> None:
    found = group_advantage(REWARDS, GROUP, ddof=ddof, eps=1e-8)
    for label in (1, 4):
        rows = GROUP.eq(label).numpy()
        r = REWARDS.numpy()[rows]
        np.testing.assert_allclose(found.numpy()[rows], (r - r.mean()) / (r.std(ddof=ddof) + 1e-8), rtol=1e-12)
    assert found[3] == 0  # a group of one has nothing to be compared with


def test_global_and_pooled_std() -> None:
    """Group means 3, 1 and 7: the batch varies about 19/7, the pooled std about the group means."""
    centred = torch.tensor([-2.0, -1.0, -1.0, 0.0, 2.0, 3.0, -1.0], dtype=torch.float64)
    batch = REWARDS.std(correction=0)
    torch.testing.assert_close(group_advantage(REWARDS, GROUP, std="global", eps=0.0), centred / batch)
    pooled = float(np.sqrt((4 + 1 + 1 + 0 + 4 + 9 + 1) / 7))
    torch.testing.assert_close(group_advantage(REWARDS, GROUP, std="pooled", eps=0.0), centred / pooled)
    torch.testing.assert_close(group_advantage(REWARDS, GROUP, std="none"), centred)


@pytest.mark.parametrize("std", ["group", "global", "pooled", "none"])
@pytest.mark.parametrize("eps", [1e-4, 1e-8, 0.0])
def test_constant_groups_give_exactly_zero(std: Scale, eps: float) -> None:
    """0.1 is not a binary fraction: the rounding of a float32 mean over 24 copies must not be amplified by eps."""
    rewards, group = torch.full((48,), 0.1), torch.arange(48) % 2
    for ddof in (0, 1):
        assert (group_advantage(rewards, group, std=std, eps=eps, ddof=ddof) == 0).all()
    assert (leave_one_out(rewards, group) == 0).all()
    assert constant_groups(rewards, group).all()


def test_zero_std_fraction_counts_groups_not_samples() -> None:
    assert zero_std_fraction(torch.tensor([1.0, 1, 1, 0, 2]), torch.tensor([0, 0, 0, 1, 1])) == 0.5


def test_nan_stays_nan_and_in_its_group() -> None:
    rewards = REWARDS.clone()
    rewards[0] = torch.nan
    found = group_advantage(rewards, GROUP)
    assert found.isnan().tolist() == [True, False, True, False, False, True, False]
    assert leave_one_out(rewards, GROUP)[0].isnan()
    assert optimality(torch.tensor([torch.nan]), mode="one_only").isnan().all()
    assert aggregate({"a": rewards, "b": REWARDS}, {"a": 0.0, "b": 1.0}, GROUP)[0].isnan()


def test_clip_and_dtype() -> None:
    rewards = torch.cat([torch.zeros(99), torch.ones(1)])
    group = torch.zeros(100, dtype=torch.int64)
    assert group_advantage(rewards, group).max() > 9
    assert group_advantage(rewards, group, clip=5.0).max() == 5
    assert group_advantage(rewards.half(), group).dtype == torch.float32


def test_leave_one_out_by_loop() -> None:
    expected = [
        REWARDS[i] - torch.stack([REWARDS[j] for j in range(7) if j != i and GROUP[j] == GROUP[i]]).mean()
        for i in range(7)
        if i != 3
    ]
    found = leave_one_out(REWARDS, GROUP)
    torch.testing.assert_close(found[[0, 1, 2, 4, 5, 6]], torch.stack(expected))
    assert found[3] == 0


def test_best_worst_by_hand() -> None:
    advantage = torch.tensor([0.1, 5.0, -3.0, 2.0, 0.0, -1.0, 9.0])
    group = torch.tensor([0, 0, 0, 0, 0, 7, 7])
    assert best_worst(advantage, group, 2).tolist() == [False, True, True, False, False, True, True]
    assert best_worst(advantage, group, 4).tolist() == [False, True, True, True, True, True, True]
    assert best_worst(advantage, group, 8).all()
    with pytest.raises(ValueError, match="keep=3"):
        best_worst(advantage, group, 3)


def test_aggregation_modes() -> None:
    loud, quiet = 1000 * REWARDS, -REWARDS
    parts, weights = {"loud": loud, "quiet": quiet}, {"loud": 1.0, "quiet": 1.0}
    exact = Normaliser(eps=0.0)
    # opposite rewards cancel once each is normalised; summed first, the loud one rules
    cancelled = aggregate(parts, weights, GROUP, "normalised", normaliser=exact)
    torch.testing.assert_close(cancelled, torch.zeros_like(REWARDS), atol=1e-12, rtol=0)
    ruled = aggregate(parts, weights, GROUP, "sum", normaliser=exact)
    torch.testing.assert_close(ruled, group_advantage(REWARDS, GROUP, eps=0.0))
    uneven = {"loud": 0.7, "quiet": 0.1}
    again = aggregate(parts, uneven, GROUP, "renormalised", normaliser=exact)
    assert again.std(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(again, standardise(0.6 * group_advantage(REWARDS, GROUP, eps=0.0), eps=0.0))
    with pytest.raises(ValueError, match="'loud'"):
        aggregate(parts, {"loud": 1.0}, GROUP)


def test_broadcast_repeats_samples_over_their_edges() -> None:
    found = broadcast(torch.tensor([1.0, 2.0]), torch.tensor([1, 0, 0, 1]))
    assert found.tolist() == [[2.0], [1.0], [1.0], [2.0]]


def test_optimality_modes_by_hand() -> None:
    advantage = torch.tensor([-10.0, -1.0, 0.0, 2.0, 10.0], dtype=torch.float64)
    expected = {
        "all": [0.0, 0.4, 0.5, 0.7, 1.0],
        "positive_only": [0.5, 0.5, 0.5, 0.7, 1.0],
        "negative_only": [0.0, 0.4, 0.5, 0.5, 0.5],
        "one_only": [0.5, 0.5, 0.5, 0.6, 0.6],
        "binary": [0.4, 0.4, 0.5, 0.6, 0.6],
    }
    for mode, labels in expected.items():
        assert optimality(advantage, 5.0, mode).tolist() == pytest.approx(labels)  # pyright: ignore[reportArgumentType]


class Reference:
    """The per-prompt tracker of the DDPO code, with deques."""

    def __init__(self, capacity: int, min_count: int) -> None:
        self.capacity, self.min_count = capacity, min_count
        self.stats: dict[int, deque[float]] = {}

    def update(self, prompts: list[int], rewards: Tensor) -> list[float]:
        values = rewards.numpy()
        advantages = np.zeros(len(values))
        for prompt in set(prompts):
            rows = np.array(prompts) == prompt
            own = self.stats.setdefault(prompt, deque(maxlen=self.capacity))
            own.extend(values[rows].tolist())
            pool = values if len(own) < self.min_count else np.array(own)
            advantages[rows] = (values[rows] - pool.mean()) / (pool.std() + 1e-6)
        return advantages.tolist()


def test_history_equals_the_reference_over_many_batches() -> None:
    """Prompts of uneven frequency, batches larger than the buffer, statistics switching from batch to own."""
    generator = torch.Generator().manual_seed(0)
    reference, history = Reference(6, 4), History.empty(5, 6)
    for _ in range(12):
        prompt = (torch.rand(13, generator=generator) ** 2 * 5).long()
        rewards = torch.randn(13, generator=generator, dtype=torch.float64) + prompt
        found, history = push_and_normalise(history, rewards, prompt, min_count=4)
        assert found.tolist() == pytest.approx(reference.update(prompt.tolist(), rewards), abs=1e-12)
        held = {p: row[~row.isnan()].tolist() for p, row in enumerate(history.values)}
        assert {p: values for p, values in held.items() if values} == {p: list(v) for p, v in reference.stats.items()}


def test_history_by_hand() -> None:
    history = push(History.empty(2, 3), torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0, 0, 1]))
    history = push(history, torch.tensor([3.0, 4.0]), torch.tensor([0, 0]))
    assert history.values[0].tolist() == [2.0, 3.0, 4.0]
    assert history.held.tolist() == [3, 1]


def test_history_refuses_nan_and_survives_constants() -> None:
    with pytest.raises(ValueError, match="finite"):
        push(History.empty(1, 4), torch.tensor([1.0, torch.nan]), torch.tensor([0, 0]))
    for count in (10, 19, 24, 31):  # below and above the count at which the prompt's own statistics hold
        rewards, prompt = torch.full((count,), 0.1, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
        assert (push_and_normalise(History.empty(1, 32), rewards, prompt)[0] == 0).all()
