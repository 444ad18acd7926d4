import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import difftilt as package
from difftilt.checks.trade_offs import advanced, begun, toy, valid
from difftilt.errors import RewardError, UserError
from difftilt.evaluation.report.charts import Cloud, limits_of, scatter_chart
from difftilt.evaluation.report.page import write_report
from difftilt.evaluation.report.pictures import pictures
from difftilt.evaluation.report.reading import read_runs
from difftilt.evaluation.report.samples import Particles
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.distinct import DistinctReward
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import sample, start_state
from difftilt.statistics.pareto import front
from difftilt.steering.archive import told
from difftilt.steering.budget import Budget, metered
from difftilt.steering.peptune import ParetoSearch, PepTune, PepTuneConfig
from difftilt.steering.protocol import Steered
from difftilt.steering.tree import Forest
from difftilt.steering.tree_rules import ParetoFront
from difftilt.tables import steer_report
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.protocol import Task


def peptune(**settings: Any) -> PepTune:
    return PepTune(PepTuneConfig.model_validate({"iterations": 8, "children": 4, **settings}))


def small(length: int = 3, letters: int = 2, steps: int = 2) -> Task:
    """All sequences equally likely; the objectives count letter 0 and letter 1, the second twice."""
    model = GenerativeModel(
        lambda x, t, c: torch.zeros(*x.shape, letters),
        MaskedProcess(letters),
        "logits",
        (length,),
        lambda p: None,
        lambda x: x,
    )
    parts = {
        "zeros": FunctionReward("zeros", lambda s: (s.media == 0).float().sum(1)),
        "ones": FunctionReward("ones", lambda s: 2 * (s.media == 1).float().sum(1)),
    }
    reward = WeightedSum(parts, {"zeros": 1.0, "ones": 1.0})
    return Task("small", model, reward, ("",), ("",), Sampler(uniform_grid(steps), Unmasking()))


def steer(steerer: PepTune, task: Task, prompts: list[str], forward_batch: int | None = 8, **extra: Any) -> Steered:
    return steerer.steer(
        task, denoiser(task.model, forward_batch=forward_batch), task.reward, prompts, Noise(0), **extra
    )


@torch.no_grad()
def search_of(task: Task, runs: int = 1, **settings: Any) -> ParetoSearch:
    config = PepTuneConfig.model_validate({"iterations": 8, "children": 4, **settings})
    return ParetoSearch.begin(config, task, denoiser(task.model), task.reward, [""] * runs, Noise(0))


@pytest.mark.parametrize("seed", range(3))
def test_selection_draws_from_the_front_of_the_bounds(seed: int) -> None:
    random = np.random.default_rng(seed)
    forest = Forest(1, 0, 2, width=3)
    children = forest.grow(np.zeros(7, np.int64), np.ones(7, np.int64))
    forest.value[children], forest.visits[children] = random.normal(size=(7, 3)), random.integers(1, 9, 7)
    forest.prior[children], forest.visits[0] = random.dirichlet(np.ones(7)), 30
    bound = [
        forest.value[i] / forest.visits[i] + 0.3 * forest.prior[i] * math.sqrt(30) / (1 + forest.visits[i])
        for i in children
    ]
    best = [
        int(child)
        for child, mine in zip(children, bound, strict=True)
        if not any(bool((other >= mine).all() and (other > mine).any()) for other in bound)
    ]
    found = [ParetoFront(0.3)(forest, children, (u + 0.5) / 100) for u in range(100)]
    assert sorted(set(found)) == best
    assert max(found.count(child) for child in best) - min(found.count(child) for child in best) <= 1
    # a single objective: its largest bound, whatever the others say
    one = ParetoFront(0.3, np.array([1]))(forest, children, 0.5)
    assert one == int(children[int(np.argmax([mine[1] for mine in bound]))])


