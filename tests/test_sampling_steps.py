"""Masks, clamps, floors, windows and refusals of steps; densities are measured in ``checks/steps.py``."""

import pytest
import torch

from difftilt.process import MaskedProcess, RectifiedFlow
from difftilt.sampling import (
    DDIM,
    CategoricalStep,
    DanceSDE,
    Euler,
    FlowSDE,
    GaussianStep,
    MixtureStep,
    Step,
    Unmasking,
    cps,
    flow_sde,
    reduce_dims,
)
from difftilt.sampling.presets import Preset

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, generator=GENERATOR)
STEP = GaussianStep(torch.zeros(2, 3), torch.tensor([0.5, 2.0]))
MASK = torch.tensor([[True, False, True], [False, True, False]])


def terms() -> torch.Tensor:
    return torch.distributions.Normal(STEP.mean, STEP.std[:, None]).log_prob(X)


def test_mask_keeps_the_named_dimensions() -> None:
    kept = torch.where(MASK, terms(), 0.0).sum(-1)
    assert torch.allclose(STEP.log_prob(X, reduce="sum", mask=MASK), kept)
    assert torch.allclose(STEP.log_prob(X, reduce="mean", mask=MASK), kept / torch.tensor([2.0, 1.0]))


def test_clamp_bounds_each_dimension_before_the_reduction() -> None:
    far = torch.tensor([[0.0, 100.0, 0.0], [0.0, 0.0, 0.0]])
    got = STEP.log_prob(far, reduce="sum", clamp=(-5.0, -1.0))
    plain = torch.distributions.Normal(STEP.mean, STEP.std[:, None]).log_prob(far)
    assert torch.allclose(got, plain.clamp(-5.0, -1.0).sum(-1))
    tokens = CategoricalStep(torch.tensor([[[0.5, 0.5, 0.0]]]).log())
    assert float(tokens.log_prob(torch.tensor([[2]]), reduce="sum", clamp=(-5.0, 0.0))) == -5.0


def test_reduction_is_named() -> None:
    assert torch.allclose(reduce_dims(X, "sum"), 3 * reduce_dims(X, "mean"))


def test_floors_of_draw_and_score_are_separate() -> None:
    preset = Preset("floored", FlowSDE(0.01), draw_floor=0.1, score_floor=0.3)
    prediction = RectifiedFlow().predict(X, X, torch.tensor([0.5, 0.5]), "velocity")
    t, s = torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.4])
    step = preset.step(prediction, X, t, s)
    assert isinstance(step, GaussianStep)
    assert torch.equal(step.std, torch.tensor([0.1, 0.1]))
    wide = torch.distributions.Normal(step.mean, 0.3).log_prob(X).mean(-1)
    assert torch.allclose(preset.log_prob(step, X), wide)


def test_a_floor_gives_a_deterministic_step_a_density() -> None:
    assert not GaussianStep(X, torch.zeros(2), deterministic=True).floored(0.1).deterministic
    assert GaussianStep(X, torch.zeros(2), deterministic=True).floored(0.0).deterministic


def test_windows_choose_rows() -> None:
    other = GaussianStep(X, torch.zeros(2), deterministic=True)
    step = STEP.only(torch.tensor([True, False]), other)
    assert torch.equal(step.mean, torch.stack([STEP.mean[0], X[1]]))
    assert torch.equal(step.std, torch.tensor([0.5, 0.0]))
    assert not step.deterministic
    assert torch.equal(step.draw(torch.ones(2, 3))[1], X[1])


@pytest.mark.parametrize("kernel", [Euler(), DDIM(0.0)])
def test_deterministic_steps_have_no_density(kernel: Euler | DDIM) -> None:
    t, s = torch.tensor([0.5, 0.5]), torch.tensor([0.4, 0.4])
    step: Step = kernel(RectifiedFlow().predict(X, X, t, "velocity"), X, t, s)
    assert step.deterministic
    assert torch.allclose(step.draw(torch.ones(2, 3)), X + (s - t)[:, None] * X, atol=1e-6)
    with pytest.raises(ValueError, match="deterministic"):
        step.log_prob(X, reduce="sum")
    with pytest.raises(ValueError, match="deterministic"):
        step.kl(step, reduce="sum")


def test_shift_moves_the_mean_and_the_kl_says_how_far() -> None:
    shifted = STEP.shift(torch.full((2, 3), 0.3))
    assert torch.allclose(shifted.kl(STEP, reduce="sum"), 3 * 0.09 / (2 * STEP.std**2))


def test_cps_scores_a_squared_error() -> None:
    assert torch.allclose(cps().log_prob(STEP, X), -(X**2).mean(-1))
    with pytest.raises(TypeError, match="Gaussian"):
        cps().log_prob(CategoricalStep(torch.zeros(1, 1, 2)), torch.zeros(1, 1, dtype=torch.int64))


def test_first_step_uses_its_end_where_the_coefficient_is_infinite() -> None:
    t, s = torch.tensor([1.0, 0.75]), torch.tensor([0.9, 0.6])
    step = FlowSDE(0.7)(RectifiedFlow().predict(X, X, t, "velocity"), X, t, s)
    g = 0.7 * (t / (1 - torch.tensor([0.9, 0.75]))).sqrt()
    assert torch.allclose(step.std, g * (t - s).sqrt())
    # the published mean, x(1 + g²/(2t)·dt) + v(1 + g²(1 - t)/(2t))·dt
    drift, dt = (g**2 / (2 * t))[:, None], (s - t)[:, None]
    assert torch.allclose(step.mean, X * (1 + drift * dt) + X * (1 + drift * (1 - t)[:, None]) * dt, atol=1e-5)


