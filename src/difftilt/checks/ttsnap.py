"""TTSnap: exact costs; on bumpy hills the plain reward of early predictions misleads, the noise-aware one does not.

The toy is a ring of eight Gaussians (radius 4, std 0.45) under deterministic DDIM with 20 steps and r = sin(1.7·x_1 +
0.5)·cos(1.3·x_2) + 0.15·x_1. Budgets are in the TFLOPs of the paper's FLUX: 9.9 for a network call, 1.2 for a score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Apart, Noise
from difftilt.statistics.ranking import kendall_tau
from difftilt.steering.protocol import Steered
from difftilt.steering.pruning import Schedule, budget_curve
from difftilt.steering.ttsnap import TTSnap, TTSnapConfig
from difftilt.testbeds.digits import Config as DigitsConfig
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config as MixturesConfig
from difftilt.testbeds.mixtures import Mixtures
from difftilt.training.protocol import Task
from difftilt.values.curriculum import Level, fit_curriculum, predict
from difftilt.values.noise_aware import verifier_of

STEP, SCORE = 9.9, 1.2
"""Cost of a network call and of a score, TFLOPs."""
BUDGETS = (1000, 2000, 4000, 8000)
PUBLISHED = Schedule(20, (2, 6, 11), (0.4, 0.4, 0.5))
ALONE = Schedule(20)
"""Best-of-n: nothing is pruned."""

Table = Float[Tensor, "prompts candidates"]


@cache
def ring() -> Task:
    """The toy."""
    return Mixtures(MixturesConfig(radius=4, std=0.45, process="vp", steps=20, shift=1, reward="bumps")).task()


@cache
def digits() -> Task:
    """Real digits, rewarded by the margin of a classifier, which is a network."""
    return Digits(DigitsConfig(steps=20, reward="margin")).task()


RING = TTSnapConfig(kernel="ode", images=4000, epochs=4)
DIGITS = TTSnapConfig(kernel="ode", images=128, learning_rate=5e-4, standardise=True)


@dataclass(frozen=True)
class Tensors:
    """Scores of recorded trajectories.

    Attributes:
        plain: prune step -> reward of the x0-prediction.
        tuned: prune step -> noise-aware reward of it; empty where nothing was fitted.
        final: reward of the finished sample.
    """

    plain: Mapping[int, Table]
    tuned: Mapping[int, Table]
    final: Table


def record(steerer: TTSnap, task: Task, prompts: list[str], candidates: int, seed: int, fitted: bool = True) -> Tensors:
    """Scores of ``candidates`` plain samples of each prompt, at the prune steps."""
    denoise = denoiser(task.model, forward_batch=512)
    distillation, at = steerer.distillation(task, denoise, task.reward, prompts), steerer.schedule(20).at
    with torch.no_grad():
        held = distillation.recorded(torch.arange(len(prompts)), candidates, Noise(seed), at)
        (term,) = distillation.terms.values()
        verifiers = distillation.verifiers(steerer.learned, at) if fitted else {}
        shape = (len(prompts), candidates)
        return Tensors(
            {step: distillation.score(term, held.predictions[step], held.prompt).reshape(shape) for step in at},
            {
                step: predict(own[term.reward.name], step, held, distillation.latent).reshape(shape)
                for step, own in verifiers.items()
            },
            distillation.score(term, held.x_0, held.prompt).reshape(shape),
        )


@cache
def plain_ring() -> Tensors:
    """A thousand trajectories."""
    return record(TTSnap(RING), ring(), [""], 1000, 1, fitted=False)


@cache
def fitted(name: str) -> TTSnap:
    """The steerer with its noise-aware reward, for the toy or for digits."""
    task, steerer = (ring(), TTSnap(RING)) if name == "ring" else (digits(), TTSnap(DIGITS))
    steerer.fit(task, denoiser(task.model, forward_batch=512), task.reward, task.prompts, Noise(7))
    return steerer


@cache
def tensors(name: str) -> Tensors:
    """40 runs of the toy with 200 candidates each, or all 20 prompts of digits with 150, none of them fitted on."""
    task, size = (ring(), 200) if name == "ring" else (digits(), 150)
    return record(fitted(name), task, judged(name), size, 2)


def judged(name: str) -> list[str]:
    """The prompts of the record."""
    return [""] * 40 if name == "ring" else [*digits().prompts, *digits().heldout_prompts]


def tau(predicted: Table, final: Table) -> float:
    """Mean over the prompts."""
    return float(kendall_tau(predicted, final).mean())


@cache
def curve(name: str, kind: str) -> Float[Tensor, " budgets"]:
    """Mean best reward at each budget, of best-of-n, of pruning by the plain reward, or by the noise-aware one."""
    known = tensors(name)
    schedule = ALONE if kind == "best-of-n" else PUBLISHED
    values = [getattr(known, kind)[step][None] for step in schedule.at]
    counts = [schedule.affordable(budget, STEP, SCORE) for budget in BUDGETS]
    counts = [min(count, known.final.shape[1]) for count in counts]
    return budget_curve(schedule, values, known.final[None], counts, Noise(3))[:, 0]


def lead(name: str, kind: str, other: str) -> Float[Tensor, " budgets"]:
    """Difference of two curves."""
    return curve(name, kind) - curve(name, other)


@cache
def _live(candidates: int) -> Steered:
    """A search with the plain reward."""
    steerer = TTSnap(TTSnapConfig(kernel="ode", value="posterior_mean", particles=candidates))
    return steerer.steer(ring(), denoiser(ring().model, forward_batch=512), ring().reward, [""], Noise(0))


def _unpaid(start: int) -> float:
    """TFLOPs that a search with 100 candidates has spent above the formula, per candidate."""
    ledger = _live(100).ledger
    return (ledger.nfe * STEP + ledger.reward_calls * SCORE) / 100 - PUBLISHED.cost(STEP, SCORE, start)


def _sizes_differ() -> float:
    """Numbers of survivors of 13 candidates that differ from 5, 2, 1."""
    return float(sum(found != wanted for found, wanted in zip(_live(13).ess[:, 0].tolist(), (5, 2, 1), strict=True)))


@cache
def _direct(name: str, step: int, epochs: int, frozen: bool = True) -> float:
    """Tau at a step after a fit on that step alone, from the first weights: no curriculum.

    Args:
        name: of the task.
        step: of the predictions.
        epochs: passes over the trajectories.
        frozen: labels are of the final sample; False takes the reward of the prediction itself.
    """
    steerer, task, known = fitted(name), ring() if name == "ring" else digits(), tensors(name)
    denoise = denoiser(task.model, forward_batch=512)
    learn, judge = (steerer.distillation(task, denoise, task.reward, own) for own in (task.prompts, judged(name)))
    with torch.no_grad():
        noise, rows = Apart(Noise(7), "record"), torch.arange(len(task.prompts))
        told = learn.recorded(rows, steerer.config.images, noise, [step])
        held = judge.recorded(torch.arange(len(judged(name))), known.final.shape[1], Noise(2), [step])
        (term,) = learn.terms.values()
        verifier = verifier_of(term, learn.regressor)
        label = learn.score(term, told.x_0 if frozen else told.predictions[step], told.prompt)
        list(fit_curriculum(verifier, [Level(step, epochs)], told, learn.latent, label, steerer.config, Noise(8)))
        return tau(predict(verifier, step, held, judge.latent).reshape(known.final.shape), known.final)


def _epochs(name: str) -> int:
    """Passes that the curriculum has made in all, for each of its three prune steps."""
    config = fitted(name).config
    return ((config.warm_up_epochs if name == "ring" else 0) + config.epochs * len(range(2, 15))) // 3


def _tuned(name: str, step: int) -> float:
    return tau(tensors(name).tuned[step], tensors(name).final)


def _gain(name: str, step: int) -> float:
    """Tau that the fit adds to the plain reward's."""
    return _tuned(name, step) - tau(tensors(name).plain[step], tensors(name).final)


