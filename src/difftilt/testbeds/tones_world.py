"""The world of the tones testbed: chords of decaying tones, their names, and waveforms of them.

A chord stands on one of twelve roots (A3 to A flat 4) and has one of twelve kinds, half of them consonant. Its notes
are among 24 semitones; every note starts at phase 0 and has two harmonics. A prompt names a chord (``"A major"``), or
leaves its kind open (``"a chord on A"``, ``"a consonant chord on A"``); the empty prompt leaves everything open.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.errors import UserError, quoted
from difftilt.leaves import nearest

RATE = 4000
"""Samples per second."""
LENGTH = 2048
"""Samples of a waveform: 0.512 s."""
ROOTS = ("A", "Bb", "B", "C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab")
"""Names of the roots, upwards from A3."""
LOWEST = 220.0
"""Frequency of A3 in Hz."""
NOTES = 24
"""Semitones from A3 that a chord may use; the highest is 831 Hz, its second harmonic 1661 Hz."""
HARMONICS = (1.0, 0.5)
"""Amplitudes of a note's harmonics. There is no third: it would sound a fifth that nobody plays."""
VOLUME = 0.25
"""Amplitude of a note of loudness 1: three of them stay within [-1, 1]."""
LOUDNESS = (0.6, 1.0)
"""Range of the loudness of each note, uniform."""
DECAY = (2.0, 6.0)
"""Range of the decay rate of a chord in 1/s, uniform: exp(-decay·t)."""

CONSONANCES = frozenset({0, 3, 4, 5, 7, 8, 9})
"""Consonant intervals in semitones, up to octaves: octave, thirds, fourth, fifth, sixths."""
KINDS: Mapping[str, tuple[int, ...]] = {
    "octave": (0, 12),
    "fifth": (0, 7),
    "third": (0, 4),
    "sixth": (0, 9),
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "second": (0, 2),
    "tritone": (0, 6),
    "seventh": (0, 11),
    "cluster": (0, 1, 2),
    "diminished": (0, 3, 6),
    "suspended": (0, 2, 7),
}
"""Semitones above the root. Of the first six every pair is consonant."""

Family = Literal["consonant", "dissonant"]
Category = Literal["empty", "free", "family", "named"]
CATEGORIES: tuple[Category, ...] = ("empty", "free", "family", "named")
"""Nothing is given; the root; root and consonant or dissonant; root and kind."""

WORDS = ("a", "chord", "on", "consonant", "dissonant", *ROOTS, *KINDS)
"""The vocabulary."""