def test_exact_step_kl_is_the_published_closed_form() -> None:
    t, s = torch.tensor([0.8, 0.3]), torch.tensor([0.7, 0.2])
    velocity, other = X, X + 0.1
    for kernel, g in ((FlowSDE(0.7), 0.7 * (t / (1 - t)).sqrt()), (DanceSDE(0.3), torch.full((2,), 0.3))):
        steps = [kernel(RectifiedFlow().predict(v, X, t, "velocity"), X, t, s) for v in (velocity, other)]
        factor = (t - s) / 2 * (g * (1 - t) / (2 * t) + 1 / g) ** 2
        assert torch.allclose(steps[0].kl(steps[1], reduce="mean"), factor * 0.01, rtol=1e-4)


def test_clipping_x0_bounds_the_mean() -> None:
    t, s = torch.tensor([0.8, 0.8]), torch.tensor([0.0, 0.0])
    prediction = RectifiedFlow().predict(torch.full((2, 3), 5.0), X, t, "x0")
    assert torch.equal(DDIM(1.0, clip_x0=1.0)(prediction, X, t, s).mean, torch.ones(2, 3))


def test_kernels_refuse_the_other_kind_of_process() -> None:
    t, s = torch.tensor([0.8, 0.8]), torch.tensor([0.5, 0.5])
    tokens = MaskedProcess(2).predict(torch.zeros(2, 1, 2), torch.full((2, 1), 2), t, "logits")
    with pytest.raises(TypeError, match="Gaussian"):
        flow_sde().step(tokens, X, t, s)
    with pytest.raises(TypeError, match="masked"):
        Unmasking()(RectifiedFlow().predict(X, X, t, "x0"), X, t, s)


def test_unmasking_reveals_with_the_right_probability_and_ends_without_mask() -> None:
    t, s = torch.tensor([0.8, 0.8]), torch.tensor([0.2, 0.0])
    x_t = torch.tensor([[2, 0], [2, 0]])
    step = Unmasking()(MaskedProcess(2).predict(torch.zeros(2, 2, 2), x_t, t, "logits"), x_t, t, s)
    probs = step.log_probs.exp()
    assert torch.allclose(probs[0, 0], torch.tensor([0.375, 0.375, 0.25]))
    assert torch.allclose(probs[1, 0], torch.tensor([0.5, 0.5, 0.0]))
    assert torch.equal(probs[:, 1], torch.tensor([[1.0, 0.0, 0.0]] * 2))


def test_categorical_shift_tilts_and_keeps_the_impossible() -> None:
    step = CategoricalStep(torch.tensor([[[0.5, 0.5, 0.0]]]).log())
    tilted = step.shift(torch.tensor([[[1.0, 0.0, 9.0]]])).log_probs.exp()
    assert torch.allclose(tilted[0, 0, :2], torch.tensor([1.0, 0.0]).softmax(0))
    assert float(tilted[0, 0, 2]) == 0.0


def test_categorical_kl_with_impossible_symbols_is_finite_in_value_and_gradient() -> None:
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    other = CategoricalStep(torch.tensor([[[0.25, 0.75, 0.0]]]).log())
    own = CategoricalStep((logits + torch.tensor([0.0, 0.0, -torch.inf])).log_softmax(-1))
    kl = own.kl(other, reduce="sum")
    assert float(kl.detach()) == pytest.approx(0.5 * torch.tensor([2.0, 2 / 3]).log().sum().item())
    kl.sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_relaxed_draw_has_a_gradient_and_moves_the_mask_mass_only() -> None:
    state = torch.tensor([[[0.3, 0.1, 0.6]]])
    logits = torch.zeros(1, 1, 3, requires_grad=True)
    step = CategoricalStep((logits + torch.tensor([0.0, 0.0, -torch.inf])).log_softmax(-1), state)
    drawn = step.relaxed_draw(torch.tensor([[[0.2, 0.7, 0.5]]]), 0.5)
    assert float(drawn.detach().sum()) == pytest.approx(1.0)
    assert torch.allclose(drawn[..., 2], torch.tensor([[0.4 * 0.6]]))
    assert bool((drawn > 0.4 * state - 1e-6).all())
    drawn[0, 0, 0].backward()
    assert logits.grad is not None
    assert float(logits.grad[0, 0, 0]) > 0
    assert bool(logits.grad.isfinite().all())


def test_relaxed_kl_counts_by_mask_mass() -> None:
    own, other = torch.tensor([[[0.5, 0.5, 0.0]]]).log(), torch.tensor([[[0.25, 0.75, 0.0]]]).log()
    state = torch.tensor([[[0.4, 0.0, 0.6]]])
    hard = CategoricalStep(own).kl(CategoricalStep(other), reduce="sum")
    relaxed = CategoricalStep(own, state).kl(CategoricalStep(other, state), reduce="sum")
    assert torch.allclose(relaxed, 0.6 * hard)


def test_mixture_refuses_what_does_not_factor() -> None:
    step = MixtureStep(torch.tensor([[0.5, 0.5]]).log(), torch.zeros(1, 2, 3), torch.ones(1))
    with pytest.raises(ValueError, match="factor"):
        step.log_prob(torch.zeros(1, 3), reduce="sum", mask=MASK[:1])
    with pytest.raises(ValueError, match="factor"):
        step.log_prob(torch.zeros(1, 3), reduce="sum", clamp=(-5.0, 2.0))
    moved = step.shift(torch.ones(1, 3))
    zero = step.log_prob(torch.zeros(1, 3), reduce="sum")
    assert torch.allclose(moved.log_prob(torch.ones(1, 3), reduce="sum"), zero)
