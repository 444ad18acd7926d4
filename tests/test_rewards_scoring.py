from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from difftilt.errors import RewardError
from difftilt.models.ledger import Ledger
from difftilt.rewards import (
    Capabilities,
    FunctionReward,
    Moments,
    Reward,
    Samples,
    Scores,
    TrainedReward,
    WeightedSum,
    as_reward,
    evaluate,
    score_components,
)
from difftilt.rewards.compose import Normalisation
from difftilt.rewards.vector import linear, quadratic

GROUP = torch.tensor([5, 2, 5, 2, 5])


def samples(media: Tensor | None = None) -> Samples:
    media = torch.arange(10.0).reshape(5, 2) if media is None else media
    prompts = [f"p{i}" for i in GROUP.tolist()]
    return Samples(media, prompts, prompts, GROUP)


def score(reward: Reward, given: Samples | None = None) -> Scores:
    return evaluate(reward, given or samples(), Ledger())


def first(given: Samples) -> Tensor:
    return given.media[:, 0]


def spread_of_set(given: Samples) -> Tensor:
    return torch.stack([first(given)[given.group == g].std(correction=0) for g in torch.unique(given.group)])


def a_set() -> FunctionReward:
    return FunctionReward("spread", spread_of_set, Capabilities(set_valued=True))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.double(),
        lambda x: x.long(),
        lambda x: x.numpy(),
        lambda x: x.tolist(),
        lambda x: tuple(x.tolist()),
        lambda x: list(x),
        lambda x: [int(v) for v in x],
        lambda x: [np.float64(v.item()) for v in x],
    ],
)
def test_functions_may_return_tensors_arrays_and_lists(convert: Callable[[Tensor], Any]) -> None:
    scores = score(as_reward(lambda given: convert(first(given)), "first"))
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == [0, 2, 4, 6, 8]
    assert scores.components["first"].tolist() == [0, 2, 4, 6, 8]


def test_as_reward_names_and_refusals() -> None:
    assert as_reward(first).name == "first"
    assert as_reward(lambda given: first(given)).name == "reward"
    known = linear(torch.ones(2))
    assert as_reward(known) is known
    with pytest.raises(ValueError, match="'linear'"):
        as_reward(known, "other")


def test_gradients_flow_through_evaluate() -> None:
    media = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = WeightedSum(
        {"a": linear(torch.tensor([1.0, 2.0])), "b": as_reward(lambda s: list(first(s)))}, {"a": 2.0, "b": 3.0}
    )
    score(total, samples(media)).total.sum().backward()
    torch.testing.assert_close(media.grad, torch.tensor([5.0, 4.0]).expand(5, 2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda given: 1 / 0, "raised ZeroDivisionError on samples 0 to 4"),
        (lambda given: None, "raised TypeError"),
        (lambda given: ["0.5"] * 5, "raised TypeError"),
        (lambda given: [None] * 5, "raised TypeError"),
        (lambda given: [[1.0], [1.0, 2.0], 1, 1, 1], "raised ValueError"),
        (lambda given: first(given)[:4], r"shape \(4,\) for 5 samples; return one number per sample, shape \(5,\)"),
        (lambda given: given.media, r"shape \(5, 2\)"),
        (lambda given: first(given).mean(), r"shape \(\)"),
        (lambda given: first(given) / first(given), r"1 of 5 scores: row 0 \(prompt 'p5'\) is nan"),
        (lambda given: 1 / first(given), r"row 0 \(prompt 'p5'\) is inf"),
        (lambda given: first(given) * torch.nan, "not finite for 5 of 5"),
    ],
)
def test_bad_rewards_are_named(function: Callable[[Samples], Any], message: str) -> None:
    reward = as_reward(function, "broken")
    for given in (reward, WeightedSum({"broken": reward, "ok": as_reward(first)}, {"broken": 0.0, "ok": 1.0})):
        with pytest.raises(RewardError, match="'broken'") as caught:
            score(given)
        caught.match(message)


