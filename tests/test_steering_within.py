import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import difftilt
from difftilt.checks.tilted_truths import Truth, ring_truth, sequence_truth, z_score
from difftilt.errors import GuardError, RewardError, UserError
from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.ledger import Ledger
from difftilt.recipes import load_recipe
from difftilt.rewards import FunctionReward, Masked, WeightedSum
from difftilt.rewards.masked import parts_masked
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM, FlowSDE
from difftilt.sampling.noise import Apart, Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import NoiseSource
from difftilt.sampling.rollout import sample, start_state
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.budget import Budget, Meter
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.merging import merged
from difftilt.steering.pricing import fitted_to, largest, price_of, scaled
from difftilt.steering.protocol import Steered
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.steering.within import steer_within
from difftilt.testbeds.digits import Digits
from difftilt.training.protocol import Task
from difftilt.values import ClosedForm, LatentReward, Rollout, Rows


def fk(**settings: Any) -> FKSteering:
    return FKSteering(FKSteeringConfig.model_validate({"temperature": 1.0, "resample_at": 2, **settings}))


def within(steerer: Any, task: Task, prompts: int, budget: Budget, reward: Any = None) -> Steered:
    with torch.no_grad():
        return steer_within(
            steerer, task, denoiser(task.model), reward or task.reward, [""] * prompts, Noise(0), budget=budget
        )


def gaussian_steps() -> Truth:
    truth = ring_truth()
    return replace(truth, task=replace(truth.task, sampler=replace(truth.task.sampler, kernel=DDIM(1.0))))


@pytest.mark.parametrize(
    ("truth", "steerer"),
    [
        (ring_truth, BestOfN(BestOfNConfig(particles=3))),
        (ring_truth, fk(particles=3)),
        (gaussian_steps, fk(particles=3, guide_scale=0.5)),
        (ring_truth, SVDD(SVDDConfig(particles=2, children=3))),
        (sequence_truth, fk(particles=3, value="x0_samples", x0_samples=5)),
        (sequence_truth, fk(particles=3, value="rollout", x0_samples=2)),
        (sequence_truth, SVDD(SVDDConfig(particles=2, children=3, value="x0_samples", x0_samples=5))),
        (sequence_truth, SVDD(SVDDConfig(particles=2, children=3, value="rollout", x0_samples=2))),
    ],
)
def test_a_price_is_what_the_ledger_counts(truth: Any, steerer: Any) -> None:
    task: Task = truth().task
    model = denoiser(task.model)
    steered = steerer.steer(task, model, task.reward, [""] * 2, Noise(0))
    assert steered.ledger == price_of(steerer, task, model, task.reward) * 2


def test_a_guided_evaluation_costs_two() -> None:
    task = Digits().task()
    task = replace(task, sampler=replace(task.sampler, guidance=2.0))
    model, steerer = denoiser(task.model, guidance=2.0), BestOfN(BestOfNConfig(particles=2))
    steered = steerer.steer(task, model, task.reward, [task.heldout_prompts[0]], Noise(0))
    assert steered.ledger == price_of(steerer, task, model, task.reward)
    assert steered.ledger.nfe == 2 * 2 * (len(task.sampler.grid) - 1)


