"""DenseGRPO: gains of ODE completions, compared step by step, under noise rates that are calibrated once and kept."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from chains import SMALL, by_hand, collected, standardised, table, task
from difftilt.checks.trial import loop_of, make_method, trained, with_reward
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.dense_grpo import Config, DenseGRPO
from difftilt.process.gaussian import GaussianProcess, RectifiedFlow, cosine_schedule
from difftilt.process.grid import uniform_grid
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.vector import distance
from difftilt.sampling.kernels import FlowSDE, StepwiseSDE, largest_rates
from difftilt.sampling.presets import Preset, flow_sde
from difftilt.sampling.rollout import replay
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.sequences import Sequences
from difftilt.testbeds.shapes import Shapes
from difftilt.training.calibration import adjusted, calibrate, count_signs, draws, rate_bounds
from difftilt.training.experience import PromptBatch
from difftilt.training.world import World
from training_runs import train

FIXED: dict[str, Any] = {"calibration_rounds": 0}
CALIBRATED: dict[str, Any] = {"calibration_rounds": 3, "calibration_samples": 8}


def clean(**changes: Any) -> Any:
    """A task whose sampler ends by the ODE."""
    base = task(**changes)
    return replace(base, sampler=replace(base.sampler, clean_end=True))


@pytest.mark.parametrize("share_start", [False, True])
@pytest.mark.parametrize("credit", ["gain", "next"])
def test_a_steps_advantage_is_its_gain_between_ode_completions_of_the_current_policy(
    share_start: bool, credit: str
) -> None:
    on = clean(classes=4)
    loop, experience = collected(
        "dense-grpo", on, apart=True, share_start=share_start, credit=credit, kl_weight=0.0, **FIXED
    )
    rewards = by_hand(loop, experience)
    assert rewards.shape == (16, 10)
    assert bool((rewards[:, 0].reshape(4, 4).std(1) == 0).all()) == share_start
    values = rewards.diff(dim=1) if credit == "gain" else rewards[:, 1:]
    found = table(experience).double()
    assert torch.allclose(found, standardised(values, 4), atol=2e-3)
    # every step is compared on its own, and the terminal reward is not in it
    assert torch.allclose(found.reshape(4, 4, 9).mean(1), torch.zeros(4, 9, dtype=torch.float64), atol=1e-5)
    assert float((found[:, 0] - found[:, 5]).abs().max()) > 0.5


def test_where_the_last_step_is_noisy_its_gain_is_measured_but_not_trained() -> None:
    loop, experience = collected("dense-grpo", **FIXED)
    rewards = by_hand(loop, experience)
    assert sorted(experience.edges.step.unique().tolist()) == list(range(9))
    # the sample is not the completion of the last recorded state: its reward is no neighbour of the trained gains
    expected = standardised(rewards[:, :-1].diff(dim=1), 4)
    assert torch.allclose(table(experience)[:, :8].double(), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("settings", "nfe", "rewards"),
    [
        ({}, 16 * (10 + 45), 16 * 11),
        ({"share_start": True}, 16 * (10 + 45) - 12 * 9, 16 * 11 - 12),
        ({"completion_steps": 1}, 16 * 10, 16 * 11),
        ({"completion_steps": 2}, 16 * (10 + 9), 16 * 11),
        ({"completion_steps": 50}, 16 * (10 + 45), 16 * 11),
        ({"window": {"width": 2, "motion": "sliding"}}, 16 * (10 + 9 + 8), 16 * 3),
    ],
)
def test_the_cost_is_counted_exactly(settings: dict[str, Any], nfe: int, rewards: int) -> None:
    loop, _ = collected("dense-grpo", **FIXED, **settings)
    assert (loop.run.ledger.nfe, loop.run.ledger.reward_calls) == (nfe, rewards)


def test_calibration_is_paid_once_and_counted() -> None:
    loop, _ = collected("dense-grpo", **CALIBRATED)
    assert (loop.run.ledger.nfe, loop.run.ledger.reward_calls) == ((16 + 24) * 55, 16 * 11 + 24 * 10)
    loop.run.begin(1)
    with torch.no_grad():
        loop.method.collect(loop.run)
    assert loop.run.ledger.nfe == (32 + 24) * 55


def test_a_step_whose_gains_are_all_equal_teaches_nothing_and_the_others_do() -> None:
    on = with_reward(task(), lambda samples: (samples.media[:, 0] > 0).float())
    _, experience = collected("dense-grpo", on, **FIXED)
    edges = experience.edges
    assert edges.advantage is not None
    assert edges.mask is not None
    values = table(experience).reshape(4, 4, 9)
    still = (values == 0).all(1)
    assert bool(still.any())
    assert not bool(still.all())
    assert torch.equal(edges.mask, edges.advantage[:, 0] != 0)


def test_rollout_and_replay_use_the_calibrated_rates_and_later_iterations_keep_them() -> None:
    loop, experience = collected("dense-grpo", **CALIBRATED)
    method, edges = loop.method, experience.edges
    assert isinstance(method, DenseGRPO)
    psi = method.state_dict()["psi"]
    grid = loop.run.task.sampler.grid
    first = FlowSDE(0.7).coefficient(RectifiedFlow(), grid[:-1], grid[1:])
    assert bool((psi != first)[:-1].all())
    assert psi[-1] == first[-1]  # never trained, so never calibrated
    assert method.preset.kernel == StepwiseSDE(tuple(grid[:-1].tolist()), tuple(psi.tolist()))
    assert edges.log_prob is not None
    assert edges.x_s is not None
    with torch.no_grad():
        for preset, same in ((method.preset, True), (flow_sde(0.7), False)):
            moment = replay(loop.run.denoiser("current"), preset, edges, experience.condition)
            assert torch.allclose(preset.log_prob(moment.step, edges.x_s), edges.log_prob, atol=1e-5) == same
            if same:
                expected = psi[edges.step] * (grid[edges.step] - grid[edges.step + 1]).sqrt()
                assert torch.allclose(moment.step.std.double(), expected, rtol=1e-4)  # type: ignore[attr-defined]
    loop.run.begin(1)
    with torch.no_grad():
        loop.method.collect(loop.run)
    assert torch.equal(method.state_dict()["psi"], psi)


def test_rates_are_remembered_and_missing_ones_are_not_taken_for_rates() -> None:
    loop, _ = collected("dense-grpo", **CALIBRATED)
    fresh = make_method("dense-grpo", loop.run.task, **{**SMALL, **CALIBRATED})
    assert isinstance(fresh, DenseGRPO)
    assert bool(fresh.state_dict()["psi"].isnan().all())
    uncalibrated = fresh.preset
    fresh.load_state_dict(loop.method.state_dict())
    assert isinstance(loop.method, DenseGRPO)
    assert fresh.preset == loop.method.preset
    fresh.load_state_dict(make_method("dense-grpo", loop.run.task, **{**SMALL, **CALIBRATED}).state_dict())
    assert fresh.preset == uncalibrated


def test_a_resumed_run_goes_on_with_its_rates(tmp_path: Path) -> None:
    settings: dict[str, Any] = {f"method_{key}": value for key, value in CALIBRATED.items()}
    whole = train("dense-grpo", tmp_path / "whole", iterations=2, checkpoint_every=1, **settings)
    train("dense-grpo", tmp_path / "parts", iterations=1, checkpoint_every=1, **settings)
    parts = train("dense-grpo", tmp_path / "parts", iterations=2, checkpoint_every=1, resume=True, **settings)
    assert [row["nfe"] for row in parts.rows] == [row["nfe"] for row in whole.rows]
    assert parts.rows[-1]["reward_mean"] == whole.rows[-1]["reward_mean"]
    assert whole.rows[0]["nfe"] > whole.rows[1]["nfe"]


@pytest.mark.parametrize(
    ("settings", "chains"),
    [
        ({"groups": 16, "group_size": 16}, 256),
        ({"groups": 12, "group_size": 16}, 192),
        ({"groups": 1, "group_size": 8}, 32),  # one round, though an iteration has fewer chains
        ({"groups": 1, "group_size": 8, "calibration_rounds": 2, "calibration_samples": 8}, 16),
        ({"groups": 1, "group_size": 8, **FIXED}, 0),
    ],
)
def test_a_calibration_costs_no_more_than_an_iteration_unless_told_to(settings: dict[str, Any], chains: int) -> None:
    loop = loop_of("dense-grpo", task(steps=3), 1024, **settings)
    with torch.no_grad():
        loop.method.collect(loop.run)
    own = settings["groups"] * settings["group_size"]
    assert loop.run.ledger.reward_calls == own * 4 + chains * 3
    assert loop.run.ledger.nfe == (own + chains) * 6


def test_every_round_has_noise_of_its_own_and_none_of_the_iterations() -> None:
    loop, _ = collected("dense-grpo", **FIXED)
    config, seen = Config(calibration_rounds=3, calibration_samples=8), list[int]()

    def measure(batch: PromptBatch, preset: Preset) -> Tensor:
        assert torch.equal(batch.group, batch.index)  # one start each, even where a group shares one
        seen.extend(batch.index.tolist())
        return torch.ones(8, 9)

    found = calibrate(loop.run, config, loop.run.task.sampler.grid, FlowSDE(0.7), measure, 16)
    assert sorted(seen) == list(range(16, 40))
    assert found.signs[:, 0].tolist() == [8] * 9 + [0]


def test_rounds_draw_different_prompts_and_the_same_on_any_number_of_processes() -> None:
    loop, _ = collected("dense-grpo", task(classes=8), **FIXED)
    whole = draws(loop.run, 3, 8, 16)
    prompts = [tuple(batch.prompt.tolist()) for batch in whole]
    assert len(set(prompts)) == 3
    assert sorted(place for batch in whole for place in batch.index.tolist()) == list(range(16, 40))
    for size in (2, 4):
        parts = [draws(replace(loop.run, world=World(rank, size)), 3, 8, 16) for rank in range(size)]
        for number, batch in enumerate(whole):
            assert torch.equal(torch.cat([part[number].index for part in parts]), batch.index)
            assert torch.equal(torch.cat([part[number].prompt for part in parts]), batch.prompt)
    with pytest.raises(UserError, match="multiple of 3"):
        draws(replace(loop.run, world=World(0, 3)), 3, 8, 16)


def test_every_round_is_measured_under_the_rates_of_the_round_before() -> None:
    """Gains that balance up to a rate of the step's own: the rates settle around it, far from both bounds."""
    loop, _ = collected("dense-grpo", **FIXED)
    config = Config(calibration_rounds=60, calibration_samples=8, calibration_change=0.05)
    grid = loop.run.task.sampler.grid
    first, _, largest = rate_bounds(RectifiedFlow(), grid, FlowSDE(0.7))
    wanted = first + (largest - first) * torch.linspace(0.2, 0.6, 10, dtype=torch.float64)
    mixed = torch.tensor([1.0, -1.0] * 4)

    def measure(batch: PromptBatch, preset: Preset) -> Tensor:
        assert isinstance(preset.kernel, StepwiseSDE)
        hurts = torch.tensor(preset.kernel.rates) > wanted
        return torch.where(hurts, -1.0, mixed[:, None])[:, :-1]

    rates = calibrate(loop.run, config, grid, FlowSDE(0.7), measure, 16).rates
    assert float((rates - wanted)[:-1].abs().max()) <= 0.05 + 1e-9
    assert rates[-1] == first[-1]


