"""Real 8×8 digits: a small diffusion transformer, conditioned on digit and stroke, and two frozen classifiers.

The smallest testbed with real data. Its tilted law is not known exactly; what is known is the data, and a second
classifier that no method is rewarded by.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.models.protocol import GenerativeModel
from difftilt.models.saving import from_pretrained
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.rewards import as_reward
from difftilt.rewards.classifier import ClassifierReward
from difftilt.rewards.image import ink, symmetry
from difftilt.rewards.protocol import Capabilities, Reward, Samples
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.statistics import frechet_distance
from difftilt.testbeds.digits_classifier import DigitClassifier, load_classifiers
from difftilt.testbeds.digits_data import CLASSES, HELDOUT, all_prompts, digit_of, labels_of, load_splits
from difftilt.training.protocol import Task

CARD = Card(
    name="digits",
    entry="Digits",
    paper="Optical recognition of handwritten digits, Alpaydin and Kaynak (UCI), as shipped with scikit-learn.",
)

CHECKPOINT = Path(__file__).parent / "checkpoints" / "digits"
CLASSIFIERS = "classifiers.safetensors"


class Config(BaseConfig):
    """The sampler and the reward."""

    steps: int = Field(default=10, ge=1)
    """Of the default sampler."""
    shift: float = Field(default=1.0, gt=0)
    """Time shift of the grid; 1 is uniform."""
    noise_level: float = Field(default=0.7, gt=0)
    """Of the Flow-SDE."""
    guidance: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance; 1 is off."""
    reward: Literal["digit", "margin", "ink", "symmetry"] = "digit"
    """Probability of the prompted digit under the frozen classifier, the margin of its logit, mean brightness, or
    left-right symmetry."""


class Digits:
    """The testbed: :meth:`task` for methods, and the distance to the real digits.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config

    @cached_property
    def classifiers(self) -> tuple[DigitClassifier, DigitClassifier]:
        """The one of the reward, and the held-out one; both frozen."""
        return load_classifiers(CHECKPOINT / CLASSIFIERS)

    def rewards(self) -> dict[str, Reward]:
        """Every reward of this testbed by name; all are differentiable.

        No configuration rewards the last two: ``heldout_digit``, the probability of the prompted digit under the
        second classifier, and :meth:`nearness`.
        """
        first, second = self.classifiers
        digits = dict(zip(all_prompts(), digit_of(all_prompts()).tolist(), strict=True))
        return {
            "digit": ClassifierReward(first, digits, probability=True, name="digit"),
            "margin": ClassifierReward(first, digits, margin=True, name="margin"),
            "ink": ink(),
            "symmetry": symmetry(),
            "heldout_digit": ClassifierReward(second, digits, probability=True, name="heldout_digit"),
            "nearness": as_reward(self.nearness, "nearness", Capabilities(differentiable=True)),
        }

    def task(self) -> Task:
        """A new copy of the pretrained model with its reward; the other rewards are held out, but for the margin."""
        config = self.config
        rewards = self.rewards()
        reward = rewards.pop(config.reward)
        rewards.pop("margin", None)  # it would say what "digit" says
        model = GenerativeModel(
            network=from_pretrained(CHECKPOINT),
            process=RectifiedFlow(),
            output="velocity",
            shape=(1, 8, 8),
            encode=labels_of,
            decode=decode,
            latents=latents_of,
            null_condition=_null,
        )
        return Task(
            name="digits",
            model=model,
            reward=reward,
            prompts=[prompt for prompt in all_prompts() if prompt not in HELDOUT],
            heldout_prompts=[prompt for prompt in all_prompts() if prompt in HELDOUT],
            sampler=Sampler(
                uniform_grid(config.steps, config.shift), FlowSDE(config.noise_level), EulerSolver(), config.guidance
            ),
            heldout=rewards,
            features=self.features,
        )

    def nearness(self, samples: Samples) -> Float[Tensor, " batch"]:
        """Minus the root mean square difference to the nearest real training image, in grey levels of [0, 1].

        It falls when images leave the data, even where both classifiers are fooled alike.
        """
        real = load_splits().train.images.flatten(1)
        gap = torch.cdist(samples.media.flatten(1), real).amin(1)
        return -gap / real.shape[1] ** 0.5

    @property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Images -> penultimate features (batch, 64) of the held-out classifier, which the reward does not shape."""
        return self.classifiers[1].features

    def accuracy(self, images: Float[Tensor, "batch 1 8 8"], prompts: Sequence[str]) -> float:
        """Share of images that the held-out classifier takes for the prompted digit."""
        with torch.no_grad():
            return float((self.classifiers[1](images).argmax(1) == digit_of(prompts)).double().mean())

    def distance_to_data(self, images: Float[Tensor, "batch 1 8 8"]) -> float:
        """Fréchet distance between the features of images and of all training digits, in squared feature units.

        The real test digits (360) are at the distance that a perfect model would have at that number of samples.
        """
        with torch.no_grad():
            return float(frechet_distance(self.features(images), self.features(load_splits().train.images)))


def latents_of(media: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 1 8 8"]:
    """Inverse of :func:`decode`."""
    return 2 * media - 1


def decode(latents: Float[Tensor, "batch 1 8 8"]) -> Float[Tensor, "batch 1 8 8"]:
    """Latents in [-1, 1] to grey levels in [0, 1], clipped; a clipped pixel passes no gradient."""
    return ((latents + 1) / 2).clamp(0, 1)


def _null(rows: int) -> Int[Tensor, " rows"]:
    """The label that no prompt has."""
    return torch.full((rows,), CLASSES)
