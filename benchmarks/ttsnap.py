"""Pruned search replayed over recorded rewards: no generation, so every schedule and budget costs seconds.

A record holds the plain and the noise-aware score of the x0-prediction after every network call, and the reward of the
finished sample, (prompts, candidates, steps). For each it says how well early scores order the candidates, whether the
best one survives, and how the mean best reward grows with the budget, with honest cost (a score at step s needs s + 1
calls) and with that of the published simulator (one call fewer). Budgets are TFLOPs of the paper's FLUX.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from benchmarks.paired import machine
from difftilt.checks.ttsnap import ALONE, PUBLISHED, RING, SCORE, STEP, Tensors, record, ring
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.statistics import kendall_tau, relative_increase, top_keep
from difftilt.steering.pruning import Schedule, budget_curve
from difftilt.steering.ttsnap import TTSnap

LEVELS = 15
"""Steps 0 to 14 have a noise-aware reward; later ones keep the plain one."""


@dataclass(frozen=True)
class Setting:
    """What is recorded and replayed.

    Attributes:
        images: training trajectories.
        prompts, candidates: of the record.
        budgets: TFLOPs.
        epochs: passes of every level, and ten times as many before the first.
    """

    images: int
    prompts: int
    candidates: int
    budgets: tuple[int, ...]
    epochs: int


SIZES = {
    "full": Setting(4000, 40, 200, (400, 1000, 1600, 2200, 2800, 3400, 4000), 4),
    "tiny": Setting(40, 2, 64, (400, 1000, 1600), 1),
}


@dataclass(frozen=True)
class Early:
    """How well one kind of score orders the candidates at one step.

    Attributes:
        step: network calls before it.
        tau: Kendall's, to the final reward, averaged over prompts.
        kept_quarter: share of prompts whose best candidate is among the best quarter.
        kept: the same, averaged over the shares 0.05, 0.1, ..., 0.95.
        lost: reward that is lost where it is not among the best quarter.
    """

    step: int
    tau: float
    kept_quarter: float
    kept: float
    lost: float


@dataclass(frozen=True)
class Replay:
    """Curves under one way to count.

    Attributes:
        start: s_0 of the cost formula.
        candidates: that each budget affords, of best-of-n and of the pruned search.
        reward: mean best reward at each budget, by method.
        increase: area gained over best-of-n, relative to its own.
    """

    start: int
    candidates: dict[str, list[int]]
    reward: dict[str, list[float]]
    increase: dict[str, float]


@dataclass(frozen=True)
class Study:
    """Everything of one record."""

    setting: Setting
    budgets: tuple[int, ...]
    early: dict[str, list[Early]]
    replays: list[Replay]


def early(scores: Mapping[int, Tensor], final: Tensor) -> list[Early]:
    """One row per step."""
    size = final.shape[1]
    shares = [max(1, round(size * share / 20)) for share in range(1, 20)]
    rows: list[Early] = []
    for step, score in sorted(scores.items()):
        quarter = top_keep(score, final, [max(1, size // 4)])
        rows.append(
            Early(
                step,
                float(kendall_tau(score, final).nanmean()),
                float(quarter.accuracy[0]),
                float(top_keep(score, final, shares).accuracy.mean()),
                float(quarter.gap[0]),
            )
        )
    return rows


def replayed(known: Tensors, budgets: Sequence[int], start: int) -> Replay:
    """Best-of-n against both kinds of pruning, at equal budgets."""
    kinds = {
        "best-of-n": (ALONE, known.plain),
        "plain": (PUBLISHED, known.plain),
        "noise-aware": (PUBLISHED, known.tuned),
    }
    counts: dict[str, list[int]] = {}
    curves: dict[str, Tensor] = {}
    for name, (schedule, scores) in kinds.items():
        # best-of-n is never counted short
        counts[name] = [affordable(schedule, budget, -1 if name == "best-of-n" else start) for budget in budgets]
        values = [scores[step][None] for step in schedule.at]
        curves[name] = budget_curve(schedule, values, known.final[None], counts[name], Noise(3))[:, 0]
    x = torch.tensor(budgets).double()
    gains = {name: relative_increase(x, curves[name], curves["best-of-n"]) for name in ("plain", "noise-aware")}
    return Replay(start, counts, {name: curve.tolist() for name, curve in curves.items()}, gains)


def affordable(schedule: Schedule, budget: float, start: int) -> int:
    """Candidates for a budget of TFLOPs."""
    return schedule.affordable(budget, STEP, SCORE, start)


def run(setting: Setting, path: Path) -> Study:
    """Fit, record, replay, and write the study."""
    chosen = {"prune_steps": tuple(range(LEVELS)), "keep": (1.0,) * LEVELS, "images": setting.images}
    chosen |= {"epochs": setting.epochs, "warm_up_epochs": 10 * setting.epochs}
    steerer, task = TTSnap(RING.model_copy(update=chosen)), ring()
    steerer.fit(task, denoiser(task.model, forward_batch=512), task.reward, task.prompts, Noise(7))
    known = record(steerer, task, [""] * setting.prompts, setting.candidates, 2)
    rows = {"plain": early(known.plain, known.final), "noise-aware": early(known.tuned, known.final)}
    study = Study(setting, setting.budgets, rows, [replayed(known, setting.budgets, start) for start in (-1, 0)])
    path.parent.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Any] = {"machine": machine(), **asdict(study)}
    path.write_text(json.dumps(stored, indent=1) + "\n")
    return study


def tables(study: Study) -> list[Table]:
    """Order at every step, then reward at every budget."""
    order = Table("step", "tau", "kept 1/4", "kept", "tau, fitted", "kept 1/4", "kept", box=None, header_style="bold")
    for plain, tuned in zip(study.early["plain"], study.early["noise-aware"], strict=True):
        cells = [f"{one:.2f}" for row in (plain, tuned) for one in (row.tau, row.kept_quarter, row.kept)]
        order.add_row(str(plain.step), *cells)
    curves = Table("s_0", "method", *map(str, study.budgets), "increase", box=None, header_style="bold")
    for replay in study.replays:
        for name, rewards in replay.reward.items():
            gain = f"{100 * replay.increase[name]:.0f}%" if name in replay.increase else ""
            curves.add_row(str(replay.start), name, *(f"{one:.2f}" for one in rewards), gain)
    return [order, curves]
