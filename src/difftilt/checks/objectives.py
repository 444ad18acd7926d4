"""What the losses promise, on problems small enough to be solved exactly: no sampling error anywhere, float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.credit import group_advantage, optimality
from difftilt.credit.optimality import OptimalityMode
from difftilt.objectives import (
    ErrorSpace,
    clipped_surrogate,
    exact_kl,
    flow_grpo_kl,
    guard_log_ratio,
    nft_loss,
    sde_kl,
    velocity_gap,
)
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, RectifiedFlow, cosine_schedule
from difftilt.sampling.kernels import DanceSDE, FlowSDE
from difftilt.sampling.steps import GaussianStep

DIM = 3
OUTCOMES = 12
FLOW = RectifiedFlow()


@dataclass(frozen=True)
class Posterior:
    """All that can lie behind one noisy state: a finite set of clean samples with their probabilities.

    Attributes:
        process: corruption.
        x_t: the state, repeated for each clean sample.
        t: its time, likewise.
        x_0: (outcomes, dim).
        chance: p(x_0 | x_t), (outcomes,).
        velocity: of the path from each x_0 through x_t.
    """

    process: GaussianProcess
    x_t: Tensor
    t: Tensor
    x_0: Tensor
    chance: Tensor
    velocity: Tensor

    @property
    def old(self) -> Tensor:
        """v_old: the posterior mean of the velocity, (dim,)."""
        return self.chance @ self.velocity

    def loss(self, v: Tensor, r: Tensor, beta: float, space: ErrorSpace = "velocity") -> Tensor:
        """Rows of the loss of a network that says v at x_t."""
        old, new = (
            GaussianPrediction(self.process, u.expand_as(self.x_t), "velocity", self.x_t, self.t) for u in (self.old, v)
        )
        return nft_loss(new, old, self.x_0, r, nft_beta=beta, space=space).value

    def minimiser(self, r: Tensor, beta: float) -> Tensor:
        """Of the expected velocity-space loss: it is quadratic, so one Newton step from anywhere lands on it."""

        def expected(v: Tensor) -> Tensor:
            return self.chance @ self.loss(v, r, beta)

        start = torch.ones(DIM, dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(expected, start)
        curvature = torch.autograd.functional.hessian(expected, start)
        assert isinstance(slope, Tensor)
        assert isinstance(curvature, Tensor)
        return start - torch.linalg.solve(curvature, slope)


def posterior(process: GaussianProcess = FLOW, time: float = 0.6) -> Posterior:
    """A drawn problem."""
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(OUTCOMES, DIM, generator=generator, dtype=torch.float64)
    chance = torch.rand(OUTCOMES, generator=generator, dtype=torch.float64)
    x_t = torch.randn(DIM, generator=generator, dtype=torch.float64).expand(OUTCOMES, DIM)
    t = torch.full((OUTCOMES,), time, dtype=torch.float64)
    velocity = GaussianPrediction(process, x_0, "x0", x_t, t).velocity
    return Posterior(process, x_t, t, x_0, chance / chance.sum(), velocity)


def _labels() -> Tensor:
    return torch.linspace(0.05, 0.9, OUTCOMES, dtype=torch.float64)


def nft_minimiser_error(process: GaussianProcess, beta: float) -> float:
    """Distance of the minimiser to v_old + (2/beta)·E[r (v - v_old)]."""
    at, r = posterior(process), _labels()
    delta = (at.chance * r) @ (at.velocity - at.old)
    return (at.minimiser(r, beta) - at.old - 2 / beta * delta).abs().max().item()


def nft_beta_ratio() -> float:
    """Increment at beta 1/2 over the increment at beta 1."""
    at, r = posterior(), _labels()
    small, large = (at.minimiser(r, beta) - at.old for beta in (0.5, 1.0))
    return (small.norm() / large.norm()).item()


def nft_null_gradient(space: ErrorSpace, *, negative_branch: bool = True) -> float:
    """Largest gradient of any row's loss at v = v_old, with the r of a constant reward.

    Without the negative branch the row is max_advantage/beta·r·(error of the positive branch) alone, which the loss is
    at r = 1 up to the factor r.
    """
    at = posterior()
    reward = torch.full((OUTCOMES,), 0.1, dtype=torch.float64)
    r = optimality(group_advantage(reward, torch.zeros(OUTCOMES, dtype=torch.int64), std="global"))
    v = at.old.expand(OUTCOMES, DIM).clone().requires_grad_()
    rows = at.loss(v, r, 0.7, space) if negative_branch else r * at.loss(v, torch.ones_like(r), 0.7, space)
    return torch.autograd.grad(rows.sum(), v)[0].abs().max().item()


def nft_mode_share(mode: OptimalityMode, share: Callable[[float], float]) -> float:
    """Relative error of (increment of the mode) = share(p)·(increment of ``all``) for a 0/1 reward.

    Reward 1 for the first five outcomes, p their probability; the advantage (r - p)/std is that of the population.
    """
    at = posterior()
    good = (torch.arange(OUTCOMES) < 5).double()
    p = (at.chance @ good).item()
    advantage = (good - p) / (p * (1 - p)) ** 0.5
    full = at.minimiser(optimality(advantage), 1.0) - at.old
    part = at.minimiser(optimality(advantage, mode=mode), 1.0) - at.old
    return ((part - share(p) * full).norm() / full.norm()).item()


def _sphere_draws(std: float) -> tuple[GaussianStep, GaussianStep, Tensor]:
    """An old and a new step, and states drawn by the old one from 2·dim points with mean 0 and covariance I.

    Every statistic below is a polynomial of degree 2 in the noise, so these points give its exact moments.
    """
    dim = 16
    axes = dim**0.5 * torch.eye(dim, dtype=torch.float64)
    noise = torch.cat([axes, -axes])
    gap = torch.randn(dim, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 10
    scale = torch.full((2 * dim,), std, dtype=torch.float64)
    old = GaussianStep(torch.zeros_like(noise), scale)
    return GaussianStep(gap.expand_as(noise), scale), old, old.draw(noise)


def guard_moments(std: float, *, corrected: bool = True) -> tuple[float, float, float]:
    """Mean and std of the log-ratio under the old policy, and the MSE of the means."""
    new, old, x = _sphere_draws(std)
    logs = [step.log_prob(x, reduce="mean") for step in (new, old)]
    ratio = guard_log_ratio(logs[0], logs[1], new.mean, old.mean, new.std) if corrected else logs[0] - logs[1]
    error = (new.mean - old.mean).square().mean().item()
    return ratio.mean().item(), ratio.std(correction=0).item(), error


def guard_mean() -> float:
    """Largest |mean| of the corrected log-ratio over steps of different noise."""
    return max(abs(guard_moments(std)[0]) for std in (0.05, 0.3, 1.0))


def guard_std() -> float:
    """Largest relative error of std = sqrt(MSE/dim) over steps of different noise."""
    found = [guard_moments(std) for std in (0.05, 0.3, 1.0)]
    return max(abs(spread / (error / 16) ** 0.5 - 1) for _, spread, error in found)


def plain_bias() -> float:
    """Largest relative error of (mean of the plain log-ratio) = -MSE/(2 std²)."""
    gaps: list[float] = []
    for std in (0.05, 0.3, 1.0):
        mean, _, error = guard_moments(std, corrected=False)
        gaps.append(abs(mean / (-error / (2 * std**2)) - 1))
    return max(gaps)


def kl_closed_form(process: GaussianProcess, kernel: FlowSDE | DanceSDE) -> float:
    """Largest relative gap of the KL of two steps and its closed form, and of the released code's to exact·(t - s)."""
    generator = torch.Generator().manual_seed(1)
    t = torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=torch.float64)
    s = t - 0.08
    x_t, one, other = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    new, ref = (process.predict(v, x_t, t, "velocity") for v in (one, other))
    step, reference = kernel(new, x_t, t, s), kernel(ref, x_t, t, s)
    exact = exact_kl(step, reference)
    g = step.std / (t - s).sqrt()
    closed = sde_kl(process, g, t, s, velocity_gap(new, ref))
    code = ((step.mean - reference.mean) ** 2).mean(1) / (2 * g**2)
    gaps = [closed / exact - 1, flow_grpo_kl(step, reference, t, s) / code - 1]
    return max(gap.abs().max().item() for gap in gaps)


