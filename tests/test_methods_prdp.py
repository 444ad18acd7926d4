"""PRDP: what it regresses on what, who holds the log-probabilities, and two passes that make one gradient."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chains import task
from difftilt.checks.trial import loop_of, make_method, perturbed, scatter, with_reward
from difftilt.errors import UserError
from difftilt.methods.forward_process.prdp import PRDP, REFERENCE
from difftilt.process.gaussian import linear_schedule
from difftilt.sampling.steps import GaussianStep
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.testbeds.sequences import Config as SequencesConfig
from difftilt.testbeds.sequences import Sequences
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Phase, Task
from training_runs import gradient

SMALL: dict[str, Any] = {"groups": 3, "group_size": 4, "epochs": 1, "reduction": "sum", "temperature": 0.5}


def begun(
    on: Task | None = None, forward_batch: int = 16, moved: bool = True, **settings: Any
) -> tuple[Loop, Experience]:
    """A loop after its collection; ``moved``: the reference stands apart, and the weights have left the old ones."""
    loop = loop_of("prdp", on or task(classes=3), forward_batch, **{**SMALL, **settings})
    if moved:
        scatter(loop, "reference", scale=0.1)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    if moved:
        scatter(loop, "current", scale=0.02)
    return loop, experience


def method_of(loop: Loop) -> PRDP:
    assert isinstance(loop.method, PRDP)
    return loop.method


def only_phase(loop: Loop) -> Phase:
    (phase,) = loop.method.phases(loop.run)
    return phase


def whole(experience: Experience) -> Experience:
    return experience.rows(torch.arange(len(experience.edges.step)))


def densities(loop: Loop, role: str, rows: Experience, guidance: float, reduce: str = "sum") -> Tensor:
    """Of every row under the weights of a role, by torch's own normal law."""
    edges = rows.edges
    assert edges.x_t is not None
    assert edges.x_s is not None
    assert edges.s is not None
    prediction = loop.run.denoiser(role, guidance=guidance)(edges.x_t, edges.t, rows.condition)
    step = method_of(loop).preset.kernel(prediction, edges.x_t, edges.t, edges.s)
    assert isinstance(step, GaussianStep)
    each = torch.distributions.Normal(step.mean.double(), step.std.double()[:, None]).log_prob(edges.x_s.double())
    return each.sum(1) if reduce == "sum" else each.mean(1)


def by_hand(loop: Loop, experience: Experience, log_prob: Tensor, reduce: str = "sum") -> Tensor:
    """The loss of all pairs, pair by pair, from the log-probability of every edge."""
    config, edges, rewards = method_of(loop).config, experience.edges, experience.rewards
    assert edges.log_prob is not None
    assert rewards is not None
    reference = edges.extras[REFERENCE]
    ratio, old = log_prob - reference, edges.log_prob - reference
    near = torch.maximum(torch.minimum(ratio, old + config.clip_range), old - config.clip_range)
    total = torch.Tensor.sum if reduce == "sum" else torch.Tensor.mean
    value, bound = ([total(side[edges.sample == sample]) for sample in range(len(rewards))] for side in (ratio, near))
    errors: list[Tensor] = []
    for i in range(len(rewards)):
        for j in range(len(rewards)):
            if experience.group[i] == experience.group[j] and rewards[i] > rewards[j]:
                gap = float(rewards[i] - rewards[j]) / config.temperature
                errors.append(torch.maximum((value[i] - value[j] - gap) ** 2, (bound[i] - bound[j] - gap) ** 2))
    return torch.stack(errors).mean()


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("forward_batch", [16, 64])
def test_loss_and_gradient_of_the_two_passes_are_those_of_the_whole_graph(reduce: Any, forward_batch: int) -> None:
    # the log-ratios of about half of the steps are clipped
    loop, experience = begun(forward_batch=forward_batch, reduction=reduce, clip_range=0.01)
    value = by_hand(loop, experience, densities(loop, "current", whole(experience), 1.0, reduce), reduce)
    wanted = torch.autograd.grad(value, list(loop.run.roles.parameters("current")))
    metrics = loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)
    expected = torch.cat([part.reshape(-1) for part in wanted]).double()
    assert float((gradient(loop) - expected).norm() / expected.norm()) < 1e-5
    assert metrics["loss/pairs"] == pytest.approx(float(value.detach()), rel=1e-6)
    assert 0.1 < metrics["clip_fraction"] < 0.9


