"""Attribution: which share of the variance of a step's advantage is the doing of that step's own noise.

A policy gradient moves a step towards the noise that its advantage praises; what the advantage owes to other steps is
noise to it. With H_k everything that was drawn up to and including step k, and A_k the advantage of that step's edges,

    own_k = (Var E[A_k | H_k] - Var E[A_k | H_{k-1}]) / Var A_k,

the mean variance that the step's own noise explains where the state it starts from is known. Variances are those within
groups; what a group shares (its prompt, its start) cancels. For one terminal reward own_k adds up to at most 1 over the
steps; for a credit that is a function of the step alone it is 1. No model is fitted, so it holds in any dimension.

The two explained variances are covariances of rollouts that share their noise up to a step and draw the rest anew
(pick-freeze estimation of Sobol indices). Beside it stands R² of a linear fit of the advantage on the injected noise in
each group, where the latent is small enough, with its chance level: the same after shuffling the advantages.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor

from benchmarks.paired import machine
from benchmarks.signal import Setting, fingerprint, task_of
from difftilt.checks.attribution import fitted_squares
from difftilt.checks.trial import loop_of
from difftilt.credit.group import group_advantage
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import replay
from difftilt.sampling.steps import GaussianStep
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.policy_gradient import PolicyGradient

DRAWN = ("step", "siblings")
"""Purposes of the noise that steps inject; all other noise (prompts, starts, windows) is always shared."""
SMALL = 4
"""Dimensions up to which the linear fit is shown: it needs far more members in a group than that."""


@dataclass(frozen=True)
class Redrawn(Noise):
    """The same noise, but for what steps from ``since`` on inject.

    Attributes:
        since: first step whose noise is another; None redraws nothing.
        salt: which other noise.
    """

    since: int | None = None
    salt: int = 0

    def normal(
        self, index: Int[Tensor, " rows"], shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0
    ) -> Float[Tensor, "rows *noise"]:
        """As the original up to step ``since``."""
        own = super().normal(index, shape, purpose=purpose, step=step)
        if self.since is None or purpose not in DRAWN:
            return own
        other = super().normal(index, shape, purpose=f"{purpose} again {self.salt}", step=step)
        late = torch.as_tensor(step).expand(len(index)).to(own.device) >= self.since
        return torch.where(late.reshape(-1, *[1] * len(shape)), other, own)


@dataclass(frozen=True)
class Share:
    """A share of variance and its standard error over iterations."""

    share: float
    error: float


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name, testbed, method, settings: as in :class:`~benchmarks.signal.Setting`.
        weights: digest of the base weights.
        repeats: independent iterations.
        own: step -> share of its own noise.
        mean: of these over the steps.
        fit, chance: step -> R² of the linear fit, and of the same after shuffling; empty for large latents.
        evaluations: network evaluations of one ``collect``, rewards of one.
    """

    name: str
    testbed: str
    method: str
    settings: dict[str, object]
    weights: str
    repeats: int
    own: dict[int, Share]
    mean: Share
    fit: dict[int, float]
    chance: dict[int, float]
    evaluations: float
    reward_calls: float


@dataclass(frozen=True)
class Credit:
    """Centred advantages by step, and the groups they are compared in."""

    advantage: Float[Tensor, " edges"]
    step: Int[Tensor, " edges"]


def credit_of(experience: Experience) -> Credit:
    """The advantages of all edges (columns added up), centred in their group and step."""
    edges = experience.edges
    assert edges.advantage is not None
    label = experience.group[edges.sample] * (int(edges.step.max()) + 1) + edges.step
    return Credit(group_advantage(edges.advantage.sum(1), label, std="none").double(), edges.step)


def collected(loop: Loop, iteration: int, since: int | None, salt: int = 0) -> Experience:
    """One rollout with its credit, with the noise of the steps from ``since`` on drawn anew; the method forgets it."""
    loop.run.begin(iteration)
    noise, state = loop.run.noise, loop.method.state_dict()
    loop.run.noise = Redrawn(noise.seed, noise.iteration, noise.scope, since, salt)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    loop.run.noise = noise
    if iteration > 0:
        loop.method.load_state_dict(state)
    return experience