def test_the_number_of_particles_follows_from_the_budget() -> None:
    task = ring_truth().task
    free = BestOfN(BestOfNConfig())
    assert len(within(free, task, 3, Budget(nfe=100)).x_0) == 3 * (100 // 16)
    assert len(within(free, task, 3, Budget(nfe=100, reward_calls=4)).x_0) == 3 * 4
    assert largest(lambda count: count <= 37) == 37
    assert largest(lambda count: count <= 1) == 1


def test_a_chosen_number_is_repeated_with_new_noise() -> None:
    task = ring_truth().task
    steered = within(BestOfN(BestOfNConfig(particles=2)), task, 3, Budget(nfe=100))
    assert steered.ledger == Ledger(nfe=3 * 3 * 32, reward_calls=3 * 3 * 2)
    assert len(steered.x_0.unique(dim=0)) == 18
    # the first round is what a call without a budget gives
    with torch.no_grad():
        one = BestOfN(BestOfNConfig(particles=2)).steer(task, denoiser(task.model), task.reward, [""] * 3, Noise(0))
    assert torch.equal(steered.x_0.reshape(3, 6, 2)[:, :2], one.x_0.reshape(3, 2, 2))
    assert float(steered.weight.sum()) == 3
    best = steered.rewards.reshape(3, 6).argmax(1) + torch.arange(3) * 6
    assert torch.equal(steered.best, best)
    assert torch.equal(steered.weight.nonzero()[:, 0], best)


@pytest.mark.parametrize("truth", [ring_truth, sequence_truth])
def test_rounds_together_keep_the_normaliser(truth: Any) -> None:
    exact = truth()
    steps = len(exact.task.sampler.grid) - 1
    steered = within(fk(particles=8, temperature=exact.temperature), exact.task, 200, Budget(nfe=3 * 8 * steps))
    assert len(steered.x_0) == 200 * 3 * 8
    assert z_score(exact, steered) < 3.5


def test_rounds_weigh_by_their_estimates_of_z() -> None:
    one = steered_of(torch.tensor([0.25, 0.75]), log_z=0.0)
    other = steered_of(torch.tensor([0.5, 0.5]), log_z=1.0)
    both = merged([one, other])
    share = torch.tensor([0.0, 1.0]).double().softmax(0)
    expected = torch.cat([share[0] * one.weight, share[1] * other.weight])
    torch.testing.assert_close(both.weight, expected)
    torch.testing.assert_close(both.log_z.exp(), torch.tensor([(1 + torch.e) / 2]).double())
    ones = [replace(steered_of(torch.tensor([1.0, 0.0]), torch.nan)) for _ in range(3)]
    torch.testing.assert_close(merged(ones).weight, torch.tensor([1 / 3, 0.0] * 3).double())
    found = merged([replace(one, search=True) for one in ones]).weight
    assert found.tolist() == [0, 1, 0, 0, 0, 0]
    alike = merged([steered_of(torch.tensor([0.25, 0.75]), torch.nan), steered_of(torch.tensor([0.5, 0.5]), torch.nan)])
    torch.testing.assert_close(alike.weight, torch.tensor([0.125, 0.375, 0.25, 0.25]).double())


def steered_of(weight: Tensor, log_z: float) -> Steered:
    x, none = torch.arange(2.0)[:, None], torch.zeros(0, 1)
    group = torch.zeros(2, dtype=torch.int64)
    z = torch.tensor([log_z]).double()
    return Steered(x, x, group, weight.double(), x[:, 0], torch.tensor([1]), z, none, none, Ledger())


def test_too_little_is_refused_before_any_work() -> None:
    task = ring_truth().task
    model = denoiser(task.model)
    with pytest.raises(
        UserError, match=r"of 15 network evaluations .* = 1 can cost 16 network evaluations and 1 reward call$"
    ):
        steer_within(BestOfN(BestOfNConfig()), task, model, task.reward, [""], Noise(0), budget=Budget(nfe=15))
    with pytest.raises(UserError, match="these settings can cost 64 network"):
        steer_within(
            BestOfN(BestOfNConfig(particles=4)), task, model, task.reward, [""], Noise(0), budget=Budget(nfe=63)
        )
    assert model.ledger == Ledger()


def slowly(samples: Samples) -> Tensor:
    time.sleep(0.05)
    return samples.media[:, 0]


def test_seconds_end_a_call_after_a_round() -> None:
    task, began = ring_truth().task, time.monotonic()
    steered = within(BestOfN(BestOfNConfig(particles=2)), task, 1, Budget(seconds=0.3), FunctionReward("slow", slowly))
    took = time.monotonic() - began
    rounds = len(steered.x_0) // 2
    assert took >= 0.3
    assert 1 <= rounds <= 6
    # a reward slower than the budget: the one round that had begun comes out
    late = within(BestOfN(BestOfNConfig(particles=2)), task, 1, Budget(seconds=0.001), FunctionReward("slow", slowly))
    assert len(late.x_0) == 2
    assert not late.complete


def test_an_interrupt_keeps_the_finished_rounds() -> None:
    task, calls = ring_truth().task, [0]

    def interrupting(samples: Samples) -> Tensor:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return samples.media[:, 0]

    steered = within(
        BestOfN(BestOfNConfig(particles=2)), task, 1, Budget(nfe=10**6), FunctionReward("stop", interrupting)
    )
    assert not steered.complete
    assert len(steered.x_0) == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@dataclass
class Waiting:
    """An anytime steerer that notes what its meter allows."""

    asked: list[bool]

    def steer(self, *args: Any, meter: Meter | None = None, **extra: Any) -> Steered:
        assert meter is not None
        self.asked += [meter.allows(Ledger(nfe=more)) for more in (10, 11)]
        return steered_of(torch.tensor([0.5, 0.5]), 0.0)


def test_an_anytime_steerer_is_given_the_budget_of_all_prompts() -> None:
    waiting = Waiting([])
    within(waiting, ring_truth().task, 2, Budget(nfe=5))
    assert waiting.asked == [True, False]


def test_other_threads_are_metered_too() -> None:
    found: list[Steered] = []
    task, budget = ring_truth().task, Budget(nfe=32)
    run = threading.Thread(target=lambda: found.append(within(BestOfN(BestOfNConfig()), task, 1, budget)))
    run.start()
    run.join()
    assert len(found[0].x_0) == 2


class Unpriced:
    """Says nothing of its cost."""

    def steer(
        self, task: Task, denoise: Any, reward: Any, prompts: Any, noise: NoiseSource, *, index: Any = None,
        progress: Any = None,
    ) -> Steered:  # fmt: skip
        return steered_of(torch.tensor([0.5, 0.5]), 0.0)


def test_one_without_price_or_rounds_takes_no_budget() -> None:
    with pytest.raises(UserError, match="leave the budget out"):
        within(Unpriced(), ring_truth().task, 1, Budget(nfe=5))
    assert len(within(Unpriced(), ring_truth().task, 1, Budget()).x_0) == 2


def test_another_number_of_children_keeps_a_value_of_ones_own() -> None:
    value = torch.nn.Identity()
    assert scaled(SVDD(SVDDConfig(), value=value), 7).config.children == 7  # type: ignore[attr-defined]
    assert scaled(SVDD(SVDDConfig(), value=value), 7).value is value  # type: ignore[attr-defined]


def left(samples: Samples) -> Tensor:
    return -samples.media[:, 0]


def test_one_call_with_objects(tmp_path: Path) -> None:
    """A model, a function as reward, prompts: everything else has a default."""
    model = ring_truth().task.model
    result = difftilt.steer(model, left, ["a", "b"], method="svdd", temperature=0.2, children=4, particles=3, seed=1)
    assert result.steered.x_0.shape == (6, 2)
    assert float(result.steered.rewards.mean()) > 2
    assert result.steered.ledger.nfe == 6 * (1 + 4 * 49)
    saved = difftilt.steer(model, left, ["a", "b"], method="best-of-n", budget={"nfe": 200}, output=tmp_path / "out")
    assert len(saved.steered.x_0) == 8
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"config.yaml", "result.json", "samples.safetensors"}
    assert difftilt.report(tmp_path / "out").exists()
    task = ring_truth().task
    own = difftilt.steer(task, method=BestOfN(BestOfNConfig(particles=2)))
    assert torch.equal(own.steered.rewards, own.steered.x_0[:, 0])