def test_exploration_alone_shares_visits_as_seats_are_shared() -> None:
    """Where all values are equal the largest p/(1 + N) is next: the method of D'Hondt, whose shares are known."""
    forest, random = Forest(1, 0, 2, width=2), np.random.default_rng(0)
    children = forest.grow(np.zeros(5, np.int64), np.ones(5, np.int64))
    forest.prior[children], forest.visits[children], forest.visits[0] = random.dirichlet(np.ones(5)), 1, 1
    for _ in range(300):
        chosen = ParetoFront(0.1)(forest, children, 0.5)
        forest.visits[chosen] += 1
        forest.visits[0] += 1
    share = forest.prior[children] / forest.visits[children]
    # nobody would give a seat for the next one that is not given; a first seat is everybody's
    assert (forest.prior[children] / (forest.visits[children] + 1)).max() <= share[forest.visits[children] > 1].min()
    np.testing.assert_allclose(forest.visits[children] / 305, forest.prior[children], atol=5 / 300)


@torch.no_grad()
def test_ranks_alone_count_so_no_increasing_function_of_an_objective_and_no_weight_changes_the_search() -> None:
    task = toy()
    assert isinstance(task.reward, WeightedSum)
    parts = task.reward.rewards
    bent = {
        "zeros": FunctionReward("zeros", lambda s: 50 + 7 * parts["zeros"].score(s).exp()),
        "ones": FunctionReward("ones", lambda s: parts["ones"].score(s) ** 3 - 4),
        "pairs": parts["pairs"],
    }
    other = replace(task, reward=WeightedSum(bent, {"zeros": 100.0, "ones": -3.0, "pairs": 0.01}))
    one, two = (advanced(search_of(each, iterations=12, children=6)) for each in (task, other))
    for name in ("parent", "visits", "value", "prior", "closed"):
        np.testing.assert_array_equal(getattr(one.forest, name), getattr(two.forest, name))
    assert torch.equal(one.archives.members[0].x, two.archives.members[0].x)


@torch.no_grad()
def test_children_are_independent_draws_of_one_step_that_keep_what_is_visible() -> None:
    search = search_of(small(length=2, steps=2), children=1000, iterations=2)
    search.advance()
    x = search.states.get(search.forest.children(0))
    # half of the positions are revealed, each letter as likely; two positions have nine outcomes
    law = torch.tensor([0.25, 0.25, 0.5])
    counts = torch.bincount(x[:, 0] * 3 + x[:, 1], minlength=9)
    expected = 1000 * (law[:, None] * law).flatten()
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # 8 degrees of freedom, 1 in 1000
    neighbours = (x[::2] == x[1::2]).all(1).float().mean()
    truth = float((law**2).sum() ** 2)
    assert abs(float(neighbours) - truth) < 4 * math.sqrt(truth * (1 - truth) / 500)
    deep = advanced(search_of(small(length=12, steps=4), iterations=6, children=4))
    nodes = np.arange(1, deep.forest.size)
    parents, children = (deep.states.get(each) for each in (deep.forest.parent[nodes], nodes))
    seen = parents < 2
    assert torch.equal(parents[seen], children[seen])


@torch.no_grad()
def test_every_state_is_evaluated_at_its_own_time() -> None:
    """At t a share t is masked, in expansions and completions of any level: 16 trees, 200 tokens, all scores equal."""
    task, seen = small(length=200, steps=4), list[tuple[float, float]]()

    def watching(x: Tensor, t: Tensor, c: object) -> Tensor:
        seen.extend(zip(t.tolist(), (x == 2).float().mean(1).tolist(), strict=True))
        return torch.zeros(*x.shape, 2)

    same = FunctionReward("same", lambda s: torch.zeros(len(s.media)))
    parts: dict[str, Reward] = {"a": same, "b": same}
    model = replace(task.model, network=watching)
    watched = replace(task, model=model, reward=WeightedSum(parts, dict.fromkeys(parts, 1.0)))
    search = advanced(search_of(watched, 16, iterations=8, children=2, exploration=0.0))
    nodes = np.arange(search.forest.size)
    assert int(search.forest.depth[nodes[search.forest.count(nodes) > 0]].max()) == 3
    times = sorted({t for t, _ in seen})
    np.testing.assert_allclose(times, [0.25, 0.5, 0.75, 1.0], rtol=1e-6)
    for t in times:
        share = float(np.mean([masked for at, masked in seen if at == t]))
        # at worst all states of a tree have the same masks
        assert abs(share - t) <= 4 * math.sqrt(t * (1 - t) / (16 * 200))


