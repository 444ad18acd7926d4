"""Token-wise masking schedules (PepTune, arXiv 2412.17780): the forward process, the reverse kernel and the bound.

Independent tokens of law pi with m_v(t) = t or t^3: a masked token is v with probability pi_v·m_v(t)/Σ pi_u·m_u(t), so
every law along the chain is known exactly.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.objectives import masked_error
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise

LAW = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
BONDED = MaskedProcess(4, bond=(False, True, False, True), power=3.0)
PLAIN = MaskedProcess(4)
W = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64)
ROWS = 20_000


def _posterior(t: Tensor, known_time: bool = True) -> Tensor:
    """Log-law of a masked token at each t, (times, vocab), float64; without its time, the law of the data."""
    return (LAW * t.double()[:, None] ** (W if known_time else 0)).log().log_softmax(-1)


def masked_fractions() -> float:
    """Largest standardised error of masked fractions against t and t³, of corrupting and of corrupting twice."""
    index, worst = torch.arange(ROWS), 0.0
    x_0 = torch.arange(4).expand(ROWS, 4)
    for s, tau in ((0.2, 0.5), (0.5, 0.9)):
        at_s, at_tau = torch.full((ROWS,), s), torch.full((ROWS,), tau)
        first, second = (Noise(0).uniform(index, (4,), purpose=purpose) for purpose in ("first", "second"))
        early = BONDED.corrupt(x_0, at_s, first)
        for x, t in ((early, s), (BONDED.renoise(early, at_s, at_tau, second), tau)):
            truth = t**W
            error = (x == BONDED.mask).double().mean(0) - truth
            worst = max(worst, float((error / (truth * (1 - truth) / ROWS).sqrt()).abs().max()))
    return worst


def noise_rate() -> float:
    """Largest relative error of the loss weights against sigma'/(exp(sigma) - 1) by central differences."""
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    bond = torch.tensor([False, True]).expand(19, 2)

    def sigma(at: Tensor) -> Tensor:
        return -(1 - BONDED.mask_probability(at[:, None].expand(19, 2), bond)).log()

    numeric = (sigma(t + h) - sigma(t - h)) / (2 * h) / sigma(t).expm1()
    weight = BONDED.loss_weight(torch.tensor([0, 1]).expand(19, 2), t)
    return float((weight / numeric - 1).abs().max())


def chain_gap(process: MaskedProcess, known_time: bool = True) -> float:
    """Largest gap between 1 - t^w and the share of each token that the reverse chain has revealed, exact.

    Args:
        process: whose kernel steps; the tokens are those of the process with bonds.
        known_time: False gives the kernel the law of the data in place of the posterior.
    """
    law, worst = torch.zeros(5, dtype=torch.float64), 0.0
    law[-1] = 1.0
    state = torch.full((1, 1), 4)
    for t, s in pairwise(uniform_grid(20)):
        prediction = process.predict(_posterior(t[None], known_time)[:, None], state, t[None], "logits")
        step = Unmasking()(prediction, state, t[None], s[None]).log_probs[0, 0].exp()
        law = torch.cat([law[:-1] + law[-1] * step[:-1], law[-1:] * step[-1:]])
        worst = max(worst, float((law[:-1] / LAW - (1 - s.double() ** W)).abs().max()))
    return worst


def _bound(logits: Tensor, t: Tensor, rate_term: bool) -> Tensor:
    """Expectation of the loss at each time, over the token that a masked position hides, (times,)."""
    total = torch.zeros(len(t), dtype=torch.float64)
    state = torch.full((len(t), 1), 4)
    prediction = BONDED.predict(logits[:, None], state, t, "logits")
    for token in range(4):
        error = masked_error(prediction, torch.full((len(t), 1), token), rate_term=rate_term)
        total = total + LAW[token] * t ** W[token] * error
    return total


def bound_gap() -> float:
    """Bound of the exact model, integrated over t, minus the entropy of the tokens, in nats."""
    # the integrand is smooth but for log t at 0: midpoints of cells that shrink towards it, t = u⁴
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    integral = (_bound(_posterior(u**4), u**4, True) * 4 * u**3).mean()
    return abs(float(integral + (LAW * LAW.log()).sum()))


def slope(rate_term: bool, biased: bool) -> float:
    """Largest slope of the expected loss at t = 0.5 in the logits, at the posterior q or at what is ∝ w·q.

    The loss is convex in the probabilities, so a slope of 0 is its minimum.
    """
    t = torch.tensor([0.5], dtype=torch.float64)
    logits = (_posterior(t) + (W.log() if biased else 0)).requires_grad_()
    (gradient,) = torch.autograd.grad(_bound(logits, t, rate_term).sum(), logits)
    return float(gradient.abs().max())


PROOFS = (
    Proof("masked fractions are t and t³, corrupted once or twice, in standard errors", masked_fractions, at_most=4),
    # central differences with a step of 1e-6 leave rounding of 1e-10 over sigma'
    Proof("the loss weights 1/t and 3/t are sigma'/(exp(sigma) - 1)", noise_rate, at_most=1e-7),
    # times of the grid are float64; a hundred roundings
    Proof("the kernel with the exact denoiser leaves t and t³ masked", partial(chain_gap, BONDED), at_most=1e-12),
    Proof("revealing all tokens alike does not", partial(chain_gap, PLAIN), at_least=0.1),
    Proof("nor does a denoiser that does not know the time", partial(chain_gap, BONDED, False), at_least=0.1),
    # the midpoint rule in u with 20 000 cells
    Proof("the bound of the exact model is the entropy of the tokens", bound_gap, at_most=1e-6),
    Proof("the posterior minimises the loss: slope there", partial(slope, True, False), at_most=1e-12),
    Proof("without the rate term, as published, w times it does", partial(slope, False, True), at_most=1e-12),
    Proof("and the posterior does not", partial(slope, False, False), at_least=0.05),
)
