"""The peptides testbed: its exact tilt against enumeration, and steerers against it where enumeration is impossible."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.checks.tilted_truths import steer
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.statistics import enumerate_sequences, tilted, total_variation
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.steering.protocol import Steered
from difftilt.testbeds.peptides import Config, Peptides
from difftilt.testbeds.peptides_properties import charge

ROWS = 4000
RUNS, PARTICLES = 16, 128
BED = Peptides()


def enumerated() -> float:
    """Total variation between the tilted chain of three residues and its 8000 peptides, reweighted one by one."""
    bed = Peptides(Config(length=3, temperature=0.5))
    every = enumerate_sequences(20, 3)
    law = tilted(bed.chain.log_prob(every).exp(), charge(every), 0.5)
    return float(total_variation(law, bed.tilted().log_prob(every).exp()))


@cache
def _base(steps: int) -> Tensor:
    task, index, noise = Peptides(Config(steps=steps)).task(), torch.arange(ROWS), Noise(0)
    start = BED.process.prior(torch.zeros(ROWS, BED.config.length))
    with torch.no_grad():
        return sample(denoiser(task.model, forward_batch=512), task.sampler, start, None, noise=noise, index=index)


def repeats(steps: int) -> float:
    """Share of neighbours that are equal in samples of the base, over that under the chain."""
    marginals, stay = BED.chain.marginals(), BED.transition.diagonal()
    exact = float((marginals[:-1] * stay).sum()) / (BED.config.length - 1)
    tokens = _base(steps)
    return float((tokens[:, 1:] == tokens[:, :-1]).double().mean()) / exact


@cache
def _steered() -> Steered:
    config = FKSteeringConfig(particles=PARTICLES, temperature=1.0, value="x0_samples", x0_samples=4, resample_at=3)
    return steer(FKSteering(config), BED.task(), RUNS)


def _errors(values: Tensor, truth: float) -> float:
    """Gap between the mean over runs and the truth, in standard errors."""
    return abs(float(values.mean()) - truth) / float(values.std() / len(values) ** 0.5)


def normaliser() -> float:
    """Estimates of Z against the exact one."""
    return _errors((_steered().log_z.double() - BED.log_z()).exp(), 1.0)


def mean_reward() -> float:
    """Weighted mean charge of each run against that of the target."""
    steered = _steered()
    rewards = (steered.weight * steered.rewards.double()).reshape(RUNS, -1).sum(1)
    return _errors(rewards, BED.expected_reward())


def best_of_n() -> float:
    """The same of the best of 64: a search does not know when to stop."""
    steered = steer(BestOfN(BestOfNConfig(particles=64)), BED.task(), RUNS)
    return _errors(steered.rewards[steered.best].double(), BED.expected_reward())


PROOFS = (
    Proof("the tilted chain of three residues is the enumerated tilt, total variation", enumerated, at_most=1e-12),
    # the standard error of the share is 2 % here; two neighbours come at once in a step of 24, and then know nothing of
    # one another
    Proof("the sampler repeats residues as often as the chain, ratio at 24 steps", lambda: repeats(24), 0.92, 1.12),
    Proof("revealing all at once forgets that residues avoid themselves", lambda: repeats(1), at_least=1.8),
    Proof(
        "FK steering estimates log Z of twelve residues, in standard errors of 16 runs",
        normaliser,
        at_most=4,
        long=True,
    ),
    Proof("its particles have the mean charge of the target, in standard errors", mean_reward, at_most=4, long=True),
    Proof("the best of 64 have not", best_of_n, at_least=4, long=True),
)