@torch.no_grad()
def test_visits_values_and_priors_are_those_of_the_expansions() -> None:
    search = begun(2, children=5, invalid_penalty=0.5)
    expansions: list[tuple[int, np.ndarray[Any, Any], float]] = []
    expand = search.expand

    def watching(roots: Any, at: Any) -> None:
        begin = search.forest.size
        expand(roots, at)
        for place, node in enumerate(at.tolist()):
            children = begin + 5 * place + np.arange(5)
            assert search.forest.children(node).tolist() == children.tolist()
            failed = sum(bool((search.forest.value[child] == 0).all()) for child in children) / 5
            expansions.append((node, search.forest.value[children].copy(), failed))

    search.expand = watching  # type: ignore[method-assign]
    for _ in range(15):
        search.advance()
    forest = search.forest
    visits, value = np.ones(forest.size), np.zeros((forest.size, 3))
    for node, ranks, failed in expansions:
        value[forest.children(node)] += ranks
        assert bool(((ranks >= 0) & (ranks <= 1)).all())
        while node >= 0:
            visits[node] += 1
            value[node] += ranks.mean(0) - 0.5 * failed
            node = int(forest.parent[node])
    np.testing.assert_array_equal(forest.visits[: forest.size], visits)
    np.testing.assert_allclose(forest.value[: forest.size], value, atol=1e-12)
    mean = forest.value[: forest.size] / visits[:, None]
    assert -0.5 <= mean.min() <= mean.max() <= 1
    for node, _, _ in expansions:
        assert float(forest.prior[forest.children(node)].sum()) == pytest.approx(1)
        assert not forest.closed[node] or forest.closed[forest.children(node)].all()


@torch.no_grad()
def test_the_reward_of_a_child_is_a_vector_of_shares_of_the_archive_that_it_meets() -> None:
    search, seen = begun(2, children=5), list[tuple[Tensor, Tensor]]()
    add = search.archives.add

    def watching(x_0: Tensor, root: Tensor, active: Tensor) -> Any:
        seen.append((x_0, root))
        return add(x_0, root, active)

    search.archives.add = watching  # type: ignore[method-assign]
    for _ in range(12):
        search.advance()
    x, root = (torch.cat([one[place] for one in seen]) for place in (0, 1))
    scores = search.archives.goals.score(Samples(x, [""] * len(x), [""] * len(x), root), Ledger()).tolist()
    archive: dict[int, dict[tuple[int, ...], list[float]]] = {0: {}, 1: {}}
    for node, (tokens, tree, ok, mine) in enumerate(zip(x.tolist(), root.tolist(), valid(x), scores, strict=True), 2):
        held = archive[tree]
        ranks = [sum(mine[k] >= one[k] for one in held.values()) / len(held) for k in range(3)] if held else [1.0] * 3
        # what an expansion has added since stands on top of it
        if search.forest.visits[node] == 1:
            np.testing.assert_allclose(search.forest.value[node], ranks if ok else [0.0] * 3, atol=1e-12)
        worse = [all(a >= b for a, b in zip(one, mine, strict=True)) and one != mine for one in held.values()]
        if ok and not any(worse):
            beaten = [key for key, one in held.items() if one != mine and all(np.array(mine) >= one)]
            archive[tree] = {key: one for key, one in held.items() if key not in beaten} | {tuple(tokens): mine}
    for tree, members in enumerate(search.archives.members):
        assert {tuple(one) for one in members.x.tolist()} == set(archive[tree])


