"""The pictures of a report: per prompt the samples before and after, of all runs that kept the same ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import cast

import torch
from torch import Tensor

from difftilt.config import Problems
from difftilt.errors import UserError, printable
from difftilt.evaluation.report.charts import Cloud, limits_of, scatter_chart
from difftilt.evaluation.report.reading import RunRecord
from difftilt.evaluation.report.samples import Gallery, Particles, Stage, kind_of
from difftilt.evaluation.report.sounds import sound
from difftilt.evaluation.report.sprites import Sprite, first_lines, sprite, token_lines
from difftilt.recipes.parts import read_part
from difftilt.recipes.steered import PARTICLES, STEERED, heaviest
from difftilt.statistics.pareto import front
from difftilt.training.looks import Look
from difftilt.training.pictures import spectrograms
from difftilt.training.protocol import Task

SHOWN = 12
"""Prompts in view; the others are folded away."""

PAIRS = 6
"""Pairs of objectives that are drawn."""

BEST = 80
"""CSS pixels of the side of a best image."""


@dataclass(frozen=True)
class Strip:
    """One row of samples of one prompt: an image, with sound if it is of audio, lines of text, or both.

    Attributes:
        label: stage, or what the steerer made of the prompt.
        run: place of the run whose colour and name stand beside it; None for what all runs share.
        image: of all samples.
        sound: all samples one after the other, as a data URI; empty for none.
        lines: of tokens, or what the samples spell.
    """

    label: str
    run: int | None
    image: Sprite | None = None
    sound: str = ""
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Prompt:
    """A caption and its rows."""

    text: str
    heldout: bool
    strips: Sequence[Strip]


@dataclass(frozen=True)
class Plot:
    """A scatter plot, its caption, whose it is, and whether it is of before training."""

    label: str
    run: int
    before: bool
    svg: str


@dataclass(frozen=True)
class Pictures:
    """What is shown of one or several runs together.

    Attributes:
        runs: places of the runs.
        note: how to read them.
        prompts, more: captions with rows, the first ones and the folded rest.
        plots: of vectors.
    """

    runs: Sequence[int]
    note: str
    prompts: Sequence[Prompt] = ()
    more: Sequence[Prompt] = ()
    plots: Sequence[Plot] = field(default_factory=list[Plot])


def pictures(records: Sequence[RunRecord], first: int) -> list[Pictures]:
    """Groups of pictures; runs with galleries of the same prompts stand in one group.

    Args:
        records: in the order of the report.
        first: number of the first chart that may be drawn here.
    """
    groups: dict[object, list[tuple[int, Gallery]]] = {}
    for place, record in enumerate(records):
        if isinstance(record.samples, Gallery):
            own = record.samples
            media = own.stages[0].media
            key = (own.prompts, own.heldout, own.size, kind_of(media), media.shape[1:])
            groups.setdefault(key, []).append((place, own))
    shown: list[Pictures] = []
    for members in groups.values():
        shown.append(_trained(members, first + sum(len(one.plots) for one in shown)))
    for place, record in enumerate(records):
        if isinstance(record.samples, Particles):
            number = first + sum(len(one.plots) for one in shown)
            shown.append(_steered(place, record, record.samples, number))
    return shown


def _trained(members: Sequence[tuple[int, Gallery]], number: int) -> Pictures:
    gallery = members[0][1]
    runs = [place for place, _ in members]
    stages = [(place, stage) for place, own in members for stage in own.stages]
    stages.sort(key=lambda one: one[1].step > 0)  # all that is before training first
    note = "Same prompts and same noise before and after."
    if kind_of(gallery.stages[0].media) == "vectors":
        return Pictures(runs, note + _two_of(gallery.stages[0].media), plots=_stage_plots(stages, number))
    texts = zip(gallery.prompts, gallery.heldout, strict=True)
    found = [
        Prompt(printable(text), heldout, _strips(stages, slice(i * gallery.size, (i + 1) * gallery.size), gallery))
        for i, (text, heldout) in enumerate(texts)
    ]
    return Pictures(runs, note, found[:SHOWN], found[SHOWN:])


def _strips(stages: Sequence[tuple[int, Stage]], rows: slice, gallery: Gallery) -> list[Strip]:
    """One row per stage; what several runs have alike before training is shown once, for no run in particular."""
    starts = [stage.media[rows] for _, stage in stages if stage.step == 0]
    shared = len(starts) > 1 and all(torch.equal(starts[0], other) for other in starts[1:])
    kept = [one for i, one in enumerate(stages) if not (shared and one[1].step == 0 and i > 0)]
    return [
        _strip(
            _label(stage) + _scored(stage, rows, gallery.score),
            None if shared and stage.step == 0 else place,
            stage.media[rows],
            stage.look.take(torch.arange(len(stage.media))[rows]),
            rate=gallery.rate,
        )
        for place, stage in kept
    ]


def _scored(stage: Stage, rows: slice, name: str) -> str:
    """What the samples of one prompt score on average, for its label."""
    if stage.score is None:
        return ""
    mean = float(stage.score[rows].double().mean())
    return f" · {name} {mean:.3g}" if math.isfinite(mean) else f" · {name} –"


def _strip(
    label: str, run: int | None, media: Tensor, look: Look, enlarged: int | None = None, rate: int | None = None
) -> Strip:
    lines = [] if look.text is None else first_lines(look.text, len(media))
    if look.drawn is not None:
        return Strip(label, run, image=sprite(look.drawn), lines=lines)
    if lines:
        return Strip(label, run, lines=lines)
    if kind_of(media) == "audio":
        return Strip(label, run, image=sprite(spectrograms(media)), sound=sound(media, rate) if rate else "")
    if kind_of(media) == "tokens":
        return Strip(label, run, lines=token_lines(media))
    return Strip(label, run, image=sprite(media) if enlarged is None else sprite(media, enlarged))


def _label(stage: Stage) -> str:
    return "before" if stage.step == 0 else f"after {stage.step}"


def _stage_plots(stages: Sequence[tuple[int, Stage]], number: int) -> list[Plot]:
    clouds = [(place, stage, _finite(stage.media)) for place, stage in stages]
    clouds = [(place, stage, points) for place, stage, points in clouds if len(points)]
    if not clouds:
        return []
    limits = limits_of([points for _, _, points in clouds])
    plots: list[Plot] = []
    for place, stage, points in clouds:
        start = stage.step == 0
        svg = scatter_chart(Cloud(None if start else place, points), limits, number + len(plots))
        plots.append(Plot(_label(stage), place, start, svg))
    return plots


def _steered(place: int, record: RunRecord, particles: Particles, number: int) -> Pictures:
    counts = torch.bincount(particles.group, minlength=1)
    count = f"{int(counts.max())} particles for each prompt"
    if kind_of(particles.media) == "vectors":
        points = _finite(particles.media)
        best = _finite(particles.media[particles.best])
        note = f"{count}; the best of each prompt is outlined.{_two_of(particles.media)}"
        if not len(points):
            return Pictures([place], note)
        chart = scatter_chart(Cloud(place, points, best), limits_of([points]), number)
        return Pictures([place], note, plots=[Plot("steered", place, False, chart)])
    unseen = _unseen(record)
    prompts = [
        Prompt(printable(text := _caption(record, group)), text in unseen, _particle_strips(particles, group, place))
        for group in range(min(len(particles.best), STEERED))
    ]
    note = f"{count}, in order of weight." + (f" The first {PARTICLES} are shown." if counts.max() > PARTICLES else "")
    if len(particles.best) > STEERED:
        note += f" The first {STEERED} of {len(particles.best)} prompts are shown."
    plots = _fronts(place, particles, number)
    if plots:
        note += " Objectives by pairs, across · up; outlined is what no particle of its prompt beats in both."
    return Pictures([place], note, prompts[:SHOWN], prompts[SHOWN:], plots)


def _fronts(place: int, particles: Particles, number: int) -> list[Plot]:
    """A scatter plot for each pair of further scores, with the front of the pair."""
    plots: list[Plot] = []
    for across, up in list(combinations(particles.scores, 2))[:PAIRS]:
        pair = torch.stack([particles.scores[across], particles.scores[up]], 1)
        known = pair.isfinite().all(1)
        if not bool(known.any()):
            continue
        pair, group = pair[known], particles.group[known]
        best = torch.cat([(mine := pair[group == prompt])[front(mine)] for prompt in group.unique()])
        chart = scatter_chart(Cloud(place, pair, best), limits_of([pair]), number + len(plots))
        plots.append(Plot(f"{across} · {up}", place, False, chart))
    return plots


def _unseen(record: RunRecord) -> frozenset[str]:
    """Prompts that the run's testbed holds out of training; none where that is not known.

    A testbed from elsewhere is not asked: a report runs no code of others.
    """
    section = record.section("testbed")
    if ":" in str(section.get("name")):
        return frozenset()
    part = read_part("testbeds", "testbed", section, Problems())
    if part is None:
        return frozenset()
    try:
        testbed = part.build()
        # a testbed that knows its prompts is not made to load its model
        task = testbed if hasattr(testbed, "heldout_prompts") else cast(Task, testbed.task())
    except UserError:
        return frozenset()
    return frozenset(task.heldout_prompts) - frozenset(task.prompts)


def _caption(record: RunRecord, group: int) -> str:
    return record.steered[group].prompt if group < len(record.steered) else f"prompt {group + 1}"


def _particle_strips(particles: Particles, group: int, place: int) -> list[Strip]:
    order = heaviest(particles.group, particles.weight, group)
    top = particles.best[group][None]
    best = _strip("best", place, particles.media[top], particles.look.take(top), BEST)
    if not len(order):
        return [best]
    return [best, _strip("particles", place, particles.media[order], particles.look.take(order))]


def _finite(points: Tensor) -> Tensor:
    return points[points.isfinite().all(dim=1)].float()


def _two_of(media: Tensor) -> str:
    return f" The first two of {media.shape[1]} coordinates are drawn." if media.shape[1] > 2 else ""