def test_missing_scores_by_setting() -> None:
    model = ring_truth().task.model

    def half(samples: Samples) -> Tensor:
        return torch.where(samples.media[:, 0] < 0, torch.nan, samples.media[:, 0])

    with pytest.raises(RewardError, match="half"):
        difftilt.steer(model, half, [""], method="best-of-n", particles=8)
    result = difftilt.steer(model, half, [""], method="best-of-n", particles=8, invalid="mask")
    row = result.summary()["prompts"][0]
    assert row["invalid"] == int((result.steered.x_0[:, 0] < 0).sum()) > 0
    assert row["reward_mean"] == row["reward_best"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward": None}, "has no reward"),
        ({"prompts": None}, "has no prompts"),
        ({"prompts": []}, "prompts is empty"),
        ({"method": "svd"}, "svdd"),
        ({"childern": 3}, "childern"),
        ({"temperature": -1.0, "seed": -1}, "temperature"),
        ({"budget": {"nfe": 10}, "method": "best-of-n"}, "particles = 1 can cost 50 network evaluations"),
        ({"budget": {"hours": 1}}, "hours"),
        ({"method": BestOfN(BestOfNConfig()), "particles": 3}, "belong into it"),
        ({"overrides": ["steerer.particles=2"]}, "by keyword"),
    ],
)
def test_what_a_user_can_get_wrong(arguments: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"reward": left, "prompts": [""], "method": "svdd"} | arguments
    with pytest.raises(UserError, match=words):
        difftilt.steer(ring_truth().task.model, given.pop("reward"), given.pop("prompts"), **given)


