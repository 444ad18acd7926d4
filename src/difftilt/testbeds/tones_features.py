"""Spectrogram features of the tones testbed: twelve pitch classes and what lies outside, on a compressed scale.

They are the encoder that distances between sets are measured with. Prompts are mapped to the same features, so that a
reference set can be made of texts alone.
"""

from collections.abc import Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.testbeds.tones_world import LOWEST, RATE, VOLUME, all_chords, nominal, parse

WINDOW, HOP = 1024, 256
"""Samples of a window, 0.256 s, and between windows: a waveform has 5 frames."""
CLASSES = 12
OCTAVES = 3
"""From A3 upwards: the fundamentals and second harmonics of all notes."""
DIM = CLASSES + 1
FLOOR = 1e-2
"""Energy, relative to a note of loudness 1, below which differences count little: 20 dB down."""


def frame_features(media: Float[Tensor, "batch 1 time"]) -> Float[Tensor, "batch frame 13"]:
    """Energy of each pitch class and of the rest in each window of a waveform, compressed; differentiable.

    log(1 + E/FLOOR)/log(1 + 1/FLOOR) of E, the energy of a Hann window's spectrum by pitch class (A, B flat, ...,
    A flat, over three octaves from A3, shared in proportion by the two nearest semitones), and last what lies outside.
    A steady note of loudness 1, without its harmonic, has E = 1 in its class and a feature of 1.
    """
    window = torch.hann_window(WINDOW, device=media.device)
    spectrum = torch.stft(media[:, 0].float(), WINDOW, HOP, window=window, center=False, return_complex=True)
    # |z|² written out: the modulus has no slope at silence
    power = spectrum.real.square() + spectrum.imag.square()
    energy = power.transpose(1, 2) @ _bands().to(media.device)
    return (1 + energy / FLOOR).log() / _TOP


def features(media: Float[Tensor, "batch 1 time"]) -> Float[Tensor, "batch 13"]:
    """Mean of :func:`frame_features` over the frames: the embedding of a waveform."""
    return frame_features(media).mean(1)


def text_features(prompts: Sequence[str]) -> Float[Tensor, "prompts 13"]:
    """Features that a prompt leads one to expect: the mean over its chords, played at mean loudness and decay."""
    chords = dict(zip(all_chords(), _nominal(), strict=True))
    return torch.stack([torch.stack([chords[chord] for chord in parse(one).chords]).mean(0) for one in prompts])


_TOP = float(torch.tensor(1 + 1 / FLOOR).log())


@cache
def _bands() -> Float[Tensor, "bin 13"]:
    """Weights of the bins of a spectrum in each feature; each row adds up to the same number.

    The number makes the energy of a note of loudness 1 one: a sine of amplitude A puts A²·N·sum(w²)/4 into the bins of
    positive frequency (Parseval).
    """
    hertz = torch.arange(1, WINDOW // 2 + 1, dtype=torch.float64) * RATE / WINDOW
    semitone = CLASSES * (hertz / LOWEST).log2()
    below = semitone.floor()
    share = semitone - below
    weights = torch.zeros(WINDOW // 2 + 1, DIM, dtype=torch.float64)
    inside = (semitone >= -0.5) & (semitone < CLASSES * OCTAVES - 0.5)
    rows = torch.arange(1, WINDOW // 2 + 1)[inside]
    weights[rows, (below[inside] % CLASSES).long()] += 1 - share[inside]
    weights[rows, ((below[inside] + 1) % CLASSES).long()] += share[inside]
    weights[:, CLASSES] = 1 - weights.sum(1)
    whole = VOLUME**2 * WINDOW * float(torch.hann_window(WINDOW, dtype=torch.float64).square().sum()) / 4
    return (weights / whole).float()


@cache
def _nominal() -> Float[Tensor, "chord 13"]:
    return features(nominal(all_chords()))