def largest_graph(steps: int, two_passes: bool) -> int:
    """Most bytes that one backward pass holds."""
    loop, experience = begun(task(steps=steps, hidden=8), groups=1, clip_range=0.01)
    held, largest = 0, 0

    def pack(saved: Tensor) -> Tensor:
        nonlocal held, largest
        held += saved.numel() * saved.element_size()
        largest = max(largest, held)
        return saved

    phase, method = only_phase(loop), method_of(loop)

    def loss(rows: Experience, noise: Any) -> Any:
        nonlocal held
        held = 0
        return phase.loss(rows, noise)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        if two_passes:
            # the small graph of the scalars, a few numbers per row, is no activation
            rows = phase.before(whole(experience)) if phase.before is not None else experience
            held = largest = 0
            loop.updater.run_phase(replace(phase, loss=loss, before=lambda _: rows), experience, loop.run.noise)
        else:
            rows = whole(experience)
            method.share(loop.run, method.log_prob(loop.run, "current", rows), rows)
    return largest


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    assert largest_graph(50, two_passes=True) == largest_graph(10, two_passes=True)
    assert largest_graph(50, two_passes=False) > 4 * largest_graph(10, two_passes=False)


def test_log_probabilities_are_recorded_under_both_weights_with_guidance_for_every_step_that_has_a_density() -> None:
    on = task(classes=3, steps=5)
    on = replace(on, sampler=replace(on.sampler, guidance=2.5))
    loop = loop_of("prdp", on, **SMALL)
    scatter(loop, "reference", scale=0.1)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
        rows = whole(experience)
        assert rows.edges.log_prob is not None
        assert rows.edges.log_prob.dtype == torch.float64
        assert torch.allclose(rows.edges.log_prob, densities(loop, "current", rows, 2.5), atol=1e-4)
        assert torch.allclose(rows.edges.extras[REFERENCE], densities(loop, "reference", rows, 2.5), atol=1e-4)
        assert not torch.allclose(rows.edges.extras[REFERENCE], densities(loop, "reference", rows, 1.0), atol=1e-1)
    # 12 chains of 5 steps, of which the last has std 0
    assert sorted(experience.edges.step.tolist()) == [step for step in range(4) for _ in range(12)]


def test_a_floor_gives_the_last_step_a_density_and_flow_sde_has_one_unless_it_ends_clean() -> None:
    on = task(steps=5)
    clean = replace(on, sampler=replace(on.sampler, clean_end=True))
    counted: list[int] = []
    cases: list[tuple[Task, dict[str, Any]]] = [
        (on, {}),
        (on, {"std_floor": 0.05}),
        (on, {"kernel": "flow_sde"}),
        (clean, {"kernel": "flow_sde"}),
        (clean, {}),
    ]
    for where, settings in cases:
        loop, experience = begun(where, moved=False, **settings)
        counted.append(len(experience.edges.step.unique()))
        assert experience.edges.log_prob is not None
        assert bool(experience.edges.log_prob.isfinite().all())
        metrics = loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)
        assert metrics["ratio_mean"] == 1.0
    assert counted == [4, 5, 5, 4, 4]


def test_at_the_reference_the_loss_is_the_mean_squared_reward_difference() -> None:
    loop, experience = begun(moved=False)
    assert experience.rewards is not None
    gaps = (experience.rewards[:, None] - experience.rewards) / 0.5
    same = experience.group[:, None] == experience.group
    apart = same & (gaps > 0)
    metrics = loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)
    assert metrics["loss/pairs"] == pytest.approx(float(gaps[apart].square().mean()), rel=1e-4)
    assert metrics["clip_fraction"] == 0.0


def test_the_clip_is_per_step_and_about_the_old_ratio() -> None:
    # at this temperature every reward difference asks for far more than any push below
    loop, experience = begun(moved=False, clip_range=0.1, temperature=1e-3)
    rows = whole(experience)
    assert rows.edges.log_prob is not None
    assert experience.rewards is not None
    early = rows.edges.step == 0
    best = rows.index == int(experience.rewards.argmax())
    push = torch.where(early & best, 5.0, 0.0).double()
    share = partial(method_of(loop).share, loop.run, rows=rows)
    plain, pushed = float(share(rows.edges.log_prob)), float(share(rows.edges.log_prob + push))
    held = float(share(rows.edges.log_prob + push.clamp(max=0.1)))
    # the best chain should gain: beyond the clip nothing more is to be had
    assert pushed == pytest.approx(held, rel=1e-9)
    assert held < plain
    assert float(share(rows.edges.log_prob - push)) > plain
    both = torch.where(best & (rows.edges.step < 3), 0.1, 0.0).double()
    assert float(share(rows.edges.log_prob + both)) < held


