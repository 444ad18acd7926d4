"""Survivors are what they would have been, costs are the formula's, and the replay agrees with the live search."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from difftilt.checks.tilted_truths import sequence_truth
from difftilt.checks.ttsnap import ring
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.process.grid import uniform_grid
from difftilt.rewards import FunctionReward, Masked, Samples, WeightedSum
from difftilt.rewards.classifier import ClassifierReward
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Apart, Noise
from difftilt.sampling.protocol import Kernel
from difftilt.sampling.rollout import sample_by_kernel, start_state
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.budget import Budget
from difftilt.steering.protocol import Fitted, Steered, Steerer
from difftilt.steering.pruning import Schedule, budget_curve, replay
from difftilt.steering.selection import fused, survivors
from difftilt.steering.ttsnap import TTSnap, TTSnapConfig
from difftilt.steering.within import steer_within
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.training.protocol import Task
from difftilt.values.curriculum import Curriculum, Level, fit_curriculum, fit_level, level_loss, order_of, predict
from difftilt.values.noise_aware import Regressor, TunedReward, verifier_of


@cache
def small() -> Task:
    """The toy in eight steps: by default it prunes at 0, 2 and 4."""
    return replace(ring(), sampler=replace(ring().sampler, grid=uniform_grid(8)))


TINY = {"images": 20, "validation_images": 10, "warm_up_epochs": 1, "batch": 10, "hidden": 8}


def ttsnap(**settings: Any) -> TTSnap:
    return TTSnap(TTSnapConfig.model_validate({"kernel": "ode", "particles": 13, **TINY, **settings}))


def plain(**settings: Any) -> TTSnap:
    return ttsnap(value="posterior_mean", **settings)


def steer(steerer: Steerer, task: Task, prompts: list[str], **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=64)
    return steerer.steer(task, model, extra.pop("reward", task.reward), prompts, Noise(0), **extra)


def everybody(task: Task, kernel: Kernel, count: int) -> Tensor:
    """Plain samples of the first ``count`` slots."""
    index, sampler = torch.arange(count), replace(task.sampler, kernel=kernel)
    with torch.no_grad():
        x = start_state(task.model.process, Noise(0), index, task.model.shape)
        condition = task.model.encode([""] * count)
        model = denoiser(task.model, forward_batch=64)
        return sample_by_kernel(model, sampler, x, condition, noise=Noise(0), index=index).x_0


@pytest.mark.parametrize("kernel", ["ode", "task"])
@pytest.mark.parametrize("task", [small, lambda: sequence_truth().task], ids=["ring", "tokens"])
def test_a_survivor_is_the_plain_sample_of_its_slot_bit_for_bit(task: Callable[[], Task], kernel: str) -> None:
    if kernel == "ode" and task is not small:
        with pytest.raises(UserError, match="tokens have none"):
            steer(plain(), task(), [""])
        return
    steered = steer(plain(kernel=kernel, prune_steps=(0, 1, 3)), task(), ["", ""])
    samples = everybody(task(), Euler() if kernel == "ode" else task().sampler.kernel, 26)
    assert steered.x_0.shape[0] == 2
    for row, group in zip(steered.x_0, steered.group.tolist(), strict=True):
        mine = samples[13 * group : 13 * group + 13]
        assert bool((mine == row).flatten(1).all(1).any())


def test_pruned_candidates_leave_the_batch_and_the_price_is_exact() -> None:
    steerer = plain()
    steered = steer(steerer, ring(), ["", ""])
    assert steered.ess[:, 0].tolist() == [5, 2, 1]
    # 13 candidates for the calls 0, 1, 2; 5 for 3..6; 2 for 7..11; 1 for 12..19
    assert steered.ledger.nfe == 2 * (13 * 3 + 5 * 4 + 2 * 5 + 1 * 8)
    assert steered.ledger.reward_calls == 2 * (13 + 5 + 2 + 1)
    assert steered.ledger == steerer.price(20) * 2


def test_without_prunings_it_is_best_of_n_over_initial_noises() -> None:
    task = small()
    ode = replace(task, sampler=replace(task.sampler, kernel=Euler()))
    ours = steer(ttsnap(prune_steps=(), keep=()), task, ["", ""])
    theirs = steer(BestOfN(BestOfNConfig(particles=13)), ode, ["", ""])
    for name in ("x_0", "rewards", "best", "weight"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.ledger == theirs.ledger
    assert bool((ours.weight[ours.best] == 1).all())


def test_prompts_in_a_batch_equal_prompts_one_by_one() -> None:
    together = steer(plain(), small(), ["", ""])
    for i in range(2):
        alone = steer(plain(), small(), [""], index=torch.tensor([i]))
        assert torch.equal(alone.x_0, together.x_0[together.group == i])


def two_rewards(scale: float = 1.0) -> WeightedSum:
    parts = {
        "bumps": small().reward,
        "right": FunctionReward("right", lambda s: scale * s.media[:, 0]),
        "unused": FunctionReward("unused", lambda s: s.media[:, 1]),
    }
    return WeightedSum(parts, {"bumps": 1.0, "right": -0.1, "unused": 0.0})


@pytest.mark.parametrize(("several", "value"), [(False, "posterior_mean"), (True, "noise_aware")])
def test_the_replay_of_recorded_scores_finds_the_survivors_of_the_live_search(several: bool, value: str) -> None:
    task, reward = small(), two_rewards() if several else small().reward
    steerer, model = ttsnap(value=value, particles=32), denoiser(small().model, forward_batch=64)
    if value == "noise_aware":
        steerer.fit(task, model, reward, task.prompts, Noise(5))
    live = steerer.steer(task, model, reward, [""] * 3, Noise(0))
    distillation = steerer.distillation(task, model, reward, [""] * 3)
    schedule = steerer.schedule(8, len(distillation.terms))
    assert len(distillation.terms) == (2 if several else 1)
    with torch.no_grad():
        held = distillation.recorded(torch.arange(3), 32, Noise(0), schedule.at)
        verifiers = distillation.verifiers(steerer.learned, schedule.at) if value == "noise_aware" else {}

        def scores(name: str, step: int) -> Tensor:
            own, term = verifiers.get(step), distillation.terms[name]
            if own is not None:
                return term.sign * predict(own[name], step, held, distillation.latent).reshape(3, 32)
            return term.sign * distillation.score(term, held.predictions[step], held.prompt).reshape(3, 32)

        values = [torch.stack([scores(name, step) for name in distillation.terms]) for step in schedule.at]
        terms = distillation.terms.values()
        rewards = [one.sign * distillation.score(one, held.x_0, held.prompt).reshape(3, 32) for one in terms]
    told = replay(schedule, values, torch.stack(rewards))
    offset = 32 * torch.arange(3)[:, None]
    assert torch.equal(live.x_0, held.x_0[(told.survivors[-1] + offset).flatten()])
    assert torch.equal(live.x_0[live.best], held.x_0[told.best + offset[:, 0]])
    assert tuple(stage.shape[1] for stage in told.survivors) == schedule.sizes(32)[1:]


def test_ranks_are_fused_whatever_the_scales_of_the_rewards() -> None:
    task = small()
    one, other = (steer(plain(particles=40), task, [""] * 2, reward=two_rewards(scale)) for scale in (1.0, 1e4))
    assert torch.equal(one.x_0[one.best], other.x_0[other.best])
    assert set(one.components) == {"bumps", "right", "unused"}
    torch.testing.assert_close(one.rewards, one.components["bumps"] - 0.1 * one.components["right"])
    # the ablation: by the sum the larger reward decides alone
    total = steer(plain(particles=40, fusion="total"), task, [""] * 2, reward=two_rewards(1e4))
    assert not torch.equal(total.x_0[total.best], other.x_0[other.best])


def test_the_best_by_ranks_need_not_have_the_highest_sum() -> None:
    steered = steer(plain(prune_steps=(), keep=(), particles=16), small(), [""], reward=two_rewards(100.0))
    ranks = steered.components["bumps"].argsort().argsort() + (-steered.components["right"]).argsort().argsort()
    assert int(steered.best) == int(ranks.argmax())
    assert int(steered.best) != int(steered.rewards.argmax())
    assert float(steered.weight[steered.best]) == 1.0


def test_missing_scores_are_counted_and_never_chosen() -> None:
    def half(samples: Any) -> Tensor:
        return torch.where(samples.media[:, 0] < 0, torch.nan, samples.media[:, 1])

    missing = Masked(FunctionReward("half", half))
    steered = steer(plain(particles=32), small(), [""] * 2, reward=missing)
    assert steered.invalid is not None
    assert bool((steered.invalid > 0).all())
    assert bool((steered.x_0[steered.best, 0] >= 0).all())
    # a masked sum still has parts that can be ranked
    parts = {"half": FunctionReward("half", half), "right": FunctionReward("right", lambda s: s.media[:, 0])}
    both = steer(plain(particles=32), small(), [""] * 2, reward=Masked(WeightedSum(parts, {"half": 1.0, "right": 1.0})))
    assert set(both.components) == {"half", "right"}
    assert bool((both.x_0[both.best, 0] >= 0).all())


def test_cost_is_the_published_formula_and_its_honest_form() -> None:
    schedule = Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5))
    x, y = 9.9, 1.2
    honest = 3 * x + y + 0.4 * (4 * x + y) + 0.16 * (5 * x + y) + 0.08 * (8 * x + y)
    assert abs(schedule.cost(x, y) - honest) < 1e-9
    assert abs(schedule.cost(x, y) - schedule.cost(x, y, start=0) - x) < 1e-9
    assert (schedule.affordable(2000, x, y), schedule.affordable(2000, x, y, start=0)) == (32, 38)
    assert Schedule(20).cost(x, y) == 20 * x + y
    assert schedule.spent(100) == (604, 164)  # fractions of 100 are whole: the formula is exact
    assert 100 * schedule.cost(1, 0) == pytest.approx(604)


def test_survivors_and_fusion() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 4.0, 0.0]])
    assert survivors(scores, 0.5).tolist() == [[0, 2]]  # round(2.5) is 2; of equal scores the first
    assert survivors(scores, 0.01).tolist() == [[0]]
    both = torch.tensor([[[1.0, 2.0, math.nan]], [[10.0, 30.0, 20.0]]])
    assert fused(both)[0, :2].tolist() == [1.0, 4.0]
    assert math.isnan(float(fused(both)[0, 2]))
    assert torch.equal(fused(both[:1])[0, :2], both[0, 0, :2].double())


def test_a_perfect_verifier_finds_the_best_and_more_candidates_are_better() -> None:
    rewards = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    schedule = Schedule(20, (2, 6), (0.5, 0.25))
    assert torch.equal(replay(schedule, [rewards, rewards], rewards).best, rewards[0].argmax(-1))
    values = [rewards + 1e-3, rewards]
    curve = budget_curve(schedule, values, rewards, [1, 8, 64], Noise(0), repeats=4)[:, 0]
    alone = budget_curve(Schedule(20), [], rewards, [1, 8, 64], Noise(0), repeats=4)[:, 0]
    torch.testing.assert_close(curve, alone)
    assert bool((curve.diff() > 0).all())
    assert abs(float(curve[2]) - float(rewards.amax(-1).mean())) < 1e-6
    with pytest.raises(UserError, match="the record holds 64"):
        budget_curve(schedule, values, rewards, [65], Noise(0))


# --- the fit ----------------------------------------------------------------------------------------------------------


@cache
def fitted() -> TTSnap:
    steerer = ttsnap(prune_steps=(2, 4), keep=(0.5, 0.5))
    steerer.fit(small(), denoiser(small().model, forward_batch=64), small().reward, [""], Noise(1))
    return steerer


def test_a_fit_returns_tau_at_every_prune_step_and_counts_what_it_cost() -> None:
    steerer, model = ttsnap(prune_steps=(2, 4), keep=(0.5, 0.5)), denoiser(small().model, forward_batch=64)
    told: list[tuple[int, int]] = []
    metrics = steerer.fit(
        small(), model, small().reward, [""], Noise(1), progress=lambda step, steps, ess: told.append((step, steps))
    )
    assert set(metrics) == {f"{name}/step_{step}" for name in ("tau", "tau_plain") for step in (2, 4)}
    assert model.ledger.nfe == 8 * (20 + 10)
    assert model.ledger.reward_calls == 20 + 10 + 2 * 10  # labels of both records, plain scores at two steps
    levels = 1 + len(range(2, 6))  # the final samples, then 14 of 20 in proportion
    assert model.ledger.auxiliary_calls == 20 * levels + 2 * 10
    assert told == [(level + 1, levels) for level in range(levels)]
    assert model.ledger.gradient_passes == 0


def test_steering_before_the_fit_fits_first_and_pays_for_it() -> None:
    steerer: Fitted = ttsnap()
    price, fit = ttsnap().price(8), ttsnap().fit_price(small())
    first = steer(steerer, small(), [""])
    assert first.ledger == price + fit
    again = steer(steerer, small(), [""])
    assert first.ledger.nfe == again.ledger.nfe + 8 * 30
    assert again.ledger.nfe == 13 * 1 + 5 * 2 + 2 * 2 + 1 * 3
    assert (again.ledger.reward_calls, again.ledger.auxiliary_calls) == (1, 13 + 5 + 2)
    assert again.ledger == ttsnap_with(steerer).price(8)
    assert torch.equal(first.x_0, again.x_0)


def ttsnap_with(steerer: Fitted) -> TTSnap:
    """Another steerer that was given what this one has learned."""
    other = ttsnap()
    other.load_state_dict(steerer.state_dict())
    return other


def test_what_was_learned_comes_back_bit_for_bit_and_belongs_to_its_task() -> None:
    state = fitted().state_dict()
    other = ttsnap(prune_steps=(2, 4), keep=(0.5, 0.5))
    other.load_state_dict(state)
    assert torch.equal(steer(other, small(), [""]).x_0, steer(fitted(), small(), [""]).x_0)
    coarse = replace(small(), sampler=replace(small().sampler, grid=uniform_grid(8, 3.0)))
    with pytest.raises(UserError, match="another grid"):
        steer(other, coarse, [""])
    with pytest.raises(UserError, match=r"no weights for step 2 and the reward 'mine'"):
        steer(other, small(), [""], reward=FunctionReward("mine", lambda s: s.media[:, 0]))
    later = ttsnap(prune_steps=(3,), keep=(0.5,))
    later.load_state_dict(state)
    with pytest.raises(UserError, match="no weights for step 3"):
        steer(later, small(), [""])
    with pytest.raises(UserError, match="no weights of a noise-aware reward"):
        later.load_state_dict({"other": torch.zeros(1)})


def recorded(task: Task, images: int = 20) -> tuple[Any, Any, Any, Tensor]:
    """(distillation, term, trajectories, labels)."""
    model = denoiser(task.model, forward_batch=64)
    distillation = ttsnap().distillation(task, model, task.reward, task.prompts[:2])
    rows = torch.arange(len(distillation.latent.prompts))
    with torch.no_grad():
        known = distillation.recorded(rows, images, Noise(4), range(8))
        (term,) = distillation.terms.values()
        return distillation, term, known, distillation.score(term, known.x_0, known.prompt)


def test_predictions_are_those_of_the_chain_and_the_last_is_its_sample() -> None:
    _, _, known, label = recorded(small())
    assert set(known.predictions) == set(range(8))
    assert torch.equal(known.predictions[7], known.x_0)  # a step of DDIM to 0 ends in its prediction
    assert torch.equal(label, small().reward.score(samples_of(known.x_0)))
    assert not torch.equal(label, small().reward.score(samples_of(known.predictions[2])))


def samples_of(x: Tensor) -> Samples:
    return Samples(x, [""] * len(x), [""] * len(x), torch.zeros(len(x), dtype=torch.int64))


def weights(module: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in module.state_dict().values()])


def test_every_level_starts_from_the_weights_before_it_with_a_new_optimiser() -> None:
    """So two levels in one go are the same as two fits, the second from what the first has saved."""
    distillation, _, known, label = recorded(small())
    config, levels = Curriculum(batch=10, hidden=8), [Level(5, 1), Level(3, 2)]

    def run(*parts: tuple[int, list[Level]]) -> Tensor:
        verifier = distillation.regressor()
        for number, part in parts:
            state = {key: value.clone() for key, value in verifier.state_dict().items()}
            verifier = distillation.regressor()
            verifier.load_state_dict(state)
            verifier.calibrate(known.x_0, known.condition, label)
            for offset, level in enumerate(part):
                source = Apart(Noise(2), f"level {number + offset}")
                fit_level(verifier, level, known, distillation.latent, label, config, source)
        return weights(verifier)

    whole = distillation.regressor()
    seen = list(fit_curriculum(whole, levels, known, distillation.latent, label, config, Noise(2)))
    assert seen == [5, 3]
    assert torch.equal(weights(whole), run((0, levels[:1]), (1, levels[1:])))
    assert not torch.equal(weights(whole), run((1, levels[1:])))  # a level without its warm start is another fit


def test_a_copy_of_a_network_reward_learns_and_the_reward_itself_does_not() -> None:
    task = Digits(DigitsConfig(steps=4, reward="margin")).task()
    assert isinstance(task.reward, ClassifierReward)
    before = weights(task.reward.network)
    steerer = ttsnap(prune_steps=(1,), keep=(0.5,), images=4, learning_rate=1e-3, validation_images=4)
    model = denoiser(task.model, forward_batch=64)
    metrics = steerer.fit(task, model, task.reward, task.prompts[:3], Noise(0))
    assert torch.equal(weights(task.reward.network), before)
    assert set(metrics) == {"tau/step_1", "tau_plain/step_1"}
    (verifier,) = (
        steerer.distillation(task, model, task.reward, ["bold three"]).verifiers(steerer.learned, (1,)).values()
    )
    tuned = verifier["margin"]
    assert isinstance(tuned, TunedReward)
    assert tuned.module is not task.reward.network
    assert not torch.equal(weights(tuned.module), before)
    assert steer(steerer, task, ["bold two"]).x_0.shape == (6, 1, 8, 8)


def test_a_prompt_class_that_was_not_fitted_is_refused_by_a_regressor() -> None:
    condition = torch.tensor([0, 1, 0, 1])
    regressor = Regressor((2,), torch.arange(3), hidden=4)
    x = torch.randn(4, 2)
    regressor.calibrate(x, condition, x[:, 0])
    assert regressor(x, condition).shape == (4,)
    with pytest.raises(UserError, match="prompted=false"):
        regressor(x, torch.tensor([0, 1, 2, 1]))
    free = Regressor((2,), None, hidden=4)
    assert free(x, torch.tensor([0, 1, 2, 1])).shape == (4,)


def test_the_regressor_takes_the_units_of_samples_and_rewards() -> None:
    """Scaling data and rewards changes its output in proportion."""
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    one, other = Regressor((2,), hidden=8), Regressor((2,), hidden=8)
    one.calibrate(x, None, x[:, 0])
    other.calibrate(100 * x, None, 7 * x[:, 0] + 3)
    torch.testing.assert_close(7 * one(x, None) + 3, other(100 * x, None), rtol=1e-4, atol=1e-4)


def test_tokens_have_noise_aware_rewards_too() -> None:
    task = sequence_truth().task
    steerer = ttsnap(kernel="task", prune_steps=(2,), keep=(0.5,), first_level=3)
    steered = steer(steerer, task, [""])
    assert steered.x_0.shape == (6, 6)
    assert not steered.x_0.is_floating_point()


def test_losses_are_what_their_names_say() -> None:
    predicted = torch.tensor([0.0, 1.0, 5.0])
    label, prompt = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1])
    plain_loss = level_loss(predicted, label, prompt, Curriculum())
    assert float(plain_loss) == pytest.approx((1 + 4 + 9) / 3)
    # one pair in prompt 0: the second sample is better by 1, at temperature 0.5
    pairs = Curriculum(regression_weight=0.0, preference_weight=2.0)
    assert float(level_loss(predicted, label, prompt, pairs)) == pytest.approx(2 * math.log1p(math.exp(-2)), rel=1e-5)
    alone = level_loss(predicted.clone().requires_grad_(), label, torch.arange(3), pairs)
    alone.backward()
    assert float(alone.detach()) == 0
    scaled = Curriculum(standardise=True)
    one = level_loss(predicted, label, prompt, scaled)
    torch.testing.assert_close(one, level_loss(10 * predicted + 3, 4 * label - 1, prompt, scaled), rtol=1e-4, atol=0)


def test_batches_of_the_preference_loss_hold_whole_prompts() -> None:
    prompt = torch.arange(6).repeat_interleave(4)
    together = prompt[order_of(prompt, Curriculum(preference_weight=1.0), Noise(0), 3, 0)]
    assert bool((together.reshape(6, 4) == together.reshape(6, 4)[:, :1]).all())
    assert sorted(order_of(prompt, Curriculum(), Noise(0), 3, 0).tolist()) == list(range(24))


def test_missing_labels_are_left_out_of_the_fit() -> None:
    reward = Masked(FunctionReward("half", lambda s: torch.where(s.media[:, 0] < 0, torch.nan, s.media[:, 1])))
    steerer = ttsnap(prune_steps=(4,), keep=(0.5,))
    metrics = steerer.fit(small(), denoiser(small().model, forward_batch=64), reward, [""], Noise(1))
    assert math.isfinite(metrics["tau/step_4"])
    assert all(bool(value.isfinite().all()) for value in steerer.state_dict().values())


def test_verifiers_are_copies_for_every_use() -> None:
    distillation, term, _, _ = recorded(small(), 2)
    assert verifier_of(term, distillation.regressor).module is not verifier_of(term, distillation.regressor).module


def test_the_published_schedules_scale_with_the_grid() -> None:
    assert ttsnap().schedule(20) == Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5))
    assert ttsnap().schedule(20, 3) == Schedule(20, (4, 6, 11), (0.4, 0.5, 0.6))
    assert ttsnap().schedule(10).at == (1, 3, 5)


def test_what_a_user_can_get_wrong() -> None:
    task, model = small(), denoiser(small().model)

    def refused(match: str, reward: Any = None, fit: bool = False, **settings: Any) -> None:
        steerer, wanted = ttsnap(**settings), task.reward if reward is None else reward
        call = partial(steerer.fit if fit else steerer.steer, task, model, wanted, [""], Noise(0))
        with pytest.raises(UserError, match=match):
            call()

    refused("need one fraction each", prune_steps=(2, 4))
    refused("must rise", prune_steps=(4, 2, 5))
    refused(r"lie in 0\.\.7", prune_steps=(2, 4, 8))
    refused("above 0 and at most 1", keep=(0.4, 0.0, 0.5))
    refused("comes before the first prune step", prune_steps=(2, 4), keep=(0.5, 0.5), first_level=1)
    refused("beyond the last step", first_level=8)
    refused("learns nothing", fit=True, value="posterior_mean")
    refused("nothing to learn", fit=True, prune_steps=(), keep=())
    nothing = WeightedSum({"a": task.reward}, {"a": 0.0})
    refused("every weight", reward=nothing)
    for wrong in ({"particles": 0}, {"value": "rollout"}, {"images": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValidationError):
            TTSnapConfig.model_validate(wrong)


def test_rounds_of_a_budget_are_judged_by_the_same_ranks() -> None:
    """The total is all x, which is large; by ranks y counts as much, among the finished samples of all rounds."""
    task = small()
    parts: dict[str, Reward] = {
        "x": FunctionReward("x", lambda s: 100 * s.media[:, 0]),
        "y": FunctionReward("y", lambda s: s.media[:, 1]),
    }
    reward, prompts = WeightedSum(parts, {"x": 1.0, "y": -2.0}), ["", ""]
    own = {"particles": 6, "value": "posterior_mean", "prune_steps": (3,), "keep": (0.5,)}
    found: dict[str, Steered] = {}
    for fusion in ("ranks", "total"):
        steerer = TTSnap(TTSnapConfig.model_validate({**own, "fusion": fusion}))
        model = denoiser(task.model)
        found[fusion] = steer_within(
            steerer, task, model, reward, prompts, Noise(0), budget=Budget(nfe=4 * steerer.price(8).nfe)
        )
    by_ranks = found["ranks"]
    assert len(by_ranks.x_0) == 2 * 4 * 3
    for prompt in (0, 1):
        mine = (by_ranks.group == prompt).nonzero()[:, 0]
        x, y = (by_ranks.components[name][mine].argsort().argsort() for name in ("x", "y"))
        assert int(by_ranks.best[prompt]) == int(mine[(x + (len(mine) - 1 - y)).argmax()])
        assert float(by_ranks.weight[by_ranks.best[prompt]]) == 1.0
        assert float(by_ranks.weight[mine].sum()) == 1.0
        mine = (found["total"].group == prompt).nonzero()[:, 0]
        assert int(found["total"].best[prompt]) == int(mine[found["total"].rewards[mine].argmax()])
    # and that is another choice than the best total
    highest = [int(by_ranks.rewards[by_ranks.group == prompt].argmax()) + 12 * prompt for prompt in (0, 1)]
    assert by_ranks.best.tolist() != highest
