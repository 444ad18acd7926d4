"""The mixtures testbed: closed forms against sampling, with standard errors.

Numbers named ``sigmas`` are gaps in standard errors. The largest of a few dozen standard normals exceeds 4.5 with
probability below 3e-4; the seeds are fixed, so a proof that passes once passes always.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.models.mixture import GaussianMixture
from difftilt.rewards.vector import VectorReward
from difftilt.sampling.noise import Noise
from difftilt.sampling.presets import Preset
from difftilt.sampling.rollout import rollout
from difftilt.testbeds.mixtures import Config, Mixtures

_ROWS = 20_000
_INDEX = torch.arange(_ROWS)
_NOISE = Noise(0)
_SIGMAS = 4.5


def _draws(mixture: GaussianMixture) -> Float[Tensor, "rows dim"]:
    return mixture.sample(_NOISE.normal(_INDEX, (mixture.means.shape[1] + 1,), purpose="check"))


def _sigmas(terms: Float[Tensor, "rows columns"], expected: Float[Tensor, " columns"]) -> float:
    """Largest distance of a column's mean from its expected value, in standard errors."""
    terms = terms.double()
    error = terms.std(0) / math.sqrt(len(terms))
    return float(((terms.mean(0) - expected.double()) / error).abs().max())


def _residuals(bed: Mixtures, t: float, label: int) -> Iterator[Tensor]:
    """(x_0 - E[x_0 | x_t]) times functions of x_t: all have mean 0 only if the denoiser is the posterior mean."""
    x_0 = _draws(bed.base(label))
    at = torch.full((_ROWS,), t)
    x_t = bed.process.corrupt(x_0, at, _NOISE.normal(_INDEX, (x_0.shape[1],), purpose="corrupt"))
    with torch.no_grad():
        predicted = denoiser(bed.task().model)(x_t, at, torch.full((_ROWS,), label)).x0
    for function in (torch.ones_like(x_t), x_t, x_t.flip(1), x_t.sin(), (x_t * x_t.flip(1)).tanh()):
        yield (x_0 - predicted) * function


def _denoiser_sigmas() -> float:
    """Over both processes, three times and one of two classes."""
    worst = 0.0
    for process in ("flow", "vp"):
        bed = Mixtures(Config(process=process, classes=2))
        for t in (0.2, 0.5, 0.8):
            terms = torch.cat(list(_residuals(bed, t, label=1)), dim=1)
            worst = max(worst, _sigmas(terms, torch.zeros(terms.shape[1])))
    return worst


