"""The molecules testbed: what samples of the shipped model are worth, and what steering makes of them."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.fk_steering import steer
from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample, start_state
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.fk_steering import FKSteering, FKSteeringConfig
from difftilt.testbeds.molecules import Molecules

ROWS = 500
BED = Molecules()


def scored(media: Tensor) -> dict[str, float]:
    """Every reward of a set of samples; all but ``valid`` and ``distinct`` averaged over those that are molecules."""
    group = torch.zeros(len(media), dtype=torch.int64)
    valid = float(BED.valid(media).float().mean())
    samples = Samples(media, [""] * len(media), [""] * len(media), group)
    means = {name: float(reward.score(samples).mean()) for name, reward in BED.rewards().items()}
    # what is no molecule adds 0 to a mean over all
    return {name: mean if name in ("valid", "distinct") else mean / valid for name, mean in means.items()}


@cache
def base() -> dict[str, float]:
    """Of 500 samples of the base."""
    task, index, noise = BED.task(), torch.arange(ROWS), Noise(0)
    start = start_state(task.model.process, noise, index, task.model.shape)
    with torch.no_grad():
        return scored(
            sample(denoiser(task.model, forward_batch=128), task.sampler, start, None, noise=noise, index=index)
        )


@cache
def steered() -> dict[str, float]:
    """Of 64 particles steered to ``qed``."""
    config = FKSteeringConfig(particles=64, temperature=0.1, value="x0_samples", x0_samples=4, resample_at=4)
    return scored(steer(FKSteering(config), BED.task(), 1).media)


@cache
def best() -> dict[str, float]:
    """Of the best of 16 by ``qed``, 16 times."""
    found = steer(BestOfN(BestOfNConfig(particles=16)), BED.task(), 16)
    return scored(found.media[found.best])


PROOFS = (Proof("half of the base's samples are molecules", lambda: base()["valid"], at_least=0.5, long=True),)