@torch.no_grad()
def test_priors_of_long_sequences_do_not_underflow() -> None:
    search = search_of(small(length=2000, letters=50, steps=3), children=6)
    search.advance()
    prior = search.forest.prior[search.forest.children(0)]
    assert float(prior.sum()) == pytest.approx(1)
    assert bool((prior >= 0).all())
    # by hand: every position reveals one of 50 letters with probability 1/3 in the first step
    x = search.states.get(search.forest.children(0))
    seen = (x < 50).sum(1).double()
    log = seen * math.log(1 / 3 / 50) + (2000 - seen) * math.log(2 / 3)
    np.testing.assert_allclose(prior, log.softmax(0).numpy(), rtol=1e-3)


@torch.no_grad()
def test_priors_of_bonds_are_those_of_their_own_schedule() -> None:
    task = small(length=8, steps=4)
    process = MaskedProcess(2, bond=(False, True), power=3.0)
    search = search_of(replace(task, model=replace(task.model, process=process)), children=6)
    search.advance()
    x = search.states.get(search.forest.children(0))
    plain, bond = 0.5 / 4, 0.5 * (1 - 0.75**3)
    log = torch.tensor([plain, bond, 1 - plain - bond]).double().log()[x].sum(1)
    np.testing.assert_allclose(search.forest.prior[search.forest.children(0)], log.softmax(0).numpy(), rtol=1e-4)


@pytest.mark.parametrize("bonds", [False, True])
def test_one_iteration_of_one_child_is_plain_sampling_bit_for_bit(bonds: bool) -> None:
    task, index = toy(), torch.arange(4)
    bonded = MaskedProcess(4, bond=(False, True, False, False), power=3.0)
    model = replace(task.model, process=bonded) if bonds else task.model
    task = replace(task, model=model, valid=None)
    model = denoiser(task.model, forward_batch=8)
    with torch.no_grad():
        start = start_state(task.model.process, Noise(0), index, task.model.shape)
        plain = sample(model, task.sampler, start, None, noise=Noise(0), index=index)
    steered = steer(peptune(iterations=1, children=1), task, [""] * 4)
    assert torch.equal(steered.x_0, plain)
    assert steered.ledger.nfe == model.ledger.nfe


@torch.no_grad()
def test_the_ledger_counts_one_evaluation_for_an_expansion_and_what_is_left_for_its_children() -> None:
    search = advanced(begun(2, children=6, iterations=12))
    forest, last = search.forest, search.forest.last
    expanded = int((forest.count(np.arange(forest.size)) > 0).sum())
    nodes = np.arange(2, forest.size)
    whole = (search.states.get(nodes) < 4).all(1).numpy()
    left = np.where(whole, 0, last - forest.depth[nodes])
    assert search.chain.ledger.nfe == expanded + int(left.sum())
    scored = len(nodes) - int(search.archives.invalid.sum())
    assert search.chain.ledger.reward_calls == 3 * scored  # three objectives each
    assert len(nodes) == 2 * 12 * 6
    assert search.price(1).nfe == 2 * (1 + 6 * (last - 1))


def test_prompts_in_a_batch_equal_prompts_one_by_one_at_any_forward_batch() -> None:
    task = toy()
    together = steer(peptune(), task, ["a", "b", "c"], 8)
    for i in (0, 2):
        alone = steer(peptune(), task, ["x"], 32, index=torch.tensor([i]))
        mine = together.group == i
        assert torch.equal(alone.x_0, together.x_0[mine])
        assert torch.equal(alone.components["pairs"], together.components["pairs"][mine])
        assert torch.equal(alone.history["valid"][:, 0], together.history["valid"][:, i])


