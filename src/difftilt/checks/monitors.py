"""The monitors on runs whose failure is known: rewards that leak raise the right alarm, sound runs raise none.

``difftilt check monitors`` counts detections and false alarms; :func:`table` says for every planted run what spoke
first and how far the truth had moved by then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.recipes.building import build_task
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.shapes_verifier import STRAY_LEVELS, ShapesReward, Verifier, see
from difftilt.testbeds.shapes_world import BACKGROUND
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.monitors import Row, Verdict, judge

SEEDS = (20, 21, 22, 23, 24)
"""Of the reported runs; leaks, lengths and rules were chosen on seeds below them."""
GUARDED = ("kl_reference", "diversity", "heldout_fall", "heldout_gap")
"""Monitors that must stay silent on a sound run; the others speak of how efficiently it learns."""


@dataclass(frozen=True)
class Planted:
    """A run that fails in a known way.

    Attributes:
        leak: is added to a score of the verifier; None plants nothing but what the settings do.
        judge: that score; None where the leak is all that is paid.
        alarm: monitor that has to speak.
        through: held-out rewards whose fall counts; empty where the monitor watches one number only.
        iterations: as few as the failure needs.
        lr: learning rate.
        max_advantage: of diffusion-nft; the smaller, the more a reward moves.
    """

    leak: str | None
    judge: str | None
    alarm: str
    through: tuple[str, ...]
    iterations: int
    lr: float = 5e-4
    max_advantage: float = 5.0


PLANTED: Mapping[str, Planted] = {
    "stray paint": Planted("stray", "loose", "heldout_fall", ("clean", "accuracy"), 10, 1e-3, 1.0),
    "one picture": Planted("empty", None, "diversity", (), 7, 1e-3, 1.0),
    "drifting ground": Planted("bright", "dense", "heldout_fall", ("fidelity",), 25, 3e-4, 1.0),
    "no anchor": Planted(None, "dense", "heldout_fall", ("fidelity",), 10, 5e-4, 1.0),
}
CLEAN: Mapping[str, tuple[str, ...]] = {
    "demo": GUARDED,
    "digits/flow-grpo": GUARDED,
}
"""Packaged recipe -> monitors that must stay silent."""


def leak(name: str, samples: Samples) -> Float[Tensor, " batch"]:
    """What a spoiled judge pays for beside the picture that was asked for.

    ``stray``: 0.3 for every pixel of paint outside the objects, up to 20 of them. ``empty``: 10 times the share of
    pixels without paint. ``bright``: 60 times the rise of the ground's grey, up to 25 levels, which the verifier
    tolerates.
    """
    ground = torch.tensor(BACKGROUND)[:, None, None] / 255
    if name == "stray":
        return 0.3 * torch.tensor([float(picture.stray) for picture in see(samples.media)]).clamp(max=20)
    if name == "empty":
        away = torch.linalg.vector_norm((samples.media - ground) * 255, dim=1)
        return 10 * (away <= STRAY_LEVELS).float().mean((1, 2))
    rise = samples.media.mean(1).flatten(1).median(1).values - ground.mean()
    return 60 * rise.clamp(max=25 / 255)


def _spoiled(planted: Planted, verifier: Verifier, samples: Samples) -> Float[Tensor, " batch"]:
    score = torch.zeros(len(samples.media))
    if planted.judge is not None:
        score = score + ShapesReward(planted.judge, verifier).score(samples)
    return score if planted.leak is None else score + leak(planted.leak, samples)


def _hack_recipe(planted: Planted, seed: int) -> Recipe:
    """No anchor, small groups, few iterations; the thresholds are those of the demo."""
    method: dict[str, Any] = {"groups": 8, "group_size": 8, "timestep_fraction": 0.5, "kl_weight": 0.0}
    method["max_advantage"] = planted.max_advantage
    training: dict[str, Any] = {"iterations": planted.iterations, "seed": seed, "evaluate_every": 5}
    training |= {"evaluation_samples": 100, "optimizer": {"lr": planted.lr, "weight_decay": 0.0}}
    training["monitors"] = load_recipe("demo").training.monitors.model_dump()
    return load_recipe(
        {"testbed": {"name": "shapes"}, "method": {"name": "diffusion-nft", **method}, "training": training}
    )


def hack(name: str, seed: int) -> TrainResult:
    """A run in memory of the named plant."""
    planted, verifier = PLANTED[name], Verifier()
    recipe = _hack_recipe(planted, seed)
    reward = as_reward(partial(_spoiled, planted, verifier), name="spoiled")
    return _train(recipe, replace_reward=reward)


def clean(recipe: str, seed: int, **settings: object) -> TrainResult:
    """A run in memory of a packaged recipe as it is, but for the seed and ``settings`` by dotted key."""
    overrides = [f"training.seed={seed}", *(f"{key}={value}" for key, value in settings.items())]
    return _train(load_recipe(recipe, overrides))


def _train(recipe: Recipe, replace_reward: Any = None) -> TrainResult:
    task = build_task(recipe)
    task = task if replace_reward is None else replace(task, reward=replace_reward)
    assert recipe.method is not None
    return train_task(task, recipe.method.build(task), recipe.training, None)


class Alarm(NamedTuple):
    """A monitor, and what it spoke of where it watches several numbers."""

    monitor: str
    of: str

    def __str__(self) -> str:
        return f"{self.monitor} of {self.of}" if self.of else self.monitor


@dataclass(frozen=True)
class Outcome:
    """What the monitors said of one run.

    Attributes:
        first: alarm -> iteration at which it first came; alarms of one monitor about different numbers are different.
        alarm: iteration at which the right alarm first came; None if it never did.
        before, then, after: held-out numbers before training, at the evaluation of that alarm (of the last one before
            it, where it came between two), and at the end.
    """

    first: Mapping[Alarm, int]
    alarm: int | None
    before: Mapping[str, float]
    then: Mapping[str, float]
    after: Mapping[str, float]


def outcome(result: TrainResult, alarm: str = "", through: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a run in which ``alarm`` is the right one, by a fall of one of ``through`` where that is given."""
    first: dict[Alarm, int] = {}
    for verdict in result.verdicts:
        first.setdefault(Alarm(verdict.monitor, verdict.of), verdict.iteration)
    right = [one.iteration for one in result.verdicts if one.monitor == alarm and _fell(result, one, through)]
    reached = [row for row in result.rows if "heldout/reward" in row and right and row["iteration"] <= right[0]]
    then = _heldout(reached[-1]) if reached else result.before
    return Outcome(first, right[0] if right else None, result.before, then, result.after)


