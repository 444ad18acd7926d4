import math

import numpy as np
import ot
import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from difftilt.statistics import (
    coverage,
    empirical,
    energy_distance,
    enumerate_sequences,
    frechet_distance,
    frechet_from_moments,
    histogram,
    kernel_distance,
    kl_divergence,
    mmd_squared,
    mode_shares,
    random_directions,
    rbf_kernel,
    sequence_codes,
    sliced_wasserstein,
    tilted,
    total_variation,
    vendi_score,
    wasserstein_1d,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_agrees_with_a_matrix_square_root() -> None:
    x, y = normal(0, 40, 5), normal(1, 60, 5) @ normal(2, 5, 5) + 1
    cov_x, cov_y = np.cov(x.numpy().T), np.cov(y.numpy().T)
    root = np.real(scipy.linalg.sqrtm(cov_x @ cov_y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(cov_x + cov_y - 2 * root)
    assert frechet_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_frechet_of_singular_covariances() -> None:
    """Fewer rows than dimensions: the root must not turn imaginary, and a set is at distance 0 from itself."""
    x = normal(3, 4, 20)
    assert abs(frechet_distance(x, x).item()) < 1e-6 * x.var(0).sum().item()
    eye = torch.eye(3, dtype=torch.float64)
    mean = torch.zeros(3, dtype=torch.float64)
    assert frechet_from_moments(mean, 4 * eye, mean + 1, eye).item() == pytest.approx(3 + 3 * (2 - 1) ** 2)


def test_frechet_of_few_rows_in_many_dimensions_agrees_with_their_moments() -> None:
    x, y = normal(0, 9, 30) @ normal(1, 30, 30), 2 * normal(2, 7, 30) + 1
    expected = frechet_from_moments(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert frechet_distance(x, y).item() == pytest.approx(expected.item(), rel=1e-6)


def test_mmd_equals_the_double_loop() -> None:
    x, y = normal(0, 6, 3), normal(1, 4, 3) + 0.5

    def k(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * 1.5**2))

    def mean(pairs: list[float]) -> float:
        return sum(pairs) / len(pairs)

    within_x = mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    expected = within_x + within_y - 2 * mean([k(a, b) for a in x for b in y])
    assert mmd_squared(x, y, rbf_kernel(1.5)).item() == pytest.approx(expected)
    assert mmd_squared(x, x, rbf_kernel(1.5), unbiased=False).item() == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_centred_for_equal_laws_and_positive_for_others() -> None:
    same = torch.stack([kernel_distance(normal(2 * i, 30, 4), normal(2 * i + 1, 30, 4)) for i in range(60)])
    assert abs(same.mean()) < 4 * same.std() / math.sqrt(60)
    assert kernel_distance(normal(0, 30, 4), normal(1, 30, 4) + 2) > 10 * same.std()


def test_vendi_counts_orthogonal_directions() -> None:
    eye = torch.eye(4)
    assert vendi_score(eye).item() == pytest.approx(4)
    assert vendi_score(eye[[0, 0, 0, 0]]).item() == pytest.approx(1)
    # shares 3/4 and 1/4 of two directions
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert vendi_score(eye[[0, 0, 1, 0]] * 7).item() == pytest.approx(math.exp(entropy))
    assert vendi_score(eye, rbf_kernel(1e-3)).item() == pytest.approx(4)


def test_coverage_and_mode_shares() -> None:
    line = torch.arange(10.0)[:, None]
    assert coverage(line, line + 0.1, neighbours=1) == 1
    assert coverage(line, line[:4], neighbours=1).item() == pytest.approx(0.5)  # 0..3 and the neighbour 4
    modes = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    samples = torch.tensor([[0.1, 0.0], [9.9, 0.0], [10.0, 0.2], [5.0, 0.0]])
    assert mode_shares(samples, modes, 0.5).tolist() == [0.25, 0.5]


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_wasserstein_agrees_with_optimal_transport(order: float) -> None:
    x, y = normal(0, 17), 2 * normal(1, 9) + 1
    a, b = normal(2, 17).abs(), normal(3, 9).abs()
    cost = ot.emd2_1d(x.numpy(), y.numpy(), (a / a.sum()).numpy(), (b / b.sum()).numpy(), metric="minkowski", p=order)
    found = wasserstein_1d(x, y, order=order, x_weights=a, y_weights=b)
    assert found.item() ** order == pytest.approx(cost, rel=1e-9)


def test_wasserstein_agrees_with_scipy() -> None:
    x, y = normal(0, 8), normal(1, 8) * 3
    assert wasserstein_1d(x, y).item() == pytest.approx(scipy.stats.wasserstein_distance(x.numpy(), y.numpy()))


def test_sliced_wasserstein_agrees_with_pot_and_shifts() -> None:
    x, y = normal(0, 20, 3), normal(1, 20, 3) + 1
    directions = random_directions(15, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(15, dtype=torch.float64))
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=directions.numpy().T, p=2)
    assert sliced_wasserstein(x, y, directions).item() == pytest.approx(np.asarray(expected).item(), rel=1e-9)
    along = directions @ torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    shifted = sliced_wasserstein(x, x + torch.tensor([2.0, 0.0, 0.0]), directions)
    assert shifted.item() == pytest.approx(along.square().mean().sqrt().item(), rel=1e-6)


def test_energy_distance_agrees_with_scipy_on_the_line() -> None:
    x, y = normal(0, 12), normal(1, 20) + 0.3
    expected = scipy.stats.energy_distance(x.numpy(), y.numpy())
    assert energy_distance(x[:, None], y[:, None]).item() == pytest.approx(expected)


def test_sequences_round_trip() -> None:
    every = enumerate_sequences(3, 4)
    assert sequence_codes(every, 3).tolist() == list(range(81))
    assert enumerate_sequences(5, 1).shape == (5, 1)
    with pytest.raises(ValueError, match=r"0\.\.2"):
        sequence_codes(torch.tensor([[0, 3]]), 3)


def test_laws() -> None:
    p = empirical(torch.tensor([[0, 0], [0, 1], [0, 1], [1, 1]]), 2)
    assert p.tolist() == [0.25, 0.5, 0, 0.25]
    weighted = histogram(torch.tensor([0, 1, 1]), 3, torch.tensor([2.0, 1.0, 1.0]))
    assert weighted.tolist() == [0.5, 0.5, 0]
    q = torch.tensor([0.25, 0.25, 0.25, 0.25])
    assert total_variation(p, q).item() == 0.25
    assert kl_divergence(p, q).item() == pytest.approx(scipy.stats.entropy(p.numpy(), q.numpy()))
    assert kl_divergence(q, p).item() == math.inf


def test_tilted_law_maximises_reward_minus_kl() -> None:
    """Value of the optimum: E_p*[r] - beta·KL(p* || p) = beta·log E_p exp(r/beta), and no other law reaches it."""
    base, reward, beta = normal(0, 6).softmax(0), normal(1, 6), 0.7

    def value(law: Tensor) -> float:
        return ((law * reward).sum() - beta * kl_divergence(law, base)).item()

    best = value(tilted(base, reward, beta))
    assert best == pytest.approx(beta * (base * (reward / beta).exp()).sum().log().item())
    assert all(value(normal(seed, 6).softmax(0)) < best for seed in range(5, 25))