def test_what_comes_out_is_the_archive() -> None:
    task = toy()
    steered = steer(peptune(iterations=20), task, [""] * 2)
    assert bool(valid(steered.media).all())
    scores = torch.stack([*steered.components.values()], 1)
    assert [*steered.components] == ["zeros", "ones", "pairs"]
    torch.testing.assert_close(steered.rewards, scores.sum(1))
    for group in (0, 1):
        mine = steered.group == group
        assert bool(front(scores[mine]).all())
        assert len(steered.x_0[mine].unique(dim=0)) == int(mine.sum()) == steered.history["archive"][-1, group]
        assert float(steered.weight[mine].sum()) == pytest.approx(1)
        assert float(steered.rewards[steered.best[group]]) == float(steered.rewards[mine].max())
    assert steered.history["valid"].shape == (20, 2)
    assert steered.invalid is not None
    share = 1 - steered.invalid.double() / 80
    torch.testing.assert_close(steered.history["valid"].double().mean(0), share)


def test_a_tree_that_is_used_up_ends_the_search_with_the_exact_front() -> None:
    task = small()
    steered = steer(peptune(iterations=200, children=8), task, [""])
    assert len(steered.history["valid"]) < 200
    assert steered.complete
    # all 8 sequences have a score of their own kind: zeros against ones
    assert sorted({(int(a), int(b)) for a, b in zip(*steered.components.values(), strict=True)}) == [
        (0, 6),
        (1, 4),
        (2, 2),
        (3, 0),
    ]


def test_an_objective_that_begins_late_counts_from_then_on() -> None:
    search = search_of(small(6, 2, 5), iterations=16, objectives=("zeros", "ones"), begin_at=(0, 4))
    with torch.no_grad():
        for _ in range(4):
            search.advance()
            best = search.archives.members[0].scores[:, 0]
            assert bool((best == best.max()).all())  # one objective: the archive holds its best
        before = len(search.archives.members[0].scores.unique(dim=0))
        advanced(search)
    assert before == 1
    assert len(search.archives.members[0].scores.unique(dim=0)) > 1
    assert bool(front(search.archives.members[0].scores).all())


def test_objectives_are_named_among_the_components() -> None:
    task = toy()
    steered = steer(peptune(objectives=("pairs", "ones")), task, [""])
    scores = torch.stack([steered.components["pairs"], steered.components["ones"]], 1)
    assert bool(front(scores).all())
    assert [*steered.components] == ["zeros", "ones", "pairs"]


def test_greedy_completions_take_the_most_likely_symbols() -> None:
    task = replace(toy(), valid=None)
    steered = steer(peptune(completion="greedy", iterations=1, children=8), task, [""])
    # the first step reveals one position in ten at random; "3" is the most likely symbol of all that are left
    assert bool(((steered.x_0 != 3).sum(1) <= 5).all())


def test_invalid_and_missing_sequences_are_counted_and_never_chosen() -> None:
    task = toy()
    assert isinstance(task.reward, WeightedSum)

    def some(samples: Samples) -> Tensor:
        score = (samples.media == 0).float().mean(1)
        return torch.where(samples.media[:, 0] == 1, torch.nan, score)

    parts = {**task.reward.rewards, "zeros": FunctionReward("zeros", some)}
    masked = replace(task, reward=Masked(WeightedSum(parts, task.reward.weights)))
    steered = steer(peptune(iterations=12), masked, [""])
    assert bool((steered.x_0[:, 0] != 1).all())
    assert bool(valid(steered.x_0).all())
    assert steered.invalid is not None
    never = replace(task, valid=lambda media: torch.zeros(len(media), dtype=torch.bool))
    with pytest.raises(
        RewardError, match=r"none of the 32 sequences of prompt 'p' has all scores \(32 are invalid, 0 v"
    ):
        steer(peptune(), never, ["p"])
    nothing = {
        **task.reward.rewards,
        "zeros": FunctionReward("zeros", lambda s: torch.full((len(s.media),), torch.nan)),
    }
    lost = replace(task, reward=Masked(WeightedSum(nothing, task.reward.weights)), valid=lambda media: media[:, 0] == 0)
    with pytest.raises(RewardError, match=r"none of the 32 sequences") as caught:
        steer(peptune(), lost, ["p"])
    drawn = search_of(lost)  # the same sequences, whatever is said about them
    with torch.no_grad():
        for _ in range(8):
            drawn.advance()
    archives = drawn.archives
    assert 0 < int(archives.missing[0]) < int(archives.invalid[0]) == 32
    counts = int(archives.invalid[0] - archives.missing[0]), int(archives.missing[0])
    assert "{} are invalid, {} valid ones miss a score".format(*counts) in str(caught.value)