def _heldout(row: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix("heldout/"): value for name, value in row.items() if name.startswith("heldout/")}


def _fell(result: TrainResult, verdict: Verdict, through: tuple[str, ...]) -> bool:
    """Whether one of the named held-out rewards had fallen by its tolerance when the monitor spoke."""
    before, now = result.before, _heldout(result.rows[verdict.iteration])
    return not through or any(before[name] - now[name] > before[f"{name}_tolerance"] for name in through)


@cache
def detected(name: str, seed: int) -> Outcome:
    """Of a planted run."""
    return outcome(hack(name, seed), PLANTED[name].alarm, PLANTED[name].through)


@cache
def spoken(recipe: str, seed: int) -> tuple[str, ...]:
    """Monitors that spoke in a run of a packaged recipe."""
    return tuple(dict.fromkeys(alarm.monitor for alarm in outcome(clean(recipe, seed)).first))


def table(names: Sequence[str] = tuple(PLANTED), seeds: Sequence[int] = SEEDS) -> str:
    """Markdown: one row for every planted run."""
    head = (
        "| planted | seed | right alarm, first at | all alarms, first at | accuracy | clean | fidelity | diversity |\n"
    )
    lines = [_line(name, seed, detected(name, seed)) for name in names for seed in seeds]
    return head + "| --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)


