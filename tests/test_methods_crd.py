"""CRD: averages per prompt, two lagging copies, a guided anchor; what s is measured against, and on which noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.checks.trial import gradient, loop_of, make_method, perturbed, scatter, with_reward
from difftilt.errors import UserError
from difftilt.methods.forward_process.crd import Config, cells, decay
from difftilt.objectives.centred import Baselines, Form, baseline_weights, cell_baselines, centred_loss
from difftilt.process.gaussian import GaussianPrediction
from difftilt.process.grid import uniform_grid
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Loss, Task
from difftilt.training.renoising import renoised, stratified_levels

SMALL: dict[str, Any] = {"groups": 4, "group_size": 4, "updates": 1}
GRID = uniform_grid(10)


def task(classes: int = 4, **changes: Any) -> Task:
    return perturbed(Mixtures(MixturesConfig(classes=classes, hidden=8, **changes)).task())


def collected(loop: Loop) -> Experience:
    with torch.no_grad():
        return loop.method.collect(loop.run)


def loss_of(loop: Loop, experience: Experience) -> tuple[Experience, Loss]:
    (phase,) = loop.method.phases(loop.run)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    rows = rows if phase.before is None else phase.before(rows)
    return rows, phase.loss(rows, loop.run.noise)


def apart(**settings: Any) -> tuple[Loop, Experience]:
    """A loop whose roles all differ."""
    loop = loop_of("crd", task(), **SMALL, **settings)
    experience = collected(loop)
    scatter(loop, "current", "reference", "old", "sampling")
    return loop, experience


def velocity(loop: Loop, role: str, x_t: Tensor, rows: Experience, guidance: float = 1.0) -> Tensor:
    prediction = loop.run.denoiser(role, guidance=guidance)(x_t, rows.edges.t, rows.condition)
    assert isinstance(prediction, GaussianPrediction)
    return prediction.velocity


def numbers(seed: int, size: int = 12) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CELL = torch.tensor([5, 2, 5, 2, 5, 2, 9, 9, 9, 5, 2, 9])


@pytest.mark.parametrize("temperature", [None, 0.0, 0.3])
def test_baselines_are_the_weighted_averages_of_each_cell(temperature: float | None) -> None:
    s, r, a = numbers(0), numbers(1).sigmoid(), numbers(2)
    found = cell_baselines(s, r, a, CELL, temperature)
    for label in CELL.unique():
        here = label == CELL
        own = r[here]
        match temperature:
            case None:
                weights = [torch.full_like(own, 1 / len(own))]
            case 0.0:
                good = [sign * a[here] > 0 for sign in (1, -1)]
                weights = [torch.where(one, own.exp(), 0.0) / own[one].exp().sum() for one in good]
            case _:
                weights = [(own / temperature).softmax(0), (-own / temperature).softmax(0)]
        for direction, weight in enumerate(weights):
            torch.testing.assert_close(
                found.external[here, direction], (weight * own).sum().expand(len(own)), check_stride=False
            )
            torch.testing.assert_close(found.implicit[here, direction], (weight * s[here]).sum().expand(len(own)))
        assert found.external.shape[1] == len(weights)


def test_hard_weights_look_at_the_sign_of_the_advantage_not_of_the_mapped_one() -> None:
    """The mapped one lies in [0, 1] and is never negative: that test leaves the bad samples' set empty."""
    advantage = torch.tensor([2.0, -1.0, -3.0, 0.0])
    mapped = advantage / 10 + 0.5
    weights = baseline_weights(mapped, advantage, torch.zeros(4, dtype=torch.int64), 0.0)
    assert weights[0].tolist() == [1.0, 0.0]
    assert weights[3].tolist() == [0.0, 0.0]
    assert float(weights[1:3, 1].sum()) == pytest.approx(1.0)
    none = baseline_weights(mapped, advantage.clamp(min=0), torch.zeros(4, dtype=torch.int64), 0.0)
    assert none[:, 1].tolist() == [0.25] * 4


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_the_loss_is_the_centred_regression_by_hand(form: Form) -> None:
    s, r = numbers(3), numbers(4).sigmoid()
    found = centred_loss(s, r, cell_baselines(s, r, r - 0.5, CELL), beta=0.7, form=form)
    for row, label in enumerate(CELL):
        here = label == CELL
        logit, target = 0.7 * (s[row] - s[here].mean()), r[row] - r[here].mean()
        share = target.sigmoid()
        entropy = -share * logit.sigmoid().log() - (1 - share) * (1 - logit.sigmoid()).log()
        expected = (logit - target).square() if form == "mse" else entropy
        torch.testing.assert_close(found[row], expected)