def test_the_table_says_that_samples_were_invalid_or_had_no_score() -> None:
    row = {"prompt": "p", "reward_best": 1.0, "reward_mean": 0.5, "log_z": None, "ancestors": [], "invalid": 185}
    summary = {"prompts": [row], "best": {"reward": 1.0}, "ledger": {"nfe": 3}, "complete": True, "equal": False}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(steer_report(summary))
    assert "185 samples were invalid or had no score; they were never chosen" in shown.get()


def test_samples_that_spell_the_same_are_one_member() -> None:
    """Letter 2 ends a word; what stands behind it means nothing. All words of zeros are on the front, and no others."""
    ended = small(length=4, letters=3)

    def words(media: Tensor) -> list[str]:
        return ["".join(map(str, one)).split("2")[0] for one in media.tolist()]

    parts: dict[str, Reward] = {
        "zeros": FunctionReward("zeros", lambda s: torch.tensor([float(one.count("0")) for one in words(s.media)])),
        "short": FunctionReward("short", lambda s: torch.tensor([4.0 - len(one) for one in words(s.media)])),
    }
    reward = WeightedSum(parts, dict.fromkeys(parts, 1.0))
    ended = replace(ended, reward=reward, valid=lambda media: media[:, 0] != 2, text=words)
    steered = steer(peptune(iterations=60, children=16), ended, [""])
    assert sorted(words(steered.x_0)) == ["0", "00", "000", "0000"]
    by_tokens = steer(peptune(iterations=60, children=16), replace(ended, text=None), [""])
    assert len(by_tokens.x_0) > 4
    x = torch.tensor([[0, 1], [0, 2], [1, 1]])
    assert told(x, ["", "", "a"]) == [(0, 1), (0, 2), "a"]


def test_a_process_that_is_not_masked_is_refused_before_any_work() -> None:
    task = Mixtures().task()
    parts: dict[str, Reward] = {
        name: FunctionReward(name, lambda s, place=place: s.media[:, place]) for place, name in enumerate("xy")
    }
    asked = list[str]()

    def watched(prompts: Any) -> Any:
        asked.append("encode")
        return task.model.encode(prompts)

    model = replace(task.model, encode=watched)
    task = replace(task, model=model, reward=WeightedSum(parts, dict.fromkeys(parts, 1.0)))
    network = denoiser(model)
    with pytest.raises(UserError, match="peptune needs a masked process, which 'mixtures' does not offer"):
        PepTune(PepTuneConfig(iterations=1, children=2)).steer(task, network, task.reward, [""], Noise(0))
    assert network.ledger.nfe == 0
    assert not asked


def test_the_call_keeps_budgets_masks_what_is_missing_and_returns_what_an_interrupt_leaves() -> None:
    task, calls = toy(), [0]
    assert isinstance(task.reward, WeightedSum)

    def stopping(samples: Samples) -> Tensor:
        calls[0] += 1
        if calls[0] == 4:
            os.kill(os.getpid(), signal.SIGINT)
        score = (samples.media == 0).float().mean(1)
        return torch.where(samples.media[:, 0] == 1, torch.nan, score)

    parts = {**task.reward.rewards, "zeros": FunctionReward("zeros", stopping)}
    reward = WeightedSum(parts, task.reward.weights)
    settings: dict[str, Any] = {"method": "peptune", "iterations": 100, "children": 8}
    with pytest.raises(RewardError, match="zeros"):
        package.steer(task, reward, **settings)
    calls[0] = 0
    found = package.steer(task, reward, **settings, invalid="mask").steered
    assert not found.complete
    assert len(found.history["valid"]) == calls[0] == 4
    assert bool((found.x_0[:, 0] != 1).all())
    assert bool(front(torch.stack([*found.components.values()], 1)).all())
    assert not found.rewards.isnan().any()
    bounded = package.steer(task, **settings, budget={"reward_calls": 200}).steered
    assert bounded.complete
    assert 200 - 24 < bounded.ledger.reward_calls <= 200
    timed = package.steer(task, **settings, budget={"seconds": 1e-6}).steered
    assert len(timed.history["valid"]) == 1
    assert not timed.complete


