"""Closed-form models against quadrature, autograd and enumeration, all in float64 and without randomness."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.markov import MarkovPosterior
from difftilt.models.mixture import GaussianMixture, MixtureVelocity
from difftilt.process.gaussian import GaussianProcess, RectifiedFlow, cosine_schedule
from difftilt.sampling.exact import ExactAncestral
from difftilt.sampling.steps import MixtureStep

_MIXTURE = GaussianMixture(
    torch.tensor([[-1.5], [0.3], [2.0]], dtype=torch.float64), 0.4, torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
)
_PROCESSES: tuple[GaussianProcess, ...] = (RectifiedFlow(), cosine_schedule(100))
_TIMES = (0.13, 0.5, 0.87)
_TEMPERATURE = 0.7
# the trapezoidal rule on a smooth density that dies off at both ends is exact to rounding at this spacing
_LINE = torch.linspace(-12, 12, 4801, dtype=torch.float64)[:, None]
_SPACING = 24 / 4800


def _at(t: float, rows: int) -> Float[Tensor, " rows"]:
    return torch.full((rows,), t, dtype=torch.float64)


def _integral(values: Float[Tensor, " points"]) -> Tensor:
    return values.sum() * _SPACING


def _clean_log_density() -> Float[Tensor, " points"]:
    """Log p_0 on the line, straight from its definition."""
    gap = (_LINE - _MIXTURE.means.T) / _MIXTURE.std
    each = _MIXTURE.weights.log() - gap.square() / 2 - math.log(_MIXTURE.std) - 0.5 * math.log(2 * math.pi)
    return each.logsumexp(-1)


def _posterior_on_line(process: GaussianProcess, x_t: float, t: float) -> Float[Tensor, " points"]:
    """p(x_0 | x_t) on the line by Bayes' rule, normalised by quadrature."""
    alpha, sigma = process.alpha(_at(t, 1)), process.sigma(_at(t, 1))
    log_joint = _clean_log_density() - ((x_t - alpha * _LINE[:, 0]) / sigma).square() / 2
    joint = (log_joint - log_joint.max()).exp()
    return joint / _integral(joint)


def _posterior_mean_error() -> float:
    """Largest gap between E[x_0 | x_t] and Bayes' rule by quadrature."""
    worst = 0.0
    for process in _PROCESSES:
        for t in _TIMES:
            for x_t in (-2.0, 0.1, 1.4):
                law = _posterior_on_line(process, x_t, t)
                exact = _integral(law * _LINE[:, 0])
                given = _MIXTURE.posterior_mean(process, torch.tensor([[x_t]], dtype=torch.float64), _at(t, 1))
                worst = max(worst, float((given - exact).abs()))
    return worst