def slope(temperature: float | None, form: Form, detached: bool) -> Tensor:
    s, r, a = numbers(3).requires_grad_(), numbers(4).sigmoid(), numbers(5)
    baselines = cell_baselines(s, r, a, CELL, temperature)
    if not detached:
        weights = baseline_weights(r, a, CELL, temperature)
        same = (CELL[:, None] == CELL).double()
        baselines = Baselines(same @ (weights * s[:, None]), baselines.external)
    return torch.autograd.grad(centred_loss(s, r, baselines, beta=0.7, form=form).sum(), s)[0]


def test_only_the_uniform_squared_form_does_not_care_whether_the_baseline_has_a_gradient() -> None:
    torch.testing.assert_close(slope(None, "mse", True), slope(None, "mse", False))
    cases: list[tuple[float | None, Form]] = [(0.3, "mse"), (0.0, "mse"), (None, "bce")]
    for temperature, form in cases:
        assert not torch.allclose(slope(temperature, form, True), slope(temperature, form, False), rtol=1e-3)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.3])
@pytest.mark.parametrize("form", ["mse", "bce"])
def test_a_constant_per_prompt_in_either_reward_changes_nothing(form: Form, temperature: float | None) -> None:
    s, r, a = numbers(3), numbers(4), numbers(5)
    offset = 10.0 * CELL
    plain = centred_loss(s, r, cell_baselines(s, r, a, CELL, temperature), beta=0.7, form=form)
    moved = [
        centred_loss(s + one, r + two, cell_baselines(s + one, r + two, a, CELL, temperature), beta=0.7, form=form)
        for one, two in ((offset, 0 * offset), (0 * offset, offset))
    ]
    for other in moved:
        torch.testing.assert_close(plain, other)
    whole = torch.zeros_like(CELL)
    batch = centred_loss(s, r + offset, cell_baselines(s, r + offset, a, whole, temperature), beta=0.7, form=form)
    assert not torch.allclose(plain, batch, rtol=0.1)


def test_all_samples_share_the_drawn_times_one_from_each_part_of_the_noisy_end() -> None:
    edges = stratified_levels(Noise(3), GRID, 0.99, 4, torch.arange(7))
    step, t = edges.step.reshape(7, 4), edges.t.reshape(7, 4)
    assert torch.equal(step, torch.arange(4).expand(7, 4))
    assert torch.equal(t, t[:1].expand(7, 4))
    places = torch.tensor([int((GRID.float() == one).nonzero()) for one in t[0]])
    parts = torch.arange(5) * 9 / 4
    assert bool(((places >= parts[:-1].floor()) & (places < parts[1:])).all())
    other = stratified_levels(Noise(3).at(1), GRID, 0.99, 4, torch.arange(7))
    assert not torch.equal(edges.t, other.t)


def test_without_a_number_every_noisy_time_is_drawn_once_and_more_draws_repeat_some() -> None:
    once = stratified_levels(Noise(0), GRID, 0.99, None, torch.arange(2))
    assert torch.equal(once.t.reshape(2, 9)[0], GRID[:9].float())
    many = stratified_levels(Noise(0), GRID, 0.99, 20, torch.arange(2))
    assert set(many.t.tolist()) == set(GRID[:9].float().tolist())
    assert many.step.reshape(2, 20)[0].tolist() == list(range(20))


