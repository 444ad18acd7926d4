import pytest
import torch
from torch import Tensor

from difftilt.objectives import (
    clipped_surrogate,
    divided_by_time,
    exact_kl,
    guard_log_ratio,
    mean_gap,
    nft_loss,
    reinforce,
    step_kl,
    surrogate_of_ratio,
    velocity_gap,
)
from difftilt.objectives.denoising import ErrorSpace
from difftilt.objectives.kl import KLMode
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, RectifiedFlow, linear_schedule
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.kernels import FlowSDE, Unmasking
from difftilt.sampling.steps import GaussianStep

FLOW = RectifiedFlow()


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_surrogate_is_ppo_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.1, 1.5, 1.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    found = clipped_surrogate(ratio.log() + 3, torch.full_like(ratio, 3), advantage, 0.2)
    assert found.value.tolist() == pytest.approx([-0.5, 0.8, -2.2, -1.2, 1.5])
    assert found.ratio.tolist() == pytest.approx(ratio.tolist())
    assert found.clipped.tolist() == [True, True, False, True, True]
    assert not found.ratio.requires_grad


def test_clip_range_may_differ_between_rows() -> None:
    log_ratio, advantage = torch.full((3,), 0.3), torch.ones(3)
    clips = torch.tensor([0.1, 0.2, 0.5])
    found = surrogate_of_ratio(log_ratio, advantage, clips)
    each = [surrogate_of_ratio(log_ratio[:1], advantage[:1], clip).value for clip in (0.1, 0.2, 0.5)]
    torch.testing.assert_close(found.value, torch.cat(each))


def test_at_the_old_weights_the_gradient_is_that_of_reinforce() -> None:
    """Before the first update the ratio is exactly 1 and nothing is clipped, however small the range."""
    old, advantage = normal(0, 5), normal(1, 5)
    log_prob = old.clone().requires_grad_()
    found = clipped_surrogate(log_prob, old, advantage, 1e-5)
    assert (found.ratio == 1).all()
    assert not found.clipped.any()
    slope = torch.autograd.grad(found.value.sum(), log_prob)[0]
    assert torch.equal(slope, torch.autograd.grad(reinforce(log_prob, advantage).sum(), log_prob)[0])
    assert torch.equal(slope, -advantage)


def test_half_precision_is_raised() -> None:
    half = torch.full((2,), 1.0, dtype=torch.bfloat16)
    assert clipped_surrogate(half, half, torch.ones(2), 0.1).value.dtype == torch.float32
    assert reinforce(half, torch.ones(2)).dtype == torch.float32


def test_guard_gradient_at_the_old_weights() -> None:
    """Log-ratio = mean over dimensions of noise·(mean - old mean): at the old mean its slope is the noise itself."""
    noise, std = normal(0, 4, 6), torch.tensor([0.01, 0.1, 1.0, 3.0], dtype=torch.float64)
    old = GaussianStep(normal(1, 4, 6), std)
    x_s = old.draw(noise)
    for offset in (0.0, 0.3):
        mean = (old.mean + offset).requires_grad_()
        log_probs = [GaussianStep(m, std).log_prob(x_s, reduce="mean") for m in (mean, old.mean)]
        found = guard_log_ratio(log_probs[0], log_probs[1], mean, old.mean, std)
        torch.testing.assert_close(found, (noise * (mean - old.mean)).mean(1))
        torch.testing.assert_close(torch.autograd.grad(found.sum(), mean)[0], noise / 6)


def test_division_by_time() -> None:
    t, s = torch.tensor([1.0, 0.5]), torch.tensor([0.9, 0.0])
    torch.testing.assert_close(divided_by_time(torch.ones(2), t, s), torch.tensor([10.0, 2.0]))


@pytest.mark.parametrize("mode", ["exact", "flow_grpo", "velocity", "mean"])
def test_penalties_by_their_written_formulas(mode: KLMode) -> None:
    """The formulas as Flow-GRPO prints them, at s_i = 0.6 -> 0.5 with sigma = 0.7·sqrt(0.6/0.4)."""
    t, s = torch.full((3,), 0.6, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    x_t, v, v_ref = normal(0, 3, 2, 4), normal(1, 3, 2, 4).requires_grad_(), normal(2, 3, 2, 4)
    new, ref = (FLOW.predict(u, x_t, t, "velocity") for u in (v, v_ref))
    step, reference = (FlowSDE(0.7)(p, x_t, t, s) for p in (new, ref))
    sigma, dt = 0.7 * (0.6 / 0.4) ** 0.5, -0.1
    coefficient = (1 + sigma**2 * 0.4 / (2 * 0.6)) * dt
    square = (v - v_ref).square().mean((1, 2))
    expected = {
        "exact": coefficient**2 * square / (2 * sigma**2 * -dt),
        "flow_grpo": coefficient**2 * square / (2 * sigma**2),
        "velocity": square,
        "mean": coefficient**2 * square,
    }[mode]
    found = step_kl(mode, step, reference, t, s, predictions=(new, ref))
    torch.testing.assert_close(found, expected)
    slope = torch.autograd.grad(found.sum(), v)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), v)[0])
    if mode == "velocity":
        with pytest.raises(ValueError, match="predictions"):
            step_kl(mode, step, reference, t, s)
    summed = step_kl(mode, step, reference, t, s, predictions=(new, ref), reduce="sum")
    torch.testing.assert_close(summed, 8 * found)


def test_deterministic_steps_have_no_exact_kl_but_a_gap() -> None:
    mean = normal(0, 2, 3)
    step = GaussianStep(mean, torch.zeros(2, dtype=torch.float64), deterministic=True)
    with pytest.raises(ValueError, match="deterministic"):
        exact_kl(step, step)
    assert (mean_gap(step, step) == 0).all()


