"""Chords as waveforms: a small trained model, with a prompt and without, an exact verifier, and reference sets.

The smallest testbed with audio. Its tilted law is not known; what is known is which notes sound in a waveform. A set of
its samples can be held against a set of others, of waveforms or of texts, in spectrogram features.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.models.protocol import GenerativeModel
from difftilt.models.saving import from_pretrained
from difftilt.models.text_encoder import TextEncoder
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards import FrechetPerSample, FrechetReward, ReferenceSet, VendiReward
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.statistics import frechet_distance
from difftilt.testbeds.tones_features import features, frame_features, text_features
from difftilt.testbeds.tones_verifier import Listener, listeners
from difftilt.testbeds.tones_world import (
    KINDS,
    LENGTH,
    RATE,
    ROOTS,
    Category,
    Family,
    all_chords,
    draw,
    parse,
    prompts_on,
)
from difftilt.training.protocol import Task

CARD = Card(
    name="tones",
    entry="Tones",
    paper="Drawn here; sets of audio are compared as in DRAGON, Bai et al. 2025, arXiv 2504.15217.",
)

CHECKPOINT = Path(__file__).parent / "checkpoints" / "tones"
SIDE = 4
"""The 16 frames of a waveform stand in a square of this side: the network takes them for the patches of an image."""
FRAME = LENGTH // SIDE**2
"""Samples of a frame."""
SCALE = 0.5
"""Sound pressure of a latent of 1; a power of two, so that the codec rounds nothing."""
REFERENCES = 576
"""Waveforms of a reference set: eight of each consonant chord, or four of each chord."""
SHRINKAGE = 0.02
"""Of covariances in Fréchet distances, so that a set smaller than the 13 features has one."""


class Config(BaseConfig):
    """The sampler, the reward, and which prompts."""

    steps: int = Field(default=10, ge=1)
    """Of the default sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid: notes are decided at high noise, so most steps are spent there; 1 is uniform."""
    noise_level: float = Field(default=0.7, gt=0)
    """Of the Flow-SDE that steerers propose with; its last step follows the ODE, for its noise would be heard."""
    guidance: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance; 1 is off."""
    reward: Literal["consonance", "accuracy", "fidelity", "frechet", "frechet_text", "frechet_per_sample", "vendi"] = (
        "consonance"
    )
    """Share of the pairs of notes that are consonant, whether the prompt is met, or likeness to the world's chords; of
    sets, nearness to consonant waveforms or to names of consonant chords, and diversity; nearness of each sample."""
    categories: tuple[Category, ...] = Field(default=("free",), min_length=1)
    """Prompts of tuning and evaluation, in equal parts; ``("empty",)`` is the unconditional model."""


