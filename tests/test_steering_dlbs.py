"""Beam search: special cases by configuration, exact costs, the order of rewards alone, the search range."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from difftilt.checks.dlbs import ring_task
from difftilt.checks.tilted_truths import ring_truth, sequence_truth
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards import FunctionReward, Masked
from difftilt.sampling.kernels import DDIM, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.rollout import rollout, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.dlbs import DLBS, DLBSConfig
from difftilt.steering.pricing import price_of
from difftilt.steering.protocol import Steered, Steerer
from difftilt.training.protocol import Task
from difftilt.values import Rows

STEPS = 12


def small() -> Task:
    return ring_task(STEPS)


def dlbs(**settings: Any) -> DLBS:
    return DLBS(DLBSConfig.model_validate({"lookahead": 2, **settings}))


def steer(steerer: Steerer, task: Task, prompts: list[str], forward_batch: int | None = None, **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=forward_batch)
    return steerer.steer(task, model, extra.pop("reward", task.reward), prompts, Noise(0), **extra)


def test_one_beam_of_one_child_is_plain_sampling_bit_for_bit() -> None:
    task, index = small(), torch.arange(3)
    with torch.no_grad():
        x = start_state(task.model.process, Noise(0), index, (2,))
        model, preset = denoiser(task.model, forward_batch=8), Preset("plain", task.sampler.kernel)
        plain = rollout(model, preset, task.sampler.grid, x, None, noise=Noise(0), index=index)
    steered = steer(dlbs(particles=1, children=1), task, [""] * 3, 8)
    assert torch.equal(steered.x_0, plain.x_0)
    assert steered.ledger.nfe == 3 * STEPS
    assert steered.ledger.reward_calls == 3


@pytest.mark.parametrize("truth", [small, lambda: sequence_truth().task])
def test_one_child_of_every_beam_is_best_of_n_bit_for_bit(truth: Any) -> None:
    task = truth()
    beams = steer(dlbs(particles=5, children=1, value="posterior_mean"), task, [""] * 3, 8)
    best = steer(BestOfN(BestOfNConfig(particles=5)), task, [""] * 3, 8)
    assert torch.equal(beams.x_0, best.x_0)
    assert torch.equal(beams.weight, best.weight)
    assert beams.ledger == best.ledger


@pytest.mark.parametrize(("beams", "children", "ahead"), [(1, 4, 1), (3, 2, 1), (3, 2, 4), (1, 3, 4)])
def test_costs_are_the_formula_with_the_first_evaluation_ahead_used_again(
    beams: int, children: int, ahead: int
) -> None:
    """B + (T - 1)·B·K·T' evaluations; (T - 1)·B·K + B rewards, as the last step has no noise and one candidate each."""
    task, steerer = small(), dlbs(particles=beams, children=children, lookahead=ahead)
    steered = steer(steerer, task, [""] * 2)
    assert steered.ledger.nfe == 2 * (beams + (STEPS - 1) * beams * children * ahead)
    assert steered.ledger.reward_calls == 2 * ((STEPS - 1) * beams * children + beams)
    price = price_of(steerer, task, denoiser(task.model), task.reward)
    # the price cannot know that the last step is without noise
    assert price.nfe * 2 == steered.ledger.nfe
    assert price.reward_calls == STEPS * beams * children