def test_signs_decide_and_ties_do_not() -> None:
    gains = torch.tensor([[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, -1.0, 1.0], [2.0, 0.0, -2.0, 0.0], [-2.0, 0.0, 0.0, 0.0]])
    signs = count_signs(gains)
    assert signs.tolist() == [[2, 2, 0], [0, 0, 4], [0, 3, 1], [1, 0, 3]]
    rates = adjusted(torch.ones(4, dtype=torch.float64), signs, 0.25, 0.1)
    assert rates.tolist() == pytest.approx([1.1, 1.0, 0.9, 0.9])


def test_rates_stay_between_their_bounds() -> None:
    grid = uniform_grid(10, 3.0)
    first, smallest, largest = rate_bounds(RectifiedFlow(), grid, FlowSDE(0.7))
    assert bool((smallest < first).all())
    assert bool((first < largest).all())
    t, s = grid[:-1], grid[1:]
    assert torch.allclose(1 - largest**2 * (t - s) / (2 * t), torch.full_like(t, 0.1))
    for tolerance, bound in ((0.9, largest), (0.01, smallest)):  # nearly everything is balanced, or nearly nothing
        settings: dict[str, Any] = {"calibration_rounds": 1, "calibration_samples": 8, "calibration_change": 100.0}
        loop, _ = collected("dense-grpo", task(), calibration_tolerance=tolerance, **settings)
        psi, signs = loop.method.state_dict()["psi"], loop.method.state_dict()["signs"]
        gap = (signs[:, 0] - signs[:, 1]).abs()[:-1]
        hit = gap < 7 if tolerance > 0.5 else gap > 0
        assert bool(hit.any())
        assert torch.allclose(psi[:-1][hit], bound[:-1][hit])


