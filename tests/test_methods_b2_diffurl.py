"""B²-DiffuRL: the interval, the shared prefix, the contrast, the three losses, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, scatter, trained, with_reward
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.b2_diffurl import B2DiffuRL, Config
from difftilt.objectives.preference import step_preference
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
from difftilt.training.protocol import Task
from training_runs import densities, steady, train

SMALL: dict[str, Any] = {"groups": 6, "group_size": 4, "updates": 1}


def task(**changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(**changes)).task())


def collected(settings: dict[str, Any], on: Task | None = None, iteration: int = 0) -> tuple[Loop, Experience]:
    """Of weights that have left the reference, so that neither can stand in for the other."""
    loop = loop_of("b2-diffurl", on or task(), **{**SMALL, **settings})
    scatter(loop, "current")
    loop.run.begin(iteration)
    with torch.no_grad():
        return loop, loop.method.collect(loop.run)


def kept_samples(experience: Experience) -> set[int]:
    edges = experience.edges
    assert edges.mask is not None
    return set(edges.sample[edges.mask].tolist())


def test_branches_are_equal_up_to_the_interval_and_only_it_is_trained() -> None:
    loop, experience = collected({"shortest": 4})
    edges = experience.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.step.unique().tolist() == [6, 7, 8]  # anchored at the data end; the last step is not trained
    start = edges.x_t[edges.step == 6].reshape(6, 4, 2)
    end = edges.x_s[edges.step == 6].reshape(6, 4, 2)
    assert bool((start == start[:, :1]).all())
    assert len(end.flatten(0, 1).unique(dim=0)) == 24
    # the prefix and the state where they part once, the rest for every branch
    assert loop.run.ledger.nfe == 6 * (6 + 1 + 4 * 3)


@pytest.mark.parametrize("settings", [{}, {"kernel": "flow_sde", "noise_level": 0.7, "shortest": 3}])
def test_chains_are_drawn_and_scored_by_the_current_weights(settings: dict[str, Any]) -> None:
    loop, experience = collected(settings)
    assert experience.edges.log_prob is not None
    assert torch.allclose(experience.edges.log_prob, densities(loop, experience), atol=1e-4)


def test_the_interval_grows_from_the_data_end_to_the_whole_chain() -> None:
    first = [
        int(collected({"shortest": 4, "stages": 14}, iteration=stage)[1].edges.step.min()) for stage in range(0, 16, 2)
    ]
    assert first == [6, 5, 4, 3, 2, 1, 0, 0]
    whole = collected({"shortest": 10})[1].edges
    assert whole.x_t is not None
    start = whole.x_t[whole.step == 0].reshape(6, 4, 2)
    assert bool((start == start[:, :1]).all())
    assert len(start[:, 0].unique(dim=0)) == 6


def test_the_default_interval_is_the_papers() -> None:
    made = make_method("b2-diffurl", task(steps=20), **SMALL)
    assert isinstance(made, B2DiffuRL)
    assert [made.length(stage) for stage in (0, 14, 15, 50, 85, 86, 99, 400)] == [14, 14, 15, 17, 19, 20, 20, 20]


def test_best_and_worst_pass_on_the_score_of_their_prompt_and_nothing_else_is_trained() -> None:
    on = task(classes=4)
    loop, experience = collected({}, on)
    rewards, edges = experience.rewards, experience.edges
    assert rewards is not None
    assert edges.advantage is not None
    kept = kept_samples(experience)
    z = torch.zeros(24)
    for prompt in experience.prompt.unique():
        own = experience.prompt == prompt
        z[own] = (rewards[own] - rewards[own].mean()) / (rewards[own].std() + 1e-8)
    expected: set[int] = set()
    for group in range(6):
        members = (experience.group == group).nonzero()[:, 0]
        best, worst = int(members[z[members].argmax()]), int(members[z[members].argmin()])
        expected |= ({best} if z[best] >= 0.5 else set()) | ({worst} if z[worst] < -0.5 else set())
    assert kept == expected
    assert 0 < len(kept) < 12  # some group fails a threshold
    torch.testing.assert_close(edges.advantage[:, 0], z[edges.sample].clamp(-5, 5), rtol=1e-4, atol=1e-5)
    before = loop.run.ledger.copy()
    (phase,) = loop.method.phases(loop.run)
    loop.updater.run_phase(phase, experience, loop.run.noise)
    assert (loop.run.ledger - before).gradient_passes == 2 * len(kept) * 6  # epochs, chains, steps of L = 7


def test_positive_and_negative_advantages_have_weights_of_their_own() -> None:
    plain = collected({})[1].edges.advantage
    weighed = collected({"positive_weight": 2.0, "negative_weight": 0.5})[1].edges.advantage
    assert plain is not None
    assert weighed is not None
    assert torch.allclose(weighed, torch.where(plain > 0, 2.0, 0.5) * plain)


def test_statistics_reach_over_earlier_stages_and_no_further() -> None:
    loop, experience = collected({"history": 2})
    for iteration in range(1, 4):
        loop.run.begin(iteration)
        with torch.no_grad():
            experience = loop.method.collect(loop.run)
    state = loop.method.state_dict()
    assert state["stage"].unique().tolist() == [1, 2, 3]
    assert experience.rewards is not None
    pool, edges = state["values"], experience.edges
    z = (experience.rewards.double() - pool.mean()) / pool.std()
    assert edges.advantage is not None
    torch.testing.assert_close(edges.advantage[:, 0], z[edges.sample].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = train("b2-diffurl", tmp_path / "whole", iterations=4)
    train("b2-diffurl", tmp_path / "parts", iterations=2)
    resumed = train("b2-diffurl", tmp_path / "parts", iterations=4, resume=True)
    assert steady(resumed.rows[2:]) == steady(whole.rows[2:])


def test_the_stages_are_restored() -> None:
    loop, _ = collected({})
    again = make_method("b2-diffurl", task(), **SMALL)
    again.load_state_dict(loop.method.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in loop.method.state_dict().items())


def test_a_stage_in_which_nothing_passes_trains_nothing_and_says_so() -> None:
    rows = trained("b2-diffurl", task(), 2, 1e-3, count=16, **SMALL, threshold_best=50.0, threshold_worst=-50.0).rows
    assert [row["updates"] for row in rows] == [0.0, 0.0]
    assert all("grad_norm" not in row for row in rows)
    flat = with_reward(task(), lambda samples: torch.full((len(samples.media),), 0.1))
    assert trained("b2-diffurl", flat, 1, 1e-3, count=16, **SMALL).rows[0]["updates"] == 0


def test_the_preference_loss_is_the_formula_of_both_rows() -> None:
    ratio = torch.tensor([0.3, -0.2, 0.1, 0.4], requires_grad=True)
    partner, sign = torch.tensor([2, 3, 0, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss = step_preference(ratio, partner, sign, 0.5)
    one = torch.sigmoid(torch.tensor(0.5 * (0.3 - 0.1)))
    two = torch.sigmoid(torch.tensor(0.5 * (0.4 + 0.2)))
    torch.testing.assert_close(loss.detach(), -torch.stack([one, two, one, two]).log())
    (grad,) = torch.autograd.grad(step_preference(0 * ratio, partner, sign, 0.5).mean(), ratio, allow_unused=True)
    assert not bool(grad.any())
    still = torch.zeros(4, requires_grad=True)
    (grad,) = torch.autograd.grad(step_preference(still, partner, sign, 0.5).mean(), still)
    torch.testing.assert_close(grad, -0.5 * sign / 4)


def test_pairs_are_best_and_worst_of_one_group_and_stay_together() -> None:
    loop, experience = collected({"preference_beta": 0.1})
    edges = experience.edges
    assert edges.mask is not None
    assert experience.pair is not None
    kept = kept_samples(experience)
    assert kept
    assert all(int(experience.pair[sample]) in kept for sample in kept)
    assert all(int(experience.group[experience.pair[s]]) == int(experience.group[s]) for s in kept)
    assert edges.advantage is not None
    assert set(edges.advantage[edges.mask, 0].tolist()) == {1.0, -1.0}
    rows = experience.rows(edges.mask.nonzero()[:, 0])
    assert rows.pair is not None
    assert bool((rows.pair >= 0).all())
    assert bool((rows.edges.step[rows.pair] == rows.edges.step).all())
    assert loop.method.phases(loop.run)[0].unit == "group"


def test_the_pairwise_gradient_does_not_depend_on_microbatches_and_differs_from_the_clipped() -> None:
    def of(batch: int, **settings: Any) -> Tensor:
        return gradient("b2-diffurl", task(), batch, **SMALL, epochs=1, **settings)

    pair = of(64, preference_beta=0.1)
    assert torch.allclose(pair, of(8, preference_beta=0.1), rtol=1e-4, atol=1e-8)
    assert float(torch.cosine_similarity(pair, of(64), dim=0)) < 0.999


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"objective": "reinforce", "kl_weight": 0.04},
        {"objective": "guard", "kernel": "flow_sde", "noise_level": 0.7},
        {"preference_beta": 0.1},
        {"kernel": "flow_sde", "noise_level": 0.7, "train_last": True},
    ],
)
def test_a_variant_trains(settings: dict[str, Any]) -> None:
    rows = trained("b2-diffurl", task(), 2, 1e-3, count=32, **{**SMALL, **settings}).rows
    assert all(row["grad_norm"] > 0 for row in rows)
    assert ("loss/kl" in rows[0]) == ("kl_weight" in settings)


def test_it_trains_on_a_variance_preserving_model_and_on_tokens() -> None:
    vp = task(process="vp", kernel="ancestral")
    assert trained("b2-diffurl", vp, 1, 1e-3, count=16, **SMALL).rows[0]["grad_norm"] > 0
    tokens = Sequences(SequencesConfig()).task()
    rows = trained("b2-diffurl", tokens, 1, 1e-3, count=16, kernel="unmasking", **SMALL).rows
    assert rows[0]["grad_norm"] > 0


def test_the_last_step_is_trained_where_asked() -> None:
    edges = collected({"kernel": "flow_sde", "noise_level": 0.7, "train_last": True})[1].edges
    assert edges.step.unique().tolist() == list(range(3, 10))


def test_one_iteration_on_digits() -> None:
    result = trained("b2-diffurl", Digits(DigitsConfig()).task(), 1, 1e-4, count=8, groups=4, group_size=4)
    assert result.rows[0]["grad_norm"] > 0


@pytest.mark.long
def test_one_iteration_on_shapes() -> None:
    on = Shapes(ShapesConfig()).task()
    result = trained("b2-diffurl", on, 1, 1e-5, count=8, groups=6, group_size=4, kernel="flow_sde", noise_level=0.7)
    assert "updates" in result.rows[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortest": 11}, "at most 10"),
        ({"longest": 11}, "at most 10"),
        ({"shortest": 8, "longest": 5}, "longest"),
        ({"shortest": 1}, "train_last"),
        ({"threshold_best": -1.0}, "exchange"),
        ({"preference_beta": 0.1, "objective": "reinforce"}, "preference_beta"),
        ({"preference_beta": 0.1, "kl_weight": 0.1}, "preference_beta"),
        ({"train_last": True}, "flow_sde"),
        ({"kernel": "unmasking"}, "flow_sde"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("b2-diffurl", task(), **{**SMALL, **settings})


def test_a_last_step_that_follows_the_ode_is_not_trained() -> None:
    base = task()
    clean = replace(base, sampler=replace(base.sampler, clean_end=True))
    with pytest.raises(UserError, match="ODE"):
        make_method("b2-diffurl", clean, kernel="flow_sde", train_last=True, **SMALL)


def test_defaults_are_those_of_the_papers_run() -> None:
    config = Config()
    assert (config.group_size, config.threshold_best, config.threshold_worst, config.history) == (5, 0.5, -0.5, 8)
    assert (config.kernel, config.noise_level, config.clip_range, config.epochs) == ("ddim", 1.0, 0.1, 2)
