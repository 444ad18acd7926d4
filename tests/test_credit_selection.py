"""Best and worst of a group past their thresholds, and scores over stages."""

import numpy as np
import pytest
import torch

from difftilt.credit.history import Stages, stage_scores
from difftilt.credit.selection import contrast


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ((1.2, 0.3, -0.1, -0.7, 0.4), [0, 3]),
        ((0.4, 0.1, 0.0, -0.2, 0.3), []),
        ((2.0, 1.5, 1.0, 0.9, 0.8), [0]),
        ((-2.0, -1.0, -0.6, -3.0, -3.0), [3]),
        ((0.5, -0.5), [0]),  # the best at its threshold passes, the worst does not
        ((1.0, 1.0, 1.0), [0]),
        ((float("nan"), float("nan")), []),
    ],
)
def test_a_group_gives_its_best_and_its_worst_if_they_pass(scores: tuple[float, ...], kept: list[int]) -> None:
    chosen = contrast(torch.tensor(scores), torch.zeros(len(scores), dtype=torch.int64))
    assert chosen.kept.nonzero()[:, 0].tolist() == kept


def test_partners_are_the_two_of_one_group() -> None:
    group = torch.tensor([8, 3, 8, 3, 8, 5, 5])
    scores = torch.tensor([1.0, 2.0, -1.0, 1.5, 0.0, -0.9, 0.8])
    chosen = contrast(scores, group)
    assert chosen.best.tolist() == [True, True, False, False, False, False, True]
    assert chosen.worst.tolist() == [False, False, True, False, False, True, False]
    assert chosen.partner.tolist() == [2, -1, 0, -1, -1, 6, 5]


def test_thresholds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="exchange"):
        contrast(torch.zeros(2), torch.zeros(2, dtype=torch.int64), least=-1.0, most=0.0)


def test_scores_are_those_of_the_prompt_over_its_newest_stages() -> None:
    generator = torch.Generator().manual_seed(0)
    stages, drawn = Stages.empty(), list[tuple[torch.Tensor, torch.Tensor]]()
    for stage in range(6):
        rewards, prompt = torch.randn(9, generator=generator), torch.randint(3, (9,), generator=generator) * 5
        drawn.append((rewards, prompt))
        stages = stages.push(rewards, prompt, stage, earlier=2)
        score = stage_scores(stages, rewards, prompt)
        for label in prompt.unique():
            pool = np.concatenate([r[p == label].numpy() for r, p in drawn[-3:]]).astype(np.float64)
            own = rewards[prompt == label].numpy()
            expected = (own - pool.mean()) / (pool.std(ddof=1) + 1e-8) if len(pool) > 1 else own * 0
            np.testing.assert_allclose(score[prompt == label], expected, rtol=1e-5, atol=1e-6)
    assert sorted(stages.stage.unique().tolist()) == [3, 4, 5]


def test_a_single_value_and_equal_values_score_nothing() -> None:
    rewards, prompt = torch.tensor([0.3, 0.1, 0.1, 0.1]), torch.tensor([4, 7, 7, 7])
    score = stage_scores(Stages.empty().push(rewards, prompt, 0, 8), rewards, prompt)
    assert score.tolist() == [0.0] * 4