def _score_error() -> float:
    """Largest gap between the score and autograd of the log density, in two dimensions."""
    means = torch.tensor([[-1.0, 0.5], [1.5, 0.0], [0.2, -2.0]], dtype=torch.float64)
    mixture = GaussianMixture(means, 0.5, torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    axis = torch.linspace(-2, 2, 9, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    worst = 0.0
    for process in _PROCESSES:
        for t in _TIMES:
            point = x.clone().requires_grad_(True)
            with torch.enable_grad():
                total = mixture.log_density(process, point, _at(t, len(x))).sum()
            (slope,) = torch.autograd.grad(total, point)
            worst = max(worst, float((mixture.score(process, x, _at(t, len(x))) - slope).abs().max()))
    return worst


def _velocity_error() -> float:
    """Largest gap between the velocity and -(dF/dt)/p, F the distribution function of p_t, by central differences.

    In one dimension the flow keeps every quantile in its place: F(x(t), t) is constant along the ODE.
    """
    width = 1e-5
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64)[:, None]
    worst = 0.0
    for process in _PROCESSES:
        for t in (0.133, 0.507, 0.872):  # between the knots of the table, whose log abar has kinks there
            change = (_distribution(process, x, t + width) - _distribution(process, x, t - width)) / (2 * width)
            at = _at(t, len(x))
            exact = -change / _MIXTURE.log_density(process, x, at).exp()
            kept = _MIXTURE.log_density(process, x, at) > math.log(1e-3)
            gap = (_MIXTURE.velocity(process, x, at)[:, 0] - exact)[kept].abs().max()
            worst = max(worst, float(gap))
    return worst


def _distribution(process: GaussianProcess, x: Float[Tensor, "points 1"], t: float) -> Float[Tensor, " points"]:
    alpha, sigma = process.alpha(_at(t, 1)), process.sigma(_at(t, 1))
    spread = (alpha.square() * _MIXTURE.std**2 + sigma.square()).sqrt()
    return (torch.special.ndtr((x - alpha * _MIXTURE.means.T) / spread) * _MIXTURE.weights).sum(-1)


def _ancestral_error(t: float, s: float) -> float:
    """Largest gap between ∫ p(x_s | x_t) p_t(x_t) dx_t and p_s(x_s)."""
    points = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    at, until = _at(t, len(_LINE)), _at(s, len(_LINE))
    worst = 0.0
    for process in _PROCESSES:
        step = _exact_step(process, _LINE, at, until)
        weight = _MIXTURE.log_density(process, _LINE, at).exp()
        reached = torch.stack(
            [_integral(weight * step.log_prob(x.expand_as(_LINE), reduce="sum").exp()) for x in points]
        )
        exact = _MIXTURE.log_density(process, points, _at(s, len(points))).exp()
        worst = max(worst, float((reached - exact).abs().max()))
    return worst


def _exact_step(process: GaussianProcess, x_t: Tensor, t: Tensor, s: Tensor) -> MixtureStep:
    network = MixtureVelocity(_MIXTURE, process, residual=False)
    prediction = network.refine(process.predict(network(x_t, t), x_t, t, "velocity"), None)
    return ExactAncestral()(prediction, x_t, t, s)


def _tilt_error() -> float:
    """Largest gap of density and log Z between closed-form tilts and quadrature, for linear and quadratic rewards."""
    centre, precision = torch.tensor([0.8], dtype=torch.float64), 1.3
    slope = torch.tensor([-0.9], dtype=torch.float64)
    x, worst = _LINE[:, 0], 0.0
    cases = (
        (_MIXTURE.tilted_linear(slope, _TEMPERATURE), slope * x),
        (_MIXTURE.tilted_quadratic(centre, precision, _TEMPERATURE), -precision / 2 * (x - centre).square()),
    )
    for tilted, reward in cases:
        mass = (_clean_log_density() + reward / _TEMPERATURE).exp()
        density = tilted.mixture.log_density(RectifiedFlow(), _LINE, _at(0.0, len(_LINE))).exp()
        worst = max(worst, float((density - mass / _integral(mass)).abs().max()))
        worst = max(worst, float((tilted.log_z - _integral(mass).log()).abs()))
    return worst


def _soft_value_error() -> float:
    """Largest gap between the soft value of a linear reward and quadrature over p(x_0 | x_t)."""
    slope, worst = torch.tensor([0.9], dtype=torch.float64), 0.0
    for process in _PROCESSES:
        for t in _TIMES:
            for x_t in (-2.0, 0.1, 1.4):
                law = _posterior_on_line(process, x_t, t)
                exact = _TEMPERATURE * _integral(law * (slope * _LINE[:, 0] / _TEMPERATURE).exp()).log()
                state = torch.tensor([[x_t]], dtype=torch.float64)
                value = _MIXTURE.soft_value_linear(process, state, _at(t, 1), slope, _TEMPERATURE)
                worst = max(worst, float((value - exact).abs()))
    return worst


def _chain() -> MarkovPosterior:
    initial = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    # one forbidden move, so that visible tokens rule out others
    transition = torch.tensor([[0.1, 0.6, 0.3], [0.0, 0.2, 0.8], [0.5, 0.25, 0.25]], dtype=torch.float64)
    return MarkovPosterior(initial, transition, length=4)


def _markov_error() -> float:
    """Largest gap between forward-backward and enumeration, over all masked states that the chain can reach."""
    chain = _chain()
    sequences = chain.sequences()
    law = chain.log_prob(sequences).exp()
    places = torch.cartesian_prod(*[torch.arange(chain.vocab + 1)] * chain.length)
    fits = ((places[:, None] == sequences) | (places[:, None] == chain.vocab)).all(-1)
    mass = fits * law
    possible = mass.sum(-1) > 0
    tokens = torch.nn.functional.one_hot(sequences, chain.vocab).double()
    exact = torch.einsum("xs,sia->xia", mass[possible] / mass[possible].sum(-1, keepdim=True), tokens)
    return float((chain.log_posterior(places[possible]).exp() - exact).abs().max())


PROOFS = (
    Proof("the mixture's posterior mean is Bayes' rule by quadrature", _posterior_mean_error, at_most=1e-10),
    Proof("the mixture's score is the gradient of its log density", _score_error, at_most=1e-11),
    # truncation 1e-10·F'''/6 and rounding 1e-16/1e-5, over densities of at least 1e-3 and rates of at most a few 100
    Proof("the mixture's velocity keeps every quantile in its place", _velocity_error, at_most=1e-5),
    Proof("one exact reverse step maps p_t to p_s", lambda: _ancestral_error(0.6, 0.4), at_most=1e-10),
    Proof("one exact reverse step of any length maps p_t to p_s", lambda: _ancestral_error(0.97, 0.06), at_most=1e-10),
    Proof("closed-form tilted mixtures and log Z agree with quadrature", _tilt_error, at_most=1e-10),
    Proof("the closed-form soft value agrees with quadrature", _soft_value_error, at_most=1e-10),
    Proof("the masked posterior by forward-backward is that by enumeration", _markov_error, at_most=1e-12),
)