@dataclass
class Moments:
    """Of one step in one iteration: variance, and what is explained by the noise up to it and before it."""

    variance: float
    through: float
    before: float


def moments_of(loop: Loop, iteration: int) -> tuple[dict[int, Moments], Experience]:
    """Covariances between rollouts that share their noise up to a step."""
    experience = collected(loop, iteration, None)
    credit = credit_of(experience)
    steps: list[int] = credit.step.unique().tolist()
    # two rollouts with independent ends for every place where the ends may begin
    ends = {since: _pair(loop, iteration, since) for since in {*steps, *(step + 1 for step in steps)}}

    def covariance(step: int, since: int) -> float:
        here = credit.step == step
        one, other = (advantage[here] for advantage in ends[since])
        return float((one * other).mean())

    return {
        step: Moments(
            float(credit.advantage[credit.step == step].square().mean()),
            covariance(step, step + 1),
            covariance(step, step),
        )
        for step in steps
    }, experience


def _pair(loop: Loop, iteration: int, since: int) -> tuple[Tensor, Tensor]:
    one, other = (credit_of(collected(loop, iteration, since, salt)).advantage for salt in (1, 2))
    return one, other


def share_of(moments: Sequence[Moments]) -> Share:
    """(through - before)/variance, each a mean over iterations; jackknifed."""

    def ratio(kept: Sequence[Moments]) -> float:
        variance = sum(one.variance for one in kept)
        return sum(one.through - one.before for one in kept) / variance if variance > 0 else 0.0

    without = [ratio([*moments[:left], *moments[left + 1 :]]) for left in range(len(moments))]
    spread = statistics.pvariance(without) * (len(moments) - 1) if len(moments) > 1 else 0.0
    return Share(ratio(moments), spread**0.5)


def fits_of(loop: Loop, experience: Experience, seed: int) -> dict[int, tuple[float, float, float]]:
    """Step -> (explained, explained after shuffling, total) sums of squares of a linear fit in each group."""
    method, edges = loop.method, experience.edges
    assert isinstance(method, PolicyGradient)
    assert edges.x_s is not None
    with torch.no_grad():
        condition = experience.rows(torch.arange(len(edges.step))).condition
        step = replay(loop.run.denoiser("current"), method.preset, edges, condition).step
    assert isinstance(step, GaussianStep)
    injected = ((edges.x_s - step.mean) / step.std[:, None]).flatten(1).double()
    advantage = credit_of(experience).advantage
    found: dict[int, tuple[float, float, float]] = {}
    generator = torch.Generator().manual_seed(seed)
    for place in edges.step.unique().tolist():
        sums = [0.0, 0.0, 0.0]
        for group in experience.group.unique():
            rows = ((edges.step == place) & (experience.group[edges.sample] == group)).nonzero()[:, 0]
            if len(rows) < injected.shape[1] + 2:
                continue
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            sums[0] += fitted_squares(advantage[None, rows], injected[None, rows])
            sums[1] += fitted_squares(advantage[None, shuffled], injected[None, rows])
            sums[2] += float(advantage[rows].square().sum())
        found[place] = (sums[0], sums[1], sums[2])
    return found


def measure(setting: Setting, repeats: int) -> Row:
    """One row of the table."""
    loop = loop_of(setting.method, task_of(setting), forward_batch=64, **setting.settings)
    collected(loop, 0, None)  # whatever a method prepares before its first rollout
    before = loop.run.ledger.copy()
    collected(loop, 1, None)
    cost = loop.run.ledger - before
    found: dict[int, list[Moments]] = {}
    fits: dict[int, list[tuple[float, float, float]]] = {}
    for iteration in range(1, repeats + 1):
        moments, experience = moments_of(loop, iteration)
        for step, one in moments.items():
            found.setdefault(step, []).append(one)
        if experience.x_0 is not None and experience.x_0[0].numel() <= SMALL:
            for step, sums in fits_of(loop, experience, iteration).items():
                fits.setdefault(step, []).append(sums)
    own = {step: share_of(moments) for step, moments in sorted(found.items())}
    return Row(
        name=setting.name,
        testbed=setting.testbed,
        method=setting.method,
        settings=dict(setting.settings),
        weights=fingerprint(task_of(setting)),
        repeats=repeats,
        own=own,
        mean=_mean(list(own.values())),
        fit={step: _share(sums, 0) for step, sums in sorted(fits.items())},
        chance={step: _share(sums, 1) for step, sums in sorted(fits.items())},
        evaluations=cost.nfe,
        reward_calls=cost.reward_calls,
    )


