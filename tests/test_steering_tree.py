import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from difftilt.checks.tree_runs import leaf_law, planted
from difftilt.errors import RewardError, UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.protocol import GenerativeModel, Stateful
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM, FlowSDE, Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import sample, start_state
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.budget import Budget, metered
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.dts_star import DTSStar, DTSStarConfig
from difftilt.steering.protocol import Steered, Steerer
from difftilt.steering.rollout_tree import Search
from difftilt.steering.store import BLOCK, NodeStore
from difftilt.steering.tree import Forest
from difftilt.steering.tree_rules import UCT, Boltzmann, Widening, soft_value
from difftilt.testbeds.shapes import Shapes
from difftilt.training.protocol import Task


def flow() -> Task:
    """Two numbers, three steps, each with noise; the network is one multiplication."""
    model = GenerativeModel(_towards, RectifiedFlow(), "velocity", (2,), lambda prompts: None, lambda x: x)
    reward = FunctionReward("angle", lambda samples: (samples.media[:, 0] / 3).tanh())
    return Task("flow", model, reward, ("",), ("",), Sampler(uniform_grid(3), FlowSDE(0.7)))


def _towards(x: Tensor, t: Tensor, condition: Any) -> Tensor:
    return 0.5 * x - t[:, None]


def clean_end() -> Task:
    task = flow()
    return replace(task, sampler=replace(task.sampler, clean_end=True))


def tokens() -> Task:
    """Four tokens of three symbols, all equally likely, in three steps from all mask."""
    model = GenerativeModel(
        lambda x, t, c: torch.zeros(len(x), 4, 3), MaskedProcess(3), "logits", (4,), lambda p: None, lambda x: x
    )
    reward = FunctionReward("ones", lambda samples: (samples.media == 1).float().mean(1))
    return Task("tokens", model, reward, ("",), ("",), Sampler(uniform_grid(3), Unmasking()))


TASKS = [flow, clean_end, tokens]


def dts(**settings: Any) -> DTS:
    return DTS(DTSConfig.model_validate({"rollouts": 16, "batch": 4, "temperature": 0.5, "samples": 8, **settings}))


def star(**settings: Any) -> DTSStar:
    return DTSStar(DTSStarConfig.model_validate({"rollouts": 16, "batch": 4, "temperature": 0.5, **settings}))


def steer(steerer: Steerer, task: Task, prompts: list[str], forward_batch: int | None = 8, **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=forward_batch)
    return steerer.steer(task, model, task.reward, prompts, Noise(0), **extra)


@torch.no_grad()
def grown(steerer: DTS | DTSStar, task: Task, runs: int = 2) -> Search:
    search = planted(steerer, task, runs)
    search.grow(None, None)
    return search


def random_forest(seed: int) -> Forest:
    """Two trees of depth 4 whose chains hang at random nodes, with random leaf values."""
    random = np.random.default_rng(seed)
    forest = Forest(2, -1, 3)
    for _ in range(12):
        at = random.integers(0, forest.size, 3)
        at = at[forest.depth[at] < forest.last]
        forest.grow(at, forest.last - forest.depth[at])
    leaves = (forest.depth[: forest.size] == forest.last).nonzero()[0]
    forest.value[leaves, 0] = random.normal(size=len(leaves))
    return forest


def by_definition(forest: Forest, node: int, temperature: float) -> float:
    """The soft Bellman equation, by recursion."""
    children = forest.children(node).tolist()
    if not children:
        return float(forest.value[node, 0])
    below = [by_definition(forest, child, temperature) for child in children]
    return temperature * math.log(sum(math.exp(value / temperature) for value in below) / len(below))


