"""Kernels, solvers and drift on Gaussian data, where every error is known without sampling."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from difftilt.checks.closed_forms import FLOW, PROCESSES, GaussianData, interior, order
from difftilt.checks.proof import Proof
from difftilt.process import GaussianProcess, uniform_grid
from difftilt.sampling.drift import TIGHTEST, path_kl
from difftilt.sampling.kernels import CPS, DDIM, DDPM, DanceSDE, Euler, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Kernel, Solver
from difftilt.sampling.solvers import DPMSolverPP, EulerSolver, Heun
from difftilt.sampling.steps import GaussianStep

DATA = GaussianData()
NARROW = GaussianData(1.0, 0.3)
STARTS = torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64)


def farthest_from_one(kernel: Kernel) -> float:
    """The measured weak order of a kernel on each process, farthest from 1.

    Grids finer than the schedules' tables of 1000 entries: beta is constant between them.
    """
    orders: list[float] = []
    for process in PROCESSES:
        coarse, fine = (DATA.chain_error(process, kernel, interior(steps)) for steps in (1600, 6400))
        orders.append(order(coarse, fine, 4))
    return max(orders, key=lambda value: abs(value - 1))


def solver_error(solver: Solver, process: GaussianProcess, grid: Tensor) -> float:
    """Largest error of the final state over three starts."""
    got = solver(NARROW.denoiser(process), STARTS, None, grid)
    return float((got - NARROW.flow(process, STARTS, grid[:1], grid[-1:])).abs().max())


def solver_order(solver: Solver, expected: float) -> float:
    """The measured order on rectified flow and the linear schedule, farthest from the expected one."""
    orders: list[float] = []
    for process in PROCESSES[:2]:
        coarse, fine = (solver_error(solver, process, interior(steps)) for steps in (50, 200))
        orders.append(order(coarse, fine, 4))
    return max(orders, key=lambda value: abs(value - expected))


def whole_flow_order(solver: Solver) -> float:
    """The order on rectified flow from t = 1 to t = 0, where lambda is infinite at both ends."""
    coarse, fine = (solver_error(solver, FLOW, uniform_grid(steps)) for steps in (100, 400))
    return order(coarse, fine, 4)


def published(kernel: Kernel, expected: Sequence[float]) -> float:
    """Largest error of the final std at T = 10, 40, 200 from N(0, 1), against numbers of two decimals."""
    final = [DATA.chain(FLOW, kernel, uniform_grid(steps), 0.0, 1.0)[1] for steps in (10, 40, 200)]
    return max(abs(got - want) for got, want in zip(final, expected, strict=True))


def final_std_error(kernel: Kernel) -> float:
    """|std - 0.5| after 200 steps of rectified flow from N(0, 1)."""
    return abs(DATA.chain(FLOW, kernel, uniform_grid(200), 0.0, 1.0)[1] - DATA.std)


def posterior(kernel: Kernel) -> float:
    """Largest error of mean and std of an ancestral step against Gaussian conditioning of (x_s, x_t) given x_0."""
    worst = 0.0
    t, s = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([0.6, 0.45, 0.05]).double()
    x_0, x_t = torch.tensor([[0.7], [-1.0], [0.2]]).double(), STARTS
    for process in PROCESSES:
        step = kernel(process.predict(x_0, x_t, t, "x0"), x_t, t, s)
        assert isinstance(step, GaussianStep)
        ratio = process.alpha(t) / process.alpha(s)
        # given x_0: var(x_s) = sigma_s², cov(x_s, x_t) = ratio·sigma_s², var(x_t) = sigma_t²
        gain = ratio * process.sigma(s) ** 2 / process.sigma(t) ** 2
        mean = process.alpha(s)[:, None] * x_0 + gain[:, None] * (x_t - process.alpha(t)[:, None] * x_0)
        std = (process.sigma(s) ** 2 * (1 - gain * ratio)).sqrt()
        worst = max(worst, float((step.mean - mean).abs().max()), float((step.std - std).abs().max()))
    return worst


def total_noise() -> float:
    """CPS and DDIM on data at one point: largest error of the noise coefficient of x_s against sigma_s."""
    point, worst = GaussianData(0.0, 0.0), 0.0
    for process in PROCESSES:
        for kernel in (CPS(0.7), CPS(0.2), DDIM(0.5), DDIM(1.0)):
            worst = max(worst, point.chain_error(process, kernel, interior(5)))
    return worst


def gaussian_drift(process: GaussianProcess, kernel: Kernel | None = None) -> float:
    """Path KL over KL(N(1.2, 0.5²) || N(1, 0.5²)); both models exact, so the tightest bound is the KL itself."""
    model, reference = GaussianData(1.2), DATA
    x_0 = torch.full((1, 1), 1.2, dtype=torch.float64)
    grid = uniform_grid(100)
    total = 0.0
    if kernel is None:
        own, theirs = model.denoiser(process), reference.denoiser(process)
        total = float(path_kl(own, theirs, x_0, None, grid, Noise(0), torch.zeros(1, dtype=torch.int64)))
    else:
        for t, s in zip(grid[:-1, None], grid[1:, None], strict=True):
            steps = [
                kernel(process.predict(d.x0(process, x_0, t), x_0, t, "x0"), x_0, t, s) for d in (model, reference)
            ]
            total += float(steps[0].kl(steps[1], reduce="sum"))
    return total / (0.2**2 / (2 * 0.5**2))


def _order_proof(kernel: Kernel, claim: str) -> Proof:
    measure: Callable[[], float] = partial(farthest_from_one, kernel)
    return Proof(f"{claim} is of order 1 in mean and std on every process", measure, 0.95, 1.05)


PROOFS = (
    _order_proof(Euler(), "Euler"),
    _order_proof(DDIM(0.0), "DDIM without noise"),
    _order_proof(DDIM(1.0), "DDIM with eta 1"),
    _order_proof(DDPM(), "DDPM"),
    _order_proof(FlowSDE(), "Flow-SDE (a = 0.7)"),
    _order_proof(TIGHTEST, "Flow-SDE (a² = 2)"),
    _order_proof(DanceSDE(1.0), "Dance-SDE"),
    Proof("the Euler solver is of order 1", partial(solver_order, EulerSolver(), 1), 0.9, 1.1),
    Proof("Heun is of order 2", partial(solver_order, Heun(), 2), 1.85, 2.15),
    Proof("DPM-Solver++(2M) is of order 2", partial(solver_order, DPMSolverPP(False), 2), 1.75, 2.25),
    Proof("Heun is of order 2 on rectified flow from t = 1 to 0", partial(whole_flow_order, Heun()), 1.85, 2.15),
    # each of the k-th steps from an infinite lambda has h = 1/k on every grid: order 2 up to a logarithm
    Proof(
        "DPM-Solver++(2M) keeps it up to a logarithm from t = 1 to 0",
        partial(whole_flow_order, DPMSolverPP()),
        1.6,
        2.2,
    ),
    # two decimals are published, so half a hundredth is the rounding of the truth
    Proof(
        "final std of the ODE: .43/.48/.50 at T = 10/40/200",
        partial(published, Euler(), (0.43, 0.48, 0.50)),
        at_most=0.0051,
    ),
    Proof("final std of Flow-SDE: .48/.50/.50", partial(published, FlowSDE(), (0.48, 0.50, 0.50)), at_most=0.0051),
    Proof("final std of Dance-SDE: .50/.50/.50", partial(published, DanceSDE(1.0), (0.50, 0.50, 0.50)), at_most=0.0051),
    Proof("final std of CPS shrinks: .37/.41/.42", partial(published, CPS(), (0.37, 0.41, 0.42)), at_most=0.0051),
    Proof(
        "final std of Flow-SDE without the score term: .84/.97/1.08",
        partial(published, FlowSDE(score_term=False), (0.84, 0.97, 1.08)),
        at_most=0.0051,
    ),
    Proof("Flow-SDE keeps the data's std at T = 200, error", partial(final_std_error, FlowSDE()), at_most=0.005),
    Proof("Dance-SDE keeps it", partial(final_std_error, DanceSDE(1.0)), at_most=0.005),
    Proof(
        "without the score term Flow-SDE breaks it", partial(final_std_error, FlowSDE(score_term=False)), at_least=0.3
    ),
    Proof("without the score term Dance-SDE breaks it", partial(final_std_error, DanceSDE(1.0, False)), at_least=0.3),
    Proof(
        "DDIM with eta 1 is the posterior q(x_s | x_t, x_0), mean and std", partial(posterior, DDIM(1.0)), at_most=1e-10
    ),
    Proof("DDPM is the posterior q(x_s | x_t, x_0), mean and std", partial(posterior, DDPM()), at_most=1e-10),
    Proof("CPS and DDIM leave the total noise coefficient at sigma_s", total_noise, at_most=1e-10),
    # Riemann sums of 100 steps
    Proof("the path KL of two exact flows is the KL of their data, ratio", partial(gaussian_drift, FLOW), 0.99, 1.01),
    Proof("so it is for a variance-preserving process, ratio", partial(gaussian_drift, PROCESSES[1]), 0.99, 1.01),
    Proof(
        "with a = 0.7 the same integral is (1 + a²/2)²/(2a²) = 1.5816 times as large",
        partial(gaussian_drift, FLOW, FlowSDE(0.7)),
        1.5816 - 0.03,
        1.5816 + 0.03,
    ),
)
