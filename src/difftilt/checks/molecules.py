"""The molecules testbed: samples of the shipped model beside the molecules of its training, and what steering adds."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.fk_steering import steer
from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample, start_state
from difftilt.statistics import vendi_score, wasserstein_1d
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.testbeds.molecules import Molecules
from difftilt.testbeds.molecules_strings import LENGTH, tokens_of

ROWS = 500
BED = Molecules()


def scored(media: Tensor) -> dict[str, float]:
    """Every reward of a set of samples; all but ``valid`` and ``distinct`` averaged over those that are molecules."""
    means = {name: float(_scores(media, name).mean()) for name in BED.rewards()}
    # what is no molecule adds 0 to a mean over all
    return {name: mean if name in ("valid", "distinct") else mean / means["valid"] for name, mean in means.items()}


def _scores(media: Tensor, name: str) -> Tensor:
    group = torch.zeros(len(media), dtype=torch.int64)
    return BED.rewards()[name].score(Samples(media, [""] * len(media), [""] * len(media), group)).double()


@cache
def base() -> Tensor:
    """500 samples of the shipped model."""
    task, index, noise = BED.task(), torch.arange(ROWS), Noise(0)
    start = start_state(task.model.process, noise, index, task.model.shape)
    with torch.no_grad():
        return sample(denoiser(task.model, forward_batch=128), task.sampler, start, None, noise=noise, index=index)


@cache
def data() -> Tensor:
    """500 of the molecules that it was trained on."""
    every = tokens_of(BED.training_smiles(), BED.words)
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:ROWS]]


def at_random() -> Tensor:
    """500 sequences of words without a model."""
    return torch.randint(len(BED.words) - 1, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


@cache
def base_rewards() -> dict[str, float]:
    """Means of the shipped model."""
    return scored(base())


def distance(media: Tensor, name: str) -> float:
    """1-Wasserstein distance of a property to that of the data, in standard deviations of the data."""
    truth = _scores(data(), name)
    return float(wasserstein_1d(_scores(media, name), truth) / truth.std())


def diversity() -> float:
    """Vendi score of the fingerprints of samples over that of as many molecules of the data."""
    return float(vendi_score(BED.features(base())) / vendi_score(BED.features(data())))


@cache
def steered() -> Tensor:
    """64 particles steered to ``qed``."""
    config = FKSteeringConfig(particles=64, temperature=0.1, value="x0_samples", x0_samples=4, resample_at=4)
    return steer(FKSteering(config), BED.task(), 1).media


@cache
def best() -> Tensor:
    """The best of 16 by ``qed``, 16 times."""
    found = steer(BestOfN(BestOfNConfig(particles=16)), BED.task(), 16)
    return found.media[found.best]


PROOFS = (
    Proof(
        "every sequence of words with an atom is a molecule, share", lambda: scored(at_random())["valid"], at_least=1
    ),
)
