"""Rollouts: chains, windows, trees and completions against what each must equal."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger
from difftilt.models.mixture import GaussianMixture, MixtureVelocity
from difftilt.process import RectifiedFlow, uniform_grid
from difftilt.sampling.kernels import Euler, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import dance_sde, euler, flow_sde
from difftilt.sampling.protocol import Moment, Trajectory
from difftilt.sampling.rollout import Plan, replay, rollout, start_state
from difftilt.trees import Pooled, join, take

PROCESS = RectifiedFlow()
NOISE = Noise(3)
GRID = uniform_grid(10, shift=3.0)


def mixture() -> GaussianMixture:
    return GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), 0.3, torch.tensor([0.4, 0.6]))


def denoise(forward_batch: int | None = 16) -> NetworkDenoiser:
    torch.manual_seed(0)
    network = MixtureVelocity(mixture(), PROCESS)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return NetworkDenoiser(network, PROCESS, "velocity", Ledger(), forward_batch=forward_batch)


def every_step(steps: int = 10) -> Tensor:
    return torch.ones(steps, dtype=torch.bool)


def roll(index: Tensor, plan: Plan, **more: object) -> Trajectory:
    with torch.no_grad():
        x = start_state(PROCESS, NOISE, index, (2,))
        padded = 16 if len(index) < 100 else 4096
        return rollout(denoise(padded), flow_sde(), GRID, x, None, noise=NOISE, index=index, plan=plan, **more)  # type: ignore[arg-type]


def test_a_sample_is_the_same_in_any_batch_and_order() -> None:
    whole = roll(torch.arange(40), Plan(record=every_step()))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = roll(order, Plan())
    assert torch.equal(shuffled.x_0, whole.x_0[order])
    parts = [roll(part, Plan()).x_0 for part in torch.arange(40).split(7)]
    assert torch.equal(torch.cat(parts), whole.x_0)


def test_replay_gives_a_ratio_of_exactly_one_in_any_minibatch() -> None:
    trajectory = roll(torch.arange(40), Plan(record=every_step()))
    assert trajectory.edges.log_prob is not None
    order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    for part in order.split(33):
        edges = take(trajectory.edges, part)
        assert edges.x_s is not None
        assert edges.log_prob is not None
        step = replay(denoise(), flow_sde(), edges, None).step
        assert torch.equal(flow_sde().log_prob(step, edges.x_s), edges.log_prob)


def test_only_the_window_is_stochastic_and_recorded() -> None:
    inside = torch.zeros(10, dtype=torch.bool)
    inside[3:5] = True
    trajectory = roll(torch.arange(8), Plan(stochastic=inside, record=every_step()))
    assert trajectory.edges.step.tolist() == [3] * 8 + [4] * 8
    # the same noise, other indices: outside the window nothing is drawn, so the states before it are the ODE's
    assert trajectory.edges.x_t is not None
    x = start_state(PROCESS, NOISE, torch.arange(8), (2,))
    with torch.no_grad():
        ode = rollout(denoise(), euler(), GRID[:4], x, None, noise=Noise(99), index=torch.arange(8))
    assert torch.equal(trajectory.edges.x_t[:8], ode.x_0)


def test_a_window_of_each_row_equals_separate_rollouts() -> None:
    inside = torch.zeros(8, 10, dtype=torch.bool)
    inside[:4, 2] = True
    inside[4:, 6] = True
    mixed = roll(torch.arange(8), Plan(stochastic=inside, record=every_step()))
    first = roll(torch.arange(4), Plan(stochastic=inside[0], record=every_step()))
    last = roll(torch.arange(4, 8), Plan(stochastic=inside[7], record=every_step()))
    assert torch.equal(mixed.x_0, torch.cat([first.x_0, last.x_0]))
    assert mixed.edges.log_prob is not None
    assert first.edges.log_prob is not None
    assert last.edges.log_prob is not None
    assert torch.equal(mixed.edges.log_prob, torch.cat([first.edges.log_prob, last.edges.log_prob]))


def test_the_tree_of_the_branchgrpo_paper_has_its_counts() -> None:
    """T = 20, K = 2, splits at 0, 3, 6, 9: 219 nodes, 218 edges, 203 evaluations, 16 leaves (arXiv 2509.06040)."""
    denoiser = denoise()
    index = torch.tensor([0])
    plan = Plan(record=every_step(20), branch={0: 2, 3: 2, 6: 2, 9: 2}, spread=4.0)
    with torch.no_grad():
        x = start_state(PROCESS, NOISE, index, (2,))
        tree = rollout(denoiser, dance_sde(), uniform_grid(20, 3.0), x, None, noise=NOISE, index=index, plan=plan)
    assert len(tree.edges.step) == 218
    assert denoiser.ledger.nfe == 203
    assert tree.ledger.nfe == 203
    assert len(tree.x_0) == 16
    assert tree.edges.parent is not None
    assert int((tree.edges.parent == -1).sum()) == 2
    assert sorted(tree.edges.sample[tree.last_edge].tolist()) == list(range(16))


def test_siblings_differ_and_leaves_keep_the_law_of_a_chain() -> None:
    roots = torch.arange(2000) * 4
    plan = Plan(branch={0: 2, 4: 2}, spread=2.0)
    tree = roll(roots, plan)
    chain = roll(torch.arange(8000), Plan())
    assert len(tree.x_0) == 8000
    assert len(torch.unique(tree.x_0, dim=0)) == 8000
    # leaves of one root are dependent: the standard error is that of 2000 independent roots
    error = chain.x_0.std(0) / 2000**0.5
    assert bool(((tree.x_0.mean(0) - chain.x_0.mean(0)).abs() < 4 * 1.5 * error).all())
    assert torch.allclose(tree.x_0.std(0), chain.x_0.std(0), rtol=0.06)
    assert torch.equal(tree.root, torch.arange(2000).repeat_interleave(4))


def test_sibling_noise_correlates_by_one_over_one_plus_spread_squared() -> None:
    seen: list[Tensor] = []

    def watch(moment: Moment, x_s: Tensor) -> None:
        step = moment.step
        noise = (x_s - step.mean) / step.std[:, None]  # type: ignore[attr-defined]
        seen.append(noise)

    roll(torch.arange(4000) * 2, Plan(branch={0: 2}, spread=2.0), observe=watch)
    first = seen[0].reshape(4000, 2, 2)
    covariance = (first[:, 0] * first[:, 1]).mean()
    assert abs(float(covariance) - 1 / 5) < 4 / 8000**0.5
    assert abs(float(first.var()) - 1) < 4 * 2**0.5 / 16000**0.5


def test_completion_from_stored_states_repeats_the_tail_of_their_chain() -> None:
    trajectory = roll(torch.arange(12), Plan(record=every_step()))
    assert trajectory.edges.x_t is not None
    picked = torch.tensor([3, 12 * 4 + 5, 12 * 9 + 7])
    states = trajectory.edges.x_t[picked]
    with torch.no_grad():
        done = rollout(
            denoise(),
            flow_sde(),
            GRID,
            states,
            None,
            noise=NOISE,
            index=torch.tensor([3, 5, 7]),
            plan=Plan(first=torch.tensor([0, 4, 9])),
        )
    assert torch.equal(done.x_0, trajectory.x_0[[3, 5, 7]])
    assert done.ledger.nfe == 10 + 6 + 1


def test_a_grid_of_each_row_equals_separate_rollouts() -> None:
    coarse = torch.cat([uniform_grid(4), torch.zeros(6, dtype=torch.float64)])
    grids = torch.stack([GRID, coarse])
    x = start_state(PROCESS, NOISE, torch.arange(2), (2,))
    with torch.no_grad():
        both = rollout(denoise(), flow_sde(), grids, x, None, noise=NOISE, index=torch.arange(2))
        one = rollout(denoise(), flow_sde(), uniform_grid(4), x[1:], None, noise=NOISE, index=torch.tensor([1]))
    assert torch.equal(both.x_0[1:], one.x_0)
    assert both.ledger.nfe == 14


def test_a_guide_shifts_the_draw_and_nothing_else() -> None:
    plain = roll(torch.arange(6), Plan(record=every_step()))
    still = roll(torch.arange(6), Plan(record=every_step()), guide=lambda moment: torch.zeros_like(moment.x_t))  # type: ignore[misc]
    assert torch.equal(plain.x_0, still.x_0)

    def guide(moment: Moment) -> Tensor | None:
        return torch.full_like(moment.x_t, 0.1) if moment.position == 9 else None

    pushed = roll(torch.arange(6), Plan(record=every_step()), guide=guide)
    assert torch.allclose(pushed.x_0 - plain.x_0, torch.full((6, 2), 0.1), atol=1e-6)
    # the base law scores the pushed state unless the plan says otherwise
    guided = roll(torch.arange(6), Plan(record=every_step(), score="guided"), guide=guide)
    assert pushed.edges.log_prob is not None
    assert guided.edges.log_prob is not None
    assert plain.edges.log_prob is not None
    assert torch.allclose(guided.edges.log_prob[-6:], plain.edges.log_prob[-6:], atol=1e-4)
    assert not torch.allclose(pushed.edges.log_prob[-6:], plain.edges.log_prob[-6:], atol=1e-2)


def test_project_imposes_known_coordinates() -> None:
    def known(x_s: Tensor, s: Tensor, condition: object) -> Tensor:
        return torch.stack([torch.full_like(x_s[:, 0], 7.0), x_s[:, 1]], dim=1)

    assert bool((roll(torch.arange(4), Plan(), project=known).x_0[:, 0] == 7).all())


def test_the_x0_output_is_the_last_prediction() -> None:
    seen: list[Moment] = []
    trajectory = roll(torch.arange(4), Plan(output="x0"), observe=lambda moment, x_s: seen.append(moment))  # type: ignore[misc]
    assert torch.equal(trajectory.x_0, seen[-1].prediction.x0)


def test_states_of_deterministic_steps_can_be_recorded_without_a_density() -> None:
    x = start_state(PROCESS, NOISE, torch.arange(4), (2,))
    plan = Plan(record=every_step(), score="none")
    with torch.no_grad():
        trajectory = rollout(denoise(), euler(), GRID, x, None, noise=NOISE, index=torch.arange(4), plan=plan)
    assert len(trajectory.edges.step) == 40
    assert trajectory.edges.log_prob is None


def test_asking_a_deterministic_step_for_a_density_is_an_error() -> None:
    x = torch.zeros(2, 2)
    prediction = PROCESS.predict(x, x, torch.full((2,), 0.5), "velocity")
    step = Euler()(prediction, x, torch.full((2,), 0.5), torch.full((2,), 0.4))
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(x, reduce="sum")


def test_a_branching_rollout_refuses_staggered_rows() -> None:
    with pytest.raises(ValueError, match="branch"):
        roll(torch.arange(2), Plan(branch={1: 2}, first=torch.tensor([0, 3])))


def test_mixed_rows_of_a_step_keep_both_laws() -> None:
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    t, s = torch.full((4,), 0.6), torch.full((4,), 0.4)
    prediction = PROCESS.predict(x, x, t, "velocity")
    noisy, ode = FlowSDE()(prediction, x, t, s), Euler()(prediction, x, t, s)
    rows = torch.tensor([True, False, True, False])
    both = noisy.only(rows, otherwise=ode)
    assert torch.equal(both.mean[rows], noisy.mean[rows])
    assert torch.equal(both.mean[~rows], ode.mean[~rows])
    assert torch.equal(both.std, torch.where(rows, noisy.std, 0))
    assert replace(both).deterministic is False


def test_edges_of_one_state_are_evaluated_once_and_replay_the_same() -> None:
    plan = Plan(record=torch.arange(10) == 0, branch={0: 4}, stochastic=torch.arange(10) == 0)
    trajectory = roll(torch.arange(0, 24, 4), plan)
    edges, model = trajectory.edges, denoise()
    assert edges.x_s is not None
    assert edges.log_prob is not None
    step = replay(model, flow_sde(), edges, None, state=edges.sample // 4).step
    assert model.ledger.gradient_passes == 6
    assert torch.equal(flow_sde().log_prob(step, edges.x_s), edges.log_prob)


def test_the_shift_of_a_guided_law_is_recorded_with_its_probability() -> None:
    def push(moment: Moment) -> Tensor | None:
        return 0.1 * moment.x_t if int(moment.position) == 1 else None

    trajectory = roll(torch.arange(8), Plan(record=every_step(), score="guided"), guide=push)
    edges = trajectory.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.log_prob is not None
    expected = torch.where((edges.step == 1)[:, None], 0.1 * edges.x_t, 0.0)
    assert torch.equal(edges.extras["shift"], expected)
    step = replay(denoise(), flow_sde(), edges, None).step.shift(edges.extras["shift"])
    assert torch.equal(flow_sde().log_prob(step, edges.x_s), edges.log_prob)
    assert "shift" not in roll(torch.arange(8), Plan(record=every_step()), guide=push).edges.extras


def chain_of(path: Trajectory, leaf: int) -> list[Tensor]:
    """The recorded states of one sample, from its start to its end."""
    edges, states, at = path.edges, list[Tensor](), int(path.last_edge[leaf])
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.parent is not None
    while at >= 0:
        states.append(edges.x_s[at])
        if int(edges.parent[at]) < 0:
            states.append(edges.x_t[at])
        at = int(edges.parent[at])
    return states[::-1]


def test_a_tree_stores_every_state_once() -> None:
    plan = Plan(record=every_step(20), branch={0: 2, 3: 2, 6: 2, 9: 2}, spread=4.0)
    grid, index = uniform_grid(20), torch.arange(3) * 16
    x = start_state(PROCESS, NOISE, index, (2,))
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(moment: Moment, x_s: Tensor) -> None:
        seen[int(moment.position)] = (moment.x_t, x_s)

    path = rollout(denoise(), flow_sde(0.7), grid, x, None, noise=NOISE, index=index, plan=plan, observe=watch)
    start, end = path.edges.start, path.edges.end
    assert start is not None
    assert end is not None
    # 203 evaluated nodes and 16 leaves for each of 3 roots, in one store that both ends of the 218 edges point into
    assert len(start.store) == 3 * (203 + 16)
    assert start.store is end.store
    assert len(start.rows) == 3 * 218
    for position, (x_t, x_s) in seen.items():
        here = path.edges.step == position
        assert torch.equal(start.rows[here], x_t)
        assert torch.equal(end.rows[here], x_s)
    assert torch.equal(chain_of(path, 17)[-1], path.x_0[17])
    assert torch.equal(chain_of(path, 17)[0], x[1])


def test_states_between_recorded_steps_that_are_apart_are_not_joined() -> None:
    record = torch.tensor([True, False, True, True, False, False, False, False, False, False])
    path = roll(torch.arange(4), Plan(record=record))
    assert path.edges.start is not None
    # steps 0, 2 and 3: the end of step 2 is the start of step 3, the end of step 0 starts nothing that is kept
    assert len(path.edges.start.store) == 4 * 5
    assert path.edges.x_t is not None
    assert path.edges.x_s is not None
    assert torch.equal(path.edges.x_s[4:8], path.edges.x_t[8:12])
    assert not torch.equal(path.edges.x_s[:4], path.edges.x_t[4:8])


def test_rows_of_edges_share_the_states_and_joined_edges_share_theirs() -> None:
    edges = roll(torch.arange(4), Plan(record=every_step())).edges
    some = torch.tensor([5, 0, 5])
    kept = take(edges, some)
    assert kept.start is not None
    assert edges.start is not None
    assert edges.x_t is not None
    assert kept.x_t is not None
    assert kept.start.store is edges.start.store
    assert torch.equal(kept.x_t, edges.x_t[some])
    again = join([kept, edges, take(edges, some[:1])])
    assert again.start is not None
    assert again.end is not None
    assert again.start.store is again.end.store
    assert len(again.start.store) == len(edges.start.store)
    other = roll(torch.arange(7, 9), Plan(record=every_step())).edges
    both = join([edges, other])
    assert both.x_s is not None
    assert edges.x_s is not None
    assert other.x_s is not None
    assert torch.equal(both.x_s, torch.cat([edges.x_s, other.x_s]))


def test_mappings_are_joined_by_name_whatever_their_order() -> None:
    one, two, few, many = torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    both = join([{"text": few, "pooled": one}, {"pooled": two, "text": many}])
    assert list(both) == ["text", "pooled"]
    assert torch.equal(both["text"], torch.cat([few, many]))
    assert torch.equal(both["pooled"], torch.cat([one, two]))
    # as well where a wrong pair would have the right shape
    both = join([{"a": one, "b": two}, {"b": two, "a": one}])
    assert both["a"].sum() == 0


def test_pools_and_plain_rows_are_joined_in_order() -> None:
    rows, store = torch.arange(4.0)[:, None], torch.arange(10.0, 13.0)[:, None]
    both = join([{"x": Pooled(store, torch.tensor([2, 0]))}, {"x": rows}])["x"]
    assert isinstance(both, Pooled)
    assert torch.equal(both.rows[:, 0], torch.tensor([12.0, 10.0, 0.0, 1.0, 2.0, 3.0]))
