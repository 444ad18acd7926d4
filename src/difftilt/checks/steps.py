"""Steps as distributions: draws, densities, divergences against quadrature, enumeration and torch.distributions."""

import math
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.ledger import Ledger
from difftilt.process import MaskedProcess, uniform_grid
from difftilt.process.protocol import Condition
from difftilt.sampling.drift import path_kl
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.steps import CategoricalStep, GaussianStep, MixtureStep

COUNT = 100_000
JOINT = torch.tensor([[0.4, 0.1], [0.05, 0.45]])
"""Law of a sequence of two binary tokens that depend on one another."""


def _gaussian(shift: float = 0.0, scale: float = 1.0) -> GaussianStep:
    mean = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, -0.2]], dtype=torch.float64)
    return GaussianStep(mean + shift, scale * torch.tensor([0.1, 1.5], dtype=torch.float64))


def gaussian_density() -> float:
    """Largest error of log_prob and KL, summed and averaged, against torch.distributions."""
    own, other = _gaussian(), _gaussian(0.2, 1.3)
    laws = [Normal(step.mean, step.std[:, None]) for step in (own, other)]
    x = own.draw(Noise(0).normal(torch.arange(2), (3,), purpose="x").double())
    terms = laws[0].log_prob(x), kl_divergence(laws[0], laws[1])
    worst = 0.0
    for got, term in ((own.log_prob(x, reduce="sum"), terms[0]), (own.kl(other, reduce="sum"), terms[1])):
        worst = max(worst, float((got - term.sum(-1)).abs().max()))
    for got, term in ((own.log_prob(x, reduce="mean"), terms[0]), (own.kl(other, reduce="mean"), terms[1])):
        worst = max(worst, float((got - term.mean(-1)).abs().max()))
    return worst


def _mixture(rows: int) -> MixtureStep:
    weight = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.5], [0.3, 1.0], [2.0, -1.0]], dtype=torch.float64)
    std = torch.tensor([0.4], dtype=torch.float64)
    return MixtureStep(weight.log().expand(rows, 3), means.expand(rows, 3, 2), std.expand(rows))


def _plane() -> tuple[Tensor, float]:
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def total_mass() -> float:
    """|1 - integral| of a Gaussian and of a mixture density over the plane, by the trapezoidal rule."""
    points, cell = _plane()
    flat = GaussianStep(torch.tensor([[0.3, -1.0]]).double(), torch.tensor([0.7]).double())
    worst = 0.0
    for log_density in (flat.log_prob(points, reduce="sum"), _mixture(len(points)).log_prob(points, reduce="sum")):
        worst = max(worst, abs(float(log_density.exp().sum()) * cell - 1))
    return worst


def mixture_draws() -> float:
    """Largest standardised error of first and second moments of draws against those of the density by quadrature."""
    points, cell = _plane()
    density = _mixture(len(points)).log_prob(points, reduce="sum").exp() * cell
    drawn = _mixture(COUNT).draw(Noise(2).normal(torch.arange(COUNT), (3,), purpose="mixture").double())
    worst = 0.0
    for feature in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] ** 2, lambda x: x[:, 0] * x[:, 1]):
        mean = float((density * feature(points)).sum())
        spread = math.sqrt(float((density * (feature(points) - mean) ** 2).sum()) / COUNT)
        worst = max(worst, abs(float(feature(drawn).mean()) - mean) / spread)
    return worst


def guard_identity() -> float:
    """Error of mean log-ratio = -MSE/(2 std²) under the old law; exact over pairs of opposite noise."""
    old = _gaussian()
    new = old.shift(torch.tensor([[0.05, 0.1, -0.2], [0.3, 0.0, 1.0]]).double())
    z = Noise(1).normal(torch.arange(2), (3,), purpose="z").double()
    ratios = [new.log_prob(x, reduce="mean") - old.log_prob(x, reduce="mean") for x in (old.draw(z), old.draw(-z))]
    mse = (new.mean - old.mean).square().mean(-1)
    return float(((ratios[0] + ratios[1]) / 2 + mse / (2 * old.std**2)).abs().max())


def _categorical(rows: int, seed: int = 0) -> CategoricalStep:
    logits = Noise(seed).normal(torch.zeros(1, dtype=torch.int64), (2, 3), purpose="logits").double()
    return CategoricalStep(logits.log_softmax(-1).expand(rows, 2, 3))


def categorical_frequencies() -> float:
    """Largest standardised error of the frequencies of draws."""
    step = _categorical(COUNT)
    drawn = step.draw(Noise(3).uniform(torch.arange(COUNT), (2, 3), purpose="tokens"))
    truth = step.log_probs[0].exp()
    frequency = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    return float(((frequency - truth).abs() / (truth * (1 - truth) / COUNT).sqrt()).max())