def _beds() -> Iterator[Mixtures]:
    weights = (0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    yield Mixtures(Config(reward="linear", direction=(1.0, 0.5), temperature=1.5, weights=weights))
    yield Mixtures(Config(reward="quadratic", temperature=4.0, weights=weights, classes=2))
    yield Mixtures(Config(reward="quadratic", temperature=2.0, means=((-2.0,), (2.0,)), std=0.5, centre=(0.5,)))
    yield Mixtures(Config(reward="linear", temperature=2.0, dimension=5, process="vp"))


def _weights(bed: Mixtures, x: Tensor) -> Float[Tensor, " rows"]:
    reward = bed.reward()
    assert isinstance(reward, VectorReward)
    point = reward.point
    score = x @ point if reward.kind == "linear" else -(x - point).square().sum(1)
    return (score.double() / bed.config.temperature).exp()


def _tilt_sigmas() -> float:
    """Z and the first two moments of p*, by importance weighting of exact draws of the base."""
    worst = 0.0
    for bed in _beds():
        label = 1 if bed.config.classes else None
        x = _draws(bed.base(label))
        tilted = bed.tilted(label=label)
        weight = _weights(bed, x)[:, None] / tilted.log_z.double().exp()
        mixture = tilted.mixture
        second = mixture.weights @ mixture.means.square() + mixture.std**2
        expected = torch.cat([torch.ones(1), mixture.mean(), second])
        terms = weight * torch.cat([torch.ones(_ROWS, 1), x, x.square()], dim=1)
        worst = max(worst, _sigmas(terms, expected))
    return worst


def _martingale_sigmas() -> float:
    """E exp(V(x_t)/β) = Z at every t."""
    worst = 0.0
    for bed in _beds():
        label, beta = (1 if bed.config.classes else None), bed.config.temperature
        x_0 = _draws(bed.base(label))
        noise = _NOISE.normal(_INDEX, (x_0.shape[1],), purpose="corrupt")
        log_z = bed.tilted(label=label).log_z.double()
        for t in (0.1, 0.5, 0.9):
            at = torch.full((_ROWS,), t)
            value = bed.soft_value(bed.process.corrupt(x_0, at, noise), at, label=label).double()
            worst = max(worst, _sigmas((value / beta - log_z).exp()[:, None], torch.ones(1)))
    return worst


def _ends_gap() -> float:
    """The soft value is the reward at t = 0 and β·log Z at t = 1 of the flow, where x_1 knows nothing."""
    worst = 0.0
    for bed in _beds():
        if bed.config.process == "vp":
            continue
        beta, label = bed.config.temperature, (1 if bed.config.classes else None)
        x = _draws(bed.base(label))[:100].double()
        clean = bed.soft_value(x, torch.zeros(100).double(), label=label)
        reward = beta * _weights(bed, x.float()).log()
        noisy = bed.soft_value(x, torch.ones(100).double(), label=label)
        gaps = (clean - reward).abs().max(), (noisy - beta * bed.tilted(label=label).log_z).abs().max()
        worst = max(worst, *(float(gap) for gap in gaps))
    return worst


def _rejection_sigmas() -> float:
    """Moments of the distance reward's target: rejection against importance weighting of other draws."""
    bed = Mixtures(Config())
    target, x = bed.target_samples(_ROWS, seed=1), _draws(bed.mixture)
    weight = (-(x - bed.centre).norm(dim=1).double()).exp()[:, None]
    share = weight / weight.mean()
    own, other = torch.cat([target, target.square()], 1).double(), torch.cat([x, x.square()], 1).double()
    mean = (share * other).mean(0)
    # the ratio estimator's error by linearisation
    error = ((share * (other - mean)).var(0) / _ROWS + own.var(0) / _ROWS).sqrt()
    return float(((own.mean(0) - mean) / error).abs().max())


def _on_mode_share() -> float:
    """Share of samples of the exact chain, in three steps, that lie on a mode."""
    bed = Mixtures(Config(kernel="exact", steps=3))
    task = bed.task()
    with torch.no_grad():
        run = rollout(
            denoiser(task.model),
            Preset("exact", task.sampler.kernel),
            task.sampler.grid,
            _NOISE.normal(_INDEX, (2,), purpose="prior"),
            None,
            noise=_NOISE,
            index=_INDEX,
        )
    return float((torch.cdist(run.x_0, bed.mixture.means).amin(1) <= 3 * bed.mixture.std).double().mean())


# in two dimensions |x - m|/std has the Rayleigh law: P(<= 3) = 1 - exp(-9/2), and the next mode is 7.7 std away
_SHARE = 1 - math.exp(-4.5)
_SHARE_ERROR = 4 * math.sqrt(_SHARE * (1 - _SHARE) / _ROWS)

PROOFS = (
    Proof(
        "the denoiser leaves no residual that a function of x_t could predict, in standard errors",
        _denoiser_sigmas,
        at_most=_SIGMAS,
    ),
    Proof("closed-form tilted mixtures agree with importance weighting, in sigmas", _tilt_sigmas, at_most=_SIGMAS),
    Proof("exp(V/beta) keeps its mean Z at every noise level, in sigmas", _martingale_sigmas, at_most=_SIGMAS),
    Proof("the soft value starts at beta·log Z and ends at the reward", _ends_gap, at_most=1e-4),
    Proof("rejection draws the distance reward's target, in sigmas", _rejection_sigmas, at_most=_SIGMAS),
    Proof(
        "samples of the exact chain lie on a mode as often as the normal law says",
        _on_mode_share,
        at_least=_SHARE - _SHARE_ERROR,
        at_most=_SHARE + _SHARE_ERROR,
    ),
)