def test_the_reductions_convert_as_the_page_says() -> None:
    steps, dims = 9, 2
    losses: list[float] = []
    grads: list[Tensor] = []
    conventions: list[dict[str, Any]] = [
        {"reduction": "mean", "temperature": 0.5, "clip_range": 0.01},
        {"reduction": "sum", "temperature": 0.5 / (steps * dims), "clip_range": 0.01 * dims},
    ]
    for settings in conventions:
        loop, experience = begun(**settings)
        losses.append(loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)["loss/pairs"])
        grads.append(gradient(loop))
    assert losses[1] == pytest.approx((steps * dims) ** 2 * losses[0], rel=1e-6)
    assert torch.allclose(grads[1], (steps * dims) ** 2 * grads[0], rtol=1e-3, atol=1e-4 * float(grads[1].abs().max()))


def test_only_reward_over_temperature_matters() -> None:
    base = task(classes=3).reward
    grads: list[Tensor] = []
    for factor in (1.0, 4.0):
        on = with_reward(task(classes=3), lambda samples, factor=factor: factor * base.score(samples))
        loop, experience = begun(on, temperature=0.5 * factor)
        loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)
        grads.append(gradient(loop))
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


def test_the_old_ratio_is_the_snapshots_through_all_gradient_steps_on_one_batch() -> None:
    loop, experience = begun(moved=False, epochs=4, clip_range=1e-3)
    loop.updater.optimizers["current"].param_groups[0]["lr"] = 1e-2
    ratios: list[float] = []
    phase = replace(only_phase(loop), after=lambda metrics: ratios.append(metrics["ratio_std"]))
    assert loop.updater.run_phase(phase, experience, loop.run.noise)["updates"] == 4
    assert ratios[0] == 0.0
    assert min(ratios[1:]) > 0.0
    assert ratios[3] > ratios[1]


def test_the_updates_of_a_pass_hold_whole_groups_and_microbatches_do_not() -> None:
    loop, experience = begun(forward_batch=8, updates=3)
    phase, lengths, groups = only_phase(loop), list[int](), list[list[int]]()

    def before(rows: Experience) -> Experience:
        groups.append(rows.group.unique().tolist())
        assert len(rows.index) == 4 * 9
        return phase.before(rows) if phase.before is not None else rows

    def loss(rows: Experience, noise: Any) -> Any:
        lengths.append(len(rows.index))
        return phase.loss(rows, noise)

    loop.updater.run_phase(replace(phase, before=before, loss=loss), experience, loop.run.noise)
    assert sorted(groups) == [[0], [1], [2]]
    assert max(lengths) <= 8


def test_rewards_that_are_all_equal_teach_nothing_and_rewards_of_one_group_only_teach_by_it() -> None:
    flat = with_reward(task(classes=3), lambda samples: torch.zeros(len(samples.media)))
    loop, experience = begun(flat)
    assert loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)["loss/pairs"] == 0.0
    assert float(gradient(loop).norm()) == 0.0


def test_the_policy_is_what_is_evaluated() -> None:
    loop, _ = begun(moved=False, steps=7)
    sampler = loop.method.sampler(loop.run.task)
    assert sampler.solver is None
    assert len(sampler.grid) == 8
    assert sampler.kernel == method_of(loop).preset.kernel


def test_reference_costs_nothing_while_it_is_the_policy() -> None:
    loop = loop_of("prdp", task(steps=5), **SMALL)
    with torch.no_grad():
        loop.method.collect(loop.run)
        first = loop.run.ledger.nfe
        scatter(loop, "current")
        loop.method.collect(loop.run)
    assert (first, loop.run.ledger.nfe - first) == (12 * 5, 12 * 5 + 12 * 4)


def test_what_cannot_work_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="Gaussian"):
        make_method("prdp", Sequences(SequencesConfig()).task())
    with pytest.raises(UserError, match="deterministic"):
        make_method("prdp", task(), noise_level=0.0)
    with pytest.raises(UserError, match=r"method\.steps"):
        make_method("prdp", task(steps=1))
    short = task(process="vp", kernel="ancestral")
    short = replace(short, model=replace(short.model, process=linear_schedule(100)))
    with pytest.raises(UserError, match=r"method\.start_signal"):
        make_method("prdp", short)
    make_method("prdp", short, start_signal=0.5)
    make_method("prdp", task(process="vp", kernel="ancestral"))


def test_the_weights_may_be_any_network() -> None:
    on = perturbed(Mixtures(MixturesConfig(process="vp", steps=5)).task())
    assert isinstance(on.model.network, nn.Module)
    loop, experience = begun(on, moved=False)
    assert loop.updater.run_phase(only_phase(loop), experience, loop.run.noise)["grad_norm"] > 0