def categorical_enumeration() -> float:
    """Error of the total mass and of the KL of two positions, against the sum over all their 9 joint values."""
    x = torch.tensor(list(product(range(3), range(3))))
    own, other = (_categorical(9, seed).log_prob(x, reduce="sum") for seed in (0, 1))
    kl = _categorical(1, 0).kl(_categorical(1, 1), reduce="sum")
    return max(abs(float(own.exp().sum()) - 1), abs(float((own.exp() * (own - other)).sum() - kl)))


def relaxed_limit() -> float:
    """Largest gap between the relaxed draw at temperature 1e-5 and the one-hot hard draw, same noise."""
    noise = Noise(4).uniform(torch.arange(100), (2, 3), purpose="tokens")
    step = _categorical(100)
    hard = torch.nn.functional.one_hot(step.draw(noise), 3)
    return float((step.relaxed_draw(noise, 1e-5) - hard).abs().max())


def _joint_logits(x: Tensor) -> Tensor:
    """Log of each position's exact conditional given the visible ones (mask symbol 2), (batch, 2, 2)."""
    first = torch.cat([JOINT.T / JOINT.T.sum(-1, keepdim=True), JOINT.sum(1)[None]])
    second = torch.cat([JOINT / JOINT.sum(-1, keepdim=True), JOINT.sum(0)[None]])
    return torch.stack([first[x[:, 1]], second[x[:, 0]]], dim=1).log()


def unmasking_gap(steps: int) -> float:
    """Total variation between the joint law and that of the whole chain, by exact propagation over its 9 states."""
    process, kernel = MaskedProcess(2), Unmasking()
    states = torch.tensor(list(product(range(3), range(3))))
    law = torch.zeros(9, dtype=torch.float64)
    law[-1] = 1.0
    for t, s in pairwise(uniform_grid(steps)):
        prediction = process.predict(_joint_logits(states), states, t.expand(9), "logits")
        step = kernel(prediction, states, t.expand(9), s.expand(9))
        each = step.log_probs.exp().double()
        law = law @ (each[:, 0, :, None] * each[:, 1, None, :]).reshape(9, 9)
    visible = law.reshape(3, 3)[:2, :2]
    return float((visible - JOINT).abs().sum()) / 2


def unmasking_order() -> float:
    """Order of the gap in the number of steps."""
    return math.log2(unmasking_gap(20) / unmasking_gap(40))


def token_drift() -> float:
    """Path KL of independent tokens against their KL, in standard errors over 2000 sequences of 8."""
    own, other = (_categorical(1, seed).log_probs[:, :1].float() for seed in (0, 1))
    process = MaskedProcess(3)

    def denoiser(logits: Tensor) -> NetworkDenoiser:
        def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return logits.expand(len(x), x.shape[1], 3)

        return NetworkDenoiser(network, process, "logits", Ledger())

    x_0, index = torch.zeros(2000, 8, dtype=torch.int64), torch.arange(2000)
    with torch.no_grad():
        each = path_kl(denoiser(own), denoiser(other), x_0, None, uniform_grid(10), Noise(6), index).double()
    truth = 8 * float((own.exp() * (own - other)).sum())
    return abs(float(each.mean()) - truth) / float(each.std() / math.sqrt(len(each)))


PROOFS = (
    Proof("Gaussian log-prob and KL, sum and mean, agree with torch.distributions", gaussian_density, at_most=1e-10),
    # the trapezoidal rule is exact to rounding here; tails beyond 6 of the plane hold below 1e-12
    Proof("Gaussian and mixture densities integrate to 1 by quadrature", total_mass, at_most=1e-9),
    Proof("draws of a mixture step have the moments of its density, in standard errors", mixture_draws, at_most=4),
    Proof("mean log-ratio under the old Gaussian is -MSE/(2 std²)", guard_identity, at_most=1e-12),
    Proof("draws of a categorical step have its probabilities, in standard errors", categorical_frequencies, at_most=4),
    Proof("categorical mass is 1 and the KL is that of the enumerated joint", categorical_enumeration, at_most=1e-12),
    Proof("the relaxed draw tends to the hard draw as the temperature falls", relaxed_limit, at_most=1e-6),
    # at most half of the correlated mass can be lost where both tokens are revealed at once: probability 1/steps
    Proof("unmasking with exact conditionals approaches the joint law", partial(unmasking_gap, 400), at_most=1e-3),
    Proof("its distance falls like 1/steps, measured order", unmasking_order, 0.95, 1.05),
    Proof("one-step unmasking misses the joint law", partial(unmasking_gap, 1), at_least=0.1),
    Proof("the path KL of independent tokens is their KL, in standard errors", token_drift, at_most=4),
)