def surrogate_gradient() -> float:
    """Largest gap between the surrogate's gradient and -A·ratio where it is not cut, 0 where it is."""
    old = torch.zeros(7, dtype=torch.float64)
    new = torch.tensor([-0.5, -0.5, -0.1, 0.0, 0.1, 0.5, 0.5], dtype=torch.float64).requires_grad_()
    advantage = torch.tensor([1.0, -1, 2, 3, -2, 1, -1], dtype=torch.float64)
    value = clipped_surrogate(new, old, advantage, 0.2).value
    found = torch.autograd.grad(value.sum(), new)[0]
    # cut: ratio above for a good action, below for a bad one
    kept = torch.tensor([1.0, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    return (found + kept * advantage * new.detach().exp()).abs().max().item()


_SHARES: tuple[tuple[OptimalityMode, str, Callable[[float], float]], ...] = (
    ("positive_only", "1 - p", lambda p: 1 - p),
    ("negative_only", "p", lambda p: p),
)
_PROCESSES: tuple[tuple[str, GaussianProcess], ...] = (
    ("rectified flow", FLOW),
    ("a cosine schedule", cosine_schedule()),
)
# float64 algebra of a few dozen operations on numbers of order 1 to 100
_ROUNDING = 1e-9

PROOFS = (
    *(
        Proof(
            f"NFT, velocity space, {name}, beta {beta}: the minimiser is v_old + (2/beta)·E[r (v - v_old)]",
            lambda process=process, beta=beta: nft_minimiser_error(process, beta),
            at_most=_ROUNDING,
        )
        for name, process in _PROCESSES
        for beta in (1.0, 0.1)
    ),
    Proof("NFT: half the beta doubles the increment", nft_beta_ratio, at_least=2 - _ROUNDING, at_most=2 + _ROUNDING),
    Proof("NFT: a constant reward moves nothing, row by row (x0 space)", lambda: nft_null_gradient("x0"), at_most=0.0),
    Proof("NFT: the same in velocity space", lambda: nft_null_gradient("velocity"), at_most=0.0),
    Proof(
        "without the negative branch a constant reward does pull every row",
        lambda: nft_null_gradient("x0", negative_branch=False),
        at_least=0.1,
    ),
    *(
        Proof(
            f"NFT: for a 0/1 reward of success rate p, {mode} moves {factor} times as far as both branches",
            lambda mode=mode, share=share: nft_mode_share(mode, share),
            at_most=_ROUNDING,
        )
        for mode, factor, share in _SHARES
    ),
    Proof("the plain log-ratio has mean -MSE/(2 std²) under the old policy", plain_bias, at_most=_ROUNDING),
    Proof("the log-ratio of GRPO-Guard has mean 0 at every noise level", guard_mean, at_most=_ROUNDING),
    Proof("and standard deviation sqrt(MSE/dim)", guard_std, at_most=_ROUNDING),
    *(
        Proof(
            f"{type(kernel).__name__}, {name}: the step KL is its closed form in the gap of the velocities",
            lambda process=process, kernel=kernel: kl_closed_form(process, kernel),
            at_most=_ROUNDING,
        )
        for name, process in _PROCESSES
        for kernel in (FlowSDE(0.7), DanceSDE(0.3))
    ),
    Proof("the clipped surrogate has gradient -A·ratio inside, 0 where it cuts", surrogate_gradient, at_most=1e-12),
)