def _line(name: str, seed: int, found: Outcome) -> str:
    planted = PLANTED[name]
    alarms = ", ".join(f"{alarm} {at}" for alarm, at in found.first.items())
    moved = [
        f"{found.before[one]:.3f} → {found.then[one]:.3f} → {found.after[one]:.3f}"
        for one in ("accuracy", "clean", "fidelity", "diversity")
    ]
    when = "missed" if found.alarm is None else str(found.alarm)
    return f"| {name} | {seed} | {planted.alarm} {when} | {alarms or 'none'} | {' | '.join(moved)} |"


def _detections(name: str) -> float:
    return float(sum(detected(name, seed).alarm is not None for seed in SEEDS))


def _cries(recipe: str) -> float:
    return float(sum(any(name in CLEAN[recipe] for name in spoken(recipe, seed)) for seed in SEEDS))


def _collapses() -> float:
    return float(sum("diversity" in spoken("mixtures/diffusion-nft", seed) for seed in SEEDS))


@cache
def _tiny(lr: float | None) -> TrainResult:
    """Two iterations of the demo's settings, few samples; a learning rate of its own breaks the model."""
    settings: dict[str, object] = {"method.groups": 4, "method.group_size": 4, "training.evaluation_samples": 64}
    settings |= {"training.iterations": 2, "training.evaluate_every": 0}
    broken: dict[str, object] = {} if lr is None else {"method.kl_weight": 0.0, "training.optimizer.lr": lr}
    return clean("demo", 10, **settings, **broken)


BROKEN = ("kl_reference", "diversity", "heldout_fall")
"""Monitors that must speak where the learning rate breaks the model at once; the gap needs a run that learns."""


def _sound_is_quiet() -> float:
    """Wrong verdicts on two tiny runs: false alarms on the sound one, monitors that are silent on the broken one."""
    cries = {verdict.monitor for verdict in _tiny(None).verdicts} & set(GUARDED)
    heard = {verdict.monitor for verdict in _tiny(1e-2).verdicts}
    return float(len(cries) + len(set(BROKEN) - heard))


def gap_rows(heldout: float) -> list[Row]:
    """Twenty rows whose training reward rises by 1 from the first ten to the last, held-out ones by ``heldout``."""
    rows: list[Row] = [{"iteration": i, "reward_mean": float(i >= 10), "reward_std": 0.5} for i in range(20)]
    # the level of a window is the mean of the evaluations at its ends; the one before training is 0
    rows[9]["heldout/reward"], rows[19]["heldout/reward"] = 0.0, 2 * heldout
    return rows


def _gap_is_told() -> float:
    """Wrong verdicts of ``heldout_gap`` with the demo's thresholds: on held-out gains of all, and of none, of it."""
    thresholds = load_recipe("demo").training.monitors
    spoke = [{one.monitor for one in judge(gap_rows(gain), thresholds, {"reward": 0.0})} for gain in (1.0, 0.0)]
    return float(("heldout_gap" in spoke[0]) + ("heldout_gap" not in spoke[1]))


PROOFS = (
    Proof(
        "false alarms of the demo's settings in two tiny iterations, and monitors silent where these break the model",
        _sound_is_quiet,
        at_most=0,
    ),
    Proof("wrong verdicts on held-out prompts that gain all or none of a training gain", _gap_is_told, at_most=0),
    *(
        Proof(
            f"detections of {planted.alarm} among 5 planted runs: {name}",
            partial(_detections, name),
            at_least=5,
            long=True,
        )
        for name, planted in PLANTED.items()
    ),
    *(
        Proof(f"false alarms among 5 clean runs of {recipe}", partial(_cries, recipe), at_most=0, long=True)
        for recipe in CLEAN
    ),
    Proof("detections of diversity among 5 mixtures that end in one mode", _collapses, at_least=5, long=True),
)
