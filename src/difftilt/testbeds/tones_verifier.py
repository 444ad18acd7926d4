"""An exact judge of the tones testbed: which notes sound, by matched filters, and how much of the waveform they are.

The notes of the world are 24 known waveforms up to loudness and a common decay. For each decay of a grid their loudness
is found by least squares; the decay that explains most energy counts. There is no network in it.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from difftilt.rewards.base import FunctionReward, ScoreFunction
from difftilt.rewards.protocol import Capabilities, Reward, Samples
from difftilt.testbeds.tones_world import DECAY, LOUDNESS, envelope, intervals, membership, parse, tones

DECAYS = 11
"""Decay rates that are tried, over a range that is half a unit wider than the world's at both ends."""
ABSENT, PRESENT = 0.2, 0.4
"""Loudness below which a note does not count as sounding, and above which it does wholly; between, in proportion."""
_QUIET = 1e-6
"""Energy that a silent waveform is given, so that it explains nothing of itself."""


@dataclass(frozen=True)
class Heard:
    """What is heard in waveforms.

    Attributes:
        loudness: least-squares loudness of each note; 0.6 to 1 where a note of the world sounds.
        presence: 0 where a note is silent, 1 where it sounds, between where it is in doubt.
        fidelity: share of the energy that the notes in question explain at a loudness of the world, 1 at most.
    """

    loudness: Float[Tensor, "batch note"]
    presence: Float[Tensor, "batch note"]
    fidelity: Float[Tensor, " batch"]

    @property
    def sounding(self) -> Bool[Tensor, "batch note"]:
        """Notes that sound more than they do not."""
        return self.presence > 0.5

    @property
    def consonance(self) -> Float[Tensor, " batch"]:
        """Share of the pairs of sounding notes that are consonant, in [0, 1]; 0 if there is no pair.

        sum_ij p_i p_j [i, j consonant] / max(1, sum_ij p_i p_j) over pairs i < j, with p the presence: exact for notes
        that are not in doubt, and with a slope where they are.
        """
        pairs = self.presence[:, :, None] * self.presence[:, None] / 2
        kinds = intervals().to(pairs.device)
        return (pairs * (kinds == 1)).sum((1, 2)) / (pairs * (kinds != 0)).sum((1, 2)).clamp(min=1)


def hear(media: Float[Tensor, "batch 1 time"]) -> Heard:
    """The notes of waveforms in [-1, 1]; one with a value that is not finite is taken for silence. Differentiable."""
    atoms, filters = (table.to(media.device) for table in _filters())
    waves = media[:, 0].float()
    waves = torch.where(waves.isfinite().all(1, keepdim=True), waves, 0.0)
    every = torch.einsum("bt,dtn->dbn", waves, filters)
    with torch.no_grad():
        # of a least-squares fit the explained energy is that of the fit
        explained = torch.einsum("dbn,dnt->dbt", every, atoms).square().sum(2)
        best = explained.argmax(0)
    loudness = every[best, torch.arange(len(waves), device=media.device)]
    presence = ((loudness - ABSENT) / (PRESENT - ABSENT)).clamp(0, 1)
    played = presence * loudness.clamp(*LOUDNESS)
    rest = waves - torch.einsum("bn,bnt->bt", played, atoms[best])
    left, whole = rest.square().sum(1) + _QUIET, waves.square().sum(1) + _QUIET
    return Heard(loudness, presence, 1 - left / whole)


@cache
def _filters() -> tuple[Float[Tensor, "decay note time"], Float[Tensor, "decay time note"]]:
    """Notes at every decay, and what least squares multiplies a waveform with, A^T (A A^T)^-1 for the notes A."""
    rates = torch.linspace(DECAY[0] - 0.5, DECAY[1] + 0.5, DECAYS)
    atoms = tones() * envelope(rates)[:, None]
    wide = atoms.double()
    return atoms, torch.linalg.solve(wide @ wide.mT, wide).mT.float()


def right(heard: Heard, prompts: Sequence[str]) -> Float[Tensor, " batch"]:
    """1 where exactly the notes of a chord sound that the prompt allows, else 0."""
    sounding = heard.sounding.cpu()
    allowed = [membership(parse(prompt).chords).bool() for prompt in prompts]
    found = [bool((row == chords).all(1).any()) for row, chords in zip(sounding, allowed, strict=True)]
    return torch.tensor(found, dtype=torch.float32, device=heard.loudness.device)


@dataclass
class Listener:
    """Hears samples; the newest are kept, for several rewards ask for the same ones. Not for media with gradients."""

    _media: "weakref.ref[Tensor] | None" = None
    _heard: Heard | None = None

    def hear(self, media: Float[Tensor, "batch 1 time"]) -> Heard:
        """As :func:`hear`."""
        if media.requires_grad:
            return hear(media)
        if self._heard is None or self._media is None or self._media() is not media:
            self._media, self._heard = weakref.ref(media), hear(media)
        return self._heard


def listeners(listener: Listener) -> list[Reward]:
    """What is heard, as rewards that share one listener.

    ``consonance`` is the share of the pairs of sounding notes that are consonant, in [0, 1], 0 if fewer than two sound.
    ``accuracy`` is 1 where exactly the notes of a chord sound that the prompt allows, else 0; black-box.
    ``fidelity`` is the share of the energy that notes of the world explain, at most 1: noise and strange timbres lose
    it.
    """

    def rewarded(name: str, score: ScoreFunction, tolerance: float, differentiable: bool = True) -> Reward:
        return FunctionReward(name, score, Capabilities(differentiable=differentiable, tolerance=tolerance))

    def accuracy(samples: Samples) -> Float[Tensor, " batch"]:
        return right(listener.hear(samples.media.detach()), samples.prompts)

    return [
        rewarded("consonance", lambda samples: listener.hear(samples.media).consonance, 0.1),
        rewarded("accuracy", accuracy, 0.1, differentiable=False),
        rewarded("fidelity", lambda samples: listener.hear(samples.media).fidelity, 0.05),
    ]
