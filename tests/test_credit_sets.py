"""The search for two sets: pairs, monotone, as visiting one by one, instance rewards, unpaired halves."""

from functools import partial

import pytest
import torch
from torch import Tensor

from difftilt.credit import Partition, partners, swap_sets, top_half
from difftilt.rewards import FrechetReward, MeanReward, ReferenceSet
from difftilt.rewards.vector import distance

REWARD = FrechetReward(ReferenceSet.gaussian(torch.tensor([1.0, 0.0]), 0.5 * torch.eye(2)))
GROUP = torch.arange(30).repeat_interleave(2)


def drawn(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(60, 2, generator=generator, dtype=torch.float64), torch.rand(60, 3, generator=generator)


def found(seed: int, **how: object) -> tuple[Tensor, Partition]:
    features, order = drawn(seed)
    return features, swap_sets(features, GROUP, order, begin=REWARD.begin, **how)  # pyright: ignore[reportArgumentType]


def one_by_one(features: Tensor, order: Tensor, sweeps: int) -> Tensor:
    """The search as the paper says it: every set scored anew, pair after pair."""
    rows = torch.arange(60).reshape(30, 2)
    heads = order[rows[:, 0], 0] < 0.5
    ours, theirs = torch.where(heads, rows[:, 0], rows[:, 1]), torch.where(heads, rows[:, 1], rows[:, 0])
    for sweep in range(1, 1 + sweeps):
        for place in order[rows[:, 0], sweep].argsort().tolist():
            trial = ours.index_fill(0, torch.tensor(place), int(theirs[place]))
            if REWARD.score_features(features[trial]) > REWARD.score_features(features[ours]):
                theirs[place], ours = int(ours[place]), trial
    return torch.full((60,), -1.0).index_fill(0, ours, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_the_search_is_that_of_visiting_pairs_one_by_one(seed: int) -> None:
    features, order = drawn(seed)
    for sweeps in (1, 2):
        labels = swap_sets(features, GROUP, order[:, : 1 + sweeps], begin=REWARD.begin).label
        assert labels.equal(one_by_one(features, order, sweeps))


def test_each_set_holds_one_of_each_pair_and_its_score_is_reported() -> None:
    features, cut = found(0)
    assert (cut.label[partners(GROUP)] == -cut.label).all()
    assert float(cut.positive[0]) == pytest.approx(REWARD.score_features(features[cut.label > 0]), rel=1e-9)
    assert float(cut.negative[0]) == pytest.approx(REWARD.score_features(features[cut.label < 0]), rel=1e-9)
    assert float(cut.before[0]) < float(cut.positive[0])
    assert cut.change.isnan().all()


def test_a_margin_or_the_contrast_accepts_only_what_it_asks_for() -> None:
    assert int(found(0, margin=100.0)[1].accepted[0]) == 0
    assert 0 < int(found(0, margin=0.02)[1].accepted[0]) < int(found(0)[1].accepted[0])
    _, cut = found(0, against=True)
    spread = float(cut.positive[0] - cut.negative[0])
    features, order = drawn(0)
    heads = swap_sets(features, GROUP, order, begin=REWARD.begin, margin=100.0).label
    begun = REWARD.score_features(features[heads > 0]) - REWARD.score_features(features[heads < 0])
    assert spread > begun


def test_changes_are_what_exchanging_a_pair_back_would_cost() -> None:
    features, cut = found(1, changes=True)
    ours = (cut.label > 0).nonzero()[:, 0]
    for place in (0, 7):
        trial = ours.index_fill(0, torch.tensor(place), int(partners(GROUP)[ours[place]]))
        cost = float(cut.positive[0]) - REWARD.score_features(features[trial])
        assert float(cut.change[ours[place]]) == pytest.approx(cost, rel=1e-6)
        assert float(cut.change[partners(GROUP)[ours[place]]]) == pytest.approx(cost, rel=1e-6)


def test_of_an_instance_reward_the_better_of_each_pair_is_positive() -> None:
    features, order = drawn(2)
    view = MeanReward(distance(torch.tensor([1.0, 0.0])))
    scores = -(features - torch.tensor([1.0, 0.0])).norm(dim=1)
    labels = swap_sets(scores[:, None], GROUP, order[:, :2], begin=view.begin).label
    assert (labels > 0).equal(scores > scores[partners(GROUP)])
    moved = scores + 5.0 * GROUP
    assert swap_sets(moved[:, None], GROUP, order[:, :2], begin=view.begin).label.equal(labels)


def test_without_pairs_any_two_are_exchanged() -> None:
    features, cut = found(3, paired=False)
    assert float(cut.label.sum()) == 0
    assert (cut.label[partners(GROUP)] == cut.label).any()
    assert float(cut.positive[0]) > float(cut.before[0])
    assert float(cut.positive[0]) == pytest.approx(REWARD.score_features(features[cut.label > 0]), rel=1e-9)
    assert top_half(torch.tensor([1.0, 3.0, 3.0, 0.0])).tolist() == [False, True, True, False]


def test_the_random_assignment_and_the_order_are_the_callers() -> None:
    features, order = drawn(0)
    search = partial(swap_sets, features, GROUP, begin=REWARD.begin, margin=100.0)
    assert not search(order).label.equal(search(1 - order).label)
    assert search(order).label.equal(search(order).label)


def test_partners_are_within_groups_of_even_size() -> None:
    assert partners(torch.tensor([4, 4, 1, 1, 4, 4])).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(ValueError, match="even"):
        partners(torch.tensor([0, 0, 0]))
