"""Every variant of the policy gradient runs and does what sets it apart; what cannot work is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, trained, with_reward
from difftilt.credit.history import History
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.flow_grpo import Config, FlowGRPO
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.vector import distance, linear
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Noise
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.experience import Experience
from difftilt.training.policy_gradient import Window
from difftilt.training.protocol import Task

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4, "updates": 1}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(**changes)).task())


def collected(config: dict[str, Any], on: Task | None = None) -> Experience:
    loop = loop_of("flow-grpo", on or task(), **{**SMALL, **config})
    with torch.no_grad():
        return loop.method.collect(loop.run)


def test_all_steps_but_the_last_are_trained_with_the_samples_advantage() -> None:
    experience = collected({})
    edges = experience.edges
    assert edges.advantage is not None
    assert sorted(edges.step.unique().tolist()) == list(range(9))
    assert len(edges.step) == 16 * 9
    for sample in range(16):
        assert len(edges.advantage[edges.sample == sample].unique()) == 1


def test_the_last_step_is_never_trained_and_follows_the_ode_where_the_sampler_ends_clean() -> None:
    base = task()
    clean = replace(base, sampler=replace(base.sampler, clean_end=True))
    for one, noisy in ((base, True), (clean, False)):
        loop = loop_of("flow-grpo", one, **SMALL)
        with torch.no_grad():
            experience = loop.method.collect(loop.run)
        edges, x_0 = experience.edges, experience.x_0
        assert edges.x_s is not None
        assert x_0 is not None
        assert int(edges.step.max()) == 8
        last = edges.x_s[edges.step == 8]
        t, s = one.sampler.grid[-2].float().expand(16), one.sampler.grid[-1].float().expand(16)
        with torch.no_grad():
            ode = Euler()(loop.run.denoiser("current")(last, t, experience.condition), last, t, s).mean
        assert torch.allclose(ode, x_0, atol=1e-5) != noisy


def test_a_window_trains_its_steps_only_and_moves_with_the_iteration() -> None:
    experience = collected({"window": Window(width=2, motion="sliding", every=3)})
    assert sorted(experience.edges.step.unique().tolist()) == [0, 1]
    method = make_method("flow-grpo", task(), window=Window(width=2, motion="sliding", every=3), **SMALL)
    assert isinstance(method, FlowGRPO)

    def first(iteration: int) -> int:
        stochastic = method.plan(iteration, Noise(0).at(iteration)).stochastic
        assert stochastic is not None
        return int(stochastic.nonzero()[0])

    assert [first(i) for i in (0, 2, 3, 21, 23, 24)] == [0, 0, 1, 7, 7, 0]


def test_a_random_window_stays_in_the_first_half() -> None:
    method = make_method("flow-grpo", task(), window=Window(width=2), **SMALL)
    assert isinstance(method, FlowGRPO)
    starts: set[int] = set()
    for iteration in range(60):
        stochastic = method.plan(iteration, Noise(0).at(iteration)).stochastic
        assert stochastic is not None
        starts.add(int(stochastic.nonzero()[0]))
    assert starts == {0, 1, 2, 3}


def test_flash_saves_evaluations_after_the_window() -> None:
    window = Window(width=2, motion="sliding")
    loops = [loop_of("flow-grpo", task(), window=window, flash_steps=flash, **SMALL) for flash in (None, 3)]
    for loop in loops:
        with torch.no_grad():
            loop.method.collect(loop.run)
    assert [loop.run.ledger.nfe for loop in loops] == [16 * 10, 16 * (2 + 3)]


def test_sixty_percent_of_the_steps_are_drawn_for_each_sample() -> None:
    edges = collected({"step_fraction": 0.6}).edges
    assert edges.mask is not None
    counts = [int(edges.mask[edges.sample == sample].sum()) for sample in range(16)]
    assert counts == [5] * 16
    assert len({tuple(edges.mask[edges.sample == sample].tolist()) for sample in range(16)}) > 1


def test_shared_starts_are_equal_in_a_group_and_step_noise_is_not() -> None:
    edges = collected({"share_start": True}).edges
    assert edges.x_t is not None
    first = edges.x_t[edges.step == 0].reshape(4, 4, 2)
    second = edges.x_t[edges.step == 1].reshape(4, 4, 2)
    assert bool((first == first[:, :1]).all())
    assert len(first[:, 0].unique(dim=0)) == 4
    assert len(second.flatten(0, 1).unique(dim=0)) == 16


def test_groups_without_variance_teach_nothing() -> None:
    on = task(classes=4)
    flat = with_reward(on, lambda samples: torch.tensor([float(prompt[-1]) for prompt in samples.prompts]))
    edges = collected({}, flat).edges
    assert edges.mask is not None
    assert not bool(edges.mask.any())


def test_best_and_worst_halves_are_kept() -> None:
    experience = collected({"best_worst": 2})
    edges, rewards = experience.edges, experience.rewards
    assert edges.mask is not None
    assert rewards is not None
    kept = edges.sample[edges.mask].unique()
    for group in range(4):
        members = (experience.group == group).nonzero()[:, 0]
        order = members[rewards[members].argsort()]
        assert {int(order[0]), int(order[-1])} == set(kept.tolist()) & set(members.tolist())


@pytest.mark.parametrize(
    "settings",
    [
        {
            "kernel": "dance_sde",
            "noise_level": 0.3,
            "share_start": True,
            "step_fraction": 0.6,
            "output": "x0",
            "ddof": 1,
        },
        {"kernel": "cps", "clip_range": 0.01},
        {"kernel": "ddim", "noise_level": 1.0, "advantage": "history"},
        {"objective": "reinforce", "advantage": "none", "value_baseline": True},
        {"objective": "guard", "window": {"width": 2}},
        {"window": {"width": 4, "motion": "exponential_decay"}, "flash_steps": 2},
        {"kl": "flow_grpo"},
        {"kl": "velocity"},
        {"kl": "mean"},
        {"advantage": "leave_one_out", "best_worst": 4, "group_size": 6},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values())[:40],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    result = trained("flow-grpo", task(), 3, 1e-3, count=32, **{**SMALL, **settings})
    assert all(row["ratio_std"] < 1 for row in result.rows)
    assert all(row["grad_norm"] > 0 for row in result.rows)


def test_ddpo_trains_on_a_variance_preserving_model() -> None:
    result = trained(
        "flow-grpo", task(process="vp", kernel="ancestral"), 3, 1e-3, count=32, kernel="ddim", noise_level=1.0, **SMALL
    )
    assert result.rows[-1]["grad_norm"] > 0


def test_tokens_train_through_the_same_file() -> None:
    on = Sequences(SequencesConfig()).task()
    result = trained("flow-grpo", on, 3, 1e-3, count=32, kernel="unmasking", clip_range=0.2, **SMALL)
    assert result.rows[0]["ratio_mean"] == pytest.approx(1, abs=1e-6)
    assert result.rows[-1]["grad_norm"] > 0


def test_the_history_of_a_prompt_is_remembered_and_restored() -> None:
    loop = loop_of("flow-grpo", task(), advantage="history", **SMALL)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    state = loop.method.state_dict()
    assert int(History(state["history"]).held.sum()) == 16
    assert experience.rewards is not None
    again = make_method("flow-grpo", task(), advantage="history", **SMALL)
    again.load_state_dict(state)
    assert torch.equal(again.state_dict()["history"].nan_to_num(), state["history"].nan_to_num())


def test_normalised_rewards_do_not_let_the_widest_one_rule() -> None:
    wide = WeightedSum(
        {"near": distance(torch.zeros(2)), "right": linear(torch.tensor([100.0, 0.0]))}, {"near": 1.0, "right": 1.0}
    )
    on = replace(task(), reward=wide)

    def advantage_of(mode: str) -> Tensor:
        edges = collected({"aggregation": mode}, on).edges
        assert edges.advantage is not None
        return edges.advantage[edges.step == 0, 0]

    experience = collected({"aggregation": "normalised"}, on)
    near = experience.components["near"]
    correlation = torch.corrcoef(torch.stack([advantage_of("normalised"), near]))[0, 1]
    ruled = torch.corrcoef(torch.stack([advantage_of("sum"), near]))[0, 1]
    assert float(correlation) > float(ruled) + 0.2


def test_a_weight_for_an_unknown_component_is_refused() -> None:
    with pytest.raises(UserError, match="distance"):
        collected({"aggregation": "sum", "component_weights": {"distanse": 1.0}})


def test_flash_follows_a_window_to_the_end_of_the_grid() -> None:
    window = Window(width=2, motion="sliding", every=1)
    result = trained("flow-grpo", task(), 9, 1e-3, count=32, window=window, flash_steps=3, **SMALL)
    rollouts = [row["nfe"] - row["gradient_passes"] for row in result.rows]
    assert rollouts == [16 * (start + 2 + min(3, 10 - start - 2)) for start in (0, 1, 2, 3, 4, 5, 6, 7, 0)]


def test_zero_kl_weight_has_no_kl_term_and_a_larger_one_pulls_back() -> None:
    free = trained("flow-grpo", task(), 8, 3e-3, count=32, kl_weight=0.0, ema=0.0, **SMALL)
    held = trained("flow-grpo", task(), 8, 3e-3, count=32, kl_weight=100.0, ema=0.0, **SMALL)
    assert "loss/kl" not in free.rows[0]
    assert held.after["kl_reference"] < 0.5 * free.after["kl_reference"]


def test_the_guarded_gradient_divides_by_the_length_of_the_step() -> None:
    window = Window(width=1, motion="sliding")
    on = task(steps=10, shift=1.0)
    plain = gradient(
        "flow-grpo", on, objective="guard", guard_divide_by_dt=False, window=window, kl_weight=0.0, **SMALL
    )
    divided = gradient("flow-grpo", task(steps=10, shift=1.0), objective="guard", window=window, kl_weight=0.0, **SMALL)
    assert torch.allclose(divided, plain * 10, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "unmasking"}, "flow_sde"),
        ({"flash_steps": 2}, "method.window"),
        ({"best_worst": 3}, "even"),
        ({"best_worst": 8}, "group_size"),
        ({"window": {"width": 11}}, "window"),
        ({"window": {"width": 2}, "flash_steps": 2, "output": "x0"}, "output"),
        ({"objective": "guard", "kernel": "cps"}, "flow_sde"),
        ({"window": {"width": 2, "high": 10}}, "at most 9"),
        ({"aggregation": "sum", "advantage": "history"}, "method.advantage"),
        ({"component_weights": {"distance": 2.0}}, "method.aggregation"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("flow-grpo", task(), **{**SMALL, **settings})


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.noise_level, config.advantage_clip, config.kl_weight, config.updates) == (0.7, 5.0, 0.04, 2)
    assert config.clip_range is None
