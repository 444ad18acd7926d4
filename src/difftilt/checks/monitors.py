"""The monitors on runs whose failure is known: rewards that leak raise the right alarm, sound runs raise none.

``difftilt check monitors`` counts detections and false alarms; :func:`table` says for every planted run what spoke
first and how far the truth had moved by then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

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
from difftilt.training.monitors import Verdict

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


@dataclass(frozen=True)
class Outcome:
    """What the monitors said of one run.

    Attributes:
        first: monitor -> iteration at which it first spoke.
        alarm: iteration at which the right alarm first came; None if it never did.
        before, then, after: held-out numbers before training, at the evaluation of that alarm (of the last one before
            it, where it came between two), and at the end.
    """

    first: Mapping[str, int]
    alarm: int | None
    before: Mapping[str, float]
    then: Mapping[str, float]
    after: Mapping[str, float]


def outcome(result: TrainResult, alarm: str = "", through: tuple[str, ...] = ()) -> Outcome:
    """The outcome of a run in which ``alarm`` is the right one, by a fall of one of ``through`` where that is given."""
    first: dict[str, int] = {}
    for verdict in result.verdicts:
        first.setdefault(verdict.monitor, verdict.iteration)
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
    return tuple(outcome(clean(recipe, seed)).first)


def table(names: Sequence[str] = tuple(PLANTED), seeds: Sequence[int] = SEEDS) -> str:
    """Markdown: one row for every planted run."""
    head = "| planted | seed | right alarm, first at | others | accuracy | clean | fidelity | diversity |\n"
    lines = [_line(name, seed, detected(name, seed)) for name in names for seed in seeds]
    return head + "| --- | --- | --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)


def _line(name: str, seed: int, found: Outcome) -> str:
    planted = PLANTED[name]
    others = ", ".join(f"{one} {at}" for one, at in found.first.items() if one != planted.alarm)
    moved = [
        f"{found.before[one]:.3f} → {found.then[one]:.3f} → {found.after[one]:.3f}"
        for one in ("accuracy", "clean", "fidelity", "diversity")
    ]
    when = "missed" if found.alarm is None else str(found.alarm)
    return f"| {name} | {seed} | {planted.alarm} {when} | {others or 'none'} | {' | '.join(moved)} |"


def _detections(name: str) -> float:
    return float(sum(detected(name, seed).alarm is not None for seed in SEEDS))


def _cries(recipe: str) -> float:
    return float(sum(any(name in CLEAN[recipe] for name in spoken(recipe, seed)) for seed in SEEDS))


def _collapses() -> float:
    return float(sum("diversity" in spoken("mixtures/diffusion-nft", seed) for seed in SEEDS))


def _sound_is_quiet() -> float:
    """False alarms of one tiny run of the demo's settings."""
    settings = {"method.groups": 4, "method.group_size": 4, "training.evaluation_samples": 64}
    result = clean("demo", 10, **{"training.iterations": 2, "training.evaluate_every": 0}, **settings)
    return float(sum(one in GUARDED for one in outcome(result).first))


PROOFS = (
    Proof("false alarms of the demo's settings in two tiny iterations", _sound_is_quiet, at_most=0),
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
