"""G2RPO: one noisy step per group, from one state; what cannot work is refused. Its identities are among the proofs."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import loop_of, make_method, perturbed, scatter, trained, with_reward
from difftilt.credit.group import group_advantage
from difftilt.errors import UserError
from difftilt.leaves import load
from difftilt.methods.policy_gradient.g2rpo import Config
from difftilt.process.gaussian import as_gaussian
from difftilt.recipes import config_of
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Samples
from difftilt.rewards.vector import distance, linear
from difftilt.sampling.kernels import FlowSDE
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Task
from training_runs import densities

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4}


def task(**changes: Any) -> Task:
    settings: dict[str, Any] = {"classes": 4, **changes}
    return perturbed(Mixtures(MixturesConfig(**settings)).task())


def collected(on: Task | None = None, **settings: Any) -> tuple[Loop, Experience]:
    """Of weights that have left the reference, so that neither can stand in for the other."""
    loop = loop_of("g2rpo", on or task(), **{**SMALL, **settings})
    scatter(loop, "current")
    with torch.no_grad():
        return loop, loop.method.collect(loop.run)


def advantages(experience: Experience) -> Tensor:
    """In order of samples."""
    assert experience.edges.advantage is not None
    return experience.edges.advantage[experience.edges.sample.argsort(), 0]


def test_every_sample_has_one_noisy_step_off_a_state_that_its_group_shares() -> None:
    _, experience = collected(trained_steps=(5, 1, 0))
    edges = experience.edges
    assert sorted(edges.sample.tolist()) == list(range(4 * 3 * 4))
    assert edges.x_t is not None
    assert edges.x_s is not None
    group = experience.group[edges.sample]
    assert torch.equal(edges.step, torch.tensor([0, 1, 5])[group % 3])
    for one in group.unique():
        states = edges.x_t[group == one]
        assert bool((states == states[0]).all())
    assert len(edges.x_t.unique(dim=0)) == 4 * 3
    assert len(edges.x_s.unique(dim=0)) == 4 * 3 * 4
    assert edges.mean is None
    assert [int(experience.prompt[experience.group // 3 == slot].unique().numel()) for slot in range(4)] == [1] * 4


def test_the_noisy_step_is_drawn_and_scored_as_in_flow_grpo() -> None:
    loop, experience = collected(objective="guard")
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    edges = rows.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.s is not None
    assert edges.mean is not None
    assert edges.log_prob is not None
    with torch.no_grad():
        prediction = loop.run.denoiser("current")(edges.x_t, edges.t, rows.condition)
    step = FlowSDE(0.7)(prediction, edges.x_t, edges.t, edges.s)
    assert torch.allclose(edges.mean, step.mean, atol=1e-6)
    assert torch.allclose(edges.log_prob, densities(loop, experience), atol=1e-5)
    grid = loop.run.task.sampler.grid.float()
    assert torch.equal(torch.stack([edges.t, edges.s]), torch.stack([grid[edges.step], grid[edges.step + 1]]))


def test_anchors_follow_the_ode_of_the_current_weights() -> None:
    loop, experience = collected(trained_steps=(0, 4, 8))
    edges, grid = experience.edges, loop.run.task.sampler.grid.float()
    first = (edges.step == 0).nonzero()[:, 0]
    condition = experience.rows(first).condition
    assert edges.x_t is not None
    state = edges.x_t[first]
    for place in range(9):
        if place in (4, 8):
            assert torch.allclose(edges.x_t[edges.step == place], state, atol=1e-5)
        t = grid[place].expand(len(state))
        with torch.no_grad():
            velocity = as_gaussian(loop.run.denoiser("current")(state, t, condition)).velocity
        state = state + (grid[place + 1] - t[:1]) * velocity


def test_every_step_and_granularity_is_compared_apart_then_summed() -> None:
    on, scored = task(), list[Tensor]()

    def watched(samples: Samples) -> Tensor:
        scored.append(on.reward.score(samples))
        return scored[-1]

    _, experience = collected(with_reward(on, watched), granularities=(3, 1))
    assert [len(rewards) for rewards in scored] == [80, 80, 4]
    parts = [group_advantage(rewards, experience.group, ddof=1, eps=1e-8) for rewards in scored[:2]]
    assert torch.allclose(advantages(experience), parts[0] + parts[1], atol=1e-6)
    assert experience.rewards is not None
    assert torch.equal(experience.rewards, scored[0])  # of the finest completion
    assert torch.equal(experience.components["anchor/proof"], scored[2].repeat_interleave(20))


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_samples_are_predictions_at_the_last_time_of_their_schedule(skip: int) -> None:
    loop, experience = collected(granularities=(skip,))
    rows, denoise = experience.rows(experience.edges.sample.argsort()), loop.run.denoiser("current")
    x, grid = rows.edges.x_s, loop.run.task.sampler.grid.float()
    assert x is not None
    assert experience.x_0 is not None
    for sample in range(0, len(x), 7):
        step = int(rows.edges.step[sample])
        state, condition = x[sample : sample + 1], rows.condition[sample : sample + 1]
        predicted = state
        with torch.no_grad():
            for at, to in pairwise([step + 1, *range(step + 2, len(grid), skip)]):
                t = grid[at].expand(1)
                prediction = as_gaussian(denoise(state, t, condition))
                state, predicted = state + (grid[to] - t) * prediction.velocity, prediction.x0
        assert torch.allclose(experience.x_0[sample], predicted[0], atol=1e-5)


def test_schedules_that_coincide_are_walked_and_scored_once_and_count_for_each() -> None:
    loop, together = collected(trained_steps=(2, 8), granularities=(3, 1, 2))
    assert loop.run.ledger.nfe == 4 * 10 + 16 * (7 + 4 + 3) + 16
    assert loop.run.ledger.reward_calls == 4 + 16 * 3 + 16
    apart = [advantages(collected(trained_steps=(2, 8), granularities=(skip,))[1]) for skip in (1, 2, 3)]
    assert torch.allclose(advantages(together), torch.stack(apart).sum(0).clamp(-5, 5), atol=1e-5)
    last = together.group % 2 == 1
    assert torch.allclose(advantages(together)[last], (3 * apart[0][last]).clamp(-5, 5), atol=1e-5)
    (loop, thrice), (_, once) = (collected(trained_steps=(8,), granularities=many) for many in ((1, 2, 3), (1,)))
    assert loop.run.ledger.reward_calls == 4 + 16
    assert torch.allclose(advantages(thrice), (3 * advantages(once)).clamp(-5, 5), atol=1e-5)


def test_a_group_of_two_has_no_other_size_of_advantage() -> None:
    _, experience = collected(group_size=2, granularities=(1,))
    assert torch.allclose(advantages(experience).abs(), torch.tensor(0.5).sqrt(), atol=1e-4)


def test_rewards_are_weighed_after_each_is_normalised() -> None:
    parts = {"near": distance(torch.zeros(2)), "right": linear(torch.tensor([100.0, 0.0]))}
    on = replace(task(), reward=WeightedSum(parts, {"near": -2.0, "right": 1.0}))
    _, experience = collected(on, granularities=(1,))
    near, right = (
        group_advantage(experience.components[name], experience.group, ddof=1, eps=1e-8) for name in ("near", "right")
    )
    assert torch.allclose(advantages(experience), right - 2 * near, atol=1e-5)


def test_constant_groups_teach_nothing_and_are_left_out() -> None:
    flat = with_reward(task(), lambda samples: torch.tensor([float(prompt[-1]) for prompt in samples.prompts]))
    _, experience = collected(flat)
    assert experience.edges.mask is not None
    assert not bool(experience.edges.mask.any())


@pytest.mark.parametrize("updates", [1, 2])
def test_updates_go_through_the_steps_from_the_noise_on(updates: int) -> None:
    loop, experience = collected(updates=updates, trained_steps=(0, 3, 2))
    (phase,) = loop.method.phases(loop.run)
    assert phase.updates == 3 * updates
    assert (phase.unit, phase.one_state) == ("group", True)
    assert phase.part is not None
    part, edges = phase.part(experience), experience.edges
    prompt = experience.group[edges.sample] // 3
    for update in range(phase.updates):
        assert edges.step[part == update].unique().tolist() == [[0, 2, 3][update // updates]]
        assert len(prompt[part == update].unique()) == 4 // updates


@pytest.mark.parametrize("objective", ["clipped", "guard", "reinforce"])
def test_policy_and_penalty_see_every_shared_state_once(objective: str) -> None:
    loop = loop_of("g2rpo", task(), objective=objective, kl_weight=0.5, granularities=(1,), **SMALL)
    loop.iterate(0)
    row = loop.rows[0]
    assert row["gradient_passes"] == 4 * 5
    assert row["nfe"] == 4 * (10 + 4 * (9 + 8 + 7 + 6 + 5)) + 4 * 5


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "guard", "kl_weight": 0.3},
        {"objective": "reinforce"},
        {"kernel": "dance_sde", "noise_level": 0.3},
        {"kernel": "cps", "clip_range": 0.01},
        {"kernel": "ddim", "noise_level": 1.0, "advantage_std": "pooled"},
        {"updates": 4, "trained_steps": (0, 8), "granularities": (2,)},
    ],
    ids=lambda settings: "-".join(f"{value}" for value in settings.values()),
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    together: dict[str, Any] = {**SMALL, "clip_range": 0.1, **settings}
    result = trained("g2rpo", task(), 2, 1e-3, count=16, **together)
    assert all(0 < row["grad_norm"] < 1e3 for row in result.rows)
    assert result.rows[0]["ratio_mean"] == pytest.approx(1, abs=0.05)


def test_a_variance_preserving_model_trains() -> None:
    settings: dict[str, Any] = {**SMALL, "kernel": "ddim", "noise_level": 1.0}
    result = trained("g2rpo", task(process="vp"), 2, 1e-3, count=16, **settings)
    assert result.rows[-1]["grad_norm"] > 0


@pytest.mark.parametrize("testbed", ["digits", pytest.param("shapes", marks=pytest.mark.long)])
def test_one_iteration_on_images(testbed: str) -> None:
    entry = load("testbeds", testbed)
    on = entry(config_of(entry)()).task()
    loop = loop_of("g2rpo", on, groups=2, group_size=2, trained_steps=(0, 1), granularities=(1, 3), objective="guard")
    loop.iterate(0)
    assert loop.rows[0]["updates"] == 2
    assert loop.rows[0]["gradient_passes"] == 4 * (1 if on.sampler.guidance == 1 else 2)
    assert any(name.startswith("reward/anchor/") for name in loop.rows[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained_steps": (0, 9)}, "up to 8"),
        ({"steps": 4, "trained_steps": (3,)}, "method.steps"),
        ({"trained_steps": (1, 1)}, "twice"),
        ({"granularities": (2, 2)}, "twice"),
        ({"updates": 5}, "groups"),
        ({"kernel": "unmasking"}, "flow_sde"),
        ({"objective": "guard", "kernel": "cps"}, "flow_sde"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("g2rpo", task(), **{**SMALL, **settings})


def test_tokens_and_single_steps_are_refused() -> None:
    with pytest.raises(UserError, match="flow-grpo"):
        make_method("g2rpo", Sequences(SequencesConfig()).task(), kernel="unmasking", **SMALL)
    with pytest.raises(UserError, match=r"method\.steps"):
        make_method("g2rpo", task(steps=1), **SMALL)
    bad: list[dict[str, Any]] = [{"granularities": ()}, {"granularities": (0,)}, {"group_size": 1}]
    bad.append({"trained_steps": ()})
    for wrong in bad:
        with pytest.raises(ValueError, match=r"at least|greater than"):
            Config(**wrong)


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.noise_level, config.advantage_clip, config.kl_weight, config.updates) == (0.7, 5.0, 0.0, 1)
    assert (config.group_size, config.granularities, config.ddof, config.std_eps) == (12, (1, 2, 3), 1, 1e-8)
    _, experience = collected()
    assert experience.edges.step.unique().tolist() == [0, 1, 2, 3, 4]
