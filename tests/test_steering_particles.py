import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from difftilt.checks.tilted_truths import Truth, ring_truth, sequence_truth, z_score
from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.mixture import GaussianMixture
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Capabilities, Reward
from difftilt.sampling.kernels import DDIM, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset, euler
from difftilt.sampling.rollout import rollout, sample, start_state
from difftilt.sampling.steps import GaussianStep
from difftilt.steering import fk_steering
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.particles import kernel_ratio
from difftilt.steering.potentials import PotentialName
from difftilt.steering.protocol import Steered, Steerer
from difftilt.steering.resampling import ResamplerName
from difftilt.testbeds.exact_chain import exact_chain, ring_mixture
from difftilt.training.protocol import Task
from difftilt.values import ClosedForm, Rows

POTENTIALS: tuple[PotentialName, ...] = ("difference", "max", "sum", "reward_only", "importance")
TRUTHS = [ring_truth, sequence_truth]


def fk(**settings: Any) -> FKSteering:
    return FKSteering(FKSteeringConfig.model_validate({"temperature": 1.0, "resample_at": 2, **settings}))


def steer(steerer: Steerer, task: Task, prompts: list[str], forward_batch: int | None = None, **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=forward_batch)
    return steerer.steer(task, model, task.reward, prompts, Noise(0), **extra)


def with_kernel(task: Task, eta: float) -> Task:
    return replace(task, sampler=replace(task.sampler, kernel=DDIM(eta)))


def test_a_clean_end_takes_the_last_step_along_the_ode() -> None:
    task = ring_truth().task
    task = replace(task, sampler=replace(task.sampler, kernel=FlowSDE(0.7), solver=None, clean_end=True))
    grid, index = task.sampler.grid, torch.arange(5)
    model, preset = denoiser(task.model, forward_batch=8), Preset("plain", task.sampler.kernel)
    with torch.no_grad():
        start = start_state(task.model.process, Noise(0), index, task.model.shape)
        before = rollout(model, preset, grid[:-1], start, None, noise=Noise(0), index=index).x_0
        clean = rollout(model, euler(), grid[-2:], before, None, noise=Noise(0), index=index).x_0
        plain = sample(model, task.sampler, start, None, noise=Noise(0), index=index)
        noisy = sample(model, replace(task.sampler, clean_end=False), start, None, noise=Noise(0), index=index)
    assert torch.equal(plain, clean)
    assert not torch.equal(plain, noisy)
    assert torch.equal(steer(BestOfN(BestOfNConfig(particles=1)), task, [""] * 5, 8).x_0, clean)
    # copies of a particle may end alike, for none of them parts after the last weighting: nothing is refused
    steered = steer(fk(particles=8, resample="always", resample_at=len(grid) - 2), task, ["", ""])
    assert bool(steered.x_0.isfinite().all())


@pytest.mark.parametrize("truth", TRUTHS)
def test_one_particle_is_plain_sampling_bit_for_bit(truth: Callable[[], Truth]) -> None:
    task = truth().task
    index = torch.arange(5)
    with torch.no_grad():
        start = start_state(task.model.process, Noise(0), index, task.model.shape)
        model, preset = denoiser(task.model, forward_batch=8), Preset("plain", task.sampler.kernel)
        plain = rollout(model, preset, task.sampler.grid, start, None, noise=Noise(0), index=index)
    for steerer in (fk(particles=1, resample="always"), BestOfN(BestOfNConfig(particles=1))):
        steered = steer(steerer, task, [""] * 5, 8)
        assert torch.equal(steered.x_0, plain.x_0)
        assert steered.ledger.nfe == plain.ledger.nfe
        assert torch.equal(steered.weight, torch.ones(5).double())


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_resampling_it_is_importance_weighted_best_of_n(
    truth: Callable[[], Truth], potential: PotentialName
) -> None:
    """Carried weights: whatever the potential, a line that is never resampled weighs exp(r(x_0)/temperature)."""
    task = truth().task
    never = steer(fk(particles=6, potential=potential, resample="ess", ess_threshold=0.0, r_min=-2), task, [""] * 3)
    best = steer(BestOfN(BestOfNConfig(particles=6)), task, [""] * 3)
    assert torch.equal(never.x_0, best.x_0)
    assert torch.equal(never.best, best.best)
    log_weight = best.rewards.double().reshape(3, 6)
    torch.testing.assert_close(never.weight.reshape(3, 6), log_weight.softmax(-1), rtol=1e-9, atol=0)
    torch.testing.assert_close(never.log_z, log_weight.logsumexp(-1) - math.log(6), rtol=0, atol=1e-6)
    assert bool((best.weight[best.best] == 1).all())
    assert float(best.weight.sum()) == 3