@pytest.mark.parametrize("process", [RectifiedFlow(), cosine_schedule()])
def test_at_the_largest_rate_a_step_keeps_nothing_of_its_state(process: GaussianProcess) -> None:
    t, s = torch.tensor([0.8, 0.4], dtype=torch.float64), torch.tensor([0.6, 0.3], dtype=torch.float64)
    rates = tuple(largest_rates(process, t, s).tolist())
    x, velocity = torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.tensor([[0.3], [0.1]], dtype=torch.float64)

    def mean(state: Tensor) -> Tensor:
        return StepwiseSDE((0.8, 0.4), rates)(process.predict(velocity, state, t, "velocity"), state, t, s).mean

    assert torch.allclose(mean(x), mean(x + 1), atol=1e-9)


def test_with_the_rates_of_flow_sde_the_stepwise_sde_is_flow_sde() -> None:
    grid = uniform_grid(10, 3.0)
    process = RectifiedFlow()
    rates = FlowSDE(0.7).coefficient(process, grid[:-1], grid[1:])
    kernel = StepwiseSDE(tuple(grid[:-1].tolist()), tuple(rates.tolist()))
    t, s = grid[:-1].float(), grid[1:].float()
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0))
    prediction = process.predict(x.flip(0), x, t, "velocity")
    one, other = kernel(prediction, x, t, s), FlowSDE(0.7)(prediction, x, t, s)
    assert torch.allclose(one.mean, other.mean, atol=1e-5)
    assert torch.allclose(one.std, other.std, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "guard", "share_start": True},
        {"objective": "reinforce"},
        {"kernel": "cps", "clip_range": 0.01, **FIXED},
        {"kernel": "dance_sde", "noise_level": 0.3},
        {"window": {"width": 3}, "output": "x0"},
        {"completion_steps": 2, "advantage_std": "global", "ddof": 1},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values())[:40],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    result = trained("dense-grpo", task(steps=5), 2, 1e-3, count=8, **{**SMALL, **CALIBRATED, **settings})
    assert all(row["grad_norm"] > 0 for row in result.rows)


