"""Monitors watch a run for drift, collapse and hacking, and say so in a sentence that ends with advice.

A monitor is a pure function of the rows of ``metrics.jsonl``, so a resumed run judges as an uninterrupted one does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
    """Largest fall of a held-out reward since before training, in units of the tolerance that it declares, or else of
    its standard deviation over the samples then."""
    heldout_gap: float = Field(default=0.5, gt=0)
    """Largest part of the gain in training reward that held-out prompts may lack."""
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
    """

    monitor: str
    iteration: int
    value: float
    threshold: float
    advice: str


Measure = Callable[[Sequence[Row], Mapping[str, float]], float | None]
"""(rows so far, evaluation before training) -> number, or None where there is nothing to judge."""


@dataclass(frozen=True)
class Monitor:
    """A name, the number it watches, whether that may not rise above or fall below its threshold, and the advice."""

    name: str
    measure: Measure
    above: bool
    advice: str


def _last(name: str) -> Measure:
    return lambda rows, before: rows[-1].get(name)


def _share_of_first(name: str) -> Measure:
    def measure(rows: Sequence[Row], before: Mapping[str, float]) -> float | None:
        first, now = rows[0].get(name), rows[-1].get(name)
        return None if first is None or now is None or first <= 0 else now / first

    return measure


def _heldout_fall(rows: Sequence[Row], before: Mapping[str, float]) -> float | None:
    """The largest fall of any held-out reward, in units of its tolerance or of its spread before training."""
    falls = [
        (before[name] - rows[-1][f"heldout/{name}"]) / unit
        for name in before
        if (unit := before.get(f"{name}_tolerance", before.get(f"{name}_std", 0.0))) > 0
        and f"heldout/{name}" in rows[-1]
    ]
    return max(falls, default=None)


def _heldout_gap(rows: Sequence[Row], before: Mapping[str, float]) -> float | None:
    """1 - (gain on held-out prompts)/(gain on training prompts); only once training has gained something."""
    seen = [row for row in rows if {"heldout/reward", "reward_mean", "reward_std"} <= row.keys()]
    if len(seen) < 2:
        return None
    gain = seen[-1]["reward_mean"] - seen[0]["reward_mean"]
    if gain <= 0.25 * max(seen[0]["reward_std"], 1e-12):
        return None
    return 1 - (seen[-1]["heldout/reward"] - seen[0]["heldout/reward"]) / gain


MONITORS = (
    Monitor(
        "kl_reference",
        _last("kl_reference"),
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
        "a reward that is only watched has fallen far: what is rewarded no longer stands for what is wanted; look at "
        "samples, raise the KL weight, or make the watched reward a part of the reward",
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
        value = monitor.measure(rows, before)
        threshold: float = getattr(config, monitor.name)
        if value is not None and (value > threshold if monitor.above else value < threshold):
            verdicts.append(Verdict(monitor.name, int(rows[-1]["iteration"]), value, threshold, monitor.advice))
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