@dataclass
class Lines:
    """Adds up, outside the steerer, what every surviving line was given."""

    total: Tensor | None = None
    rewards: Tensor | None = None
    survivors: list[int] = field(default_factory=list[int])


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("resample", ["always", "ess"])
def test_product_condition_holds_for_every_surviving_line(
    truth: Callable[[], Truth], potential: PotentialName, resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = Lines()
    gather, weighted = fk_steering.gather, fk_steering.weighted

    def spy_weighted(chain: Any, particles: Any, log_gain: Tensor) -> Any:
        lines.total = log_gain if lines.total is None else lines.total + log_gain
        return weighted(chain, particles, log_gain)

    def spy_gather(chain: Any, particles: Any, ancestors: Tensor) -> Any:
        rows = (torch.arange(len(ancestors))[:, None] * chain.size + ancestors).flatten()
        assert lines.total is not None
        lines.total = lines.total[rows]
        lines.survivors.append(len(rows.unique()))
        return gather(chain, particles, ancestors)

    monkeypatch.setattr(fk_steering, "weighted", spy_weighted)
    monkeypatch.setattr(fk_steering, "gather", spy_gather)
    r_min = -0.5
    settings = {"potential": potential, "resample": resample, "r_min": r_min, "resampler": "multinomial"}
    steered = steer(fk(particles=16, temperature=0.5, **settings), truth().task, [""] * 4)
    if resample == "always":
        assert min(lines.survivors) < 64
    short = r_min if potential == "difference" else 0.0
    assert lines.total is not None
    assert (0.5 * lines.total - (steered.rewards.double() - short)).abs().max() < 1e-6


def test_copies_of_one_parent_part_at_the_next_stochastic_step() -> None:
    seen: dict[int, Tensor] = {}

    def record(x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows) -> Tensor:
        seen[rows.step] = x_t
        return x_t[:, 0]

    config = FKSteeringConfig(particles=8, resampler="greedy", resample="always", resample_at=(3, 4))
    steered = steer(FKSteering(config, value=record), ring_truth().task, [""])
    assert steered.ancestors[:, 0].tolist() == [1, 1, 1]
    assert len(seen[4].unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("truth", "value"), [*((truth, "posterior_mean") for truth in TRUTHS), (TRUTHS[-1], "x0_samples")]
)
def test_prompts_in_a_batch_equal_prompts_one_by_one(truth: Callable[[], Truth], value: str) -> None:
    task = truth().task
    steerer = fk(particles=6, value=value, temperature=0.3)
    together = steer(steerer, task, ["a", "b", "c"], 8)
    for i, prompt in enumerate(["a", "b", "c"]):
        alone = steer(steerer, task, [prompt], 8, index=torch.tensor([i]))
        rows = together.group == i
        assert torch.equal(alone.x_0, together.x_0[rows])
        assert torch.equal(alone.weight, together.weight[rows])
        assert torch.equal(alone.ess[:, 0], together.ess[:, i])
        assert torch.equal(alone.log_z, together.log_z[i : i + 1])


def test_prompts_reach_the_reward_with_their_particles() -> None:
    task = ring_truth().task
    sign = {"left": -1.0, "right": 1.0}
    reward = FunctionReward("side", lambda s: s.media[:, 0] * torch.tensor([sign[p] for p in s.prompts]))
    steerer = fk(particles=64, temperature=0.5)
    steered = steerer.steer(task, denoiser(task.model), reward, ["left", "right"], Noise(0))
    mean = (steered.weight * steered.x_0[:, 0].double()).reshape(2, 64).sum(1)
    assert mean[0] < -2 < 2 < mean[1]


@pytest.mark.parametrize("truth", TRUTHS)
def test_temperature_to_zero_is_greedy(truth: Callable[[], Truth]) -> None:
    task = truth().task
    # distinct values: ties would be broken at random by the one and by order by the other
    value = ClosedForm(
        lambda x, t, c: x.double() @ torch.tensor([1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5])[: x.shape[1]].double()
    )

    def run(temperature: float, resampler: ResamplerName) -> Steered:
        config = FKSteeringConfig(
            particles=8, temperature=temperature, resampler=resampler, resample="always", resample_at=3
        )
        return steer(FKSteering(config, value=value), task, [""] * 3)

    cold, greedy = run(1e-7, "multinomial"), run(1.0, "greedy")
    assert torch.equal(cold.x_0, greedy.x_0)
    best = cold.rewards.reshape(3, 8) == cold.rewards[cold.best][:, None]
    torch.testing.assert_close((cold.weight.reshape(3, 8) * best).sum(1), torch.ones(3).double())


def test_each_prompt_decides_alone_whether_to_resample() -> None:
    task = ring_truth().task
    scale = {"flat": 0.0, "steep": 5.0}
    reward = FunctionReward("slope", lambda s: s.media[:, 0] * torch.tensor([scale[p] for p in s.prompts]))
    steered = fk(particles=16).steer(task, denoiser(task.model), reward, ["flat", "steep"], Noise(0))
    assert steered.ancestors[-1, 0] == 16
    assert steered.ancestors[-1, 1] < 16
    torch.testing.assert_close(steered.ess[:, 0], torch.full((len(steered.ess),), 16.0).double())


def test_ledger_is_exact() -> None:
    task = sequence_truth().task
    steps, particles = 6, 5 * 3
    # weighted at 2, 4 and at the end; the prediction that valued a state is the next step's
    steered = steer(fk(particles=5), task, [""] * 3)
    assert (steered.ledger.nfe, steered.ledger.reward_calls) == (steps * particles, 3 * particles)
    draws = steer(fk(particles=5, value="x0_samples", x0_samples=7), task, [""] * 3)
    assert (draws.ledger.nfe, draws.ledger.reward_calls) == (steps * particles, (2 * 7 + 1) * particles)
    completed = steer(fk(particles=5, value="rollout", x0_samples=2), task, [""] * 3)
    assert completed.ledger.nfe == (steps + 2 * (4 + 2)) * particles
    assert steered.ess.shape == steered.ancestors.shape == (3, 3)
    best = steer(BestOfN(BestOfNConfig(particles=5)), task, [""] * 3)
    assert (best.ledger.nfe, best.ledger.reward_calls, len(best.ess)) == (steps * particles, particles, 0)


@pytest.mark.parametrize("value", ["x0_samples", "rollout"])
def test_other_values_keep_the_normaliser(value: str) -> None:
    truth = sequence_truth()
    steered = steer(fk(particles=16, temperature=truth.temperature, value=value, x0_samples=2), truth.task, [""] * 300)
    assert z_score(truth, steered) < 3.5


def test_r_min_moves_no_weight_of_difference_and_its_offset_returns_to_log_z() -> None:
    task = ring_truth().task
    low, high = (steer(fk(particles=8, r_min=r), task, [""] * 2) for r in (-3.0, 2.0))
    assert torch.equal(low.x_0, high.x_0)
    torch.testing.assert_close(low.weight, high.weight)
    torch.testing.assert_close(low.log_z, high.log_z)


def test_outputs() -> None:
    task = ring_truth().task
    weighted, resampled, best = (
        steer(fk(particles=8, output=output), task, [""] * 2) for output in ("weighted", "resampled", "best")
    )
    assert torch.equal(resampled.weight, torch.full((16,), 1 / 8).double())
    assert torch.equal(resampled.rewards, resampled.x_0[:, 0])
    assert torch.equal(resampled.media, resampled.x_0)
    # systematic resampling copies by weight
    for row in range(16):
        mine = (resampled.x_0 == weighted.x_0[row]).all(1).sum()
        assert abs(int(mine) - 8 * float(weighted.weight[row])) < 1
    assert torch.equal(best.x_0, weighted.x_0)
    assert torch.equal(best.weight.nonzero()[:, 0], best.best)
    assert torch.equal(best.rewards[best.best], weighted.rewards.reshape(2, 8).amax(1))


def test_progress_sees_every_step_and_the_ess() -> None:
    seen: list[tuple[int, int, Tensor | None]] = []
    steered = steer(fk(particles=4), sequence_truth().task, [""], progress=lambda *told: seen.append(told))
    assert [step for step, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    told = [ess for _, _, ess in seen if ess is not None]
    assert torch.equal(torch.stack(told), steered.ess)


def test_a_deterministic_kernel_is_refused_where_copies_must_part() -> None:
    task = with_kernel(ring_truth().task, 0.0)
    with pytest.raises(UserError, match=r"deterministic.*DDIM with eta above 0"):
        steer(fk(particles=4), task, [""])
    # without copies there is nothing to part
    assert steer(fk(particles=4, resample_at=()), task, [""]).x_0.shape == (4, 2)
    assert steer(BestOfN(BestOfNConfig(particles=4)), task, [""]).x_0.shape == (4, 2)


def test_weighting_points() -> None:
    assert fk(resample_at=None).times(100) == {20, 40, 60, 80}
    assert fk(resample_at=None).times(1) == frozenset()
    assert fk(resample_at=4).times(12) == {4, 8}
    assert fk(resample_at=(0, 3, 12)).times(12) == {0, 3}


def test_what_a_user_can_get_wrong() -> None:
    task = ring_truth().task
    with pytest.raises(UserError, match=r"\[17\].*0 to 16"):
        steer(fk(resample_at=(3, 17)), task, [""])
    with pytest.raises(UserError, match="at least 1"):
        steer(fk(resample_at=0), task, [""])
    with pytest.raises(ValidationError):
        FKSteeringConfig.model_validate({"lambda": 10})
    with pytest.raises(UserError, match="use rollout"):
        steer(fk(value="x0_samples"), task, [""])
    with pytest.raises(UserError, match="black-box"):
        steer(fk(guide_scale=1.0), with_reward(task, Capabilities()), [""])
    with pytest.raises(UserError, match="scores sets"):
        steer(fk(), with_reward(task, Capabilities(set_valued=True)), [""])
    with pytest.raises(UserError, match="moves Gaussian steps"):
        steer(fk(guide_scale=1.0), task, [""])
    broken: Reward = FunctionReward("broken", lambda samples: samples.media[:, 0] * torch.nan)
    with pytest.raises(RewardError, match="finite"):
        steer(fk(), replace(task, reward=broken), [""])


def with_reward(task: Task, capabilities: Capabilities) -> Task:
    return replace(task, reward=FunctionReward("points", lambda samples: samples.media[:, 0], capabilities))


def test_kernel_ratio_is_the_difference_of_squares() -> None:
    noise = Noise(1)
    mean, delta, x = (noise.normal(torch.arange(4), (3, 2), purpose=name) for name in ("mean", "delta", "x"))
    std = torch.tensor([0.1, 0.5, 1.0, 2.0])
    base = GaussianStep(mean, std)
    ratio = kernel_ratio(base, base.shift(delta), x)
    squares = ((x - mean - delta).double().square() - (x - mean).double().square()).sum((1, 2))
    torch.testing.assert_close(ratio, squares / (2 * std.double() ** 2), rtol=1e-5, atol=1e-6)


def chain_variance(task: Task, model: NetworkDenoiser) -> float:
    """Variance of x_0 under a sampler whose steps are affine: from the kernel itself, at 0 and at 1."""
    grid, variance = task.sampler.grid.float(), 1.0
    first = task.model.process.prior(torch.ones(1, 1)) - task.model.process.prior(torch.zeros(1, 1))
    variance = float(first) ** 2
    for t, s in pairwise(grid):
        x, times = torch.tensor([[0.0], [1.0]]), t.repeat(2)
        step = task.sampler.kernel(model(x, times, None), x, times, s.repeat(2))
        assert isinstance(step, GaussianStep)
        variance = float(step.mean[1] - step.mean[0]) ** 2 * variance + float(step.std[0]) ** 2
    return variance


def test_guided_proposals_pay_the_kernel_ratio() -> None:
    """One Gaussian, DDIM steps: the chain is linear, so Z is known, and guiding only lowers the variance."""
    mixture = GaussianMixture(torch.zeros(1, 1), 1.5, torch.ones(1))
    task = with_kernel(exact_chain(mixture, lambda x: x[:, 0], 8), 1.0)
    model = denoiser(task.model)
    with torch.no_grad():
        log_z = chain_variance(task, model) / 2
    runs = 400
    spread: dict[float, Tensor] = {}
    for scale in (0.0, 1.0):
        steered = steer(fk(particles=16, guide_scale=scale), task, [""] * runs)
        ratio = (steered.log_z - log_z).exp()
        assert (ratio.mean() - 1).abs() < 3.5 * ratio.std() / math.sqrt(runs)
        spread[scale] = steered.log_z.std()
        assert steered.ledger.gradient_passes == (8 * 16 * runs if scale else 0)
    assert spread[1.0] < 0.7 * spread[0.0]


def test_the_ring_has_its_weights() -> None:
    assert torch.equal(ring_mixture([0.3] + [0.1] * 7).weights, torch.tensor([0.3] + [0.1] * 7))
