"""GDRO: the loss against the formula by hand, one time per group, the reference without gradient, no sampling later."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, scatter, trained, with_reward
from difftilt.errors import UserError
from difftilt.objectives.ranking import best_members, spread, suffix_cross_entropy
from difftilt.process.gaussian import GaussianProcess, as_gaussian
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.offline import from_tensors
from difftilt.training.protocol import Loss, Task

SMALL: dict[str, Any] = {"groups": 4, "group_size": 3, "collect": 8}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(steps=4, hidden=8, **changes)).task())


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


def first_update(loop: Loop) -> tuple[Experience, Loss]:
    """Rows of the first update, prepared, and their loss."""
    experience = collected(loop)
    (phase,) = loop.method.phases(loop.run)
    assert phase.before is not None
    rows = phase.before(experience.rows(torch.arange(len(experience.edges.step))))
    return rows, phase.loss(rows, loop.run.noise)


def by_hand(s: Tensor, r: Tensor, tau: float, first: bool = False) -> Tensor:
    """L of one group, term by term as in the paper; at tau 0 tied suffixes are skipped."""
    order = r.argsort(descending=True, stable=True)
    s, r, total = s[order], r[order], torch.zeros((), dtype=s.dtype)
    for i in range(min(1, len(s) - 1) if first else len(s) - 1):
        if tau == 0 and r[i] == r[i + 1]:
            continue
        q = torch.eye(len(s) - i, dtype=s.dtype)[0] if tau == 0 else (r[i:] / tau).softmax(0)
        total = total + s[i:].logsumexp(0) - (q * s[i:]).sum()
    return total


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_the_loss_of_ragged_groups_in_any_order_is_the_papers(tau: float, first: bool) -> None:
    group = torch.tensor([5, 5, 2, 2, 2, 5, 7, 5])
    rewards = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0, 9.0, 2.0], dtype=torch.float64)
    scores = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = suffix_cross_entropy(scores, rewards, group, tau=tau, suffixes="first" if first else "all")
    for label in (2, 5, 7):
        own = group == label
        assert torch.allclose(loss[own].sum(), by_hand(scores[own], rewards[own], tau, first))
    expected = sum(
        (by_hand(scores[group == one], rewards[group == one], tau, first) for one in (2, 5)), torch.zeros(())
    )
    slopes = [torch.autograd.grad(total, scores, retain_graph=True)[0] for total in (loss.sum(), expected)]
    assert torch.allclose(slopes[0], slopes[1])


def test_tied_members_pull_alike_under_soft_targets() -> None:
    scores = torch.zeros(3, requires_grad=True)
    tied = torch.tensor([1.0, 1.0, 0.0])
    suffix_cross_entropy(scores, tied, torch.zeros(3).long(), tau=0.5, suffixes="first").sum().backward()
    assert scores.grad is not None
    assert scores.grad[0] == scores.grad[1] < 0


def test_best_members_and_spread() -> None:
    group, rewards = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([2.0, 5.0, 3.0, 5.0, 3.0])
    assert best_members(rewards, group).tolist() == [False, True, True, False, False]
    assert spread(rewards, group).tolist() == [1.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("process", ["flow", "vp"])
def test_rows_of_an_update_against_the_paper(process: str, reduction: str) -> None:
    settings: dict[str, Any] = {"tau": 0.7, "beta": 3.0, "gamma": 0.25, "reduction": reduction}
    loop = loop_of("gdro", task(classes=4, process=process), **SMALL, **settings)
    scatter(loop, "current")
    rows, loss = first_update(loop)
    assert rows.x_0 is not None
    assert rows.rewards is not None
    path = loop.run.task.model.process
    assert isinstance(path, GaussianProcess)
    eps = loop.run.noise.normal(rows.index, (2,), purpose="renoise", step=rows.edges.step)
    t = rows.edges.t
    x_t, truth = path.corrupt(rows.x_0, t, eps), path.target("velocity", rows.x_0, t, eps)

    def error(role: str) -> Tensor:
        prediction = loop.run.denoiser(role, 1.0)(x_t, t, rows.condition)
        gap = (as_gaussian(prediction).velocity - truth) ** 2
        return gap.sum(1) if reduction == "sum" else gap.mean(1)

    s = -3.0 * (error("current") - error("reference"))
    groups = [(rows.group == one) for one in rows.group.unique()]
    expected = torch.stack([by_hand(s[own], rows.rewards[own], 0.7) for own in groups]).mean()
    assert torch.allclose(loss.terms["ranking"].value.mean(), expected, rtol=1e-3)
    best = torch.stack([error("current")[own][rows.rewards[own].argmax()] for own in groups]).mean()
    assert torch.allclose(loss.terms["best"].value.float().mean(), best, rtol=1e-3)
    assert loss.terms["best"].weight == 0.25
    displaced = torch.stack([-s[own][rows.rewards[own].argmax()] / 3 for own in groups]).mean()
    assert torch.allclose(loss.metrics["displacement"].mean(), displaced, atol=1e-4)
    wide = torch.stack([s[own].max() - s[own].min() for own in groups]).mean()
    assert torch.allclose(loss.metrics["implicit_spread"].mean(), wide, rtol=1e-3)
    asked = torch.stack([(rows.rewards[own].max() - rows.rewards[own].min()) / 0.7 for own in groups]).mean()
    assert torch.allclose(loss.metrics["target_spread"].mean(), asked, rtol=1e-4)


def test_pairs_at_temperature_zero_are_diffusion_dpo() -> None:
    settings: dict[str, Any] = {**SMALL, "group_size": 2, "tau": 0.0, "beta": 2.0, "gamma": 0.0}
    loop = loop_of("gdro", task(), **settings)
    scatter(loop, "current")
    rows, loss = first_update(loop)
    assert rows.rewards is not None
    assert set(loss.terms) == {"ranking"}
    per_pair = loss.terms["ranking"].value.double().reshape(-1, 2).mean(1)
    gain = _scores(loop, rows, 2.0).reshape(-1, 2)
    better = rows.rewards.reshape(-1, 2).argmax(1, keepdim=True)
    margin = (gain.gather(1, better) - gain.gather(1, 1 - better))[:, 0]
    assert torch.allclose(per_pair, -torch.nn.functional.logsigmoid(margin), rtol=1e-4, atol=1e-5)


def _scores(loop: Loop, rows: Experience, beta: float, guidance: float = 1.0) -> Tensor:
    """s of every row of a rectified flow, whose velocity is eps - x_0."""
    assert rows.x_0 is not None
    t = rows.edges.t
    eps = loop.run.noise.normal(rows.index, (2,), purpose="renoise", step=rows.edges.step)
    x_t = loop.run.task.model.process.corrupt(rows.x_0, t, eps)
    guesses = [
        as_gaussian(loop.run.denoiser(role, guidance)(x_t, t, rows.condition)).velocity
        for role in ("current", "reference")
    ]
    errors = [(guess - (eps - rows.x_0)).square().sum(1) for guess in guesses]
    return -beta * (errors[0] - errors[1]).detach().double()


def test_a_guided_task_compares_guided_predictions() -> None:
    """They are what drew the data and what is evaluated."""
    on = task(classes=4)
    loop = loop_of("gdro", replace(on, sampler=replace(on.sampler, guidance=2.5)), **SMALL, beta=2.0, tau=0.7)
    scatter(loop, "current")
    rows, loss = first_update(loop)
    s = _scores(loop, rows, 2.0, guidance=2.5)
    spreads = torch.stack([s[own].max() - s[own].min() for own in (rows.group == one for one in rows.group.unique())])
    assert torch.allclose(loss.metrics["implicit_spread"].double().mean(), spreads.mean(), rtol=1e-3)
    unguided = _scores(loop, rows, 2.0)
    assert not torch.allclose(unguided, s, rtol=0.1)


@pytest.mark.parametrize("times", ["uniform", "grid"])
def test_a_group_shares_its_time_and_not_its_noise(times: str) -> None:
    loop = loop_of("gdro", task(), times=times, **SMALL)
    edges = collected(loop)
    t = edges.edges.t[edges.edges.sample.argsort()].reshape(4, 3)
    assert bool((t == t[:, :1]).all())
    assert len(t[:, 0].unique()) > 1
    grid = loop.run.task.sampler.grid[:-1].float()
    assert bool(torch.isin(t, grid).all()) == (times == "grid")
    loop.run.begin(1)
    assert not torch.equal(t[:, 0], collected(loop).edges.t.reshape(4, 3)[:, 0])


def test_noise_is_shared_in_a_group_only_when_asked_for() -> None:
    for shared in (False, True):
        loop = loop_of("gdro", task(), shared_noise=shared, gamma=1.0, tau=0.0, **SMALL)
        experience = collected(loop)
        assert experience.x_0 is not None
        # all members are one and the same latent: only the noise can tell their errors apart
        alike = replace(experience, x_0=torch.zeros_like(experience.x_0))
        (phase,) = loop.method.phases(loop.run)
        assert phase.before is not None
        scatter(loop, "current")
        rows = phase.before(alike.rows(torch.arange(12)))
        spreads = phase.loss(rows, loop.run.noise).metrics["implicit_spread"]
        assert bool((spreads == 0).all()) == shared


def test_nothing_is_sampled_or_scored_after_the_first_iteration() -> None:
    result = trained("gdro", task(), 4, 1e-3, count=16, **SMALL)
    drawn = 8 * 3
    assert [row["reward_calls"] for row in result.rows] == [drawn, 0, 0, 0]
    # one pass of the reference and one with gradient for each of the 12 trained samples
    assert [row["nfe"] for row in result.rows] == [drawn * 4 + 12, 12, 12, 12]
    assert [row["gradient_passes"] for row in result.rows] == [12] * 4


def test_the_reference_draws_the_data_and_never_moves() -> None:
    plain, moved = (loop_of("gdro", task(), **SMALL) for _ in range(2))
    scatter(moved, "current")
    one, other = collected(plain), collected(moved)
    assert one.x_0 is not None
    assert other.x_0 is not None
    assert torch.equal(one.x_0, other.x_0)


def test_the_values_of_the_rewards_matter_and_not_their_ranks_alone() -> None:
    def score(power: float) -> Task:
        return with_reward(task(), lambda samples: (samples.media[:, 0] / 4 + 0.5).clamp(0, 1) ** power)

    soft = [gradient("gdro", score(power), tau=0.1, gamma=0.0, **SMALL) for power in (1.0, 3.0)]
    ranks = [gradient("gdro", score(power), tau=0.0, gamma=0.0, **SMALL) for power in (1.0, 3.0)]
    assert torch.cosine_similarity(*soft, dim=0) < 0.999
    assert torch.equal(*ranks)


def test_settings_change_the_gradient() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"suffixes": "first"},
        {"gamma": 0.0},
        {"reduction": "mean"},
        {"shared_noise": True},
        {"times": "grid"},
    ]
    given: list[dict[str, Any]] = [{**SMALL, "tau": 0.5, "beta": 1.0, **one} for one in settings]
    found = [gradient("gdro", task(), **one) for one in given]
    for one in range(len(found)):
        for other in range(one):
            assert not torch.allclose(found[one], found[other], rtol=1e-3), (settings[one], settings[other])


def with_data(rewards: Tensor, size: int) -> Task:
    """A task with stored groups of the given rewards; x_0 counts the samples."""
    index = torch.arange(len(rewards))
    x_0 = index[:, None].float().expand(-1, 2)
    columns = {"index": index, "group": index // size, "prompt": index * 0, "x_0": x_0, "rewards": rewards}
    return replace(task(), data=from_tensors(columns))


def test_groups_take_turns_without_repetition_and_equal_ones_are_left_out() -> None:
    rewards = torch.rand(7 * 3, generator=torch.Generator().manual_seed(0))
    rewards[6:9] = 0.25
    loop = loop_of("gdro", with_data(rewards, 3), groups=2, group_size=3)
    seen: list[int] = []
    for iteration in range(6):
        loop.run.begin(iteration)
        drawn = collected(loop)
        assert drawn.x_0 is not None
        assert drawn.rewards is not None
        assert drawn.index.tolist() == list(range(6))
        assert torch.equal(drawn.rewards, rewards[drawn.x_0[:, 0].long()])
        seen += (drawn.x_0[::3, 0] // 3).int().tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == [0, 1, 3, 4, 5, 6]
    assert seen[:6] != seen[6:]
    loop.run.begin(0)
    _, loss = first_update(loop)
    assert bool((loss.metrics["dropped_groups"] == 1).all())


def test_more_groups_than_there_are_come_again_with_noise_of_their_own() -> None:
    loop = loop_of("gdro", with_data(torch.tensor([0.0, 1.0, 0.5, 0.2]), 2), groups=6, group_size=2)
    rows, _ = first_update(loop)
    assert len(rows.group.unique()) == 6
    assert len(rows.edges.t.unique()) == 6


@pytest.mark.parametrize(
    ("rewards", "size", "message"),
    [
        (torch.ones(6), 3, "equal rewards"),
        (torch.rand(6), 1, "at least two"),
        (torch.rand(6), 2, "method.group_size=2"),
        (torch.full((6,), torch.nan), 3, "not finite"),
    ],
)
def test_data_that_cannot_be_learned_from_are_refused(rewards: Tensor, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("gdro", with_data(rewards, size), groups=2, group_size=3)


def test_data_of_another_task_are_refused() -> None:
    held = with_data(torch.rand(6), 3)
    assert held.data is not None
    with pytest.raises(UserError, match="shape"):
        make_method("gdro", replace(Digits(DigitsConfig()).task(), data=held.data), group_size=3)
    strange = replace(held.data, prompt=held.data.prompt + 1)
    with pytest.raises(UserError, match="prompts outside"):
        make_method("gdro", replace(held, data=strange), group_size=3)
    with pytest.raises(UserError, match="no scored samples"):
        make_method("gdro", replace(held, data=replace(held.data, rewards=None)), group_size=3)


def test_no_data_and_tokens_are_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="difftilt collect"):
        make_method("gdro", task())
    with pytest.raises(UserError, match="Gaussian"):
        make_method("gdro", Sequences(SequencesConfig()).task(), **SMALL)


def test_drawn_data_are_remembered_and_given_data_are_not() -> None:
    loop = loop_of("gdro", task(), **SMALL)
    assert loop.method.state_dict() == {}
    first = collected(loop)
    state = loop.method.state_dict()
    other = loop_of("gdro", task(), **SMALL)
    other.method.load_state_dict(state)
    before = other.run.ledger.copy()
    again = collected(other)
    assert other.run.ledger == before
    assert first.x_0 is not None
    assert again.x_0 is not None
    assert torch.equal(first.x_0, again.x_0)
    given = loop_of("gdro", with_data(torch.rand(6), 3), groups=2, group_size=3)
    collected(given)
    assert given.method.state_dict() == {}


@pytest.mark.long
def test_a_short_training_raises_the_reward() -> None:
    on = with_reward(Mixtures(MixturesConfig(steps=6)).task(), lambda samples: torch.sigmoid(samples.media[:, 0]))
    result = trained("gdro", on, 60, 3e-3, count=256, groups=16, collect=64, beta=0.5, group_size=4)
    assert result.after["reward"] > result.before["reward"] + 0.05