class OwnTroubleError(Exception):
    """Raised by a reward; no subclass of the usual families."""


def test_the_cause_is_chained_and_interrupts_pass() -> None:
    def strange(given: Samples) -> Tensor:
        raise OwnTroubleError("no disk")

    with pytest.raises(RewardError, match="no disk") as caught:
        score(as_reward(strange))
    assert isinstance(caught.value.__cause__, OwnTroubleError)

    def interrupted(given: Samples) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(as_reward(interrupted))


class ReturnsList:
    name = "listed"
    capabilities = Capabilities()

    def score(self, samples: Samples) -> Any:
        return [1.0] * 5


def test_reward_objects_must_return_tensors() -> None:
    with pytest.raises(RewardError, match=r"'listed' returned list.*as_reward"):
        score(ReturnsList())


def test_set_scores_reach_every_member() -> None:
    scores = score(a_set())
    members = {g: first(samples())[g == GROUP].std(correction=0).item() for g in (2, 5)}
    assert scores.total.tolist() == pytest.approx([members[g] for g in GROUP.tolist()])
    with pytest.raises(RewardError, match=r"one number per set, shape \(2,\)"):
        score(FunctionReward("broken", first, Capabilities(set_valued=True)))
    with pytest.raises(RewardError, match="group 2 is nan"):
        score(FunctionReward("broken", lambda s: [np.nan, 1.0], Capabilities(set_valued=True)))


def test_ledger_counts_samples_per_component() -> None:
    ledger = Ledger()
    evaluate(as_reward(first), samples(), ledger)
    assert ledger == Ledger(reward_calls=5)
    evaluate(WeightedSum({"a": as_reward(first), "b": a_set()}, {"a": 1, "b": 1}), samples(), ledger)
    assert ledger == Ledger(reward_calls=15)


def test_weighted_sum_reports_components_before_weights() -> None:
    total = WeightedSum({"a": as_reward(first), "b": as_reward(lambda s: -3 * first(s))}, {"a": 2.0, "b": 0.5})
    scores = score(total)
    torch.testing.assert_close(scores.total, 0.5 * first(samples()))
    torch.testing.assert_close(scores.components["b"], -3 * first(samples()))
    torch.testing.assert_close(total.score(samples()), scores.total)


def test_nested_sums() -> None:
    inner = WeightedSum({"a": as_reward(first), "b": as_reward(first)}, {"a": 1.0, "b": 1.0})
    scores = score(WeightedSum({"in": inner, "c": as_reward(first)}, {"in": 1.0, "c": -1.0}))
    assert set(scores.components) == {"in", "in/a", "in/b", "c"}
    torch.testing.assert_close(scores.total, first(samples()))


def zscore(x: Tensor, group: Tensor) -> Tensor:
    rows = [group == g for g in group]
    return torch.stack([(v - x[r].mean()) / x[r].std(correction=0) for v, r in zip(x, rows, strict=True)])


@pytest.mark.parametrize(("normalise", "group"), [("group", GROUP), ("batch", torch.zeros(5, dtype=torch.int64))])
def test_normalisation_makes_scale_and_offset_of_a_component_irrelevant(
    normalise: Normalisation, group: Tensor
) -> None:
    parts = {"a": as_reward(lambda s: 1000 * first(s) + 7), "b": as_reward(lambda s: (first(s) - 3) ** 2)}
    found = score(WeightedSum(parts, {"a": 1.0, "b": 2.0}, normalise)).total
    x = first(samples())
    torch.testing.assert_close(found, zscore(x, group) + 2 * zscore((x - 3) ** 2, group), rtol=1e-4, atol=1e-4)