def test_tokens_have_the_exact_kl_only() -> None:
    process = MaskedProcess(2)
    x, t, s = torch.full((1, 3), 2), torch.ones(1), torch.full((1,), 0.5)
    new, ref = (process.predict(normal(i, 1, 3, 2).float(), x, t, "logits") for i in (0, 1))
    step, reference = (Unmasking()(p, x, t, s) for p in (new, ref))
    found = step_kl("exact", step, reference, t, s, reduce="sum")
    law, other = new.log_probs, ref.log_probs
    torch.testing.assert_close(found, 0.5 * (law.exp() * (law - other)).sum((1, 2)))
    with pytest.raises(TypeError, match="CategoricalStep"):
        step_kl("mean", step, reference, t, s)


def test_velocity_gap_is_independent_of_the_parametrisation() -> None:
    process, t = linear_schedule(), torch.full((3,), 0.4, dtype=torch.float64)
    x_t = normal(0, 3, 2)
    pair = [process.predict(normal(i, 3, 2), x_t, t, "epsilon") for i in (1, 2)]
    other = [GaussianPrediction(process, p.x0, "x0", x_t, t) for p in pair]
    torch.testing.assert_close(velocity_gap(*pair), velocity_gap(*other))


def nft_case(seed: int = 0) -> tuple[Tensor, ...]:
    x_0, noise, v_old, v = (normal(seed + i, 4, 2, 3) for i in range(4))
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    r = torch.tensor([0.0, 0.3, 0.5, 1.0], dtype=torch.float64)
    return x_0, FLOW.corrupt(x_0, t, noise), t, noise, v_old, v, r


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_nft_equals_the_released_code_and_its_gradient(beta: float) -> None:
    """Written out from the paper's script: branches in v, errors of x0 over a detached mean absolute error."""
    x_0, x_t, t, _, v_old, v, r = nft_case()
    v.requires_grad_()
    time = t[:, None, None]

    def branch(u: Tensor) -> Tensor:
        x0 = x_t - time * u
        weight = (x0 - x_0).abs().mean((1, 2), keepdim=True).clip(min=1e-5).detach()
        return ((x0 - x_0) ** 2 / weight).mean((1, 2))

    plus, minus = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    expected = 5.0 * (r * branch(plus) + (1 - r) * branch(minus)) / beta
    new, old = (FLOW.predict(u, x_t, t, "velocity") for u in (v, v_old))
    found = nft_loss(new, old, x_0, r, nft_beta=beta, max_advantage=5.0)
    torch.testing.assert_close(found.value, expected)
    torch.testing.assert_close(found.positive, branch(plus).detach())
    slopes = [torch.autograd.grad(value.sum(), v)[0] for value in (found.value, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])


def test_nft_velocity_space_by_its_equation() -> None:
    x_0, x_t, t, noise, v_old, v, r = nft_case()
    new, old = (FLOW.predict(u, x_t, t, "velocity") for u in (v, v_old))
    found = nft_loss(new, old, x_0, r, nft_beta=0.5, max_advantage=2.0, space="velocity")
    target = noise - x_0
    plus, minus = (v_old + sign * 0.5 * (v - v_old) for sign in (1, -1))
    errors = [(u - target).square().mean((1, 2)) for u in (plus, minus)]
    torch.testing.assert_close(found.value, 2.0 / 0.5 * (r * errors[0] + (1 - r) * errors[1]))


@pytest.mark.parametrize("space", ["x0", "velocity"])
@pytest.mark.parametrize("process", [FLOW, linear_schedule()])
def test_nft_does_not_see_the_parametrisation(space: ErrorSpace, process: GaussianProcess) -> None:
    x_0, x_t, t, _, e_old, e, r = nft_case()
    new, old = (process.predict(output, x_t, t, "epsilon") for output in (e, e_old))
    value = nft_loss(new, old, x_0, r, nft_beta=0.3, space=space).value
    again = [GaussianPrediction(process, p.velocity, "velocity", x_t, t) for p in (new, old)]
    torch.testing.assert_close(value, nft_loss(again[0], again[1], x_0, r, nft_beta=0.3, space=space).value)


def test_nft_gradient_reaches_the_current_weights_only() -> None:
    x_0, x_t, t, _, v_old, v, r = nft_case()
    v.requires_grad_()
    v_old.requires_grad_()
    new, old = (FLOW.predict(u, x_t, t, "velocity") for u in (v, v_old))
    nft_loss(new, old, x_0, r, nft_beta=1.0).value.sum().backward()
    assert v.grad is not None
    assert v.grad.abs().sum() > 0
    assert v_old.grad is None


def test_nft_floors_its_normaliser_and_refuses_beta_zero() -> None:
    """A perfect positive branch: error 0 over the floor is 0, not NaN."""
    x_0, x_t, t, noise, _, _, _ = nft_case()
    exact = FLOW.predict(noise - x_0, x_t, t, "velocity")
    found = nft_loss(exact, exact, x_0, torch.ones(4), nft_beta=1.0)
    assert found.value.abs().max() < 1e-20
    with pytest.raises(ValueError, match="nft_beta=0"):
        nft_loss(exact, exact, x_0, torch.ones(4), nft_beta=0.0)


def test_nft_is_the_same_in_any_batch() -> None:
    x_0, x_t, t, _, v_old, v, r = nft_case()

    def rows(of: Tensor) -> Tensor:
        new, old = (FLOW.predict(u[of], x_t[of], t[of], "velocity") for u in (v, v_old))
        return nft_loss(new, old, x_0[of], r[of], nft_beta=1.0).value

    assert torch.equal(rows(torch.arange(4)), torch.cat([rows(torch.tensor([i])) for i in range(4)]))