def test_repeated_times_of_a_lookahead_are_evaluated_once() -> None:
    """With the sampler's own times, s = j/12 has j evaluations ahead at most."""
    steered = steer(dlbs(particles=2, children=2, lookahead=6, clock=STEPS), small(), [""])
    ahead = [len(dict.fromkeys([j, *(j * u // 6 for u in range(5, 0, -1) if j * u // 6 > 0)])) for j in range(1, STEPS)]
    assert steered.ledger.nfe == 2 + 4 * sum(ahead)


@pytest.mark.parametrize("settings", [{"lookahead": 3}, {"value": "posterior_mean"}])
def test_rewards_enter_through_their_order_alone(settings: dict[str, Any]) -> None:
    task = small()
    root = FunctionReward("root", lambda s: 5 * task.reward.score(s).sqrt())
    one = steer(dlbs(particles=3, children=2, **settings), task, [""] * 4)
    other = steer(dlbs(particles=3, children=2, **settings), task, [""] * 4, reward=root)
    assert torch.equal(one.x_0, other.x_0)
    assert torch.equal(one.weight, other.weight)
    falling = FunctionReward("falling", lambda s: -task.reward.score(s))
    assert not torch.equal(
        one.x_0, steer(dlbs(particles=3, children=2, **settings), task, [""] * 4, reward=falling).x_0
    )


class Recorded:
    """x_1 of every candidate as its score, and what was asked."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Tensor:
        self.seen[rows.step] = (x_t, t, rows.prompt)
        return x_t[:, 0]


@torch.no_grad()
def noise_of(task: Task, parents: Tensor, position: int, children: Tensor) -> Tensor:
    """What each child differs by from the mean of its parent's step, in units of the step's standard deviation."""
    t, s = (torch.full((len(parents),), float(task.sampler.grid[p])) for p in (position, position + 1))
    step = task.sampler.kernel(denoiser(task.model)(parents, t, None), parents, t, s)
    assert isinstance(step, GaussianStep)
    return (children - step.mean[:, None]) / step.std[:, None, None]


def test_the_best_of_all_candidates_go_on_whoever_their_parents_are() -> None:
    """The parents of a step's children are, in order, the best of the step before."""
    task, record = small(), Recorded()
    steered = DLBS(DLBSConfig(particles=2, children=3), value=record).steer(
        task, denoiser(task.model), task.reward, [""], Noise(0)
    )
    for position in range(1, STEPS - 1):
        x, t, _ = record.seen[position]
        assert x.shape == (6, 2)
        assert torch.equal(t, torch.full((6,), float(task.sampler.grid[position])))
        kept = x[x[:, 0].argsort(descending=True)[:2]]
        noise = noise_of(task, kept, position, record.seen[position + 1][0].reshape(2, 3, 2))
        assert float(noise.abs().max()) < 6
    # one beam had both survivors at least once: selection is joint
    assert float(steered.ess.min()) == 1
    assert float(steered.ess.max()) == 2


def test_a_cap_keeps_beams_of_several_parents() -> None:
    task = small()
    free = steer(dlbs(particles=3, children=3), task, [""] * 4)
    capped = steer(dlbs(particles=3, children=3, per_parent=1), task, [""] * 4)
    assert float(free.ess[:-1].min()) < 3
    assert capped.ess[:-1].unique().tolist() == [3]
    assert capped.ancestors.unique().tolist() == [3]


def test_outside_the_range_one_trajectory_runs() -> None:
    """Between a third and two thirds: 4 steps alone, B·K of one mean at the entrance, 5 searched, the best alone."""
    task, record = small(), Recorded()
    settings = DLBSConfig(particles=2, children=3, search_low=1 / 3, search_high=2 / 3)
    model = denoiser(task.model)
    steered = DLBS(settings, value=record).steer(task, model, task.reward, ["", ""], Noise(0))
    assert sorted(record.seen) == list(range(5, 10))
    assert all(len(x) == 2 * 6 for x, _, _ in record.seen.values())
    assert len(steered.x_0) == 2
    assert steered.ledger.reward_calls == 2
    # one evaluation of one trajectory, then of every candidate, then of the one that is left
    assert steered.ledger.nfe == 2 * (5 + 6 * 5 + 2)
    early = steer(dlbs(particles=1, children=1), task, ["", ""])
    assert early.ledger.nfe == 2 * STEPS
    # before the range it is plain sampling of the first place of each prompt
    x = start_state(task.model.process, Noise(0), torch.tensor([0, 2]), (2,))
    preset = Preset("plain", task.sampler.kernel)
    with torch.no_grad():
        alone = rollout(
            denoiser(task.model), preset, task.sampler.grid[:5], x, None, noise=Noise(0), index=torch.tensor([0, 2])
        ).x_0
    noise = noise_of(task, alone, 4, record.seen[5][0].reshape(2, 6, 2))
    assert float(noise.abs().max()) < 5
    assert len(noise.reshape(-1, 2).unique(dim=0)) == 12


def test_a_range_to_the_end_keeps_all_beams() -> None:
    task = small()
    steered = steer(dlbs(particles=2, children=2, search_high=0.5), task, [""])
    assert len(steered.x_0) == 2
    assert float(steered.weight[steered.best]) == 1
    whole = steer(dlbs(particles=2, children=2), task, [""])
    again = steer(dlbs(particles=2, children=2, search_high=1.0, search_low=0.0), task, [""])
    assert torch.equal(whole.x_0, again.x_0)


@pytest.mark.parametrize("settings", [{}, {"search_low": 0.2, "search_high": 0.6}, {"per_parent": 1}])
def test_prompts_in_a_batch_equal_prompts_one_by_one(settings: dict[str, Any]) -> None:
    task, steerer = small(), dlbs(particles=2, children=2, **settings)
    together = steer(steerer, task, ["a", "b"], 8)
    for i, prompt in enumerate(["a", "b"]):
        alone = steer(steerer, task, [prompt], 8, index=torch.tensor([i]))
        assert torch.equal(alone.x_0, together.x_0[together.group == i])


@pytest.mark.parametrize("value", ["posterior_mean", "x0_samples", "rollout"])
def test_tokens_are_searched_by_values_without_an_ode(value: str) -> None:
    task = sequence_truth().task
    best = steer(dlbs(particles=4, children=4, value=value, x0_samples=2), task, [""] * 8)
    plain = steer(BestOfN(BestOfNConfig(particles=4)), task, [""] * 8)
    assert float(best.rewards[best.best].mean()) > float(plain.rewards[plain.best].mean())


def test_a_missing_score_comes_last() -> None:
    task = ring_truth().task
    reward = Masked(FunctionReward("half", lambda s: torch.where(s.media[:, 0] < 0, torch.nan, s.media[:, 0])))
    steered = steer(dlbs(particles=3, children=4), task, [""] * 4, reward=reward)
    assert not bool(steered.rewards[steered.best].isnan().any())
    assert steered.invalid is not None
    assert int(steered.invalid.sum()) > 0


def test_what_a_user_can_get_wrong() -> None:
    task = small()
    ode = replace(task, sampler=replace(task.sampler, kernel=DDIM(0.0)))
    with pytest.raises(UserError, match=r"deterministic.*DDIM with eta above 0"):
        steer(dlbs(), ode, [""])
    with pytest.raises(UserError, match="tokens have none"):
        steer(DLBS(DLBSConfig()), sequence_truth().task, [""])
    with pytest.raises(UserError, match=r"no step begins between steerer.search_low = 0.51"):
        steer(dlbs(search_low=0.51, search_high=0.52), task, [""])
    for wrong in ({"search_low": 0.5, "search_high": 0.5}, {"particles": 0}, {"children": 0}, {"per_parent": 0}):
        with pytest.raises(ValidationError):
            DLBSConfig.model_validate(wrong)


def test_a_kernel_with_a_clean_end_has_one_last_candidate() -> None:
    task = small()
    task = replace(task, sampler=replace(task.sampler, kernel=FlowSDE(0.7), clean_end=True))
    steered = steer(dlbs(particles=2, children=3), task, [""])
    assert steered.ledger.reward_calls == (STEPS - 1) * 6 + 2
