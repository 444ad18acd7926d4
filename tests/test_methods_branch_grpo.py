"""Trees: what they share, what they cost, what is compared with what, what is pruned, what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import loop_of, make_method, perturbed, scatter, trained, with_reward
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.branch_grpo import BranchGRPO, Config
from difftilt.sampling.noise import Noise
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.testbeds.shapes import Config as ShapesConfig
from difftilt.testbeds.shapes import Shapes
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.policy_gradient import Window
from difftilt.training.protocol import Task
from difftilt.training.pruning import DepthPruning
from training_runs import densities

SMALL: dict[str, Any] = {"groups": 3, "group_size": 8, "updates": 1}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(**changes)).task())


def collected(settings: dict[str, Any], on: Task | None = None, iteration: int = 0) -> tuple[Loop, Experience]:
    """Of weights that have left the reference, so that neither can stand in for the other."""
    loop = loop_of("branch-grpo", on or task(), **{**SMALL, **settings})
    scatter(loop, "current")
    loop.run.begin(iteration)
    with torch.no_grad():
        return loop, loop.method.collect(loop.run)


def trained_steps(experience: Experience) -> list[int]:
    edges = experience.edges
    assert edges.mask is not None
    return edges.step[edges.mask].unique().tolist()


def method(**settings: Any) -> BranchGRPO:
    made = make_method("branch-grpo", task(steps=settings.pop("grid", 10)), **{**SMALL, **settings})
    assert isinstance(made, BranchGRPO)
    return made


def test_leaves_share_root_and_early_steps_and_the_tree_is_evaluated_once() -> None:
    loop, experience = collected({})
    edges = experience.edges
    # splits 0, 3, 6 of 10 steps: 1 + 3·2 + 3·4 + 3·8 nodes are evaluated
    assert loop.run.ledger.nfe == 3 * (1 + 3 * 2 + 3 * 4 + 3 * 8)
    counts = torch.bincount(edges.step).tolist()
    assert counts == [6, 6, 6, 12, 12, 12, 24, 24, 24]
    assert edges.x_t is not None
    first = edges.x_t[edges.step == 0].reshape(3, 2, -1)
    assert bool((first[:, 0] == first[:, 1]).all())
    assert len(first[:, 0].unique(dim=0)) == 3
    assert experience.x_0 is not None
    assert len(experience.x_0.unique(dim=0)) == 24


def test_the_last_step_is_not_trained_and_the_sample_is_the_x0_prediction_before_it() -> None:
    loop, experience = collected({})
    edges = experience.edges
    assert edges.x_s is not None
    assert int(edges.step.max()) == 8
    at = edges.step == 8
    assert isinstance(loop.method, BranchGRPO)
    t = loop.method.grid[-2].float().expand(24)
    with torch.no_grad():
        x0 = loop.run.denoiser("current")(edges.x_s[at], t, None).x0  # type: ignore[attr-defined]
    order = edges.sample[at].argsort()
    assert experience.x_0 is not None
    assert torch.equal(x0[order], experience.x_0)


def test_trees_are_drawn_and_scored_by_the_current_weights() -> None:
    loop, experience = collected({})
    assert experience.edges.log_prob is not None
    assert torch.allclose(experience.edges.log_prob, densities(loop, experience), atol=1e-4)


@pytest.mark.parametrize("kernel", ["dance_sde", "cps", "flow_sde", "ddim"])
def test_paths_are_weighed_by_the_gaussian_density_of_their_steps(kernel: str) -> None:
    loop, experience = collected({"kernel": kernel, "noise_level": 0.7, "group_size": 9, "children": 3})
    edges, density = experience.edges, densities(loop, experience).double()
    assert experience.rewards is not None
    assert edges.parent is not None
    assert edges.advantage is not None
    last = edges.step.max()
    path, top = torch.zeros(27, dtype=torch.float64), torch.zeros(27, dtype=torch.int64)
    for edge in (edges.step == last).nonzero()[:, 0].tolist():
        leaf, at = int(edges.sample[edge]), edge
        while int(edges.parent[at]) >= 0:
            path[leaf] += density[at]
            at = int(edges.parent[at])
        top[leaf] = at
    rewards = experience.rewards.double()
    for tree in range(3):
        nodes = top[experience.group == tree].unique()
        assert len(nodes) == 3
        value = torch.stack([path[top == node].softmax(0) @ rewards[top == node] for node in nodes])
        expected = (value - value.mean()) / value.std()
        torch.testing.assert_close(edges.advantage[nodes, 0], expected.float(), rtol=1e-3, atol=1e-4)


def test_one_start_for_all_trees_where_asked() -> None:
    edges = collected({"same_start": True})[1].edges
    assert edges.x_t is not None
    assert len(edges.x_t[edges.step == 0].unique(dim=0)) == 1
    assert len(edges.x_t[edges.step == 1].unique(dim=0)) == 6


def test_an_edge_has_the_advantage_of_its_child_among_its_depth_and_tree() -> None:
    experience = collected({"fusion_beta": 0.0, "group_size": 4})[1]
    edges, rewards = experience.edges, experience.rewards
    assert rewards is not None
    assert edges.advantage is not None
    for tree in range(3):
        own = rewards[experience.group == tree].double()
        for step in range(9):
            value = own.reshape(2, 2).mean(1) if step < 3 else own
            expected = (value - value.mean()) / (value.std() + 1e-8)
            at = (experience.group[edges.sample] == tree) & (edges.step == step)
            order = edges.sample[at].argsort()
            torch.testing.assert_close(edges.advantage[at, 0][order], expected.float(), rtol=1e-4, atol=1e-5)
    path = edges.advantage[edges.sample == 0, 0]
    assert len(path.unique()) == 2  # depths of one path differ


def test_path_weights_change_what_inner_nodes_are_worth_and_leave_leaves_alone() -> None:
    mean, path = (collected({"fusion_beta": beta})[1].edges for beta in (0.0, 1.0))
    assert mean.advantage is not None
    assert path.advantage is not None
    late = mean.step >= 6
    assert torch.equal(mean.advantage[late], path.advantage[late])
    assert not torch.equal(mean.advantage[~late], path.advantage[~late])


def test_steps_before_the_first_split_are_not_trained() -> None:
    experience = collected({"splits": (2, 4, 6)})[1]
    assert trained_steps(experience) == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("settings", [{"width": "parent_top1"}, {"width": "extreme", "extreme": 2}])
def test_pruned_edges_cost_no_backward_pass_and_change_no_advantage(settings: dict[str, Any]) -> None:
    _, whole = collected({})
    loop, pruned = collected(settings)
    assert whole.edges.advantage is not None
    assert pruned.edges.advantage is not None
    assert pruned.edges.mask is not None
    assert torch.equal(whole.edges.advantage, pruned.edges.advantage)
    assert torch.equal(pruned.edges.step[~pruned.edges.mask].unique(), torch.tensor([7, 8]))
    assert int(pruned.edges.mask.sum()) == 126 - 24
    before = loop.run.ledger.copy()
    (phase,) = loop.method.phases(loop.run)
    loop.updater.run_phase(phase, pruned, loop.run.noise)
    assert (loop.run.ledger - before).gradient_passes == 102


def test_the_depth_window_moves_later_or_earlier_and_stays_at_its_stop() -> None:
    later = DepthPruning(size=2, every=2)
    assert [trained_steps(collected({"depth": later}, iteration=i)[1]) for i in (0, 2, 50)] == [
        [0, 1, 2, 3, 4, 5, 8],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6],
    ]
    earlier = DepthPruning(size=3, every=1, direction="earlier", stop=2)
    assert trained_steps(collected({"depth": earlier}, iteration=1)[1]) == [0, 1, 2, 3, 4, 8]
    assert trained_steps(collected({"depth": earlier}, iteration=9)[1]) == [0, 1, 5, 6, 7, 8]


def test_the_windows_of_paper_and_code_on_twenty_steps() -> None:
    assert DepthPruning().ends(9, 20) == (9, 15)
    assert DepthPruning(direction="earlier").ends(9, 20) == (15, 9)


def test_pruning_ends_with_its_iterations() -> None:
    settings = {"width": "parent_top1", "prune_iterations": 3}
    kept = [collected(settings, iteration=i)[1].edges.mask for i in (2, 3)]
    assert kept[0] is not None
    assert kept[1] is not None
    assert not bool(kept[0].all())
    assert bool(kept[1].all())


def test_mix_is_stochastic_at_the_splits_and_in_a_window_over_the_others() -> None:
    made = method(window=Window(width=2, motion="sliding", every=1))

    def steps(iteration: int) -> list[int]:
        plan = made.plan(iteration, Noise(0).at(iteration))
        assert plan.stochastic is not None
        assert plan.record is not None
        assert torch.equal(plan.stochastic, plan.record)
        return plan.stochastic.nonzero()[:, 0].tolist()

    assert [steps(i) for i in (0, 1, 4, 5)] == [[0, 1, 2, 3, 6], [0, 2, 3, 4, 6], [0, 3, 6, 7, 8], [0, 1, 2, 3, 6]]


def test_ode_steps_of_mix_have_no_edge_and_fusion_reaches_over_them() -> None:
    experience = collected({"window": Window(width=2, motion="sliding"), "fusion_beta": 0.0})[1]
    edges = experience.edges
    assert edges.step.unique().tolist() == [0, 1, 2, 3, 6]
    assert edges.log_prob is not None
    assert bool(edges.log_prob.isfinite().all())
    assert experience.rewards is not None
    assert edges.advantage is not None
    half = experience.rewards.double().reshape(3, 2, 4).mean(2)
    better = half.argmax(1)
    top = edges.advantage[edges.step == 0, 0].reshape(3, 2)
    assert torch.equal(top.argmax(1), better)
    assert torch.allclose(top.abs(), torch.full((3, 2), 0.5**0.5), atol=1e-5)


def test_default_splits_are_the_papers_where_they_fit() -> None:
    assert method(grid=20, group_size=16).splits == (0, 3, 6, 9)
    assert method(grid=10, group_size=16).splits == (0, 2, 4, 6)
    assert method(grid=5, group_size=16).splits == (0, 1, 2, 3)
    assert method(group_size=2).splits == (0,)
    assert method(group_size=9, children=3).splits == (0, 3)


def test_scaled_noise_is_the_released_codes_and_not_the_default() -> None:
    def first(mode: str) -> Tensor:
        edges = collected({"noise_mode": mode, "groups": 200, "group_size": 2})[1].edges
        assert edges.x_s is not None
        at = edges.step == 0
        return edges.x_s[at].reshape(200, 2, -1).diff(dim=1).std()

    # of the difference of siblings: s·sqrt(2)·std, and that over sqrt(1 + s²)
    assert float(first("scaled") / first("correlated")) == pytest.approx(17**0.5, rel=1e-3)


def test_trees_without_spread_teach_nothing() -> None:
    flat = with_reward(task(), lambda samples: torch.full((len(samples.media),), 0.1))
    edges = collected({}, flat)[1].edges
    assert edges.mask is not None
    assert not bool(edges.mask.any())


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "flow_sde", "noise_level": 0.7, "objective": "guard", "clip_range": 0.1},
        {"kernel": "cps", "noise_level": 0.7, "clip_range": 0.01},
        {"kl_weight": 0.1, "window": {"width": 2}},
        {"width": "parent_top1", "depth": {"size": 2}},
    ],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    result = trained("branch-grpo", task(), 2, 1e-3, count=32, **{**SMALL, **settings})
    assert all(row["grad_norm"] > 0 for row in result.rows)


def test_one_iteration_on_digits() -> None:
    result = trained("branch-grpo", Digits(DigitsConfig()).task(), 1, 1e-4, count=8, groups=2, group_size=4)
    assert result.rows[0]["grad_norm"] > 0
    assert result.rows[0]["nfe"] >= 2 * (1 + 3 * 2 + 6 * 4)


@pytest.mark.long
def test_one_iteration_on_shapes() -> None:
    on = Shapes(ShapesConfig()).task()
    result = trained("branch-grpo", on, 1, 1e-5, count=8, groups=4, group_size=8, objective="guard", kl_weight=0.3)
    assert "grad_norm" in result.rows[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 6}, "no power"),
        ({"group_size": 2048}, "do not fit"),
        ({"splits": (0, 3)}, "group_size"),
        ({"splits": (0, 3, 9)}, "leaves the grid"),
        ({"splits": (-1, 3, 4)}, "leaves the grid"),
        ({"splits": (0, 4, 4)}, "rise"),
        ({"width": "parent_top1", "group_size": 2}, "one leaf"),
        ({"width": "extreme", "extreme": 5}, "at most half"),
        ({"depth": {"size": 9}}, "depth"),
        ({"depth": {"size": 2, "start": 8}}, "depth.size"),
        ({"depth": {"size": 1, "start": 5, "stop": 3}}, "direction"),
        ({"window": {"width": 7}}, "window.width"),
        ({"kernel": "unmasking"}, "flow_sde"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("branch-grpo", task(), **{**SMALL, **settings})


def test_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="tokens"):
        make_method("branch-grpo", Sequences(SequencesConfig()).task(), kernel="unmasking", **SMALL)


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.children, config.group_size, config.spread, config.fusion_beta) == (2, 16, 4.0, 1.0)
    assert (config.kernel, config.noise_level, config.clip_range, config.kl_weight) == ("dance_sde", 0.3, 1e-3, 0.0)