def test_a_recipe_names_its_own_parts() -> None:
    with pytest.raises(UserError, match="method belongs to a model"):
        difftilt.steer("mixtures/best-of-n", method="svdd")
    settings: dict[str, Any] = {"steerer.particles": 3}
    bounded = difftilt.steer("mixtures/best-of-n", prompts=[""], budget={"reward_calls": 3}, **settings)
    assert len(bounded.steered.x_0) == 3


@pytest.mark.parametrize("chosen", [[], ["steerer.particles=3"]])
def test_a_written_recipe_gives_the_same_run_again(tmp_path: Path, chosen: list[str]) -> None:
    """A number that follows from the budget follows again; a chosen one, the default among them, is repeated."""
    tight = ["testbed.steps=4", "steering.budget.nfe=30", *chosen]
    values = {"testbed": {"name": "mixtures"}, "steerer": {"name": "best-of-n"}}
    first = difftilt.steer(values, output=tmp_path / "first", overrides=tight)
    again = difftilt.steer(tmp_path / "first" / "config.yaml", output=tmp_path / "again")
    assert torch.equal(first.steered.x_0, again.steered.x_0)
    assert first.steered.ledger == again.steered.ledger
    written = [(tmp_path / name / "config.yaml").read_text() for name in ("first", "again")]
    assert written[0] == written[1]
    assert ("particles:" in written[0]) == bool(chosen)
    count = len(difftilt.steer(values, overrides=["testbed.steps=4"]).steered.x_0)
    assert len(first.steered.x_0) // len(first.prompts) == (6 if chosen else 7) != count // len(first.prompts)


def test_a_typed_recipe_still_knows_what_nobody_chose(tmp_path: Path) -> None:
    values = {"testbed": {"name": "mixtures", "steps": 4}, "steerer": {"name": "best-of-n"}}
    typed = load_recipe(values)
    tight = Budget(nfe=30)
    found = [difftilt.steer(one, budget=tight).steered.x_0 for one in (typed, values)]
    assert torch.equal(*found)
    assert len(found[0]) == 7 * len(typed.testbed.build().task().heldout_prompts)
    plain = difftilt.steer(typed, output=tmp_path / "plain")
    # without a budget the default is what ran, and is written down
    default = BestOfNConfig().particles
    assert f"particles: {default}" in (tmp_path / "plain" / "config.yaml").read_text()
    assert len(plain.steered.x_0) == default * len(plain.prompts)
    assert load_recipe(typed.resolved()) == replace(typed, source="the recipe")


def test_a_call_of_objects_writes_down_no_number_that_the_budget_found(tmp_path: Path) -> None:
    task = ring_truth().task
    for name, tight in (("tight", Budget(nfe=64)), ("free", None)):
        difftilt.steer(task, prompts=[""], method="best-of-n", output=tmp_path / name, budget=tight)
        assert ("particles:" in (tmp_path / name / "config.yaml").read_text()) == (name == "free")


