import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from difftilt.checks.tilted_truths import Truth, ring_truth, sequence_truth
from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards import FunctionReward, Masked
from difftilt.sampling.kernels import DDIM, FlowSDE, Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import rollout, start_state
from difftilt.statistics import enumerate_sequences, sequence_codes
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Steered, Steerer
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.testbeds.enumeration import transition
from difftilt.training.protocol import Task
from difftilt.values import ClosedForm, Rows

TRUTHS = [ring_truth, sequence_truth]


def svdd(**settings: Any) -> SVDD:
    return SVDD(SVDDConfig.model_validate({"temperature": 0.5, "children": 4, **settings}))


def steer(steerer: Steerer, task: Task, prompts: list[str], forward_batch: int | None = None, **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=forward_batch)
    return steerer.steer(task, model, extra.pop("reward", task.reward), prompts, Noise(0), **extra)


@pytest.mark.parametrize("truth", TRUTHS)
def test_one_child_is_plain_sampling_bit_for_bit(truth: Any) -> None:
    task, index = truth().task, torch.arange(6)
    with torch.no_grad():
        x = start_state(task.model.process, Noise(0), index, task.model.shape)
        model, preset = denoiser(task.model, forward_batch=8), Preset("plain", task.sampler.kernel)
        plain = rollout(model, preset, task.sampler.grid, x, None, noise=Noise(0), index=index)
    steered = steer(svdd(children=1, particles=2), task, [""] * 3, 8)
    assert torch.equal(steered.x_0, plain.x_0)
    assert steered.ledger.nfe == plain.ledger.nfe


@pytest.mark.parametrize("truth", TRUTHS)
def test_the_chosen_prediction_is_used_again(truth: Any) -> None:
    """1 + M·(T - 1) evaluations a sample; a reward call for every child."""
    task = truth().task
    steps = len(task.sampler.grid) - 1
    steered = steer(svdd(children=4, particles=3), task, [""] * 2)
    assert steered.ledger.nfe == 6 * (1 + 4 * (steps - 1))
    assert steered.ledger.reward_calls == 6 * 4 * steps
    assert steered.ess.shape == (steps, 2)