class Tones:
    """The testbed: :meth:`task` for methods, the rewards by name, the encoder and the reference sets.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Trained with the model; frozen from then on."""
        encoder = from_pretrained(CHECKPOINT / "text").float()
        assert isinstance(encoder, TextEncoder)
        return encoder.requires_grad_(False)

    def rewards(self) -> dict[str, Reward]:
        """What the verifier hears, and rewards of sets against consonant references, of waveforms and of texts."""
        waveforms = self.reference()
        names = [chord.text for chord in all_chords("consonant")]
        heard = ReferenceSet.encoded(waveforms, self.encoder)
        told = ReferenceSet.encoded(names, self.text_features)
        windows = ReferenceSet.encoded(waveforms, lambda media: frame_features(media).flatten(0, 1))
        rewards: list[Reward] = [
            *listeners(Listener()),
            FrechetReward(heard, self.encoder, shrinkage=SHRINKAGE),
            FrechetReward(told, self.encoder, shrinkage=SHRINKAGE, name="frechet_text"),
            FrechetPerSample(windows, frame_features, shrinkage=SHRINKAGE),
            VendiReward(self.encoder),
        ]
        return {reward.name: reward for reward in rewards}

    def task(self) -> Task:
        """A new copy of the pretrained model with its reward; the others are held out, but for twins of a distance."""
        config, rewards = self.config, self.rewards()
        hidden = {"frechet_text", "frechet_per_sample", config.reward}
        model = GenerativeModel(
            network=from_pretrained(CHECKPOINT / "denoiser").float(),
            process=RectifiedFlow(),
            output="velocity",
            shape=(FRAME, SIDE, SIDE),
            encode=self.encode,
            decode=decode,
            latents=latents_of,
            null_condition=lambda rows: self.text_encoder.condition([""] * rows),
        )
        return Task(
            name="tones",
            model=model,
            reward=rewards[config.reward],
            prompts=balanced(config.categories, heldout=False),
            heldout_prompts=balanced(config.categories, heldout=True),
            sampler=Sampler(
                uniform_grid(config.steps, config.shift),
                FlowSDE(config.noise_level),
                EulerSolver(),
                config.guidance,
                clean_end=True,
            ),
            heldout={name: reward for name, reward in rewards.items() if name not in hidden},
            features=self.encoder,
            categories=lambda prompt: parse(prompt).category,
            rate=RATE,
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Token vectors and their mean.

        Raises:
            UserError: for a prompt outside the grammar, which the verifier could not judge.
        """
        for prompt in prompts:
            parse(prompt)
        return self.text_encoder.condition(prompts)

    @property
    def encoder(self) -> Callable[[Tensor], Tensor]:
        """Waveforms -> (batch, 13) spectrogram features, :func:`difftilt.testbeds.tones_features.features`."""
        return features

    def text_features(self, prompts: Sequence[str]) -> Float[Tensor, "prompts 13"]:
        """Prompts -> the features that they lead one to expect: references that no waveform was needed for."""
        return text_features(prompts)

    def reference(
        self, kind: Family | Literal["data"] = "consonant", count: int = REFERENCES
    ) -> Float[Tensor, "count 1 time"]:
        """Waveforms of the world, all its chords in turn: the consonant ones, the dissonant ones, or both.

        Fixed: every call returns the same. A smaller set is not the beginning of a larger one.
        """
        chords = all_chords(None if kind == "data" else kind)
        wishes = [parse(chords[place % len(chords)].text) for place in range(count)]
        return draw(wishes, torch.Generator().manual_seed(0))

    def distance(self, media: Float[Tensor, "batch 1 time"], kind: Family | Literal["data"] = "consonant") -> float:
        """Fréchet distance between features of waveforms and of a reference set, in squared feature units."""
        with torch.no_grad():
            return float(frechet_distance(self.encoder(media), self.encoder(self.reference(kind))))


def is_heldout(prompt: str) -> bool:
    """Whether tuning never sees the prompt; pretraining has seen all.

    On every root three kinds of twelve are held out, and on alternate roots its consonant or its dissonant chord, so
    that every word is trained on. Where only the root is given, or nothing, there is nothing to hold out.
    """
    wish = parse(prompt)
    root, kind = ROOTS.index(wish.chords[0].root), list(KINDS).index(wish.chords[0].kind)
    if wish.category == "named":
        return (root + kind) % 4 == 0
    return wish.category == "family" and wish.chords[0].family == ("consonant", "dissonant")[root % 2]


def balanced(categories: Sequence[Category], heldout: bool) -> list[str]:
    """Prompts of every category in turn, equally many; a category that has fewer goes round.

    Args:
        categories: of the prompts.
        heldout: False for those of tuning; True for those of evaluation, which are the same if nothing is held out.
    """
    columns: list[list[str]] = []
    for category in categories:
        texts = prompts_on(ROOTS, (category,))
        columns.append([text for text in texts if is_heldout(text) == heldout] or texts)
    each = max(len(column) for column in columns)
    return [column[place % len(column)] for place in range(each) for column in columns]


def latents_of(media: Float[Tensor, "batch 1 time"]) -> Float[Tensor, "batch frame side side2"]:
    """Frames of a waveform, over ``SCALE``; the exact inverse of :func:`decode`."""
    return (media[:, 0] / SCALE).unflatten(1, (SIDE, SIDE, FRAME)).permute(0, 3, 1, 2)


def decode(latents: Float[Tensor, "batch frame side side2"]) -> Float[Tensor, "batch 1 time"]:
    """Frames one after the other: waveforms in [-1, 1], clipped; a clipped value passes no gradient."""
    return (latents.permute(0, 2, 3, 1).flatten(1)[:, None] * SCALE).clamp(-1, 1)
