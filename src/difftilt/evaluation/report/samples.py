"""What a run kept to look at: samples at fixed prompts and noise before and after training, or steered particles."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.evaluation.report.tolerant import Damage, items, read_object, read_tensors, read_texts
from difftilt.recipes.steered import COMPONENT
from difftilt.training.looks import Look

FASTEST = 768_000
"""Samples per second beyond which a rate is no rate."""

Kind = Literal["images", "audio", "vectors", "tokens"]


@dataclass(frozen=True)
class Stage:
    """The samples of one moment of a training run.

    Attributes:
        step: iterations done; 0 is before training.
        media: as decoded, (prompts · size, ...), prompts outermost.
        score: of each sample, where the run kept it.
        look: strings and drawings, where the run kept them.
    """

    step: int
    media: Shaped[Tensor, "rows *shape"]
    score: Float[Tensor, " rows"] | None = None
    look: Look = field(default_factory=Look)


@dataclass(frozen=True)
class Gallery:
    """Samples at fixed prompts and fixed noise.

    Attributes:
        prompts: captions.
        heldout: whether the prompt was never trained on.
        size: samples of each prompt.
        stages: before training and newest, or the one of them that is there.
        score: name of what the samples are scored by.
        rate: samples per second of audio, where the run says so.
    """

    prompts: tuple[str, ...]
    heldout: tuple[bool, ...]
    size: int
    stages: tuple[Stage, ...]
    score: str = "score"
    rate: int | None = None


@dataclass(frozen=True)
class Particles:
    """The particles of a steerer.

    Attributes:
        media: as decoded, one row per particle.
        group: prompt of each particle.
        weight: of each particle, normalised within its prompt.
        best: for each prompt the row of the highest reward.
        scores: further scores of each particle by name, those of a search for several objectives.
        look: strings and drawings, where the run kept them.
    """

    media: Shaped[Tensor, "rows *shape"]
    group: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    best: Int[Tensor, " prompts"]
    scores: Mapping[str, Float[Tensor, " rows"]] = field(default_factory=dict[str, Tensor])
    look: Look = field(default_factory=Look)


def kind_of(media: Tensor) -> Kind | None:
    """What media of this type and rank are shown as; None where there is no way to show them."""
    if media.numel() == 0 or media.is_complex():
        return None
    if media.dim() == 4:
        return "images"
    if media.dim() == 3 and media.is_floating_point():
        return "audio"
    if media.dim() == 2:
        return "vectors" if media.is_floating_point() else "tokens"
    return None


def read_gallery(run: Path, damage: Damage, *, evaluation: bool = False) -> Gallery | None:
    """The gallery of a training run, or of evaluations; None where it kept none or none can be read."""
    if (run / "samples").is_dir() and not (run / "samples" / "prompts.json").exists():
        damage.add("prompts.json is missing: the samples cannot be shown")
    described = read_object(run / "samples" / "prompts.json", damage)
    if not described:
        return None
    prompts = tuple(str(prompt) for prompt in items(described.get("prompts")))
    flags = tuple(bool(flag) for flag in items(described.get("heldout")))
    size = described.get("size")
    if not prompts or len(flags) != len(prompts) or not isinstance(size, int) or size < 1:
        damage.add("prompts.json is damaged (it needs prompts, as many flags heldout, and a size)")
        return None
    found = [
        _stage(path, step, len(prompts) * size, damage) for step, path in _ends(run / "samples", damage, evaluation)
    ]
    stages = tuple(stage for stage in found if stage is not None)
    if len({(kind_of(stage.media), stage.media.shape[1:]) for stage in stages}) > 1:
        damage.add("the samples before and after are of different shapes; only the newest are shown")
        stages = stages[-1:]
    rate, score = described.get("rate"), str(described.get("score", "score"))
    known = rate if isinstance(rate, int) and 0 < rate <= FASTEST else None
    return Gallery(prompts, flags, size, stages, score, known) if stages else None


def read_particles(run: Path, damage: Damage) -> Particles | None:
    """The particles of a steering directory; None where none can be read."""
    path = run / "samples.safetensors"
    if not path.exists():
        damage.add(f"{path.name} is missing")
    tensors = read_tensors(path, damage)
    if not tensors:
        return None
    missing = [name for name in ("media", "group", "weight", "best") if name not in tensors]
    if missing:
        damage.add(f"{path.name} is damaged (it lacks {', '.join(missing)})")
        return None
    media, group, weight, best = (tensors[name] for name in ("media", "group", "weight", "best"))
    if media.is_complex():
        damage.add(f"{path.name} holds complex numbers, which cannot be shown")
        return None
    shapes = (
        kind_of(media)
        and not weight.is_complex()
        and group.dim() == weight.dim() == best.dim() == 1
        and len(media) == len(group)
    )
    fitting = shapes and len(weight) == len(group) and _points_into(best, len(media))
    if not fitting or not _points_into(group, len(best)):
        damage.add(f"{path.name} is damaged (its tensors do not fit together)")
        return None
    scores = {
        name.removeprefix(COMPONENT): values.double()
        for name, values in tensors.items()
        if name.startswith(COMPONENT) and values.shape == group.shape and not values.is_complex()
    }
    look = _look(path, tensors, len(media), damage)
    return Particles(media, group.long(), weight.double(), best.long(), scores, look)


def prompts_of(summary: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The entries of ``result.json``, one per prompt."""
    return [entry for entry in items(summary.get("prompts")) if isinstance(entry, dict)]