def _by_curriculum(name: str) -> float:
    """Tau of the curriculum minus that of direct fits with as many updates in all, averaged over the prune steps."""
    gaps = [_tuned(name, step) - _direct(name, step, _epochs(name)) for step in PUBLISHED.at]
    return sum(gaps) / len(gaps)


def _order(step: int) -> float:
    return tau(plain_ring().plain[step], plain_ring().final)


PROOFS = (
    Proof(
        "cost per candidate, prune steps 2, 6, 11, fractions 0.4, 0.4, 0.5, honest (s_0 = -1): 61.8 TFLOPs",
        lambda: PUBLISHED.cost(STEP, SCORE),
        at_least=61.75,
        at_most=61.85,
    ),
    Proof(
        "the same as the published simulator counts (s_0 = 0): 51.9 TFLOPs",
        lambda: PUBLISHED.cost(STEP, SCORE, 0),
        at_least=51.85,
        at_most=51.95,
    ),
    Proof(
        "a live search of 100 candidates spends what the honest formula says (difference per candidate)",
        lambda: abs(_unpaid(-1)),
        at_most=1e-9,
    ),
    Proof(
        "ablation: counted from s_0 = 0 it spends one network call (9.9) more than the formula",
        lambda: _unpaid(0),
        at_least=9.9 - 1e-9,
        at_most=9.9 + 1e-9,
    ),
    Proof("13 candidates become 5, 2 and 1 (numbers that differ)", _sizes_differ, at_most=0),
    Proof("ring: the plain reward hardly orders the candidates at step 2 (tau)", lambda: _order(2), 0.1, 0.35),
    Proof("ring: at step 6 it does so better (tau)", lambda: _order(6), 0.5, 0.7),
    Proof("ring: at step 11 it does so well (tau)", lambda: _order(11), 0.8, 0.95),
    Proof("ring: noise-aware at step 2 (tau)", lambda: _tuned("ring", 2), at_least=0.8, long=True),
    Proof("ring: noise-aware at step 6 (tau)", lambda: _tuned("ring", 6), at_least=0.84, long=True),
    Proof("ring: noise-aware at step 11 (tau)", lambda: _tuned("ring", 11), at_least=0.89, long=True),
    Proof(
        "ablation: with labels of the prediction itself it orders at step 2 as badly as the plain reward (tau)",
        lambda: _direct("ring", 2, _epochs("ring"), frozen=False),
        at_least=0.1,
        at_most=0.35,
        long=True,
    ),
    Proof(
        "ring: the curriculum against fits on each prune step alone with as many updates in all (mean gain in tau)",
        lambda: _by_curriculum("ring"),
        at_least=-0.03,
        at_most=0.05,
        long=True,
    ),
    Proof(
        "ring, budgets 1000 to 8000: noise-aware pruning beats best-of-n at each (least gain in mean best reward)",
        lambda: float(lead("ring", "tuned", "best-of-n").min()),
        at_least=0.05,
        long=True,
    ),
    Proof(
        "ring, the same budgets: it beats pruning by the plain reward at each (least gain)",
        lambda: float(lead("ring", "tuned", "plain").min()),
        at_least=0.1,
        long=True,
    ),
    Proof(
        "ring: pruning by the plain reward beats best-of-n at budget 1000 (gain)",
        lambda: float(lead("ring", "plain", "best-of-n")[0]),
        at_least=0.02,
        long=True,
    ),
    Proof(
        "ring: and loses to it at budget 8000 (gain)",
        lambda: float(lead("ring", "plain", "best-of-n")[-1]),
        at_most=-0.08,
        long=True,
    ),
    Proof(
        "digits, classifier margin: a fine-tuned copy orders better at step 2 (gain in tau, 20 prompts, s.e. 0.011)",
        lambda: _gain("digits", 2),
        at_least=0.01,
        long=True,
    ),
    Proof(
        "digits: and at step 6 (gain in tau, s.e. 0.008)",
        lambda: _gain("digits", 6),
        at_least=0.01,
        long=True,
    ),
    Proof(
        "digits, budgets 1000 to 8000: noise-aware pruning beats best-of-n at each (least gain in mean best margin)",
        lambda: float(lead("digits", "tuned", "best-of-n").min()),
        at_least=0.2,
        long=True,
    ),
    Proof(
        "digits, the same budgets: it is no worse than pruning by the plain reward (least gain)",
        lambda: float(lead("digits", "tuned", "plain").min()),
        at_least=0.0,
        long=True,
    ),
)
