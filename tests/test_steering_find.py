import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import difftilt
from difftilt.checks.best_noise import CENTRE, DIMENSIONS, bowl_task
from difftilt.checks.tilted_truths import sequence_truth
from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.models.side_by_side import SideBySide
from difftilt.objectives.policy_gradient import surrogate_of_ratio
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.sampling.diagonal import DiagonalGaussian, radius
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Solver
from difftilt.sampling.rollout import sample
from difftilt.sampling.solvers import DPMSolverPP, EulerSolver, Heun
from difftilt.steering.budget import Budget, Meter
from difftilt.steering.find import FIND, FINDConfig, Learner
from difftilt.steering.generator import generator_of
from difftilt.steering.protocol import Anytime, Fitted, Steered
from difftilt.steering.within import is_anytime, steer_within
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.protocol import Task

INDEX = torch.arange(2)


def find(**settings: Any) -> FIND:
    return FIND(
        FINDConfig.model_validate({"iterations": 6, "rollouts": 3, "value_hidden": 8, "samples": 5, **settings})
    )


def ring(steps: int = 4, **settings: Any) -> Task:
    return Mixtures(Config(reward="linear", steps=steps, shift=1.0, **settings)).task()


def steer(steerer: FIND, task: Task, prompts: list[str], **extra: Any) -> Steered:
    return steerer.steer(task, denoiser(task.model, forward_batch=16), task.reward, prompts, Noise(0), **extra)


def learner(prompts: int = 2, shape: tuple[int, ...] = (3, 2), **settings: Any) -> Learner:
    config = FINDConfig.model_validate({"value_hidden": 8, "learning_rate": 0.05, **settings})
    index = torch.arange(prompts)
    return Learner(config, shape, index, torch.zeros(prompts, 0), Noise(0), Ledger())


def test_a_find_is_fitted_and_ends_after_any_round() -> None:
    fitted: Fitted = find()
    anytime: Anytime = find()
    assert is_anytime(anytime)
    assert fitted.state_dict() == {}


def test_density_and_divergence_are_those_of_independent_normals() -> None:
    noise = Noise(1)
    mean, z = (noise.normal(torch.arange(4), (3, 2), purpose=name) for name in ("mean", "z"))
    std = noise.uniform(torch.arange(4), (3, 2), purpose="std") + 0.2
    law = DiagonalGaussian(mean, std)
    other = Independent(Normal(mean, std), 2)
    torch.testing.assert_close(law.log_prob(z, reduce="sum"), other.log_prob(z))
    torch.testing.assert_close(law.log_prob(z, reduce="mean"), other.log_prob(z) / 6)
    prior = Independent(Normal(torch.zeros(4, 3, 2), 1.0), 2)
    torch.testing.assert_close(law.kl_to_prior(reduce="sum"), kl_divergence(other, prior))
    torch.testing.assert_close(law.gap_to_prior(reduce="mean"), (mean**2 + (std - 1) ** 2).mean((1, 2)))
    assert torch.equal(DiagonalGaussian.prior(4, (3, 2)).kl_to_prior(reduce="sum"), torch.zeros(4))


def test_the_first_gradient_is_the_policy_gradient_over_the_dimensions() -> None:
    """On the bowl E[r] = top - (|mean - c|² + |std|²)/D, of which the surrogate has the gradient divided by D."""
    one = learner(1, (DIMENSIONS,), reward_weight=2.0, kl_weight=0.0)
    z = one.draw(60_000)
    one.learn(z, -(z - CENTRE).square().mean(2))
    assert one.mean.grad is not None
    assert one.std.grad is not None
    # descent: minus the weight, the derivative 2c/D of E[r] at mean 0 (-2/D at std 1), over D
    scale = 2.0 * 2 / DIMENSIONS / DIMENSIONS
    # the terms A·z and A·(z² - 1) have standard deviations below 1.5 sd(r) = 0.6
    error = 4.5 * 2.0 / DIMENSIONS * 0.6 / math.sqrt(60_000)
    torch.testing.assert_close(one.mean.grad[0], -scale * CENTRE, rtol=0, atol=error)
    torch.testing.assert_close(one.std.grad[0], torch.full((DIMENSIONS,), scale), rtol=0, atol=error)


