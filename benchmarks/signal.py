"""How much of a policy gradient is signal: independent gradients at the base weights, nothing trained.

Every iteration of a method draws new prompts and new noise, so its gradient is g = m + noise with E[noise] = 0, and for
two independent iterations E<g, g'> = |m|². The share of signal is

    share = E<g, g'> / E|g|²,

the cosine between two gradients if all had one length. An average of n iterations has the ratio n·share/(1 - share) of
signal to noise, which is therefore quoted per 1000 network evaluations. Optimisers that divide by the root mean square
of every coordinate follow ``share_scaled``, the same of g/rms(g). Standard errors are jackknifed over the iterations.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.table import Table
from torch import Tensor, nn

from benchmarks.paired import machine
from difftilt.checks.trial import loop_of
from difftilt.leaves import load
from difftilt.recipes.parts import config_of
from difftilt.training.experience import Experience
from difftilt.training.loop import Loop
from difftilt.training.protocol import Phase, Task

Gradients = Float[Tensor, "iterations parameters"]


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        name: in the table.
        testbed, method: leaves.
        settings: of the method.
        world: of the testbed.
    """

    name: str
    testbed: str
    method: str
    settings: Mapping[str, object]
    world: Mapping[str, object] = field(default_factory=dict[str, object])


@dataclass(frozen=True)
class Share:
    """A share of signal, its standard error, and the root mean square length of the gradients it is about."""

    share: float
    error: float
    length: float


@dataclass(frozen=True)
class Signal:
    """One row of the table.

    Attributes:
        name, testbed, method, settings: as in :class:`Setting`.
        weights: digest of the base weights, of which all numbers are.
        repeats: independent iterations.
        all: of the whole gradient.
        scaled: of the gradient over the root mean square of each coordinate.
        steps: of the rows of one step of the chain (or one time of the grid) alone.
        evaluations: of the network in one iteration, those with a gradient included.
        per_thousand: share/(1 - share) for 1000 evaluations.
        like_nft: cosine of the expected gradient to that of diffusion-nft; None for itself and without signal.
        reward: mean of the rollouts.
        flat_groups: share of groups without variance, which teach nothing.
    """

    name: str
    testbed: str
    method: str
    settings: dict[str, object]
    weights: str
    repeats: int
    all: Share
    scaled: Share
    steps: dict[int, Share]
    evaluations: float
    per_thousand: float
    like_nft: float | None
    reward: float
    flat_groups: float


def share_of(gradients: Gradients) -> Share:
    """Share of signal of independent gradients, from the mean over all pairs."""
    gram = (gradients @ gradients.T).double()
    count = len(gram)
    without = [_ratio(gram, [row for row in range(count) if row != left]) for left in range(count)]
    spread = torch.tensor(without).var(correction=0) * (count - 1)
    return Share(_ratio(gram, list(range(count))), float(spread.sqrt()), float(gram.diagonal().mean().sqrt()))


def _ratio(gram: Float[Tensor, "rows rows"], kept: list[int]) -> float:
    block = gram[kept][:, kept]
    squares = block.diagonal().sum()
    pairs = (block.sum() - squares) / (len(kept) - 1)
    return float(pairs / squares) if squares > 0 else 0.0


def cosine_of_means(one: Gradients, other: Gradients) -> float | None:
    """Cosine between the expectations of two kinds of gradients, lengths corrected for noise; None without signal."""
    lengths = [share_of(g).share * share_of(g).length ** 2 for g in (one, other)]
    inner = float(one.mean(0).double() @ other.mean(0).double())
    return inner / (lengths[0] * lengths[1]) ** 0.5 if min(lengths) > 0 else None


@dataclass
class Draws:
    """Gradients of the iterations of one setting, summed over rows, by step; and what they cost."""

    steps: dict[int, list[Tensor]] = field(default_factory=dict[int, list[Tensor]])
    whole: list[Tensor] = field(default_factory=list[Tensor])
    rewards: list[float] = field(default_factory=list[float])
    flat: list[float] = field(default_factory=list[float])
    evaluations: float = 0.0


def draw(setting: Setting, repeats: int) -> Draws:
    """The gradients of ``repeats`` independent iterations at the base weights."""
    loop = loop_of(setting.method, task_of(setting), forward_batch=64, **setting.settings)
    draws = Draws()
    for iteration in range(repeats):
        loop.run.begin(iteration)
        with torch.no_grad():
            experience = loop.method.collect(loop.run)
        _add(draws, loop, experience)
    cost = loop.run.ledger
    draws.evaluations = (cost.nfe + cost.gradient_passes) / repeats
    return draws


def task_of(setting: Setting) -> Task:
    """The testbed's task with the pretrained weights."""
    entry = load("testbeds", setting.testbed)
    return entry(config_of(entry)(**setting.world)).task()


def fingerprint(task: Task) -> str:
    """Digest of all weights of the task's network."""
    network = task.model.network
    assert isinstance(network, nn.Module)
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in network.parameters())).hexdigest()[:16]


def _add(draws: Draws, loop: Loop, experience: Experience) -> None:
    """One more iteration: the gradient of every step alone, and of all together."""
    phase = replace(loop.method.phases(loop.run)[0], updates=1, epochs=1, unit="edge")
    edges, total = experience.edges, 0
    whole = torch.zeros(())
    for step in edges.step.unique().tolist():
        gradient, rows = _gradient(loop, phase, experience, step)
        draws.steps.setdefault(step, []).append(gradient / max(rows, 1))
        whole, total = whole + gradient, total + rows
    draws.whole.append(whole / max(total, 1))
    assert experience.rewards is not None
    draws.rewards.append(float(experience.rewards.mean()))
    groups = [experience.rewards[experience.group == one] for one in experience.group.unique()]
    draws.flat.append(sum(float(group.std(correction=0)) < 1e-8 for group in groups) / len(groups))