@dataclass(frozen=True)
class Chord:
    """One chord.

    Attributes:
        root: of ``ROOTS``.
        kind: of ``KINDS``.
    """

    root: str
    kind: str

    @property
    def text(self) -> str:
        """``"A major"``."""
        return f"{self.root} {self.kind}"

    @property
    def notes(self) -> tuple[int, ...]:
        """Semitones above A3, upwards."""
        return tuple(ROOTS.index(self.root) + step for step in KINDS[self.kind])

    @property
    def consonance(self) -> float:
        """Share of the pairs of notes that are consonant."""
        pairs = [(high - low) % 12 in CONSONANCES for low, high in combinations(self.notes, 2)]
        return sum(pairs) / len(pairs)

    @property
    def family(self) -> Family:
        """Consonant if every pair is."""
        return "consonant" if self.consonance == 1 else "dissonant"


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for.

    Attributes:
        text: the prompt.
        chords: any of these is right; drawn with equal probability.
        category: how much the prompt leaves open.
    """

    text: str
    chords: tuple[Chord, ...]
    category: Category


@cache
def all_chords(family: Family | None = None) -> tuple[Chord, ...]:
    """Every chord, or those of one family, roots outermost."""
    chords = [Chord(root, kind) for root in ROOTS for kind in KINDS]
    return tuple(chord for chord in chords if family in (None, chord.family))


@cache
def parse(prompt: str) -> Wish:
    """The wish that a prompt states.

    Raises:
        UserError: names the first word that is not in the vocabulary, or the form that prompts have.
    """
    match prompt.split():
        case []:
            return Wish(prompt, all_chords(), "empty")
        case [root, kind] if root in ROOTS and kind in KINDS:
            return Wish(prompt, (Chord(root, kind),), "named")
        case ["a", "chord", "on", root] if root in ROOTS:
            return Wish(prompt, _on(root, None), "free")
        case ["a", "consonant" | "dissonant" as family, "chord", "on", root] if root in ROOTS:
            return Wish(prompt, _on(root, family), "family")
        case words:
            for word in words:
                if word not in WORDS:
                    raise UserError(
                        f"prompt {quoted(prompt)}: {quoted(word)} is not in the vocabulary; {nearest(word, WORDS)}"
                    )
    raise UserError(
        f"prompt {quoted(prompt)} names no chord; prompts are like 'A major', 'a chord on A', 'a consonant chord on "
        "A', 'a dissonant chord on A', or empty"
    )


def _on(root: str, family: Family | None) -> tuple[Chord, ...]:
    return tuple(chord for chord in all_chords(family) if chord.root == root)


def prompts_on(roots: Sequence[str], categories: Sequence[Category]) -> list[str]:
    """Every prompt of the categories on the roots, roots outermost; the empty one once for each root."""
    forms: Mapping[Category, Sequence[str]] = {
        "empty": ("",),
        "free": ("a chord on {}",),
        "family": ("a consonant chord on {}", "a dissonant chord on {}"),
        "named": tuple(f"{{}} {kind}" for kind in KINDS),
    }
    return [form.format(root) for root in roots for category in categories for form in forms[category]]


def frequencies() -> Float[Tensor, " note"]:
    """Fundamentals in Hz, equally tempered."""
    return LOWEST * 2 ** (torch.arange(NOTES, dtype=torch.float64) / 12)


@cache
def tones() -> Float[Tensor, "note time"]:
    """Every note at loudness 1, not decaying."""
    time = torch.arange(LENGTH, dtype=torch.float64) / RATE
    turns = frequencies()[:, None] * time
    waves = [height * (2 * torch.pi * (place + 1) * turns).sin() for place, height in enumerate(HARMONICS)]
    return (VOLUME * torch.stack(waves).sum(0)).float()


def envelope(decay: Float[Tensor, " batch"]) -> Float[Tensor, "batch time"]:
    """exp(-decay·t)."""
    return (-decay[:, None] * torch.arange(LENGTH, device=decay.device) / RATE).exp()


def synthesise(loudness: Float[Tensor, "batch note"], decay: Float[Tensor, " batch"]) -> Float[Tensor, "batch 1 time"]:
    """Waveforms in [-1, 1]: exp(-decay·t)·VOLUME·sum_n loudness_n·(sin(2π f_n t) + sin(4π f_n t)/2)."""
    return ((loudness @ tones().to(loudness)) * envelope(decay))[:, None]


def membership(chords: Sequence[Chord]) -> Float[Tensor, "chord note"]:
    """1 at the notes of each chord, else 0."""
    table = torch.zeros(len(chords), NOTES)
    for row, chord in zip(table, chords, strict=True):
        row[list(chord.notes)] = 1
    return table


def play(notes: Float[Tensor, "batch note"], generator: torch.Generator) -> Float[Tensor, "batch 1 time"]:
    """Waveforms of the notes (1 where they sound) with drawn loudness and decay."""
    loudness = _uniform(LOUDNESS, notes.shape, generator)
    return synthesise(notes * loudness, _uniform(DECAY, notes.shape[:1], generator))


def draw(wishes: Sequence[Wish], generator: torch.Generator) -> Float[Tensor, "wish 1 time"]:
    """A waveform for each wish: one of its chords, drawn."""
    places = torch.rand(len(wishes), generator=generator).tolist()
    chords = [wish.chords[int(place * len(wish.chords))] for wish, place in zip(wishes, places, strict=True)]
    return play(membership(chords), generator)


def nominal(chords: Sequence[Chord]) -> Float[Tensor, "chord 1 time"]:
    """Waveforms of mean loudness and mean decay."""
    loudness = membership(chords) * sum(LOUDNESS) / 2
    return synthesise(loudness, torch.full((len(chords),), sum(DECAY) / 2))


def _uniform(bounds: tuple[float, float], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(tuple(shape), generator=generator)


@cache
def intervals() -> Int[Tensor, "note note"]:
    """1 where two different notes are a consonant interval, -1 where a dissonant one, 0 on the diagonal."""
    steps = (torch.arange(NOTES)[:, None] - torch.arange(NOTES)).abs()
    good = torch.tensor([step in CONSONANCES for step in range(12)])[steps % 12]
    return torch.where(steps == 0, 0, torch.where(good, 1, -1))