def test_a_baseline_changes_no_expected_gradient() -> None:
    """The network's value was known before the draws: rewards shifted by a constant have the same mean gradient."""
    grads: list[Tensor] = []
    for shift in (0.0, 3.0):
        one = learner(1, (4,), kl_weight=0.0, baseline="none", learning_rate=1e-6)
        z = one.draw(100_000)
        one.learn(z, z[:, :, 0] + shift)
        assert one.mean.grad is not None
        grads.append(one.mean.grad[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=4.5 * 10 / 4 * 3 / math.sqrt(100_000))


def test_the_baseline_is_a_function_of_the_law() -> None:
    """Told of two laws in turn, whose rewards differ, it knows both; a running mean would say 2.5 of either."""
    one = learner(2, (2,), value_learning_rate=5e-3, learning_rate=1e-6)
    said: list[Tensor] = []
    for turn in range(120):
        with torch.no_grad():
            one.mean.fill_(1.0 if turn % 2 else -1.0)
        z = one.draw(4)
        level = 4.0 if turn % 2 else 1.0
        said.append(one.learn(z, torch.full((2, 4), level) + 0.1 * z[:, :, 0])["baseline"])
    torch.testing.assert_close(torch.stack(said[-2:]), torch.tensor([[0.9, 0.9], [4.1, 4.1]]), rtol=0, atol=0.3)


def test_a_law_of_as_many_elements_as_a_pipeline_has() -> None:
    """16384 elements: averaged densities stay in the interval, and all elements together gain; summed ones leave it."""
    shape = (4, 64, 64)
    told: dict[str, dict[str, Tensor]] = {}
    for reduce in ("mean", "sum"):
        one = learner(1, shape, reduce=reduce, reference="prior", learning_rate=0.01, kl_weight=0.0)
        first = one.learn(one.draw(4), torch.tensor([[1.0, -1.0, 0.5, -0.5]]))
        assert float(first["clipped"]) == 0
        told[reduce] = one.learn(one.draw(4), torch.tensor([[1.0, -1.0, 0.5, -0.5]]))
        assert float(one.mean.detach().abs().max()) <= 0.021
    assert float(told["mean"]["clipped"]) == 0
    assert float(told["sum"]["clipped"]) >= 0.75


def test_the_first_baseline_is_the_first_mean_reward_and_later_ones_are_older_than_their_draws() -> None:
    said: list[Tensor] = []
    for jump in (0.0, 100.0):
        one = learner(2, value_steps=3, value_learning_rate=0.1)
        z = one.draw(4)
        told = one.learn(z, z[:, :, 0, 0] + 2)
        torch.testing.assert_close(told["baseline"], told["reward"])
        said.append(one.learn(one.draw(4), torch.zeros(2, 4) + jump)["baseline"])
    assert torch.equal(said[0], said[1])


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_baseline_begins_with_the_first_reward_of_its_prompt(rounds: int) -> None:
    """Whatever the rounds without a reward: until then nothing is learned, and other prompts see nothing of it."""
    both, alone = learner(2, kl_weight=0.0), learner(2, kl_weight=0.0)
    for number in range(rounds + 2):
        z = both.draw(4)
        reward = 100 + z[:, :, 0, 0]
        full = alone.learn(alone.draw(4), reward)
        late = number < rounds
        told = both.learn(z, reward.index_fill(0, torch.tensor([1]), torch.nan) if late else reward)
        torch.testing.assert_close(told["baseline"][0], full["baseline"][0])
        assert bool(told["baseline"][1].isnan()) == late
        if late:
            assert torch.equal(both.mean[1], torch.zeros(3, 2))
        elif number == rounds:
            torch.testing.assert_close(told["baseline"], torch.stack([full["baseline"][0], told["reward"][1]]))
        else:
            torch.testing.assert_close(told["baseline"][1], torch.tensor(100.0), rtol=0, atol=2)
    torch.testing.assert_close(both.mean[0], alone.mean[0])


@pytest.mark.parametrize("penalty", ["exact", "quadratic"])
def test_penalty_and_density_are_reduced_alike(penalty: str) -> None:
    """At the law that drew, the gradient of a sum is D times that of a mean: the temperature is the same."""
    grads: list[Tensor] = []
    for reduce in ("mean", "sum"):
        one = learner(1, (8,), reduce=reduce, penalty=penalty, kl_weight=7.0)
        with torch.no_grad():
            one.mean.fill_(0.5)
            one.std.fill_(0.8)
        z = one.draw(4)
        one.learn(z, z[:, :, 0])
        assert one.mean.grad is not None
        assert one.std.grad is not None
        grads.append(torch.cat([one.mean.grad, one.std.grad]))
    torch.testing.assert_close(grads[1], 8 * grads[0])


def remembering(**settings: Any) -> Learner:
    """A learner after some rounds whose reward is a known function of the noise."""
    one = learner(2, (2,), reused=3, learning_rate=0.03, **settings)
    for _ in range(12):
        z = one.draw(2)
        one.learn(z, score(z))
    return one


def score(z: Tensor) -> Tensor:
    return z[..., 0] + torch.tensor([[1.0], [-1.0]]) * z[..., 1]


def test_noise_reward_and_reference_stay_together() -> None:
    one = learner(2, (2,), reused=3, history=16, learning_rate=0.03, clip_range=0.9)
    laws: dict[int, DiagonalGaussian] = {}
    for _ in range(12):
        for draw_number in range(2):
            policy = one.policy
            laws[2 * one.iteration + draw_number] = DiagonalGaussian(
                policy.mean.detach().clone(), policy.std.detach().clone()
            )
        z = one.draw(2)
        one.learn(z, score(z))
    memory = one.memory
    assert memory is not None
    torch.testing.assert_close(memory.reward, score(memory.z))
    for column in range(memory.number.shape[1]):
        law = laws[int(memory.number[0, column])]
        torch.testing.assert_close(memory.log_prob[:, column], law.log_prob(memory.z[:, column], reduce="mean"))
    # bounded: the last sixteen that were drawn
    assert memory.number.shape[1] <= 16
    assert int(memory.number.min()) >= 24 - 16


def test_what_has_left_its_interval_is_dropped_for_good() -> None:
    wide, narrow = remembering(clip_range=0.9), remembering(clip_range=0.02)
    assert wide.memory is not None
    assert narrow.memory is not None
    assert int(narrow.memory.live.sum()) < int(wide.memory.live.sum()) == wide.memory.live.numel()
    ratio = (narrow.policy.log_prob(narrow.memory.z[:, -1], reduce="mean") - narrow.memory.log_prob[:, -1]).exp()
    assert torch.equal(narrow.memory.live[:, -1], (ratio - 1).abs() <= 0.02)
    picked = wide.memory.picked(3, INDEX, Noise(0), 5)
    assert picked.z.shape == (2, 3, 2)
    assert bool(picked.live.all())
    some = wide.memory.only(wide.memory.number < wide.memory.number[0, 2]).picked(3, INDEX, Noise(0), 5)
    assert some.live.sum(1).tolist() == [2, 2]


def test_history_is_used() -> None:
    fresh, reusing = (learner(2, (2,), reused=reused, learning_rate=0.03) for reused in (0, 3))
    for one in (fresh, reusing):
        for _ in range(3):
            z = one.draw(2)
            one.learn(z, score(z))
    assert not torch.isclose(fresh.mean, reusing.mean).all()


@pytest.mark.parametrize("pessimistic", [True, False])
def test_forms_of_the_clip(pessimistic: bool) -> None:
    """Outside the interval the clipped ratio alone has no gradient; the worse of the two has it where it is worse."""
    log_ratio = torch.tensor([-0.5, -0.5, 0.5, 0.5, 0.05]).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    surrogate = surrogate_of_ratio(log_ratio, advantage, 0.2, pessimistic)
    (slope,) = torch.autograd.grad(surrogate.value.sum(), log_ratio)
    alive = [True, False, False, True, True] if pessimistic else [False, False, False, False, True]
    assert (slope != 0).tolist() == alive
    assert surrogate.clipped.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("clip", ["clamp", "pessimistic"])
def test_ratios_to_the_prior_have_a_trust_region(clip: str) -> None:
    """Draws far from the prior are clipped, and with the clipped ratio alone teach nothing: the law rests."""
    one = learner(1, (2,), reference="prior", kl_weight=0.0, clip_range=0.05, clip=clip)
    with torch.no_grad():
        one.mean.fill_(3.0)
    z = one.draw(8)
    told = one.learn(z, z[:, :, 0])
    assert float(told["clipped"]) == 1
    # the worse of the two has a gradient where a draw that was worse than expected is likelier than under the prior
    assert torch.equal(one.mean, torch.full((1, 2), 3.0)) == (clip == "clamp")


def test_std_has_a_floor_and_gradients_a_bound() -> None:
    one = learner(2, (2,), learning_rate=0.5, smallest_std=0.3, kl_weight=0.0)
    for _ in range(10):
        z = one.draw(16)
        one.learn(z, -z.square().sum(2))
    assert float(one.std.detach().min()) == pytest.approx(0.3)
    free, bound = learner(2, (2,), kl_weight=0.0), learner(2, (2,), kl_weight=0.0, max_grad_norm=0.1)
    for other in (free, bound):
        z = other.draw(16)
        other.learn(z, 5 * z[:, :, 0])

    def norm(other: Learner) -> Tensor:
        assert other.mean.grad is not None
        assert other.std.grad is not None
        return torch.cat([other.mean.grad, other.std.grad], 1).norm(dim=1)

    assert bool((norm(free) > 0.1).all())
    torch.testing.assert_close(norm(bound), torch.full((2,), 0.1))


def test_the_penalty_can_wait() -> None:
    plain, waiting, never = (
        learner(1, (2,), kl_weight=weight, penalty_from=first) for weight, first in ((9.0, 0), (9.0, 1), (0.0, 0))
    )
    with torch.no_grad():
        for one in (plain, waiting, never):
            one.mean.fill_(1.0)
    z = plain.draw(4)
    for one in (plain, waiting, never):
        one.learn(z, z[:, :, 0])
    assert torch.equal(waiting.mean, never.mean)
    assert not torch.equal(plain.mean, never.mean)


def test_the_generator_is_a_black_box() -> None:
    task = ring()
    network = task.model.network

    def watched(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not x.requires_grad
        return network(x, t, condition)

    def score_of(samples: Samples) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not samples.media.requires_grad
        return samples.media[:, 0].floor()

    task = replace(task, model=replace(task.model, network=watched), reward=FunctionReward("steps", score_of))
    steered = steer(find(), task, ["", ""])
    assert steered.ledger.gradient_passes == 0
    assert not steered.x_0.requires_grad


class Half(nn.Module):
    """A generator in half precision."""

    def forward(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        return (-x).half()


def test_a_half_precision_generator_has_a_single_precision_policy() -> None:
    task = ring()
    task = replace(task, model=replace(task.model, network=Half()))
    steerer = find()
    assert steer(steerer, task, [""]).x_0.dtype == torch.float32
    assert steerer.latest is not None
    assert steerer.latest.policy.mean.dtype == torch.float32


def test_before_learning_it_is_plain_sampling() -> None:
    task = ring()
    steered = steer(find(iterations=0), task, ["", ""])
    z = DiagonalGaussian.prior(2, (2,)).draws(INDEX, 5, Noise(0), "fresh").flatten(0, 1)
    model, index = denoiser(task.model, forward_batch=16), torch.arange(10)
    with torch.no_grad():
        plain = sample(model, task.sampler, z, None, noise=Noise(0), index=index)
    assert torch.equal(steered.x_0, plain)
    torch.testing.assert_close(steered.components["radius"], radius(z))
    assert torch.equal(steered.weight, torch.full((10,), 1 / 5, dtype=torch.float64))
    assert torch.equal(steered.rewards[steered.best], steered.rewards.reshape(2, 5).amax(1))


@pytest.mark.parametrize(
    "settings", [{}, {"reused": 4, "policy_steps": 2}, {"reference": "prior", "max_grad_norm": 0.1}]
)
def test_prompts_side_by_side_learn_as_if_alone(settings: dict[str, Any]) -> None:
    task = ring()
    sign = {"left": -1.0, "right": 1.0}
    reward = FunctionReward("side", lambda s: s.media[:, 0] * torch.tensor([sign[p] for p in s.prompts]))
    task = replace(task, reward=reward)
    both, alone = (find(iterations=12, learning_rate=0.05, clip_range=0.05, **settings) for _ in range(2))
    together = steer(both, task, ["left", "right"])
    one = steer(alone, task, ["right"], index=torch.tensor([1]))
    torch.testing.assert_close(together.x_0[5:], one.x_0, rtol=1e-4, atol=1e-4)
    assert both.latest is not None
    left, right = both.latest.policy.mean[:, 0].tolist()
    assert left < -0.1
    assert right > 0.1


def test_equal_networks_side_by_side_equal_networks_alone() -> None:
    many = SideBySide(4, 8, torch.tensor([3, 5, 3]))
    x = Noise(0).normal(torch.arange(3), (4,), purpose="x")
    many.begin_at(torch.tensor([1.0, 2.0, 3.0]))
    assert many(x).tolist() == [1, 2, 3]
    with torch.no_grad():
        many.weights[-1].fill_(0.1)
    for row, seed in enumerate((3, 5, 3)):
        one = SideBySide(4, 8, torch.tensor([seed]))
        with torch.no_grad():
            one.weights[-1].fill_(0.1)
            one.biases[-1].fill_(row + 1)
        torch.testing.assert_close(one(x[row : row + 1]), many(x)[row : row + 1])
    (slope,) = torch.autograd.grad(many(x)[0], many.weights[0])
    assert torch.equal(slope[1:], torch.zeros_like(slope[1:]))


def test_the_baseline_knows_the_encoded_prompt() -> None:
    task = ring()
    tokens = {"tokens": torch.ones(2, 5, 7), "pooled": torch.full((2, 3), 2.0), "label": torch.tensor([4, 5])}
    encoded = replace(task, model=replace(task.model, encode=lambda prompts: tokens))
    context = generator_of(encoded, denoiser(task.model), task.reward, ["a", "b"], Noise(0), None).context()
    assert torch.equal(context, torch.tensor([[2.0] * 3 + [1.0] * 7] * 2))  # by sorted name: pooled, tokens
    assert generator_of(task, denoiser(task.model), task.reward, ["", ""], Noise(0), None).context().shape == (2, 0)
    config = FINDConfig(value_hidden=8)
    value = Learner(config, (2,), INDEX, context, Noise(0), Ledger()).value
    assert value.weights[0].shape == (2, 2 + 2 + 10, 8)


@pytest.mark.parametrize("solver", [EulerSolver(), Heun(), DPMSolverPP(), None], ids=str)
def test_the_price_of_a_sample_is_what_it_costs(solver: Solver | None) -> None:
    task = ring(5)
    sampler = replace(task.sampler, solver=solver, kernel=DDIM(1.0))
    model = denoiser(task.model)
    with torch.no_grad():
        sample(model, sampler, torch.zeros(3, 2), None, noise=Noise(0), index=torch.arange(3))
    box = generator_of(replace(task, sampler=sampler), model, task.reward, ["", ""], Noise(0), None)
    assert model.ledger.nfe == 3 * box.evaluations
    assert box.price(3) == Ledger(nfe=2 * model.ledger.nfe, reward_calls=2 * 3)


def test_ledger_is_exact() -> None:
    ledger = steer(find(), ring(), ["", ""]).ledger
    runs = 2 * (6 * 3 + 5)
    # five lessons of the baseline in each of six iterations
    assert (ledger.nfe, ledger.reward_calls, ledger.auxiliary_calls) == (4 * runs, runs, 2 * 6 * 5)
    guided = Digits(DigitsConfig(steps=2, guidance=2.0)).task()
    model = denoiser(guided.model, guidance=2.0)
    steered = find(iterations=1).steer(guided, model, guided.reward, guided.prompts[:1], Noise(0))
    assert steered.ledger.nfe == 2 * 2 * (3 + 5)


def test_a_budget_ends_the_learning_and_leaves_room_for_the_samples() -> None:
    task, steerer = ring(), find(iterations=50)
    told: list[tuple[int, int]] = []
    model = denoiser(task.model)
    steered = steer_within(
        steerer, task, model, task.reward, ["", ""], Noise(0), budget=Budget(nfe=4 * (7 * 3 + 5) + 3),
        progress=lambda done, total, ess: told.append((done, total)),
    )  # fmt: skip
    assert steered.ledger.nfe == 2 * 4 * (7 * 3 + 5)
    assert told == [(done, 50) for done in range(1, 8)]
    assert steered.complete
    assert steerer.latest is not None
    assert steerer.latest.history["reward"].shape == (7, 2)
    with pytest.raises(UserError, match="less than one round"):
        steer_within(find(), task, model, task.reward, [""], Noise(0), budget=Budget(reward_calls=7))


def test_samples_of_a_fitted_law_keep_to_the_budget() -> None:
    task, steerer = ring(), find()
    model = denoiser(task.model)
    steerer.fit(task, model, task.reward, [""], Noise(0))
    with pytest.raises(
        UserError, match=r"of 19 network .* fresh samples, up to 20 network evaluations and 5 reward calls: raise"
    ):
        steer_within(steerer, task, model, task.reward, [""], Noise(0), budget=Budget(nfe=19))
    assert steer_within(steerer, task, model, task.reward, [""], Noise(0), budget=Budget(nfe=20)).ledger.nfe == 20
    with pytest.raises(UserError, match="less than the fresh samples"):
        steer_within(find(iterations=0), task, model, task.reward, [""], Noise(0), budget=Budget(nfe=19))


def test_ctrl_c_ends_a_fit_and_keeps_its_rounds() -> None:
    task, steerer = ring(), find()

    def press(done: int, total: int, ess: Tensor | None) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGINT)

    metrics = steerer.fit(task, denoiser(task.model), task.reward, [""], Noise(0), progress=press)
    assert metrics["rounds"] == 2
    assert steerer.fitted is not None
    assert not torch.equal(steerer.fitted.policy.mean, torch.zeros(1, 2))


def test_commands_fit_and_steer(tmp_path: Path) -> None:
    settings = ["testbed.steps=3", "steerer.iterations=3", "steerer.rollouts=2", "steerer.samples=4"]
    fitted = difftilt.fit("mixtures/find", tmp_path / "fit", overrides=settings)
    # the fit, and four samples that say which model and reward it belongs to
    assert fitted.ledger.nfe == 3 * 2 * 3 + 4 * 3
    here = difftilt.steer("mixtures/find", overrides=settings).steered
    there = difftilt.steer("mixtures/find", overrides=[*settings, f"steering.fitted={tmp_path / 'fit'}"]).steered
    # the same rounds with the same noise
    torch.testing.assert_close(here.x_0, there.x_0)
    assert (here.ledger.nfe, there.ledger.nfe) == (3 * (2 * 3 + 4), 3 * 4)
    bounded = difftilt.steer(
        ring(), prompts=["", ""], method="find", rollouts=2, samples=4, value_hidden=8, budget={"reward_calls": 11}
    )
    assert bounded.steered.ledger.reward_calls == 2 * (3 * 2 + 4)
    digits = ["testbed.steps=1", "steerer.iterations=1", "steerer.rollouts=1", "steerer.samples=1"]
    difftilt.fit("digits/find", tmp_path / "digits", overrides=digits)
    with pytest.raises(UserError, match=r"no noise was learned for the prompt '.*': name it in steering\.prompts"):
        difftilt.steer("digits/find", overrides=[*digits, f"steering.fitted={tmp_path / 'digits'}"])


def test_an_interrupted_call_gives_samples_of_what_it_has_learned() -> None:
    task = ring()
    model = denoiser(task.model)
    meter = Meter(Budget(), model.ledger, 1)

    def stop(done: int, total: int, ess: Tensor | None) -> None:
        meter.interrupted = done == 3

    steered = find().steer(task, model, task.reward, [""], Noise(0), meter=meter, progress=stop)
    assert not steered.complete
    assert len(steered.x_0) == 5
    assert steered.ledger.reward_calls == 3 * 3 + 5


def test_the_artefact_survives_a_file_and_draws_any_number(tmp_path: Path) -> None:
    task = ring()
    task = replace(task, reward=FunctionReward("side", lambda samples: samples.media[:, 0]))
    first = find(iterations=10, learning_rate=0.05)
    metrics = first.fit(task, denoiser(task.model), task.reward, ["a", "b"], Noise(0))
    assert set(metrics) == {"reward", "radius", "std", "baseline", "clipped", "kl", "first_reward", "rounds"}
    assert metrics["reward"] > metrics["first_reward"]
    save_file(dict(first.state_dict()), tmp_path / "noise.safetensors")
    second = find(samples=7)
    second.load_state_dict(load_file(tmp_path / "noise.safetensors"))
    assert second.fitted is not None
    assert second.fitted.prompts == ("a", "b")
    assert torch.equal(second.fitted.history["reward"], first.state_dict()["history/reward"])
    steered = steer(second, task, ["b", "a", "b"])
    # nothing is learned again
    assert steered.ledger.reward_calls == 3 * 7
    assert len(steered.x_0) == 21
    same = find(samples=7)
    same.fitted = first.fitted
    assert torch.equal(steer(same, task, ["b", "a", "b"]).x_0, steered.x_0)
    law = second.fitted.law(["b", "a", "b"], (2,))
    assert torch.equal(law.mean, second.fitted.policy.mean[[1, 0, 1]])
    with pytest.raises(UserError, match=r"no noise was learned for the prompt 'c'"):
        steer(second, task, ["c"])
    other = ring(means=((0.0, 0.0, 1.0), (1.0, 0.0, 0.0)))
    with pytest.raises(UserError, match=r"shape \(2,\), and this model has \(3,\)"):
        steer(second, other, ["a"])
    with pytest.raises(UserError, match="std, prompts is missing"):
        find().load_state_dict({"mean": torch.zeros(1, 2)})


def test_calls_learn_anew_unless_fitted() -> None:
    task, steerer = ring(), find()
    first, second = (steer(steerer, task, [""]) for _ in range(2))
    assert torch.equal(first.x_0, second.x_0)
    assert first.ledger == second.ledger
    assert "mean" in steerer.state_dict()


def test_learned_noise_is_unscaled() -> None:
    """What is drawn are the ``latents`` of a pipeline, which its process scales: the sampler starts at prior(z)."""
    seen: list[Tensor] = []
    task = ring(process="vp")

    class Watching(EulerSolver):
        def __call__(self, denoise: Any, x: Tensor, condition: Any, grid: Tensor) -> Tensor:
            seen.append(x)
            return super().__call__(denoise, x, condition, grid)

    task = replace(task, sampler=replace(task.sampler, solver=Watching()))
    steerer = find()
    steer(steerer, task, [""])
    assert steerer.latest is not None
    z = steerer.latest.policy.draws(torch.tensor([0]), 5, Noise(0), "fresh")[0]
    assert torch.equal(seen[-1], task.model.process.prior(z))


def test_a_stochastic_sampler_draws_anew_in_every_round() -> None:
    task = ring(kernel="ancestral", process="vp")
    task = replace(task, sampler=replace(task.sampler, solver=None))
    generator = generator_of(task, denoiser(task.model), task.reward, [""], Noise(0), None)
    z = torch.zeros(1, 2, 2)
    first, again, later = (generator(z, label)[0] for label in ("round 0", "round 0", "round 1"))
    assert torch.equal(first, again)
    assert not torch.isclose(first, later).any()
    assert not torch.isclose(first[0], first[1]).any()


def test_missing_rewards_teach_nothing_and_are_counted() -> None:
    lost: list[int] = []

    def half(samples: Samples) -> Tensor:
        x = samples.media[:, 0]
        lost.append(int((x <= 0).sum()))
        return torch.where(x > 0, x, torch.nan)

    task = replace(ring(), reward=FunctionReward("half", half, Capabilities(missing=True)))
    steerer = find(iterations=10, samples=20)
    steered = steer(steerer, task, ["", ""])
    assert steered.invalid is not None
    assert int(steered.invalid.sum()) == sum(lost)
    assert bool((steered.invalid > 0).all())
    assert bool(steered.rewards[steered.best].isfinite().all())
    assert steerer.latest is not None
    assert bool(steerer.latest.policy.mean.isfinite().all())
    nothing = FunctionReward("nothing", lambda s: s.media[:, 0] * torch.nan, Capabilities(missing=True))
    with pytest.raises(RewardError, match="all 5 fresh samples"):
        steer(find(), replace(task, reward=nothing), [""])


def test_fresh_samples_without_a_reward_have_no_weight() -> None:
    def half(samples: Samples) -> Tensor:
        return torch.where(samples.media[:, 0] > 0, samples.media[:, 0], torch.nan)

    task = replace(ring(), reward=FunctionReward("half", half, Capabilities(missing=True)))
    steered = steer(find(iterations=0, samples=20), task, ["", ""])
    live = steered.rewards.isfinite().reshape(2, 20)
    assert bool((live.any(1) & ~live.all(1)).all())
    weight = steered.weight.reshape(2, 20)
    assert torch.equal(weight, live.double() / live.sum(1, keepdim=True))


def texts(value: object) -> Tensor:
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"std": torch.ones(2, 3)}, r"mean \(2, 2\) and std \(2, 3\) are not one row for each of 2 prompts"),
        ({"prompts": texts(["a"])}, "one row for each of 1 prompts"),
        ({"mean": torch.tensor([[0.0, torch.nan], [0.0, 0.0]])}, "must be finite, and std greater than 0"),
        ({"std": torch.full((2, 2), torch.inf)}, "must be finite, and std greater than 0"),
        ({"std": torch.tensor([[1.0, 0.0], [1.0, 1.0]])}, "must be finite, and std greater than 0"),
        ({"prompts": texts(["a", "b"])[:-1]}, "its prompts cannot be read"),
        ({"prompts": torch.tensor([255, 254], dtype=torch.uint8)}, "its prompts cannot be read"),
        ({"prompts": texts({"a": 1, "b": 2})}, "its prompts cannot be read"),
        ({"prompts": texts(["a", 2])}, "its prompts cannot be read"),
        ({"prompts": torch.zeros(2)}, "its prompts cannot be read"),
    ],
)
def test_damaged_laws_are_refused(changed: dict[str, Tensor], said: str) -> None:
    state = {"mean": torch.zeros(2, 2), "std": torch.ones(2, 2), "prompts": texts(["a", "b"])}
    find().load_state_dict(state)
    with pytest.raises(UserError, match=rf"{said}.*; fit it again with `difftilt train`$"):
        find().load_state_dict({**state, **changed})


def test_what_a_user_can_get_wrong() -> None:
    task = sequence_truth().task
    with pytest.raises(UserError, match="tokens: use svdd"):
        steer(find(), task, [""])
    with pytest.raises(UserError, match="scores sets"):
        steer(
            find(),
            replace(ring(), reward=FunctionReward("set", lambda s: s.media[:1, 0], Capabilities(set_valued=True))),
            [""],
        )
    for wrong in ({"clip_range": 1.0}, {"rollouts": 0}, {"smallest_std": 0.0}, {"reference": "initial"}):
        with pytest.raises(ValidationError):
            find(**wrong)


def test_the_bowl_needs_no_network() -> None:
    steered = steer(find(), bowl_task(), [""])
    assert steered.ledger.nfe == 0