def test_running_normalisation_is_explicit_state() -> None:
    total = WeightedSum({"a": as_reward(first)}, {"a": 1.0}, "running")
    assert total.capabilities.trained
    learning: TrainedReward = total  # a contract that pyright checks
    assert learning.name == "weighted_sum"
    x = first(samples())
    torch.testing.assert_close(score(total).total, zscore(x, torch.zeros(5)))  # nothing observed yet: the batch
    total.observe({"a": torch.tensor([100.0, 104.0])})
    torch.testing.assert_close(score(total).total, (x - 102) / 2, rtol=1e-5, atol=1e-5)
    before = total.snapshot()
    total.update(samples())
    pooled = torch.cat([torch.tensor([100.0, 104.0]), x])
    assert total.moments["a"].mean == pytest.approx(pooled.mean().item())
    assert total.moments["a"].std == pytest.approx(pooled.std(correction=0).item())
    torch.testing.assert_close(score(before).total, (x - 102) / 2, rtol=1e-5, atol=1e-5)
    other = WeightedSum({"a": as_reward(first)}, {"a": 1.0}, "running")
    other.load_state_dict(total.state_dict())
    assert other.moments == total.moments


def test_moments_do_not_depend_on_the_split() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)) + 1e3
    parts = Moments().push(x[:1]).push(x[1:30]).push(x[:0]).push(x[30:])
    whole = Moments().push(x)
    assert (parts.count, parts.mean) == (50, pytest.approx(whole.mean))
    assert parts.std == pytest.approx(whole.std, rel=1e-9)


@pytest.mark.parametrize("normalise", [None, "group", "batch"])
def test_nan_is_never_zero(normalise: Normalisation | None) -> None:
    total = WeightedSum({"a": as_reward(first), "b": as_reward(first)}, {"a": 0.0, "b": 1.0}, normalise)
    broken = torch.tensor([torch.nan, 1.0, 2.0, 3.0, 4.0])
    assert total.combine({"a": broken, "b": first(samples())}, GROUP)[0].isnan()


def test_sums_of_sets() -> None:
    both = WeightedSum({"a": a_set(), "b": a_set()}, {"a": 1.0, "b": 1.0})
    assert both.capabilities.set_valued
    assert both.score(samples()).shape == (2,)
    torch.testing.assert_close(score(both).total, 2 * score(a_set()).total)
    # two sets of unequal size: standardised as two scores, not as five
    scaled = score(WeightedSum({"a": a_set()}, {"a": 1.0}, "batch")).total
    torch.testing.assert_close(scaled.abs(), torch.ones(5), rtol=1e-4, atol=1e-4)
    mixed = WeightedSum({"a": a_set(), "b": as_reward(first)}, {"a": 1.0, "b": 1.0})
    assert not mixed.capabilities.set_valued
    assert mixed.capabilities.mixed
    assert WeightedSum({"a": mixed}, {"a": 1.0}).capabilities.of_sets
    assert not both.capabilities.mixed
    assert not WeightedSum({"a": as_reward(first)}, {"a": 1.0}).capabilities.of_sets
    torch.testing.assert_close(score(mixed).total, score(a_set()).total + first(samples()))
    torch.testing.assert_close(mixed.score(samples()), score(mixed).total)
    with pytest.raises(ValueError, match="set-valued"):
        WeightedSum({"a": a_set()}, {"a": 1.0}, "group")


def test_capabilities_combine() -> None:
    smooth, box = quadratic(torch.zeros(2)), as_reward(first)
    assert WeightedSum({"a": smooth}, {"a": 1.0}).capabilities.differentiable
    assert not WeightedSum({"a": smooth, "b": box}, {"a": 1.0, "b": 1.0}).capabilities.differentiable
    with pytest.raises(ValueError, match="'b'"):
        WeightedSum({"a": smooth}, {"b": 1.0})


def test_components_can_be_gathered_before_they_are_combined() -> None:
    """Two processes: normalisation over the joined rows equals that of one process."""
    total = WeightedSum({"a": as_reward(first)}, {"a": 1.0}, "batch")
    halves = [score_components(total, samples().take(rows), Ledger()) for rows in torch.arange(5).split(3)]
    joined = {"a": torch.cat([half["a"] for half in halves])}
    torch.testing.assert_close(total.combine(joined, GROUP), score(total).total)
