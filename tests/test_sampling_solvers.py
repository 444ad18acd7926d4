"""What orders do not show: per-sample grids, zero-length steps, prepare, evaluations, dtypes, drift's bookkeeping."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from difftilt.checks.closed_forms import FLOW, PROCESSES, GaussianData
from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger
from difftilt.process import GaussianProcess, MaskedProcess, uniform_grid
from difftilt.process.protocol import Condition
from difftilt.sampling import DPMSolverPP, EulerSolver, Heun, Noise, Solver, path_kl

SOLVERS: list[Solver] = [EulerSolver(), Heun(), DPMSolverPP(), DPMSolverPP(lower_order_final=False)]
DATA = GaussianData()
X = torch.tensor([[-1.5], [0.3], [2.0]])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_each_sample_may_have_its_own_grid(solver: Solver, process: GaussianProcess) -> None:
    grids = torch.stack([uniform_grid(6), uniform_grid(6, 3.0), 0.2 + 0.5 * uniform_grid(6)])
    together = solver(DATA.denoiser(process), X.double(), None, grids)
    for row in range(3):
        alone = solver(DATA.denoiser(process), X[row : row + 1].double(), None, grids[row])
        assert torch.allclose(together[row], alone[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_of_no_length_change_nothing(solver: Solver) -> None:
    grid = torch.tensor([1.0, 0.7, 0.4, 0.0]).double()
    waiting = torch.tensor([1.0, 1.0, 0.7, 0.7, 0.4, 0.0, 0.0]).double()
    plain, paused = (solver(DATA.denoiser(FLOW), X.double(), None, g) for g in (grid, waiting[:-1]))
    assert torch.allclose(plain, paused, rtol=0, atol=1e-12)


def test_ended_rows_wait_for_the_others() -> None:
    grids = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.2, 0.0]]).double()
    for solver in (EulerSolver(), Heun()):
        denoiser = replace(DATA.denoiser(FLOW), kind="velocity", network=lambda x, t, c: x)
        ended = solver(denoiser, X[:2].double(), None, grids)[:1]
        assert torch.allclose(ended, solver(denoiser, X[:1].double(), None, grids[0, :3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_dtypes(solver: Solver) -> None:
    for given, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        assert solver(DATA.denoiser(FLOW), X.to(given), None, uniform_grid(3)).dtype == expected


@pytest.mark.parametrize(("solver", "evaluations"), [(EulerSolver(), 5), (Heun(), 9), (DPMSolverPP(), 5)])
def test_evaluations(solver: Solver, evaluations: int) -> None:
    denoiser = DATA.denoiser(FLOW)
    with torch.no_grad():
        solver(denoiser, X, None, uniform_grid(5))
    assert denoiser.ledger == Ledger(nfe=3 * evaluations)


@dataclass
class Recorder:
    """A network of constant velocity that notes when it is prepared."""

    times: list[float] = field(default_factory=list[float])

    def prepare(self, x: Tensor, t: Tensor, condition: Condition) -> Condition:
        self.times.append(float(t[0]))
        return condition + 1

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x) + condition[:, None]


@pytest.mark.parametrize("solver", SOLVERS)
def test_prepare_comes_before_every_step_and_its_state_is_kept(solver: Solver) -> None:
    recorder = Recorder()
    denoiser = NetworkDenoiser(recorder, FLOW, "x0", Ledger())
    final = solver(denoiser, X, torch.zeros(3), uniform_grid(4))
    assert recorder.times == [1.0, 0.75, 0.5, 0.25]
    if isinstance(solver, EulerSolver):
        assert torch.allclose(final, torch.full((3, 1), 4.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_refusals(solver: Solver) -> None:
    tokens = NetworkDenoiser(lambda x, t, c: x, MaskedProcess(2), "logits", Ledger())
    with pytest.raises(TypeError, match="Gaussian process"):
        solver(tokens, X, None, uniform_grid(2))
    with pytest.raises(ValueError, match="time grid"):
        solver(DATA.denoiser(FLOW), X, None, uniform_grid(2).flip(0))
    with pytest.raises(ValueError, match="one row each"):
        solver(DATA.denoiser(FLOW), X, None, uniform_grid(2).expand(2, -1))


def test_drift_from_itself_is_exactly_zero_at_one_evaluation_per_role_and_step() -> None:
    own, reference = DATA.denoiser(FLOW), DATA.denoiser(FLOW)
    with torch.no_grad():
        drift = path_kl(own, reference, X, None, uniform_grid(5), Noise(0), torch.arange(3))
    assert torch.equal(drift, torch.zeros(3))
    assert own.ledger == reference.ledger == Ledger(nfe=15)


def test_drift_belongs_to_the_sample_and_not_to_its_place() -> None:
    own, reference = GaussianData(1.2, 0.4).denoiser(FLOW), DATA.denoiser(FLOW)
    order = torch.tensor([2, 0, 1])
    grid = uniform_grid(5)
    plain = path_kl(own, reference, X, None, grid, Noise(0), torch.arange(3))
    moved = path_kl(own, reference, X[order], None, grid, Noise(0), order)
    assert torch.equal(plain[order], moved)
    assert bool((plain > 0).all())