def test_a_time_that_is_drawn_twice_has_noise_of_its_own_each_time() -> None:
    loop = loop_of("crd", task(), draws=20, **SMALL)
    experience = collected(loop)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    x_t = renoised(loop.run.denoiser("current").process, rows, loop.run.noise).reshape(16, 20, 2)
    t = rows.edges.t.reshape(16, 20)[0]
    twins = next((i, j) for i in range(20) for j in range(i) if t[i] == t[j])
    assert not torch.equal(x_t[:, twins[0]], x_t[:, twins[1]])


def test_the_schedules_of_the_copies() -> None:
    old, sampling = Config().old_decay, Config().sampling_decay
    assert [decay(n, old) for n in (0, 10, 1000)] == pytest.approx([0.25, 0.3, 0.999])
    assert [decay(n, sampling) for n in (0, 74, 75, 115, 1000)] == pytest.approx([0, 0, 0, 0.3, 0.999])


def test_each_copy_follows_once_per_iteration_by_its_own_schedule_in_optimiser_steps() -> None:
    loop = loop_of("crd", task(), **SMALL)
    before = loop.run.roles.state_dict()
    scatter(loop, "current")
    moved = loop.run.roles.state_dict()
    loop.updater.steps["current"] = 115
    loop.updater.follow()
    after = loop.run.roles.state_dict()
    for role, d in (("old", 0.825), ("sampling", 0.3)):
        for name in (name for name in before if name.startswith(f"{role}/") and name.endswith("weight")):
            current = moved[f"current/{name.removeprefix(role + '/')}"]
            assert torch.allclose(after[name], d * before[name] + (1 - d) * current, atol=1e-6)
    assert all(getattr(spec, "every", None) == "iteration" for spec in loop.method.roles().values())


def test_rollouts_come_from_sampling_alone_and_without_guidance() -> None:
    guided = task()
    guided = replace(guided, sampler=replace(guided.sampler, guidance=3.0))
    plain, moved, other = (loop_of("crd", guided, **SMALL) for _ in range(3))
    scatter(moved, "current", "old", "reference")
    scatter(other, "sampling")
    before = plain.run.ledger.copy()
    first, second, third = (collected(loop).x_0 for loop in (plain, moved, other))
    assert (plain.run.ledger - before).nfe == 16 * 10  # guidance would double it
    assert first is not None
    assert second is not None
    assert third is not None
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_while_old_equals_current_the_implicit_reward_is_zero_and_one_pass_serves_both() -> None:
    loop = loop_of("crd", task(), kl_weight=0.0, **SMALL)
    experience = collected(loop)
    before = loop.run.ledger.copy()
    _, loss = loss_of(loop, experience)
    rows = len(experience.edges.step)
    cost = loop.run.ledger - before
    assert (cost.gradient_passes, cost.nfe) == (rows, 0)
    assert bool((loss.metrics["implicit_reward"] == 0).all())
    loop.run.roles.stepped("current")
    before = loop.run.ledger.copy()
    _, loss = loss_of(loop, experience)
    assert (loop.run.ledger - before).nfe == rows
    # equal weights, told apart by their number only: still zero
    assert bool((loss.metrics["implicit_reward"] == 0).all())


def test_a_lagged_old_gives_the_group_an_implicit_reward() -> None:
    loop, experience = apart(kl_weight=0.0)
    _, loss = loss_of(loop, experience)
    assert float(loss.metrics["implicit_reward"].mean()) > 1e-3


