"""GARDO: suspects are held, to a reference that follows, and good samples gain from being unlike; on two bases."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from difftilt.checks.gardo import hackable
from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, scatter, trained
from difftilt.credit.diversity import nearest_distance
from difftilt.credit.uncertainty import Fraction, suspects, uncertainty
from difftilt.errors import UserError
from difftilt.methods.policy_gradient.gardo import Config, GatedChain, GatedRegression, gardo
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.testbeds.shapes import Config as ShapesConfig
from difftilt.testbeds.shapes import Shapes
from difftilt.training.config import TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.gating import Gating, GatingConfig
from difftilt.training.loop import Loop, train_task
from difftilt.training.protocol import Task
from difftilt.training.surrogate import KL_GATE

NAMES = ("true", "nearness")
SMALL: dict[str, Any] = {"groups": 3, "group_size": 4, "updates": 1, "auxiliary": NAMES, "kl_weight": 1.0}
NFT: dict[str, Any] = {**SMALL, "base": "diffusion-nft", "share_start": False}
BASES = [pytest.param(SMALL, id="flow-grpo"), pytest.param(NFT, id="diffusion-nft")]


def task() -> Task:
    return perturbed(hackable())


def made(settings: dict[str, Any], on: Task | None = None) -> tuple[Loop, Gating]:
    loop = loop_of("gardo", on or task(), **settings)
    assert isinstance(loop.method, GatedChain | GatedRegression)
    return loop, loop.method.gating


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


def scored(experience: Experience, on: Task) -> tuple[Tensor, Tensor]:
    """Proxy and auxiliary scores of the samples, computed here."""
    assert experience.x_0 is not None
    names = [""] * len(experience.index)
    samples = Samples(experience.x_0, names, names, experience.group)
    return on.reward.score(samples), torch.stack([on.heldout[name].score(samples) for name in NAMES], dim=1)


def gates(experience: Experience) -> Tensor:
    """Of each sample, after checking that all its edges agree."""
    edges = experience.edges
    gate = edges.extras[KL_GATE]
    own = [gate[edges.sample == sample].unique() for sample in range(len(experience.index))]
    assert all(len(values) == 1 for values in own)
    return torch.cat(own)


@pytest.mark.parametrize("settings", BASES)
def test_edges_of_the_suspects_are_held_and_no_others(settings: dict[str, Any]) -> None:
    on = task()
    loop, _ = made({**settings, "gate_fraction": 0.2}, on)
    experience = collected(loop)
    proxy, auxiliary = scored(experience, on)
    scope = torch.zeros_like(experience.group)
    expected = suspects(uncertainty(proxy, auxiliary, scope), scope, 0.2)
    assert 1 <= int(expected.sum()) <= 3
    assert torch.equal(gates(experience).bool(), expected)


@pytest.mark.parametrize("settings", BASES)
@pytest.mark.parametrize(("seen", "factor", "share"), [(1e-9, 1.1, 0.14), (0.999, 0.9, 0.15)])
def test_the_share_follows_the_doubt_of_a_batch_before_that_batch_is_gated(
    settings: dict[str, Any], seen: float, factor: float, share: float
) -> None:
    on = task()
    loop, gating = made({**settings, "groups": 4, "group_size": 12}, on)
    gating.fraction = Fraction(share, seen=(seen,))
    experience = collected(loop)
    proxy, auxiliary = scored(experience, on)
    scope = torch.zeros_like(experience.group)
    doubt = uncertainty(proxy, auxiliary, scope)
    before, after = (suspects(doubt, scope, value) for value in (share, factor * share))
    assert not torch.equal(before, after)
    assert torch.equal(gates(experience).bool(), after)
    assert gating.fraction.value == pytest.approx(factor * share)
    assert gating.fraction.seen == pytest.approx((seen, float(doubt[doubt >= 0].mean())))


@pytest.mark.parametrize("settings", BASES)
def test_monotone_transforms_of_the_auxiliaries_change_neither_gate_nor_advantage(settings: dict[str, Any]) -> None:
    def cubed(samples: Samples) -> Tensor:
        return 7 * on.heldout["nearness"].score(samples) ** 3

    on = task()
    other = replace(on, heldout={**on.heldout, "nearness": as_reward(cubed, name="nearness")})
    one, two = (collected(made(settings, which)[0]) for which in (on, other))
    assert torch.equal(gates(one), gates(two))
    for a, b in ((one.edges.advantage, two.edges.advantage), (one.label, two.label)):
        assert a is b is None or (a is not None and b is not None and torch.equal(a, b))


def penalty_gradient(settings: dict[str, Any], keep: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """(gradient of the penalty term alone, its value for each row) where only the kept suspects are held."""
    loop, _ = made({**settings, "diversity": "none"})
    experience = collected(loop)
    scatter(loop, "current", "anchor", "reference")
    held = torch.tensor(keep)
    edges = experience.edges
    rows = experience.rows(torch.arange(len(edges.step)))
    gate = held[rows.index].float()
    rows = replace(rows, edges=replace(rows.edges, extras={KL_GATE: gate}))
    (phase,) = loop.method.phases(loop.run)
    assert phase.before is not None
    term = phase.loss(phase.before(rows), loop.run.noise).terms["kl"]
    parameters = loop.run.roles.parameters("current")
    grads = torch.autograd.grad(term.value.mean(), parameters)
    return torch.cat([grad.reshape(-1) for grad in grads]).double(), term.value.detach()


@pytest.mark.parametrize("settings", BASES)
def test_samples_that_are_not_held_have_exactly_no_penalty(settings: dict[str, Any]) -> None:
    none, values = penalty_gradient(settings, [False] * 12)
    assert float(none.abs().max()) == 0.0
    assert float(values.abs().max()) == 0.0
    _, values = penalty_gradient(settings, [True, *[False] * 11])
    rows = len(values) // 12
    assert int((values > 0).sum()) == rows


@pytest.mark.parametrize("settings", BASES)
def test_the_penalty_is_a_mean_over_the_held_rows_or_over_all(settings: dict[str, Any]) -> None:
    keep = [True, True, True, *[False] * 9]
    gated, _ = penalty_gradient(settings, keep)
    over_all, _ = penalty_gradient({**settings, "kl_mean": "all"}, keep)
    assert torch.allclose(gated, 4 * over_all, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("settings", BASES)
def test_the_penalty_pulls_to_the_anchor_not_to_the_reference(settings: dict[str, Any]) -> None:
    loop, _ = made({**settings, "gate": "all", "auxiliary": ()})
    experience = collected(loop)
    scatter(loop, "current", "reference")
    loop.run.roles.blend("anchor", "current", 0.0)
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    values = phase.loss(rows, loop.run.noise).terms["kl"].value.detach()
    assert float(values.abs().max()) == 0.0
    scatter(loop, "anchor")
    assert float(phase.loss(rows, loop.run.noise).terms["kl"].value.detach().min()) > 0


@pytest.mark.parametrize("settings", BASES)
def test_microbatches_of_any_size_give_one_gradient(settings: dict[str, Any]) -> None:
    found: list[Tensor] = []
    for batch in (8, 64):
        loop = loop_of("gardo", task(), batch, **{**settings, "gate_fraction": 0.2})
        experience = collected(loop)
        scatter(loop, "current", "anchor")
        (phase,) = loop.method.phases(loop.run)
        loop.updater.fresh = False
        numbers = loop.updater.run_phase(phase, experience, loop.run.noise)
        assert numbers["loss/kl"] > 0
        grads = [p.grad for p in loop.run.roles.parameters("current") if p.grad is not None]
        found.append(torch.cat([grad.reshape(-1) for grad in grads]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-4


def test_advantages_are_centred_not_scaled_and_shaped_where_positive() -> None:
    on = task()
    experience = collected(made(SMALL, on)[0])
    proxy, _ = scored(experience, on)
    assert experience.x_0 is not None
    assert experience.edges.advantage is not None
    centred = proxy - proxy.reshape(3, 4).mean(1).repeat_interleave(4)
    distance = nearest_distance(experience.x_0, experience.group)
    factor = distance / distance.reshape(3, 4).mean(1).repeat_interleave(4)
    expected = torch.where(centred > 0, centred * factor, centred.double())
    given = experience.edges.advantage[experience.edges.step == 0, 0]
    assert torch.allclose(given.double(), expected, atol=1e-6)
    assert float((factor - 1).abs().max()) > 0.1


def test_labels_of_the_regression_come_from_the_shaped_advantage() -> None:
    on = task()
    loop, gating = made({**NFT, "nft": {"max_advantage": 0.8}}, on)
    experience = collected(loop)
    names = [""] * 12
    assert experience.x_0 is not None
    with torch.no_grad():
        credit = gating.credit(loop.run, experience, Samples(experience.x_0, names, names, experience.group))
    assert experience.label is not None
    assert torch.allclose(experience.label, (credit.advantage / 1.6 + 0.5).clamp(0, 1), atol=1e-6)


def test_a_group_shares_its_start_by_default() -> None:
    edges = collected(made(SMALL)[0]).edges
    assert edges.x_t is not None
    first = edges.x_t[edges.step == 0].reshape(3, 4, 2)
    assert bool((first == first[:, :1]).all())


def weights(loop: Loop, role: str) -> Tensor:
    """Copied, in one row."""
    return torch.cat([value.flatten() for value in loop.run.roles.module(role).state_dict().values()])


@pytest.mark.parametrize(
    ("limit", "steps", "expected"),
    [(1e-4, 3, [3, 6, 9]), (1e-4, None, [3]), (None, 4, [4, 8]), (1e-4, 4, [3, 7]), (None, None, [])],
)
def test_the_reference_is_replaced_when_it_is_far_or_old(
    limit: float | None, steps: int | None, expected: list[int]
) -> None:
    loop, gating = made({**SMALL, "kl_limit": limit, "reset_steps": steps})
    found: list[int] = []
    base = weights(loop, "reference")
    for update, kl in enumerate((0.0, 0.5e-4, 2e-4, 0.0, 0.0, 0.0, 1e-4, 0.0, 0.0), start=1):
        scatter(loop, "current")
        before = gating.resets
        gating.moved(loop.run, {"loss/kl": kl})
        if gating.resets > before:
            found.append(update)
            assert loop.run.roles.same("anchor", "current")
            assert torch.equal(weights(loop, "anchor"), weights(loop, "current"))
        else:
            assert not loop.run.roles.same("anchor", "current")
        assert torch.equal(weights(loop, "reference"), base)
    assert found == expected
    assert gating.resets == len(expected)


def test_the_measured_kl_is_that_of_the_held_rows_whatever_the_mean() -> None:
    measured: list[float] = []
    for mean in ("gated", "all"):
        loop, gating = made({**SMALL, "kl_mean": mean, "gate_fraction": 0.2, "kl_limit": None})
        experience = collected(loop)
        scatter(loop, "current", "anchor")
        loop.updater.fresh = False
        (phase,) = loop.method.phases(loop.run)
        kl = loop.updater.run_phase(phase, experience, loop.run.noise)["loss/kl"]
        limit = kl * (1.0 if mean == "gated" else len(gates(experience)) / float(gates(experience).sum()))
        measured.append(limit)
        for factor, resets in ((1.01, 0), (0.99, 1)):
            gating.config = replace_config(gating.config, kl_limit=limit * factor)
            gating.resets = 0
            gating.moved(loop.run, {"loss/kl": kl})
            assert gating.resets == resets
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


def replace_config(config: GatingConfig, **changes: Any) -> GatingConfig:
    return config.model_copy(update=changes)


@pytest.mark.parametrize("settings", BASES)
def test_a_run_resets_counts_adapts_and_keeps_drift_to_the_first_weights(settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"group_size": 12, "gate_fraction": 0.15, "reset_steps": 2, "kl_limit": None, "ema": 0.0}
    result = trained("gardo", task(), 5, 1e-2, count=16, **{**settings, **changes})
    assert [row["resets"] for row in result.rows] == [0, 0, 1, 1, 2]
    assert [row["loss/kl"] == 0 for row in result.rows] == [True, False, True, False, True]
    drift = [row["kl_reference"] for row in result.rows]
    assert min(drift) > 0  # also in iterations 1 and 3, whose last update reset the anchor
    assert drift[4] > drift[0]
    base, kept = task().model.network, result.run.roles.module("reference").state_dict()
    assert isinstance(base, nn.Module)
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    assert len({row["gate_share"] for row in result.rows}) > 1
    assert all(0 < row["gated"] < 0.5 for row in result.rows)
    assert all(row["doubt"] > 0 for row in result.rows)


@pytest.mark.long
@pytest.mark.parametrize("settings", BASES)
def test_a_resumed_run_ends_in_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    changes = {**settings, "reset_steps": 2, "kl_limit": None}

    def run(directory: Path, iterations: int, resume: bool = False) -> dict[str, Tensor]:
        on = task()
        config = TrainingConfig(iterations=iterations, evaluate_every=0, evaluation_samples=8, checkpoint_every=1)
        method = make_method("gardo", on, **changes)
        result = train_task(on, method, config, directory, resume=resume)
        return {**result.run.roles.state_dict(), **method.state_dict()}

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "parts", 1)
    parts = run(tmp_path / "parts", 3, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert int(whole["resets"]) == 1
    assert len(whole["seen"]) == 3


def test_what_is_remembered_comes_back() -> None:
    loop, gating = made({**SMALL, "reset_steps": 2})
    collected(loop)
    for _ in range(3):
        gating.moved(loop.run, {})
    _, other = made(SMALL)
    other.load_state_dict(gating.state_dict())
    assert (other.steps, other.resets, other.fraction) == (1, 1, gating.fraction)
    assert len(other.fraction.seen) == 1


def test_held_samples_without_advantage_still_reach_the_loss() -> None:
    flat = replace(task(), reward=as_reward(lambda samples: torch.zeros(len(samples.media)), name="flat"))
    experience = collected(made(SMALL, flat)[0])
    assert experience.edges.mask is not None
    assert torch.equal(experience.edges.mask, experience.edges.extras[KL_GATE] > 0)
    assert bool(experience.edges.mask.any())


def test_without_a_penalty_no_auxiliary_is_needed_or_called() -> None:
    loop, _ = made({**SMALL, "kl_weight": 0.0, "auxiliary": ()})
    collected(loop)
    assert loop.run.ledger.reward_calls == 12
    loop, _ = made(SMALL)
    collected(loop)
    assert loop.run.ledger.reward_calls == 12 * 3


def test_under_a_constant_reward_the_regression_has_no_gradient() -> None:
    flat = replace(task(), reward=as_reward(lambda samples: torch.full((len(samples.media),), 0.3), name="flat"))
    settings: dict[str, Any] = {**NFT, "kl_weight": 0.0}
    assert float(gradient("gardo", flat, **settings).norm()) == 0.0


def test_tokens_are_gated_too() -> None:
    on = Sequences(SequencesConfig()).task()
    settings: dict[str, Any] = {
        **SMALL,
        "auxiliary": ("naturalness",),
        "kernel": "unmasking",
        "clip_range": 0.2,
        "reset_steps": 1,
    }
    result = trained("gardo", on, 2, 1e-3, count=16, **settings)
    assert result.rows[1]["resets"] == 1
    assert result.rows[1]["grad_norm"] > 0


@pytest.mark.parametrize("settings", BASES)
def test_one_iteration_on_digits(settings: dict[str, Any]) -> None:
    changes: dict[str, Any] = {"groups": 2, "group_size": 6, "gate_fraction": 0.2, "auxiliary": ("heldout_digit",)}
    on = Digits(DigitsConfig(reward="ink")).task()
    result = trained("gardo", on, 1, 1e-3, count=8, **{**settings, **changes})
    assert 0 < result.rows[0]["gated"] < 0.5
    assert result.rows[0]["grad_norm"] > 0


@pytest.mark.long
def test_one_iteration_on_shapes() -> None:
    on = Shapes(ShapesConfig()).task()
    settings: dict[str, Any] = {**SMALL, "groups": 2, "objective": "guard", "auxiliary": ("fidelity",)}
    result = trained("gardo", on, 1, 3e-4, count=8, **settings)
    assert result.rows[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auxiliary": ()}, "true, nearness|nearness, true"),
        ({"auxiliary": ("nearnes",)}, "did you mean nearness"),
        ({"auxiliary": ("nearnes",), "kl_weight": 0.0}, "did you mean nearness"),
        ({"auxiliary": ("nearnes",), "gate": "all"}, "did you mean nearness"),
        ({"nft": {}}, "diffusion-nft"),
        ({"base": "diffusion-nft"}, "share_start"),
        ({"base": "diffusion-nft", "share_start": False, "kernel": "cps"}, "method.kernel"),
        ({"base": "diffusion-nft", "share_start": False, "window": {"width": 2}}, "method.window"),
        ({"kernel": "unmasking"}, "flow_sde"),
        ({"window": {"width": 20}}, "window"),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_method("gardo", task(), **{**SMALL, **settings})


def test_a_share_outside_its_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="gate_high"):
        Config(gate_fraction=0.5)


def test_defaults_are_those_of_the_paper_and_the_entry_follows_the_base() -> None:
    config = Config()
    assert (config.kl_weight, config.kl_limit, config.reset_steps, config.gate_fraction) == (0.04, 1e-4, 100, 0.1)
    assert isinstance(gardo(Config(**NFT), task()), GatedRegression)
    assert isinstance(gardo(Config(**SMALL), task()), GatedChain)