def test_ancestral_steps_of_a_variance_preserving_model_train() -> None:
    on = task(process="vp", kernel="ancestral")
    result = trained("dense-grpo", on, 2, 1e-3, count=8, kernel="ddim", noise_level=1.0, **SMALL, **FIXED)
    assert result.rows[-1]["grad_norm"] > 0


def test_digits_train() -> None:
    settings: dict[str, Any] = {"groups": 1, "group_size": 2, "steps": 4, "calibration_rounds": 1}
    loop = loop_of("dense-grpo", Digits().task(), 32, calibration_samples=8, **settings)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    (phase,) = loop.method.phases(loop.run)
    assert loop.updater.run_phase(phase, experience, loop.run.noise)["grad_norm"] > 0


@pytest.mark.long
def test_shapes_train() -> None:
    settings: dict[str, Any] = {"groups": 1, "group_size": 2, "steps": 4, "calibration_rounds": 1}
    loop = loop_of("dense-grpo", Shapes().task(), 32, calibration_samples=8, **settings)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    (phase,) = loop.method.phases(loop.run)
    assert loop.updater.run_phase(phase, experience, loop.run.noise)["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "cps"}, "flow_sde or dance_sde"),
        ({"window": {"width": 10}}, "window"),
        ({"objective": "guard", "kernel": "cps"}, "flow_sde"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("dense-grpo", task(), **{**SMALL, **settings})


@pytest.mark.parametrize("name", ["dense-grpo", "tp-grpo"])
def test_tokens_and_rewards_without_one_scale_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="tokens"):
        make_method(name, Sequences().task(), **SMALL)
    scaled = WeightedSum({"near": distance(torch.zeros(2))}, {"near": 1.0}, normalise="batch")
    with pytest.raises(UserError, match="normalise"):
        make_method(name, replace(task(), reward=scaled), **SMALL)