def test_a_value_that_reads_no_prediction_is_not_given_one() -> None:
    """Then only the chosen state is evaluated: T evaluations a sample, whatever M."""
    task = ring_truth().task

    def value(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return x[:, 0]

    steered = steer(SVDD(svdd(children=7).config, value=ClosedForm(value)), task, [""] * 2)
    assert steered.ledger.nfe == 2 * 16
    assert steered.ledger.reward_calls == 2 * 7


def test_children_are_valued_at_their_own_time_and_share_a_parent() -> None:
    task, seen = ring_truth().task, dict[int, tuple[Tensor, Tensor]]()

    def record(x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows) -> Tensor:
        seen[rows.step] = (x_t, t)
        return x_t[:, 0]

    steer(SVDD(svdd(children=5).config, value=record), task, [""])
    assert sorted(seen) == list(range(1, 16))
    for position, (x_t, t) in seen.items():
        assert len(x_t.unique(dim=0)) == 5
        assert torch.equal(t, torch.full((5,), float(task.sampler.grid[position])))


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("anew", [False, True])
def test_prompts_in_a_batch_equal_prompts_one_by_one(truth: Any, anew: bool) -> None:
    task, steerer = truth().task, svdd(particles=3, resample_batch=anew)
    together = steer(steerer, task, ["a", "b"], 8)
    for i, prompt in enumerate(["a", "b"]):
        alone = steer(steerer, task, [prompt], 8, index=torch.tensor([i]))
        assert torch.equal(alone.x_0, together.x_0[together.group == i])
        assert torch.equal(alone.ess[:, 0], together.ess[:, i])


def test_samples_of_a_prompt_meet_in_svdd_r_only() -> None:
    task = ring_truth().task
    alone = steer(svdd(particles=6, temperature=0.05), task, [""])
    assert alone.ancestors.unique().tolist() == [6]
    assert steer(svdd(particles=6, temperature=0.05, resample_batch=True), task, [""]).ancestors[-1, 0] < 6


def two_tokens(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Two letters, more probable at the left, and more equal where the neighbour is known."""
    known = (x < 2).sum(1)[:, None, None]
    return torch.tensor([[0.4, -0.3], [0.8, 0.1]]).expand(len(x), 2, 2) / (1 + known)


def pairs_law(value: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Joint law of both samples of SVDD-R with two children on two tokens in two steps, (9, 9), enumerated."""
    process, pair = MaskedProcess(2), torch.zeros(9, 9, dtype=torch.float64)
    pair[8, 8] = 1.0  # both all mask
    for (t, s), v in zip(((1.0, 0.5), (0.5, 0.0)), (value, rewards), strict=True):
        left, right = transition(two_tokens, process, 2, t, s)
        step = (left[:, :, None] * right[:, None]).reshape(9, 9)
        lift = (v.double() / temperature).exp()
        share = lift[:, None] / (lift[:, None] + lift)  # of the first of two
        # both children of a parent, and the one that is taken
        kept = 2 * step * (step @ share.T)
        both = kept.T @ pair @ kept
        # each place draws anew from the two samples (y, z): y with probability share[y, z], z with the rest
        pair = torch.zeros(9, 9, dtype=torch.float64)
        for y in range(9):
            for z in range(9):
                drawn = torch.zeros(9, dtype=torch.float64)
                drawn[y] += share[y, z]
                drawn[z] += 1 - share[y, z]
                pair += both[y, z] * drawn[:, None] * drawn
    return pair


@pytest.mark.parametrize("temperature", [0.4, 2.0])
def test_svdd_r_draws_pairs_of_samples_as_often_as_their_law_says(temperature: float) -> None:
    every, runs = enumerate_sequences(3, 2), 20_000
    value = torch.tensor([0.1, -0.4, 0.6, 0.3, -0.2, 0.5, -0.5, 0.4, 0.0])
    scores = (every[:, 0] - 0.6 * every[:, 1] + every[:, 0] * every[:, 1]).float()
    model = GenerativeModel(
        two_tokens, MaskedProcess(2), "logits", (2,), lambda p: None, lambda x: x, dtype_tokens=True
    )
    reward = FunctionReward("letters", lambda s: scores[sequence_codes(s.media, 3)])
    task = Task("two", model, reward, ("",), ("",), Sampler(uniform_grid(2), Unmasking()))
    steerer = SVDD(
        svdd(children=2, particles=2, resample_batch=True, temperature=temperature).config,
        value=ClosedForm(lambda x, t, c: value[sequence_codes(x, 3)]),
    )
    steered = steer(steerer, task, [""] * runs)
    law = pairs_law(value, scores, temperature)
    code = sequence_codes(steered.x_0, 3).reshape(runs, 2)
    counts = torch.zeros(9, 9, dtype=torch.float64).index_put((code[:, 0], code[:, 1]), torch.ones(()).double(), True)
    possible = law > 0
    assert float(law.sum()) == pytest.approx(1.0)
    assert int(possible.sum()) == 16
    assert float(counts[~possible].sum()) == 0
    expected = runs * law[possible]
    assert bool((expected > 5).all())
    # the mean of chi squared is its degrees of freedom, its variance twice as many
    chi = float(((counts[possible] - expected).square() / expected).sum())
    assert chi < 15 + 4 * math.sqrt(2 * 15)


@pytest.mark.parametrize("truth", TRUTHS)
def test_a_low_temperature_is_greedy(truth: Any) -> None:
    task = truth().task
    value = ClosedForm(
        lambda x, t, c: x.double() @ torch.tensor([1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])[: x.shape[1]].double()
    )

    def run(temperature: float) -> Tensor:
        return steer(SVDD(svdd(temperature=temperature).config, value=value), task, [""] * 4, reward=PLACES).x_0

    assert torch.equal(run(1e-9), run(0.0))
    assert not torch.equal(run(5.0), run(0.0))


PLACES = FunctionReward(
    "places", lambda s: s.media.double() @ torch.tensor([1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])[: s.media.shape[1]].double()
)


def missing_on_the_left(truth: Truth) -> FunctionReward:
    return FunctionReward("half", lambda s: torch.where(s.media[:, 0] < 0, torch.nan, s.media[:, 0]))


@pytest.mark.parametrize(
    "steerer",
    [
        svdd(particles=8),
        BestOfN(BestOfNConfig(particles=8)),
        FKSteering(FKSteeringConfig(particles=8, temperature=1.0, resample_at=2)),
        FKSteering(FKSteeringConfig(particles=8, temperature=1.0, resample_at=2, output="resampled")),
    ],
)
def test_missing_scores_are_counted_and_weigh_nothing(steerer: Steerer) -> None:
    truth = ring_truth()
    reward = missing_on_the_left(truth)
    with pytest.raises(RewardError, match="half"):
        steer(steerer, truth.task, [""] * 4, reward=reward)
    steered = steer(steerer, truth.task, [""] * 4, reward=Masked(reward))
    assert steered.invalid is not None
    assert bool((steered.invalid > 0).all())
    left = steered.x_0[:, 0] < 0
    assert torch.equal(steered.rewards.isnan(), left)
    assert float(steered.weight[left].sum()) == 0
    torch.testing.assert_close(steered.weight.sum(), torch.tensor(4.0).double())
    assert not bool(left[steered.best].any())


def test_all_missing_is_an_error_with_the_counts() -> None:
    nothing = Masked(FunctionReward("nothing", lambda s: torch.full((len(s.media),), torch.nan)))
    with pytest.raises(RewardError, match=r"all 8 scores of prompt 0 are missing at grid point 1 of 16"):
        steer(svdd(particles=2), ring_truth().task, ["", ""], reward=nothing)


def test_what_a_user_can_get_wrong() -> None:
    task = ring_truth().task
    ode = replace(task, sampler=replace(task.sampler, kernel=DDIM(0.0)))
    with pytest.raises(UserError, match=r"deterministic.*DDIM with eta above 0"):
        steer(svdd(), ode, [""])
    with pytest.raises(UserError, match="tokens have none"):
        steer(svdd(value="lookahead"), sequence_truth().task, [""])
    for wrong in ({"temperature": -0.1}, {"children": 0}, {"particles": 0}):
        with pytest.raises(ValidationError):
            SVDDConfig.model_validate(wrong)


@pytest.mark.parametrize("kernel", [DDIM(1.0), FlowSDE(0.7)])
def test_a_last_step_without_noise_has_one_child(kernel: Any) -> None:
    task = ring_truth().task
    task = replace(task, sampler=replace(task.sampler, kernel=kernel, clean_end=isinstance(kernel, FlowSDE)))
    steered = steer(svdd(children=4), task, [""] * 2)
    assert steered.ledger.reward_calls == 2 * (4 * 15 + 1)
    assert steered.ledger.nfe == 2 * (1 + 4 * 15)
