"""Monitors watch a run for drift, collapse and hacking, and say so in a sentence that ends with advice.

A monitor is a pure function of the rows of ``metrics.jsonl``, so a resumed run judges as an uninterrupted one does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import cast

from pydantic import Field

from difftilt.config import Config

Row = dict[str, float]


class MonitorConfig(Config):
    """Thresholds of the monitors."""

    kl_reference: float = Field(default=50.0, gt=0)
    """Largest path KL to the reference, in nats."""
    diversity: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of the first iteration's within-group diversity."""
    heldout_fall: float = Field(default=1.0, gt=0)
    """Largest fall of a reward on held-out prompts since before training: of a held-out reward that declares a
    tolerance in units of that, of any other, the training reward included, in standard deviations over the samples
    then."""
    heldout_gap: float = Field(default=0.5, gt=0)
    """Largest part of the certain gain in training reward that held-out prompts may lack."""
    clip_fraction: float = Field(default=0.5, gt=0, le=1)
    """Largest share of clipped rows."""
    zero_std_fraction: float = Field(default=0.5, gt=0, le=1)
    """Largest share of groups without variance."""
    grad_norm: float = Field(default=100.0, gt=0)
    """Largest gradient norm before clipping."""


@dataclass(frozen=True)
class Verdict:
    """One monitor's finding.

    Attributes:
        monitor: its name.
        iteration: row it speaks of.
        value, threshold: what was measured and what it was held against.
        advice: a sentence: what happened and what to do.
        of: name of what was measured, where the monitor watches several numbers.
    """

    monitor: str
    iteration: int
    value: float
    threshold: float
    advice: str
    of: str = ""


@dataclass(frozen=True)
class Reading:
    """What a monitor measured, and of what where it watches several numbers."""

    value: float
    of: str = ""


Measure = Callable[[Sequence[Row], Mapping[str, float]], Reading | None]
"""(rows so far, evaluation before training) -> reading, or None where there is nothing to judge."""


@dataclass(frozen=True)
class Monitor:
    """A name, what it watches, whether that may not rise above or fall below its threshold, and the advice.

    The advice may name what was measured by ``{of}``.
    """

    name: str
    measure: Measure
    above: bool
    advice: str


def _last(name: str) -> Measure:
    return lambda rows, before: Reading(rows[-1][name]) if name in rows[-1] else None


RECENT = 5
"""Iterations whose median drift is judged between evaluations."""


def _drift(rows: Sequence[Row], before: Mapping[str, float]) -> Reading | None:
    """The drift of an evaluation, or between evaluations the median of the newest iterations' own.

    An iteration's own drift is one step of the grid per sample, times the number of steps: right on average, with rare
    values many times too large, which the median passes over.
    """
    if "heldout/kl_reference" in rows[-1]:
        return Reading(rows[-1]["heldout/kl_reference"])
    recent = [row["kl_reference"] for row in rows[-RECENT:] if "kl_reference" in row]
    return Reading(median(recent)) if "kl_reference" in rows[-1] and len(recent) == RECENT else None


def _share_of_first(name: str) -> Measure:
    def measure(rows: Sequence[Row], before: Mapping[str, float]) -> Reading | None:
        first, now = rows[0].get(name), rows[-1].get(name)
        return None if first is None or now is None or first <= 0 else Reading(now / first)

    return measure


def _heldout_fall(rows: Sequence[Row], before: Mapping[str, float]) -> Reading | None:
    """The largest fall of any reward on held-out prompts, in units of its tolerance or of its spread before training.

    The evaluation before training has a tolerance only of held-out rewards.
    """
    falls = [
        Reading((before[name] - rows[-1][f"heldout/{name}"]) / unit, name)
        for name in before
        if (unit := before.get(f"{name}_tolerance", before.get(f"{name}_std", 0.0))) > 0
        and f"heldout/{name}" in rows[-1]
    ]
    return max(falls, key=lambda reading: reading.value, default=None)


NOISE = 2.0
"""Standard errors that are taken off a gain before it counts as certain."""
GAIN = 0.25
"""Smallest certain gain in training reward, in its standard deviations over the samples of the first iteration."""


