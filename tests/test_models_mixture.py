"""The mixture and the Markov chain: classes, residual, draws. Closed forms are held to quadrature in checks/models."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models import (
    GaussianMixture,
    Ledger,
    MarkovPosterior,
    MixturePrediction,
    MixtureVelocity,
    NetworkDenoiser,
)
from difftilt.process import MaskedProcess, RectifiedFlow, cosine_schedule
from difftilt.sampling.exact import ExactAncestral
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Noise

FLOW = RectifiedFlow()
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]])
MIXTURE = GaussianMixture(MEANS, 0.4, torch.tensor([0.5, 0.3, 0.2]))


def states(rows: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 2, generator=generator), torch.rand(rows, generator=generator) * 0.9 + 0.05


@pytest.mark.parametrize("process", [FLOW, cosine_schedule(100)], ids=["flow", "vp"])
def test_velocity_score_and_mean_are_one_prediction(process: RectifiedFlow) -> None:
    x_t, t = (value.double() for value in states())
    prediction = process.predict(MIXTURE.posterior_mean(process, x_t, t), x_t, t, "x0")
    assert torch.allclose(prediction.velocity, MIXTURE.velocity(process, x_t, t), rtol=1e-6, atol=1e-6)
    assert torch.allclose(prediction.score, MIXTURE.score(process, x_t, t), rtol=1e-6, atol=1e-6)


def test_velocity_is_finite_at_both_ends() -> None:
    x_t, _ = states(8)
    assert torch.allclose(MIXTURE.velocity(FLOW, x_t, torch.ones(8)), x_t - MIXTURE.mean(), atol=1e-5)
    assert bool(MIXTURE.velocity(FLOW, x_t, torch.zeros(8)).isfinite().all())


def test_reference_equals_base_bit_for_bit_until_the_residual_moves() -> None:
    x_t, t = states()
    network = MixtureVelocity(MIXTURE, FLOW)
    off = MixtureVelocity(MIXTURE, FLOW, residual=False, seed=3)
    exact = MIXTURE.velocity(FLOW, x_t, t)
    assert torch.equal(network(x_t, t), exact)
    with torch.no_grad():
        for each in (network, off):
            each.network.last.bias.add_(0.1)
    assert torch.equal(off(x_t, t), exact)
    assert not torch.equal(network(x_t, t), exact)


def test_class_condition_restricts_the_components() -> None:
    x_t, t = states(9)
    network = MixtureVelocity(MIXTURE, FLOW, classes=torch.tensor([0, 1, 0]))
    kept = GaussianMixture(MEANS[[0, 2]], 0.4, torch.tensor([5 / 7, 2 / 7]))
    alone = GaussianMixture(MEANS[1:2], 0.4, torch.ones(1))
    label = torch.tensor([0, 1, 2]).repeat(3)
    velocity = network(x_t, t, label)
    assert torch.allclose(velocity[0::3], kept.velocity(FLOW, x_t[0::3], t[0::3]), atol=1e-5)
    assert torch.allclose(velocity[1::3], alone.velocity(FLOW, x_t[1::3], t[1::3]), atol=1e-5)
    assert torch.allclose(velocity[2::3], MIXTURE.velocity(FLOW, x_t[2::3], t[2::3]), atol=1e-5)


def predict(network: MixtureVelocity, x_t: Tensor, t: Tensor) -> MixturePrediction:
    prediction = NetworkDenoiser(network, network.process, "velocity", Ledger(), forward_batch=512)(x_t, t, None)
    assert isinstance(prediction, MixturePrediction)
    return prediction


@torch.no_grad()
def test_exact_chain_of_four_steps_draws_the_clean_law() -> None:
    rows, noise = 4096, Noise(0)
    index, network = torch.arange(rows), MixtureVelocity(MIXTURE, FLOW)
    x = MIXTURE.sample_marginal(FLOW, torch.ones(rows), noise.normal(index, (3,), purpose="start"))
    times = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    for i, (t, s) in enumerate(pairwise(times)):
        step = ExactAncestral()(predict(network, x, t.expand(rows)), x, t.expand(rows), s.expand(rows))
        x = step.draw(noise.normal(index, step.noise_shape, purpose="step", step=i))
    nearest = (x[:, None] - MEANS).square().sum(-1).argmin(-1)
    share = torch.bincount(nearest, minlength=3) / rows
    # 4 standard errors of a share; modes stand 5 std apart, so that misassignment is below 1e-3
    assert bool(((share - MIXTURE.weights).abs() < 4 * (MIXTURE.weights * (1 - MIXTURE.weights) / rows).sqrt()).all())
    spread = (x - MEANS[nearest]).square().mean()
    assert abs(float(spread) / 0.16 - 1) < 4 * math.sqrt(2 / (2 * rows))


@torch.no_grad()
def test_mixture_draws_use_one_rule_for_the_noise() -> None:
    noise = Noise(2).normal(torch.arange(4096), (3,), purpose="x")
    x_0 = MIXTURE.sample(noise)
    assert torch.allclose(x_0.mean(0), MIXTURE.mean(), atol=4 * 1.5 / 64)
    # as sigma_t grows to 1 the exact step to s forgets x_t: its component is the clean one picked by the same noise
    step = ExactAncestral()(
        predict(MixtureVelocity(MIXTURE, FLOW), torch.randn_like(noise[:, :2]), torch.ones(4096)),
        noise[:, :2],
        torch.ones(4096),
        torch.zeros(4096),
    )
    assert torch.allclose(step.draw(noise), x_0, atol=1e-5)


def test_residual_moves_the_exact_step_with_the_network() -> None:
    x_t, t = states(16)
    network = MixtureVelocity(MIXTURE, FLOW)
    before = ExactAncestral()(predict(network, x_t, t), x_t, t, t / 2)
    with torch.no_grad():
        network.network.last.bias.add_(torch.tensor([0.3, -0.2]))
    prediction = predict(network, x_t, t)
    after = ExactAncestral()(prediction, x_t, t, t / 2)
    weighted = (prediction.log_responsibility.exp()[..., None] * prediction.posterior()[0]).sum(1)
    assert torch.allclose(weighted, prediction.x0, atol=1e-5)
    # DDIM with eta 1: x0 enters x_s with alpha_s·(1 - a·c_t); velocity v moves x0 by -t·v
    s = t / 2
    ratio = (1 - t) / (1 - s)
    reach = (1 - s) * (1 - ratio**2 * s**2 / t**2)
    moved = -(reach * t)[:, None] * torch.tensor([0.3, -0.2])
    assert torch.allclose(after.means - before.means, moved[:, None].expand_as(after.means), atol=1e-5)


def test_exact_step_refuses_other_predictions() -> None:
    x_t, t = states(4)
    with pytest.raises(TypeError, match="components of a mixture"):
        ExactAncestral()(FLOW.predict(x_t, x_t, t, "velocity"), x_t, t, t / 2)
    assert Euler()(predict(MixtureVelocity(MIXTURE, FLOW), x_t, t), x_t, t, t / 2).deterministic


def test_impossible_mixtures_are_refused() -> None:
    with pytest.raises(UserError, match="positive"):
        GaussianMixture(MEANS, 0.0, torch.ones(3) / 3)
    with pytest.raises(UserError, match="outweighs"):
        MIXTURE.tilted_quadratic(torch.zeros(2), precision=-10.0, temperature=1.0)


CHAIN = MarkovPosterior(
    torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[0.1, 0.6, 0.3], [0.3, 0.2, 0.5], [0.5, 0.25, 0.25]]), length=4
)


@torch.no_grad()
def test_markov_base_reference_and_relaxed_states() -> None:
    hard = torch.randint(0, 4, (32, 4), generator=torch.Generator().manual_seed(0))
    t = torch.full((32,), 0.5)
    logits = CHAIN(hard, t)
    assert torch.equal(logits, CHAIN.log_posterior(hard).float())
    relaxed = torch.nn.functional.one_hot(hard, 4).float()
    assert torch.equal(CHAIN(relaxed, t), logits)
    prediction = MaskedProcess(3).predict(logits, hard, t, "logits")
    assert torch.equal(prediction.x0[hard < 3], hard[hard < 3])


def test_markov_enumeration_is_a_law_and_its_own_index() -> None:
    sequences = CHAIN.sequences()
    assert torch.allclose(CHAIN.log_prob(sequences).exp().sum(), torch.ones(()).double(), atol=1e-6)
    assert torch.equal(CHAIN.index(sequences), torch.arange(81))
    with pytest.raises(UserError, match="too many"):
        MarkovPosterior(CHAIN.initial, CHAIN.transition, length=30).sequences()
    with pytest.raises(UserError, match="sum to 1"):
        MarkovPosterior(CHAIN.initial * 2, CHAIN.transition, length=4)


def test_markov_soft_values_are_a_martingale_up_to_log_z() -> None:
    """exp(V(x_t)/β) is a conditional mean of exp(r/β): revealing one more token keeps its average."""
    rewards = torch.rand(81, generator=torch.Generator().manual_seed(1)).double()
    masked = torch.tensor([[3, 1, 3, 3]])
    children = torch.tensor([[v, 1, 3, 3] for v in range(3)])
    law = CHAIN.log_posterior(masked)[0, 0].exp()
    value = CHAIN.soft_value(masked, rewards, 0.3)
    average = (law * (CHAIN.soft_value(children, rewards, 0.3) / 0.3).exp()).sum().log() * 0.3
    assert torch.allclose(value[0], average, atol=1e-9)
    finished = CHAIN.soft_value(CHAIN.sequences(), rewards, 0.3)
    assert torch.allclose(finished, rewards, atol=1e-9)
    log_z = CHAIN.soft_value(torch.full((1, 4), 3), rewards, 0.3) / 0.3
    tilt = CHAIN.log_prob(CHAIN.sequences()) + rewards / 0.3 - log_z
    assert torch.allclose(CHAIN.tilted(rewards, 0.3), tilt, atol=1e-6)