def test_budgets_are_kept_and_what_is_done_comes_out() -> None:
    task, steerer = toy(), peptune(iterations=100)
    for budget in (Budget(nfe=200), Budget(reward_calls=50)):
        model = denoiser(task.model)
        with metered(budget, model.ledger, 2) as meter:
            steered = steerer.steer(task, model, task.reward, [""] * 2, Noise(0), meter=meter)
        assert steered.ledger.nfe <= 400 if budget.nfe else steered.ledger.reward_calls <= 100
        assert steered.complete
        assert len(steered.history["valid"]) > 2
    with (
        metered(Budget(reward_calls=11), denoiser(task.model).ledger, 1) as meter,
        pytest.raises(
            UserError,
            match=r"of 11 reward calls .* up to \d+ network evaluations and 12 reward",
        ),
    ):
        steerer.steer(task, denoiser(task.model), task.reward, [""], Noise(0), meter=meter)


def test_what_a_user_can_get_wrong() -> None:
    with pytest.raises(ValidationError):
        peptune(invalid_penalty=-1.0)
    with pytest.raises(UserError, match=r"begin_at = \(0, 5\).*name the objectives as well"):
        peptune(begin_at=(0, 5))
    for begin_at in ((3, 5), (0, 5, 6)):
        with pytest.raises(UserError, match="one iteration for each of objectives"):
            peptune(begin_at=begin_at, objectives=("zeros", "ones"))
    with pytest.raises(UserError, match=r"no component 'zero'; did you mean zeros\?"):
        steer(peptune(objectives=("zero",)), toy(), [""])
    with pytest.raises(UserError, match="zeros is named twice"):
        steer(peptune(objectives=("zeros", "ones", "zeros")), toy(), [""])
    parts: dict[str, Reward] = {"ones": FunctionReward("ones", lambda s: s.media.float().mean(1))}
    parts["distinct"] = DistinctReward(lambda media: media.float() + 1)
    with pytest.raises(UserError, match="distinct scores sets: leave it out"):
        steer(peptune(), replace(toy(), reward=WeightedSum(parts, dict.fromkeys(parts, 1.0))), [""])
    with pytest.raises(UserError, match="masked process"):
        package.steer(Mixtures().task(), method="peptune")
    alone = replace(toy(), reward=FunctionReward("alone", lambda s: s.media.float().mean(1)))
    with pytest.raises(UserError, match=r"was given 'alone': write reward: \{weights"):
        steer(peptune(), alone, [""])


def test_the_report_draws_the_trade_offs_by_pairs(tmp_path: Path) -> None:
    result = package.steer(toy(), method="peptune", output=tmp_path / "run", iterations=10, children=8)
    kept = load_file(tmp_path / "run" / "samples.safetensors")
    assert torch.equal(kept["components/zeros"], result.steered.components["zeros"])
    assert kept["history/archive"].shape == (10, 1)
    (record,) = read_runs([tmp_path / "run"])
    assert isinstance(record.samples, Particles)
    (shown,) = pictures([record], 0)
    assert [plot.label for plot in shown.plots] == ["ones · pairs", "ones · zeros", "pairs · zeros"]
    text = write_report([tmp_path / "run"], tmp_path / "out.html").read_text()
    assert all(plot.svg in text for plot in shown.plots)
    # outlined are the members that none beats in both
    pair = torch.stack([kept["components/ones"], kept["components/zeros"]], 1).double()
    plain = scatter_chart(Cloud(0, pair), limits_of([pair]), 1)
    assert shown.plots[1].svg.count("<use") - plain.count("<use") == int(front(pair).sum())