def test_at_old_the_gradient_is_that_of_a_weighted_regression() -> None:
    """With s = 0 it is 2·A_max·(a - mean a)·grad of the sample's own normalised error."""
    loop = loop_of("crd", task(), kl_weight=0.0, beta=0.5, **SMALL)
    experience = collected(loop)
    rows, loss = loss_of(loop, experience)
    parameters = list(loop.run.roles.parameters("current"))
    found = torch.autograd.grad(loss.terms["policy"].value.sum(), parameters)
    assert rows.x_0 is not None
    assert rows.label is not None
    x_t = renoised(loop.run.denoiser("current").process, rows, loop.run.noise)
    now = velocity(loop, "current", x_t, rows)
    gap = now - (x_t - rows.x_0) / rows.edges.t[:, None]
    error = gap.square().mean(1) / gap.detach().abs().mean(1)
    label = rows.label.reshape(4, 4, 9)
    centred = (label - label.mean(1, keepdim=True)).reshape(-1)
    expected = torch.autograd.grad((2 * 5.0 * centred * error).sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_with_all_roles_apart(normalised: bool, adaptive: bool) -> None:
    loop, experience = apart(
        beta=0.4, max_advantage=3.0, kl_weight=0.2, kl_guidance=2.5, kl_adaptive=adaptive, self_normalised=normalised
    )
    rows, loss = loss_of(loop, experience)
    assert rows.x_0 is not None
    assert rows.label is not None
    t = rows.edges.t[:, None]
    eps = loop.run.noise.normal(rows.index, (2,), purpose="renoise", step=rows.edges.step)
    x_t = (1 - t) * rows.x_0 + t * eps
    now, old = (velocity(loop, role, x_t, rows) for role in ("current", "old"))
    errors: list[Tensor] = []
    for guess in (now, old):
        gap = guess - (eps - rows.x_0)
        errors.append(gap.square().mean(1) / (gap.abs().mean(1) if normalised else 1.0))
    s, a = (errors[1] - errors[0]).reshape(4, 4, 9), rows.label.reshape(4, 4, 9)
    residual = 0.4 * (s - s.mean(1, keepdim=True)) - (a - a.mean(1, keepdim=True))
    expected = 3.0 / 0.4 * residual.square().reshape(-1)
    assert torch.allclose(loss.terms["policy"].value, expected, rtol=1e-3, atol=1e-4)
    # the anchor alone is guided
    one = velocity(loop, "reference", x_t, rows)
    null = velocity(loop, "reference", x_t, replace(rows, condition=torch.full_like(rows.condition, 4)))
    strength = 5e-4 + rows.label * (1 - 5e-4) if adaptive else torch.ones(len(t))
    kl = strength * (now - (null + 2.5 * (one - null))).square().mean(1)
    assert loss.terms["kl"].weight == 0.2
    assert torch.allclose(loss.terms["kl"].value, kl, rtol=1e-3, atol=1e-5)


def test_the_adaptive_anchor_is_never_weaker_than_its_floor_nor_stronger_than_its_weight() -> None:
    for weight in (0.3, 1e-5):
        loop, experience = apart(kl_weight=weight, kl_guidance=1.0)
        rows, loss = loss_of(loop, replace(experience, label=torch.tensor([0.0, 1.0]).repeat(8)))
        _, fixed = loss_of(*_fixed(weight, experience))
        ratio = weight * (loss.terms["kl"].value / fixed.terms["kl"].value)
        assert rows.label is not None
        expected = torch.where(rows.label > 0, weight, min(1e-4, weight))
        assert torch.allclose(ratio, expected, rtol=1e-3)


def _fixed(weight: float, experience: Experience) -> tuple[Loop, Experience]:
    return apart(kl_weight=weight, kl_guidance=1.0, kl_adaptive=False)[0], experience


def test_the_averages_do_not_mix_prompts_or_times_whatever_the_microbatch() -> None:
    """Group size 4 in microbatches of 8 rows: two cells each."""
    whole = gradient("crd", task(), 1024, **SMALL, kl_weight=0.0, temperature=0.1)
    assert torch.allclose(whole, gradient("crd", task(), 8, **SMALL, kl_weight=0.0, temperature=0.1), rtol=1e-4)
    loop = loop_of("crd", task(), **SMALL)
    experience = collected(loop)
    rows = experience.rows(torch.arange(len(experience.edges.step)))
    label = cells(rows)
    assert len(label.unique()) == 4 * 9
    for one in label.unique():
        assert len(rows.group[label == one].unique()) == len(rows.edges.step[label == one].unique()) == 1


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_averages_over_the_batch_are_those_of_the_whole_update(temperature: float | None) -> None:
    def found(size: int, centre: str) -> Tensor:
        loop, experience = apart(kl_weight=0.0, centre=centre, temperature=temperature)
        loop.run.forward_batch = size
        (phase,) = loop.method.phases(loop.run)
        loop.updater.run_phase(phase, experience, loop.run.noise)
        return torch.cat([p.grad.reshape(-1) for p in loop.run.roles.parameters("current") if p.grad is not None])

    whole = found(1024, "batch")
    assert torch.allclose(whole, found(8, "batch"), rtol=1e-3, atol=1e-5)
    assert float((whole - found(1024, "prompt")).norm() / whole.norm()) > 1e-3


def test_averages_over_the_batch_do_not_mix_times() -> None:
    rows, _ = loss_of(*apart(kl_weight=0.0, centre="batch"))
    found = rows.extras["baselines"]
    assert rows.label is not None
    assert torch.allclose(found.external, rows.label.double().reshape(16, 9).mean().expand(144, 1))
    implicit = found.implicit.reshape(16, 9)
    assert torch.equal(implicit, implicit[:1].expand(16, 9))
    assert len(implicit[0].unique()) == 9


def offset_gradients(std: str) -> tuple[Tensor, Tensor]:
    base = task()

    def moved(samples: Samples) -> Tensor:
        return base.reward.score(samples) + torch.tensor([8.0 * int(prompt[-1]) for prompt in samples.prompts])

    settings: dict[str, Any] = SMALL | {"kl_weight": 0.0, "advantage_std": std}
    plain = gradient("crd", with_reward(base, base.reward.score), **settings)
    return plain, gradient("crd", with_reward(task(), moved), **settings)


def test_a_constant_added_to_the_rewards_of_a_prompt_changes_nothing() -> None:
    plain, moved = offset_gradients("pooled")
    assert float((plain - moved).norm() / plain.norm()) < 1e-4


def test_under_the_std_of_the_batch_it_changes_the_scale_and_not_the_direction() -> None:
    plain, moved = offset_gradients("global")
    assert float(torch.cosine_similarity(plain, moved, dim=0)) > 1 - 1e-6
    assert float(moved.norm()) < 0.5 * float(plain.norm())


def test_the_mapped_advantage_is_a_tenth_of_the_advantage() -> None:
    loop = loop_of("crd", task(), advantage_std="none", max_advantage=5.0, **SMALL)
    experience = collected(loop)
    assert experience.rewards is not None
    assert experience.label is not None
    advantage = experience.rewards - experience.rewards.reshape(4, 4).mean(1).repeat_interleave(4)
    assert torch.allclose(experience.label - 0.5, advantage / 10, atol=1e-6)
    assert torch.allclose(experience.extras["advantage"], advantage, atol=1e-5)


def test_guidance_of_the_anchor_needs_an_unconditional_branch_where_there_is_an_anchor() -> None:
    plain = task(classes=0)
    with pytest.raises(UserError, match="kl_guidance=1"):
        make_method("crd", plain, **SMALL)
    make_method("crd", plain, **SMALL, kl_guidance=1.0)
    make_method("crd", plain, **SMALL, kl_weight=0.0)


def test_tokens_are_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="Gaussian"):
        make_method("crd", Sequences(SequencesConfig()).task(), **SMALL)


def test_it_serves_another_gaussian_process() -> None:
    found = gradient("crd", task(process="vp"), **SMALL)
    assert bool(found.isfinite().all())
    assert float(found.norm()) > 0