def law_by_definition(forest: Forest, node: int, temperature: float, mass: float = 1.0) -> dict[int, float]:
    children = forest.children(node).tolist()
    if not children:
        return {node: mass}
    weight = np.exp([forest.value[child, 0] / temperature for child in children])
    found: dict[int, float] = {}
    for child, share in zip(children, weight / weight.sum(), strict=True):
        found |= law_by_definition(forest, child, temperature, mass * float(share))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_flat_arrays_hold_the_tree_and_the_backup_is_its_definition(seed: int) -> None:
    forest, temperature = random_forest(seed), 0.7
    for node in range(forest.size):
        assert forest.children(node).tolist() == [i for i in range(forest.size) if forest.parent[i] == node]
        if forest.parent[node] >= 0:
            assert forest.depth[node] == forest.depth[forest.parent[node]] + 1
    leaves = (forest.depth[: forest.size] == forest.last).nonzero()[0]
    forest.backup(forest.parent[leaves], soft_value(temperature))
    for node in range(forest.size):
        assert float(forest.value[node, 0]) == pytest.approx(by_definition(forest, node, temperature), rel=1e-12)
    for root in (0, 1):
        found, law = Boltzmann(temperature).law(forest, root)
        expected = law_by_definition(forest, root, temperature)
        assert dict(zip(found.tolist(), law.tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)
    starts = forest.branch(leaves)
    assert bool((forest.parent[starts] < 2).all())
    assert all(node in [*up] for node, leaf in zip(starts, leaves, strict=True) for up in [way_up(forest, leaf)])


def way_up(forest: Forest, node: int) -> list[int]:
    way = [node]
    while forest.parent[way[-1]] >= 0:
        way.append(int(forest.parent[way[-1]]))
    return way


def test_boltzmann_chooses_by_exp_of_the_value() -> None:
    forest = Forest(1, 0, 1)
    forest.grow(np.zeros(4, np.int64), np.ones(4, np.int64))
    forest.value[1:5, 0] = [0.3, -1.0, 900.0, 899.5]
    rule, draws = Boltzmann(0.5), 2000
    chosen = [rule(forest, forest.children(0), (i + 0.5) / draws) for i in range(draws)]
    share = np.exp((forest.value[1:5, 0] - 900) / 0.5)
    # the uniforms stand at equal distances, so every count is its expectation up to one
    assert np.abs(np.bincount(chosen, minlength=5)[1:] - draws * share / share.sum()).max() <= 1
    forest.value[1:5, 0] = -np.inf
    assert [rule(forest, forest.children(0), u) for u in (0.1, 0.3, 0.6, 0.9)] == [1, 2, 3, 4]


def test_uct_is_its_formula_and_counts_virtual_visits() -> None:
    forest, random = Forest(1, 0, 1), np.random.default_rng(0)
    forest.grow(np.zeros(6, np.int64), np.ones(6, np.int64))
    for _ in range(20):
        forest.value[1:7, 0] = random.normal(size=6)
        forest.visits[1:7], forest.virtual[1:7] = random.integers(1, 20, 6), random.integers(0, 3, 6)
        forest.visits[0] = forest.visits[1:7].sum()
        forest.virtual[0] = forest.virtual[1:7].sum()
        total = forest.visits[:7] + forest.virtual[:7]
        bound = [forest.value[i, 0] + 0.8 * math.sqrt(math.log(total[0]) / total[i]) for i in range(1, 7)]
        assert UCT(0.8)(forest, forest.children(0), 0.5) == 1 + int(np.argmax(bound))
    assert UCT(0.0)(forest, forest.children(0), 0.5) == 1 + int(np.argmax(forest.value[1:7, 0]))


def test_widening() -> None:
    visits = np.arange(0, 30)
    for factor, exponent in ((1.0, 0.5), (0.3, 0.5), (2.0, 0.25)):
        expected = [max(1, math.ceil(factor * max(1, n) ** exponent - 1e-9)) for n in visits]
        assert Widening(factor, exponent).limit(visits).tolist() == expected
    # rounding of a root does not give a child more
    assert Widening(1.0, 1 / 3).limit(np.array([8, 27, 64, 125, 343, 1000])).tolist() == [2, 3, 4, 5, 7, 10]


@pytest.mark.parametrize("task", [flow, tokens])
@pytest.mark.parametrize(("make", "batch"), [(dts, 1), (star, 5)])
def test_virtual_visits_leave_no_trace_and_the_ledger_is_exact(
    task: Callable[[], Task], make: Callable[..., DTS | DTSStar], batch: int
) -> None:
    search = grown(make(batch=batch), task())
    forest, size = search.forest, search.forest.size
    assert not forest.virtual[:size].any()
    assert not forest.pending[:size].any()
    inner = forest.depth[:size] < forest.last
    visits = forest.visits[:size]
    passed = np.zeros(size, np.int64)
    np.add.at(passed, forest.parent[2:size], visits[2:])
    assert np.array_equal(passed[inner], visits[inner])  # every visit goes on to a child
    assert visits[:2].tolist() == [16, 16]
    for node in range(size):
        assert float(forest.value[node, 0]) == pytest.approx(by_definition(forest, node, 0.5), rel=1e-9, abs=1e-12)
        if batch == 1 and inner[node] and visits[node] > 1:
            # widened while it had one visit fewer
            assert len(forest.children(node)) <= Widening().limit(visits[node : node + 1] - 1)[0]
    dummy = int((forest.depth[:size] < 0).sum())
    leaves, ledger = int((~inner).sum()), search.frontier.chain.ledger
    assert (ledger.nfe, ledger.reward_calls) == (
        size - leaves - dummy,
        leaves,
    )
    again = planted(make(batch=batch, predictions="recomputed"), task(), 2)
    with torch.no_grad():
        again.grow(None, None)
    # without stored predictions every child but the first of a node is one evaluation more
    stored = inner & (forest.depth[:size] >= 0)
    branchings = int((forest.count(np.arange(size))[stored] - 1).sum())
    assert again.frontier.chain.ledger.nfe == ledger.nfe + branchings
    assert np.array_equal(again.forest.parent[:size], forest.parent[:size])
    np.testing.assert_allclose(again.forest.value[:size], forest.value[:size], rtol=1e-5, atol=1e-6)


def test_selections_of_one_round_spread() -> None:
    """A root with one old child may have three: two of three selections widen it, the third must go down."""
    forest = Forest(1, 0, 2)
    first = int(forest.grow(np.array([0]), np.array([2]))[0])
    forest.settle(np.array([0]), np.array([first + 1]))
    at = [forest.select(0, Boltzmann(1.0), lambda node: 3 if node == 0 else 2, [0.5, 0.5]) for _ in range(4)]
    assert at == [0, 0, first, first + 1]
    assert forest.pending[:3].tolist() == [2, 1, 1]
    assert forest.virtual[:3].tolist() == [4, 2, 1]
    forest.settle(np.array(at), np.array([first + 1]))
    assert not forest.pending.any()
    assert not forest.virtual.any()
    assert forest.visits[:3].tolist() == [2, 2, 2]
    # without children of old there is nothing to go down to, so a first round is a flat list
    fresh = Forest(1, -1, 2)
    assert [fresh.select(0, Boltzmann(1.0), lambda node: 1, [0.5] * 3) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("make", [dts, star])
def test_one_rollout_is_plain_sampling_bit_for_bit(
    task: Callable[[], Task], make: Callable[..., DTS | DTSStar]
) -> None:
    one, index = task(), torch.arange(5)
    model = denoiser(one.model, forward_batch=8)
    with torch.no_grad():
        start = start_state(one.model.process, Noise(0), index, one.model.shape)
        plain = sample(model, replace(one.sampler, solver=None), start, None, noise=Noise(0), index=index)
    settings: dict[str, Any] = {"samples": 1} if make is dts else {}
    steered = steer(make(rollouts=1, **settings), one, [""] * 5)
    assert torch.equal(steered.x_0[steered.best], plain)
    assert steered.ledger.nfe == model.ledger.nfe
    assert steered.ledger.reward_calls == 5


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch", [6])
def test_a_wide_root_makes_a_flat_list_which_is_best_of_n(task: Callable[[], Task], batch: int) -> None:
    one = task()
    search = grown(dts(rollouts=12, batch=batch, root_widening=100.0), one)
    flat = BestOfN(BestOfNConfig(particles=12)).steer(one, denoiser(one.model), one.reward, [""] * 2, Noise(0))
    rewards = flat.rewards.double().reshape(2, 12)
    for root in (0, 1):
        x, law, found = leaf_law(search, root)
        torch.testing.assert_close(x, flat.x_0[flat.group == root], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, rewards[root], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(law, (rewards[root] / 0.5).softmax(0), rtol=1e-4, atol=1e-6)
    log_z = (rewards / 0.5).logsumexp(1) - math.log(12)
    torch.testing.assert_close(torch.from_numpy(search.forest.value[:2, 0] / 0.5), log_z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("task", "make"), [(flow, dts), (clean_end, star), (tokens, dts)])
def test_prompts_in_a_batch_equal_prompts_one_by_one_at_any_forward_batch(
    task: Callable[[], Task], make: Callable[..., DTS | DTSStar]
) -> None:
    one = task()
    together = steer(make(), one, ["a", "b", "c"], 8)
    for i in (0, 2):
        alone = steer(make(), one, ["a"], 32, index=torch.tensor([i]))
        mine = together.group == i
        assert torch.equal(alone.x_0, together.x_0[mine])
        assert torch.equal(alone.rewards, together.rewards[mine])
        assert torch.equal(alone.log_z, together.log_z[i : i + 1]) or make is star


def test_samples_of_a_finished_tree_are_free_and_have_the_law_of_the_tree() -> None:
    one, steerer, draws = flow(), dts(), 1000
    search = grown(steerer, one)
    spent = search.frontier.chain.denoise.ledger.copy()
    steered = steerer.sample(search, draws)
    assert search.frontier.chain.denoise.ledger == spent
    assert torch.equal(steered.weight, torch.full((2 * draws,), 1 / draws, dtype=torch.float64))
    for root in (0, 1):
        x, law, rewards = leaf_law(search, root)
        mine = steered.x_0[steered.group == root]
        counts = (mine[:, None] == x).all(-1).sum(0)
        assert int(counts.sum()) == draws
        # the mean of chi squared is its degrees of freedom, its variance twice as many
        chi = float(((counts - draws * law).square() / (draws * law)).sum())
        assert chi < len(law) - 1 + 4 * math.sqrt(2 * (len(law) - 1))
        assert float(steered.ess[0, root]) == pytest.approx(1 / float(law.square().sum()))
        assert float(steered.log_z[root]) == pytest.approx(float(search.forest.value[root, 0]) / 0.5)
        assert bool((rewards[law.argmax()] <= rewards.max()).all())
    assert bool((steered.ancestors[0].numpy() <= search.forest.count(np.arange(2))).all())


def test_the_reward_sees_each_finished_sample_once_and_nothing_else() -> None:
    one, seen = tokens(), list[Tensor]()

    def watching(samples: Samples) -> Tensor:
        seen.append(samples.media)
        return one.reward.score(samples)

    search = grown(dts(), replace(one, reward=FunctionReward("watching", watching)))
    every = torch.cat(seen)
    leaves = (search.forest.depth[: search.forest.size] == search.forest.last).nonzero()[0]
    assert len(every) == len(leaves) == search.frontier.chain.ledger.reward_calls
    assert int(every.max()) < 3  # no mask


def test_star_returns_the_best_sample_ever_and_the_one_that_values_lead_to() -> None:
    one, steerer = flow(), star()
    search = grown(steerer, one, 3)
    steered = steer(steerer, one, [""] * 3, None)
    leaves = (search.forest.depth[: search.forest.size] == search.forest.last).nonzero()[0]
    roots = np.array([way_up(search.forest, leaf)[-1] for leaf in leaves])
    for root in range(3):
        best, led = steered.rewards[steered.group == root].tolist()
        assert best == pytest.approx(search.forest.value[leaves[roots == root], 0].max())
        assert led <= best
        node = root
        while search.forest.depth[node] < search.forest.last:
            children = search.forest.children(node)
            node = int(children[search.forest.value[children, 0].argmax()])
        assert led == pytest.approx(search.forest.value[node, 0])
    assert steered.weight.tolist() == [1.0, 0.0] * 3
    assert bool(steered.log_z.isnan().all())


@pytest.mark.parametrize("task", [flow, tokens])
def test_a_last_step_without_noise_has_one_child(task: Callable[[], Task]) -> None:
    one = task()
    if task is flow:
        one = replace(one, sampler=replace(one.sampler, kernel=DDIM(1.0)))  # its std is 0 in the step to the data
    search = grown(dts(rollouts=48, root_widening=0.5), one)
    forest, inner = search.forest, np.arange(search.forest.size)
    last = inner[forest.depth[inner] == forest.last - 1]
    if task is flow:
        assert bool((forest.count(last) == 1).all())
        assert bool((forest.visits[last] > 1).any())
        return
    # tokens: a sequence without mask stays as it is
    open_ = inner[(forest.depth[inner] >= 0) & (forest.depth[inner] < forest.last)]
    masked = (search.frontier.states.get(open_) == 3).any(1).numpy()
    assert bool((forest.count(open_[~masked]) == 1).all())
    assert bool((forest.count(open_[masked]) > 1).any())


def test_a_step_without_length_is_no_node() -> None:
    one = flow()
    grid = torch.tensor([1.0, 0.6, 0.6, 0.2, 0.0, 0.0], dtype=torch.float64)
    search = grown(dts(), replace(one, sampler=replace(one.sampler, grid=grid)))
    assert search.forest.last == 3
    steered = steer(dts(), replace(one, sampler=replace(one.sampler, grid=grid)), [""])
    assert bool(steered.x_0.isfinite().all())


def test_a_deterministic_kernel_and_a_model_with_memory_are_refused() -> None:
    one = flow()
    with pytest.raises(UserError, match=r"branches at the root alone: use best-of-n, or .*DDIM with eta above 0"):
        steer(dts(), replace(one, sampler=replace(one.sampler, kernel=DDIM(0.0))), [""])

    class Remembering(torch.nn.Module):
        def prepare(self, x_t: Tensor, t: Tensor, condition: Any) -> Stateful:
            return Stateful(None, x_t)

        def forward(self, x_t: Tensor, t: Tensor, condition: Any) -> Tensor:
            return x_t

    kept = replace(one, model=replace(one.model, network=Remembering()), sampler=replace(one.sampler, kernel=DDIM(1.0)))
    with pytest.raises(UserError, match="keeps state along a trajectory"):
        steer(dts(), kept, [""])


def test_missing_rewards_are_the_worst_and_counted() -> None:
    one = flow()
    half = FunctionReward("half", lambda s: torch.where(s.media[:, 1] > 0, s.media[:, 0] / 3, torch.nan))
    partly = replace(one, reward=Masked(half))
    steered = steer(dts(samples=64), partly, [""] * 2)
    assert bool((steered.x_0[:, 1] > 0).all())
    assert steered.invalid is not None
    assert bool((steered.invalid > 0).all())
    assert bool(steered.log_z.isfinite().all())
    search = grown(star(), partly)
    below = [search.forest.value[leaf, 0] for leaf in range(search.forest.size) if search.forest.depth[leaf] == 3]
    assert int(search.invalid.sum()) == sum(value == -np.inf for value in below)
    never = FunctionReward("never", lambda s: torch.full((len(s.media),), torch.nan))
    with pytest.raises(RewardError, match=r"all 16 rewards of prompt '' are missing \(of 2 of 2 prompts\)"):
        steer(dts(widening=100.0), replace(one, reward=Masked(never)), [""] * 2)


@pytest.mark.parametrize("make", [dts, star])
def test_budgets_are_kept_and_what_is_done_comes_out(make: Callable[..., DTS | DTSStar]) -> None:
    one, steerer = flow(), make(rollouts=100)
    for budget in (Budget(nfe=28), Budget(reward_calls=17)):
        model = denoiser(one.model)
        with metered(budget, model.ledger, 2) as meter:
            steered = steerer.steer(one, model, one.reward, [""] * 2, Noise(0), meter=meter)
        nfe, calls = steered.ledger.nfe, steered.ledger.reward_calls
        assert steered.complete
        if budget.nfe is not None:
            assert 56 - 6 < nfe <= 56  # less is left than one more rollout of both prompts may cost
        else:
            assert 33 <= calls <= 34
    model = denoiser(one.model)
    with (
        metered(Budget(nfe=2), model.ledger, 1) as meter,
        pytest.raises(UserError, match="of 2 network evaluations for all prompts is less than one round, up to 3"),
    ):
        steerer.steer(one, model, one.reward, [""], Noise(0), meter=meter)
    with metered(None, model.ledger, 1) as meter:
        done: list[int] = []

        def interrupt(step: int, steps: int, ess: Tensor | None) -> None:
            done.append(step)
            meter.interrupted = step >= 8

        steered = steerer.steer(one, model, one.reward, [""], Noise(0), meter=meter, progress=interrupt)
    assert done == [4, 8]
    assert not steered.complete
    assert bool(steered.rewards.isfinite().all())


def test_a_store_gives_back_what_it_was_given() -> None:
    store: NodeStore[dict[str, Tensor]] = NodeStore(half=False)
    x, token = torch.randn(3 * BLOCK, 2, 3), torch.arange(3 * BLOCK)
    nodes = np.random.default_rng(0).permutation(3 * BLOCK)
    for part in np.array_split(nodes, 7):
        store.put(part, {"x": x[part], "token": token[part]})
    found = store.get(nodes)
    assert torch.equal(found["x"], x[nodes])
    assert torch.equal(found["token"], token[nodes])
    held = store.bytes
    store.drop(nodes[:1000])
    assert store.rows == 3 * BLOCK - 1000
    store.put(nodes[:1000], {"x": -x[:1000], "token": token[:1000]})
    assert store.bytes == held  # in the places that were free
    assert torch.equal(store.get(nodes[:1000])["x"], -x[:1000])
    half: NodeStore[Tensor] = NodeStore(half=True)
    half.put(nodes, x[nodes])
    assert 2 * half.bytes == x.nbytes
    assert half.get(nodes).dtype == x.dtype
    assert bool(((half.get(np.arange(3 * BLOCK)) - x).abs() <= x.abs() / 2048 + 1e-6).all())


def test_half_precision_keeps_finished_samples_as_they_were_scored_and_predictions_are_dropped() -> None:
    one = flow()
    search = grown(dts(store="half", rollouts=40), one)
    assert search.frontier.samples.get(search.best).dtype == torch.float32
    torch.testing.assert_close(
        (search.frontier.samples.get(search.best)[:, 0] / 3).tanh().double(),
        torch.from_numpy(search.forest.value[search.best, 0]),
    )
    inner = int((search.forest.depth[: search.forest.size] < 3).sum())
    assert search.frontier.states.rows == inner - 2
    # at the end nothing can branch any more
    assert search.frontier.predictions.rows == 0
    narrow = grown(dts(rollouts=30, widening=0.1, root_widening=1.0), one)
    assert narrow.frontier.predictions.bytes == 0  # 0.1·sqrt(30) children: none is ever worth keeping


def test_what_a_user_can_get_wrong() -> None:
    for wrong in ({"temperature": 0.0}, {"rollouts": 0}, {"exponent": 1.0}, {"widening": -1.0}, {"lambda": 2.0}):
        with pytest.raises(ValidationError):
            dts(**wrong)
    sets = FunctionReward("sets", lambda s: torch.zeros(1), replace(flow().reward.capabilities, set_valued=True))
    with pytest.raises(UserError, match="scores sets"):
        steer(dts(), replace(flow(), reward=sets), [""])


@pytest.mark.long
@torch.no_grad()
def test_a_tree_of_20000_nodes_of_the_shapes_model_stays_under_1_gb() -> None:
    task = Shapes().task()
    search = planted(dts(rollouts=20_000, batch=64, temperature=0.1, store="half"), task, 1)
    nothing = resident()
    while search.forest.size < 20_000:
        search.advance(64)
    frontier = search.frontier
    held = frontier.states.bytes + frontier.predictions.bytes + frontier.samples.bytes
    assert held < 0.5 * 2**30
    assert resident() - nothing < 2**30
    # 3·32² numbers of two bytes for a state on the way, thrice as many for its prediction with what was evaluated
    inner = int((search.forest.depth[: search.forest.size] < 8).sum()) - 1
    assert frontier.states.rows == inner
    assert held <= (inner + 1024) * 3 * 3072 * 2.1 + (search.forest.size - inner + 1024) * 3072 * 4


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