def test_rounds_of_one_sample_are_no_search() -> None:
    """Five rounds of one sample each weigh alike, whatever their rewards."""
    steered = within(SVDD(SVDDConfig(particles=1, children=2)), ring_truth().task, 2, Budget(nfe=5 * 31))
    assert len(steered.x_0) == 10
    torch.testing.assert_close(steered.weight, torch.full((10,), 0.2).double())


def test_a_budget_that_bounds_nothing_that_grows_leaves_the_settings() -> None:
    """A value that reads no prediction makes children free of evaluations."""
    task, steerer = ring_truth().task, SVDD(SVDDConfig(value="rollout", x0_samples=1))
    assert fitted_to(steerer, task, denoiser(task.model), task.reward, Budget(seconds=1.0)) is steerer
    closed = SVDD(SVDDConfig(), value=ClosedForm(lambda x, t, c: x[:, 0]))
    steered = within(closed, ring_truth().task, 1, Budget(reward_calls=40))
    assert steered.ledger.reward_calls <= 40


def test_a_round_without_a_score_loses_none_of_the_others() -> None:
    calls = [0]

    def third_fails(samples: Samples) -> Tensor:
        calls[0] += 1
        return torch.full((len(samples.media),), torch.nan if calls[0] == 3 else 1.0)

    reward = Masked(FunctionReward("fails", third_fails))
    steered = within(BestOfN(BestOfNConfig(particles=2)), ring_truth().task, 1, Budget(nfe=10 * 32), reward)
    assert len(steered.x_0) == 4


class Dear:
    """A value that evaluates the network once more, of which no price knows."""

    def __init__(self, model: NetworkDenoiser) -> None:
        self.model = model

    def __call__(self, x_t: Tensor, t: Tensor, condition: object, prediction: object, rows: Rows) -> Tensor:
        self.model(x_t, t, None)
        return x_t[:, 0]


def test_a_round_that_costs_more_than_its_price_is_an_error() -> None:
    task = ring_truth().task
    model = denoiser(task.model)
    steerer = SVDD(SVDDConfig(children=2), value=Dear(model))
    with (
        pytest.raises(GuardError, match="a round cost 61 network evaluations and 2 reward calls, and its price is 31"),
        torch.no_grad(),
    ):
        steer_within(steerer, task, model, task.reward, [""], Noise(0), budget=Budget(nfe=40))


def test_sums_of_rewards_cost_one_call_for_each_part() -> None:
    task = ring_truth().task
    total = WeightedSum({"a": FunctionReward("a", left), "b": FunctionReward("b", left)}, {"a": 1.0, "b": 2.0})
    steerer, model = BestOfN(BestOfNConfig(particles=3)), denoiser(task.model)
    for reward in (total, parts_masked(Masked(total))):
        with torch.no_grad():
            steered = steerer.steer(task, denoiser(task.model), reward, [""], Noise(0))
        assert steered.ledger == price_of(steerer, task, model, reward) == Ledger(nfe=48, reward_calls=6)


def test_a_rollout_of_a_clean_end_is_what_the_sampler_gives() -> None:
    task = ring_truth().task
    sampler = replace(task.sampler, kernel=FlowSDE(0.7), solver=None, clean_end=True)
    model, index = denoiser(task.model), torch.arange(4)
    rows, reward = Rows(index, index * 0, 0), LatentReward(task.reward, task.model.decode, [""], Ledger())
    value = Rollout(reward, model, Preset("p", FlowSDE(0.7)), sampler.grid, 1, 1.0, Noise(0), clean_end=True)
    with torch.no_grad():
        x = start_state(task.model.process, Noise(0), index, task.model.shape)
        found = value(x, torch.ones(4), None, None, rows)
        plain = sample(model, sampler, x, None, noise=Apart(Noise(0), "value 0"), index=index)
    torch.testing.assert_close(found.float(), plain[:, 0])
