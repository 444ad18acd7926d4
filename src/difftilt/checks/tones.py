"""The tones testbed: codec and verifier are exact, features tell sets apart, the shipped model leaves room to learn."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.statistics import vendi_score
from difftilt.statistics.sets import frechet_distance
from difftilt.testbeds.tones import CHECKPOINT, Tones, decode, latents_of
from difftilt.testbeds.tones_verifier import hear, right
from difftilt.testbeds.tones_world import (
    CATEGORIES,
    LENGTH,
    LOUDNESS,
    NOTES,
    ROOTS,
    Category,
    all_chords,
    draw,
    intervals,
    parse,
    prompts_on,
    synthesise,
)

_EACH = 288
_BED = Tones()


@cache
def _renders() -> tuple[Tensor, list[str]]:
    """Ten waveforms of every chord, and its name."""
    prompts = [chord.text for chord in all_chords()] * 10
    return draw([parse(prompt) for prompt in prompts], torch.Generator().manual_seed(1)), prompts


def _renders_right() -> float:
    waves, prompts = _renders()
    return float(right(hear(waves), prompts).mean())


def _strangers_right() -> float:
    waves, prompts = _renders()
    return float(right(hear(waves), prompts[1:] + prompts[:1]).mean())


def _renders_fidelity() -> float:
    return float(hear(_renders()[0]).fidelity.min())


def _codec_error() -> float:
    waves = _renders()[0]
    latents = latents_of(waves)
    return float((decode(latents) - waves).abs().max() + (latents_of(decode(latents)) - latents).abs().max())


@cache
def _noise() -> Tensor:
    """White noise as loud as the data."""
    loudness = float(_renders()[0].std())
    return Noise(1).normal(torch.arange(_EACH), (1, LENGTH), purpose="check") * loudness


def _noise_right() -> float:
    """Share of noise in which some chord of the world is heard, with any energy explained."""
    heard = hear(_noise())
    return float(right(heard, [""] * _EACH).mean() + heard.fidelity.clamp(min=0).mean())


def _chance_gap() -> float:
    """Mean consonance of three random notes less the consonant share of all pairs, in standard errors."""
    count = 2000
    chosen = torch.rand(count, NOTES, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :3]
    notes = torch.zeros(count, NOTES).scatter(1, chosen, sum(LOUDNESS) / 2)
    scores = hear(synthesise(notes, torch.full((count,), 4.0))).consonance
    share = float((intervals() == 1).sum() / (intervals() != 0).sum())
    return float((scores.mean() - share).abs() / scores.std() * count**0.5)


@cache
def _other(consonant: bool) -> Tensor:
    """Consonant waveforms that are not those of the reference set; or dissonant ones."""
    if not consonant:
        return _BED.reference("dissonant")
    chords = all_chords("consonant") * 8
    return draw([parse(chord.text) for chord in chords], torch.Generator().manual_seed(9))


def _dissonant_ratio() -> float:
    return _BED.distance(_other(False)) / _BED.distance(_other(True))


def _mean_share() -> float:
    """Of the Fréchet distance between dissonant and consonant waveforms, the part that the means make up."""
    gap = _BED.encoder(_other(False)).mean(0) - _BED.encoder(_BED.reference()).mean(0)
    return float(gap.square().sum()) / _BED.distance(_other(False))


def _text_ratio() -> float:
    """Fréchet distance of dissonant over that of consonant waveforms, to the names of the consonant chords."""
    told = _BED.text_features([chord.text for chord in all_chords("consonant")])
    far, near = (frechet_distance(_BED.encoder(_other(kind)), told) for kind in (False, True))
    return float(far / near)


@cache
def _base(category: Category) -> tuple[Tensor, list[str]]:
    """Waveforms of the shipped model on all roots, and their prompts."""
    task, texts = _BED.task(), prompts_on(ROOTS, (category,))
    prompts = [texts[place % len(texts)] for place in range(_EACH)]
    index, noise = torch.arange(_EACH), Noise(0)
    start = noise.normal(index, task.model.shape, purpose="prior")
    with torch.no_grad():
        condition = task.model.encode(prompts)
        x_0 = sample(denoiser(task.model), task.sampler, start, condition, noise=noise, index=index)
        return task.model.decode(x_0), prompts


def _accuracy(category: Category) -> float:
    waves, prompts = _base(category)
    return float(right(hear(waves), prompts).mean())


def _fidelity() -> float:
    """The lowest mean of a category."""
    return min(float(hear(_base(category)[0]).fidelity.mean()) for category in CATEGORIES)


def _consonant_share(category: Category) -> float:
    """Of the samples that are a chord of the world."""
    waves, prompts = _base(category)
    heard = hear(waves)
    return float((heard.consonance[right(heard, prompts) == 1] == 1).double().mean())


def _distance_ratio(category: Category) -> float:
    """Fréchet distance of the model's samples to the data over that of noise."""
    return _BED.distance(_base(category)[0], "data") / _BED.distance(_noise(), "data")


def _vendi_ratio() -> float:
    """Vendi score of the model's samples over that of as many from the world."""
    made, real = (vendi_score(_BED.encoder(waves)) for waves in (_base("free")[0], _BED.reference("data", _EACH)))
    return float(made / real)


def _megabytes() -> float:
    return sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) / 1e6


PROOFS = (
    Proof("the codec and its inverse cancel exactly", _codec_error, at_most=0),
    Proof("the verifier hears every chord of the world right", _renders_right, at_least=0.98),
    Proof("and finds each wrong for another prompt", _strangers_right, at_most=0.01),
    # decay rates are tried 0.5/s apart: a gap of 0.25/s over the 0.13 s that a note's energy is spread leaves 0.001
    Proof("it explains every chord wholly (least fidelity)", _renders_fidelity, at_least=0.99),
    Proof("it hears no chord in noise", _noise_right, at_most=0.01),
    Proof("random notes are as consonant as chance has it (standard errors)", _chance_gap, at_most=3),
    Proof(
        "features tell dissonant from consonant: Fréchet distances over that of equals", _dissonant_ratio, at_least=10
    ),
    Proof("hardly by their means, so that only sets show it (share of the distance)", _mean_share, at_most=0.3),
    Proof("names of chords serve as a reference: the same ratio to texts alone", _text_ratio, at_least=5),
    Proof("the base plays what it is told: accuracy on named chords", lambda: _accuracy("named"), at_least=0.9),
    Proof("with only a root it plays mostly one of its chords, and leaves room", lambda: _accuracy("free"), 0.6, 0.98),
    Proof("samples are nearly all tones of the world: lowest mean fidelity", _fidelity, at_least=0.9, long=True),
    # the data's half and three standard errors of 250 samples
    Proof("as many of its chords are consonant as of the data's", lambda: _consonant_share("free"), 0.4, 0.6),
    Proof("it is near the data: Fréchet distance over that of noise", lambda: _distance_ratio("free"), at_most=0.05),
    Proof("so is the unconditional model", lambda: _distance_ratio("empty"), at_most=0.05),
    Proof("it is as diverse as the world: ratio of Vendi scores", _vendi_ratio, 0.85, 1.15),
    Proof("megabytes of the shipped model", _megabytes, at_most=5),
)