def _mean(shares: Sequence[Share]) -> Share:
    """Mean over steps; errors added as if independent."""
    error = sum(share.error**2 for share in shares) ** 0.5 / len(shares)
    return Share(statistics.mean(share.share for share in shares), error)


def _share(sums: Sequence[tuple[float, float, float]], column: int) -> float:
    total = sum(one[2] for one in sums)
    return sum(one[column] for one in sums) / total if total > 0 else float("nan")


def run(settings: Sequence[Setting], repeats: int, path: Path) -> list[Row]:
    """Measure all settings; the file is rewritten after each of them."""
    rows: list[Row] = []
    for setting in settings:
        rows.append(measure(setting, repeats))
        path.parent.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Any] = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """One row per setting."""
    shown = Table(
        "testbed",
        "setting",
        "own %",
        "own % by step",
        "fit %",
        "chance %",
        "nfe",
        "rewards",
        box=None,
        header_style="bold",
    )
    for row in rows:
        shown.add_row(
            row.testbed,
            row.name,
            f"{100 * row.mean.share:.0f} ± {100 * row.mean.error:.0f}",
            " ".join(f"{step}:{100 * one.share:.0f}" for step, one in row.own.items()),
            " ".join(f"{step}:{100 * one:.0f}" for step, one in row.fit.items()),
            f"{100 * statistics.mean(row.chance.values()):.0f}" if row.chance else "",
            f"{row.evaluations:.0f}",
            f"{row.reward_calls:.0f}",
        )
    return shown


def settings_of(
    testbed: str, groups: int, size: int, world: Mapping[str, object], auxiliary: tuple[str, ...] = ()
) -> list[Setting]:
    """Every method of the family on one testbed; ``auxiliary`` are held-out rewards of it."""
    chains: dict[str, Any] = {"groups": groups, "group_size": size, "kl_weight": 0.0, "clip_range": 0.1}

    def of(name: str, method: str, **settings: Any) -> Setting:
        return Setting(name, testbed, method, settings, world)

    return [
        of("flow-grpo", "flow-grpo", **chains),
        of("flow-grpo, one start", "flow-grpo", share_start=True, **chains),
        of("flow-grpo, window 0-1", "flow-grpo", share_start=True, window={"width": 2, "low": 0, "high": 2}, **chains),
        of("gardo", "gardo", auxiliary=auxiliary, **chains),
        of("dense-grpo", "dense-grpo", share_start=True, **chains),
        of("tp-grpo", "tp-grpo", share_start=True, kernel="flow_sde", **chains),
        of("g2rpo, one granularity", "g2rpo", granularities=(1,), **chains),
        of("g2rpo", "g2rpo", granularities=(1, 2, 3), **chains),
        of("branch-grpo", "branch-grpo", groups=groups, group_size=16, kernel="flow_sde", noise_level=0.7),
        of("b2-diffurl", "b2-diffurl", groups=groups, group_size=size, kernel="flow_sde", noise_level=0.7),
        of("euphonium", "euphonium", **{**chains, "kernel": "flow_sde", "noise_level": 0.7}),
    ]


def chosen(size: str) -> list[Setting]:
    """The table of the documentation, or two rows that only show that everything runs."""
    if size == "tiny":
        return settings_of("mixtures", 2, 8, {})[1:3]
    taught = {"categories": ("count", "binding", "position", "count_position")}
    ring = {"steps": 10, "shift": 3.0, "noise_level": 0.7, "reward": "distance", "centre": (2.0, 0.0)}
    return [*settings_of("mixtures", 16, 24, ring), *settings_of("shapes", 8, 12, taught, ("clean", "fidelity"))]