def _ends(directory: Path, damage: Damage, evaluation: bool) -> list[tuple[int, Path]]:
    """(step, file) of the stage before training and of the newest one; of evaluations of the first and the last."""
    matches = ((re.fullmatch(r"step_(\d+)\.safetensors", path.name), path) for path in sorted(directory.iterdir()))
    found = sorted((int(match[1]), path) for match, path in matches if match)
    if evaluation:
        return [*found[:1], *found[1:][-1:]]
    if not found or found[0][0] != 0:
        damage.add("step_0.safetensors is missing: there are no samples from before training")
    return [found[0], found[-1]] if len(found) > 1 and found[0][0] == 0 else found[-1:]


def _stage(path: Path, step: int, rows: int, damage: Damage) -> Stage | None:
    tensors = read_tensors(path, damage)
    media = tensors.get("media")
    if media is None:
        if tensors:
            damage.add(f"{path.name} is damaged (it lacks media)")
        return None
    if media.is_complex():
        damage.add(f"{path.name} holds complex numbers, which cannot be shown")
        return None
    if kind_of(media) is None or len(media) != rows:
        damage.add(f"{path.name} holds samples of shape {tuple(media.shape)}, which do not fit {rows} rows of prompts")
        return None
    score, look = tensors.get("score"), _look(path, tensors, rows, damage)
    if score is None or score.shape != (rows,) or score.is_complex():
        return Stage(step, media, None, look)
    if not score.isfinite().all():
        damage.add(f"{path.name} holds scores that are not finite; the mean of their prompt is a dash")
    return Stage(step, media, score, look)


def _look(path: Path, tensors: Mapping[str, Tensor], rows: int, damage: Damage) -> Look:
    """The strings beside a file of samples, and the drawings in it."""
    text = read_texts(path.with_suffix(".json"), rows, damage)
    drawn, drawn_rows = tensors.get("drawn"), tensors.get("drawn_rows")
    if drawn is None or drawn_rows is None:
        return Look(text)
    fitting = drawn.dim() == 4 and drawn.dtype == torch.uint8 and drawn_rows.shape == drawn.shape[:1]
    if not fitting or drawn.numel() == 0 or not _points_into(drawn_rows, rows):
        damage.add(f"{path.name} is damaged (its drawings do not fit its samples)")
        return Look(text)
    return Look(text, drawn, drawn_rows.long())


def _points_into(index: Tensor, rows: int) -> bool:
    plain = not index.is_floating_point() and not index.is_complex()
    return plain and bool(((index >= 0) & (index < rows)).all())