def _heldout_gap(rows: Sequence[Row], before: Mapping[str, float]) -> Reading | None:
    """1 - (gain on held-out prompts)/(certain gain on training prompts); only once training has gained something.

    Gains go from the iterations up to the first evaluation to those since the last but one. Every iteration has other
    prompts, so its mean reward is noisy: a window's mean is compared, less two standard errors, with the noise taken
    from successive differences (von Neumann 1941), which a slow trend does not reach. The held-out reward of a window
    is the mean of the evaluations at its two ends.
    """
    seen = [place for place, row in enumerate(rows) if "heldout/reward" in row]
    if len(seen) < 2 or "reward" not in before or any("reward_mean" not in row for row in rows):
        return None
    means = [row["reward_mean"] for row in rows[: seen[-1] + 1]]
    first, last = means[: seen[0] + 1], means[seen[-2] + 1 :]
    # a product overflows to infinity, a power raises
    squares = sum((later - earlier) * (later - earlier) for earlier, later in pairwise(means)) / (2 * (len(means) - 1))
    error = (squares * (1 / len(first) + 1 / len(last))) ** 0.5
    gain = fmean(last) - fmean(first) - NOISE * error
    if not gain > GAIN * max(rows[0].get("reward_std", 0.0), 1e-12):
        return None
    held = [before["reward"], *(rows[place]["heldout/reward"] for place in seen)]
    return Reading(1 - (held[-2] + held[-1] - held[0] - held[1]) / 2 / gain)


MONITORS = (
    Monitor(
        "kl_reference",
        _drift,
        True,
        "the model has moved far from its reference: raise the KL weight, lower the learning rate, or stop earlier",
    ),
    Monitor(
        "diversity",
        _share_of_first("diversity"),
        False,
        "samples of one prompt have become alike: raise the KL weight, or reward diversity; the reward is being hacked "
        "if it still rises",
    ),
    Monitor(
        "heldout_fall",
        _heldout_fall,
        True,
        "{of} has fallen far on held-out prompts: what is rewarded no longer stands for what is wanted; look at "
        "samples, raise the KL weight, or make {of} a part of the reward",
    ),
    Monitor(
        "heldout_gap",
        _heldout_gap,
        True,
        "the training reward rises without the held-out one: the gain is particular to the training prompts or to a "
        "weakness of the reward; add prompts, look at samples, raise the KL weight",
    ),
    Monitor(
        "clip_fraction",
        _last("clip_fraction"),
        True,
        "most ratios are clipped, so most samples teach nothing: lower the learning rate or the updates per iteration, "
        "or widen clip_range",
    ),
    Monitor(
        "zero_std_fraction",
        _last("zero_std_fraction"),
        True,
        "most groups have one reward for all samples and teach nothing: choose prompts of middling difficulty, larger "
        "groups, or a finer reward",
    ),
    Monitor(
        "grad_norm",
        _last("grad_norm"),
        True,
        "the gradient is far above its clip: lower the learning rate, and look for a reward of a very large scale",
    ),
)


def judge(rows: Sequence[Row], config: MonitorConfig, before: Mapping[str, float]) -> list[Verdict]:
    """Verdicts on the newest row, given all rows so far and the evaluation before training."""
    verdicts: list[Verdict] = []
    for monitor in MONITORS:
        reading = monitor.measure(rows, before)
        threshold: float = getattr(config, monitor.name)
        if reading is not None and (reading.value > threshold if monitor.above else reading.value < threshold):
            advice = monitor.advice.format(of=reading.of)
            iteration = int(rows[-1]["iteration"])
            verdicts.append(Verdict(monitor.name, iteration, reading.value, threshold, advice, reading.of))
    return verdicts


def summarise(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """One entry per monitor that spoke: its last verdict, its first iteration, and how many iterations it spoke in."""
    entries: dict[str, dict[str, object]] = {}
    for verdict in verdicts:
        earlier = entries.get(verdict.monitor, {"first_iteration": verdict.iteration, "iterations": 0})
        count = cast(int, earlier["iterations"]) + 1
        entries[verdict.monitor] = {
            **asdict(verdict),
            "first_iteration": earlier["first_iteration"],
            "iterations": count,
        }
    return list(entries.values())