def _gradient(loop: Loop, phase: Phase, experience: Experience, step: int) -> tuple[Tensor, int]:
    """Sum over the trained rows of one step of the gradient of their loss, and their number."""
    edges = experience.edges
    here = edges.step == step
    rows = int((here if edges.mask is None else here & edges.mask).sum())
    parameters = list(loop.run.roles.parameters("current"))
    for parameter in parameters:
        parameter.grad = None
    loop.updater.run_phase(replace(phase, select=lambda _: here.nonzero()[:, 0]), experience, loop.run.noise)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.reshape(-1) for part in parts]) * rows, rows


def measure(setting: Setting, repeats: int, anchor: Gradients | None) -> tuple[Signal, Gradients]:
    """One row of the table and the gradients behind it; ``anchor`` are those of diffusion-nft."""
    draws = draw(setting, repeats)
    whole = torch.stack(draws.whole)
    size = whole.square().mean(0).sqrt()
    share = share_of(whole)
    row = Signal(
        name=setting.name,
        testbed=setting.testbed,
        method=setting.method,
        settings=dict(setting.settings),
        weights=fingerprint(task_of(setting)),
        repeats=repeats,
        all=share,
        scaled=share_of(whole / size.clamp(min=1e-20)),
        steps={step: share_of(torch.stack(parts)) for step, parts in sorted(draws.steps.items())},
        evaluations=draws.evaluations,
        per_thousand=share.share / max(1 - share.share, 1e-6) * 1000 / draws.evaluations,
        like_nft=None if anchor is None else cosine_of_means(whole, anchor),
        reward=statistics.mean(draws.rewards),
        flat_groups=statistics.mean(draws.flat),
    )
    return row, whole


def run(settings: Sequence[Setting], repeats: int, path: Path) -> list[Signal]:
    """Measure all settings; the file is rewritten after each of them."""
    rows: list[Signal] = []
    anchors: dict[str, Gradients] = {}
    for setting in settings:
        row, gradients = measure(setting, repeats, anchors.get(setting.testbed))
        if setting.method == "diffusion-nft":
            anchors.setdefault(setting.testbed, gradients)
        rows.append(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        stored: dict[str, Any] = {"machine": machine(), "rows": [asdict(one) for one in rows]}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    return rows


def table(rows: Sequence[Signal]) -> Table:
    """One row per setting."""
    columns = ("testbed", "setting", "share %", "scaled %", "per 1000", "steps %", "cost", "reward", "flat", "nft")
    shown = Table(*columns, box=None, header_style="bold")
    for row in rows:
        shown.add_row(
            row.testbed,
            row.name,
            f"{100 * row.all.share:.2f} ± {100 * row.all.error:.2f}",
            f"{100 * row.scaled.share:.2f} ± {100 * row.scaled.error:.2f}",
            f"{row.per_thousand:.4f}",
            " ".join(f"{step}:{100 * one.share:.1f}" for step, one in row.steps.items()),
            f"{row.evaluations:.0f}",
            f"{row.reward:.3f}",
            f"{row.flat_groups:.2f}",
            "" if row.like_nft is None else f"{row.like_nft:.2f}",
        )
    return shown


def _window(low: int, width: int) -> dict[str, int]:
    """Always the same steps."""
    return {"width": width, "low": low, "high": low + width}


def settings_of(testbed: str, steps: int, world: Mapping[str, object]) -> list[Setting]:
    """Everything that is compared on one testbed of so many steps."""
    shared = {"groups": 16, "group_size": 12, "kl_weight": 0.0, "updates": 1, "ema": 0.0}
    common = {**shared, "clip_range": 0.1}

    def grpo(name: str, **settings: Any) -> Setting:
        return Setting(name, testbed, "flow-grpo", {**common, **settings}, world)

    two, most = _window(0, 2), _window(0, steps - 1)
    guard = {"objective": "guard", "share_start": True}
    return [
        Setting("diffusion-nft", testbed, "diffusion-nft", {**shared, "timestep_fraction": 0.5}, world),
        grpo("all steps, a 0.7"),
        grpo("all steps, a 0.3", noise_level=0.3),
        grpo("all but the last, a 0.7", window=most),
        grpo("all but the last, guard", window=most, objective="guard"),
        grpo("all but the last, guard, one start", window=most, **guard),
        grpo("first 4, guard, one start", window=_window(0, 4), **guard),
        grpo("last 3 but one, a 0.7", window=_window(steps - 4, 3)),
        grpo("first 3, a 0.7", window=_window(0, 3)),
        grpo("first 2, a 0.7", window=two),
        grpo("first 2, a 0.3", window=two, noise_level=0.3),
        grpo("first 2, a 1.0", window=two, noise_level=1.0),
        grpo("first 2, a 0.7, one start", window=two, share_start=True),
        grpo("first 2, a 0.7, one start, 8x24", window=two, share_start=True, groups=8, group_size=24),
        grpo("first 2, cps 0.7, one start", window=two, share_start=True, kernel="cps"),
        grpo("first 2, ddim 1, one start", window=two, share_start=True, kernel="ddim", noise_level=1.0),
    ]


def chosen(size: str) -> list[Setting]:
    """The table of the documentation, or two rows that only show that everything runs."""
    if size == "tiny":
        small = {"groups": 2, "group_size": 4}
        settings = settings_of("mixtures", 10, {})
        return [replace(one, settings={**one.settings, **small}) for one in (settings[0], settings[9])]
    taught = {"categories": ("count", "binding", "position", "count_position")}
    return [*settings_of("shapes", 8, taught), *settings_of("digits", 10, {})]
