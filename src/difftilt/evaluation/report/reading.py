"""Run directories as typed data: finished, unfinished or damaged ones, of training or of steering."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from difftilt.config import Problems
from difftilt.errors import UserError
from difftilt.evaluation.report.samples import Gallery, Particles, prompts_of, read_gallery, read_particles
from difftilt.evaluation.report.tolerant import (
    Damage,
    Row,
    items,
    mapping,
    number,
    numbers,
    read_metrics,
    read_object,
    read_plain,
)
from difftilt.recipes.fitting import FITTED
from difftilt.recipes.loading import read
from difftilt.training.monitors import MonitorConfig, Verdict, judge, summarise

OF_TRAINING = ("metrics.jsonl", "before.json", "summary.json")
EVALUATION = "evaluation.json"
OF_STEERING = ("result.json", "samples.safetensors")


@dataclass(frozen=True)
class Finding:
    """What one monitor said over a whole run.

    Attributes:
        monitor: its name.
        value, threshold: of its last verdict; None where the file does not tell.
        first, last: iterations, counted from 1.
        times: iterations in which it spoke.
        advice: what to do.
    """

    monitor: str
    value: float | None
    threshold: float | None
    first: int | None
    last: int | None
    times: int | None
    advice: str


@dataclass(frozen=True)
class SteeredPrompt:
    """The outcome of steering for one prompt; None is missing, or not defined for the steerer."""

    prompt: str
    best: float | None
    mean: float | None
    log_z: float | None
    ess: float | None
    ancestors: float | None


@dataclass(frozen=True)
class RunRecord:
    """Everything that a run directory tells.

    Attributes:
        path: as the user named it.
        name: unique among the runs of one report.
        steering: made by ``difftilt steer``, not by ``difftilt train``.
        config: resolved recipe as plain values; empty if it cannot be read.
        config_text: its text.
        rows: of ``metrics.jsonl``.
        iterations: rows that there must have been, damaged and missing ones included.
        before, after: evaluations; ``after`` of an unfinished run is its newest one, of a steered one that of the best
            sample of each prompt.
        after_iteration: iterations done when ``after`` was measured.
        unfinished: sentence that says how far it came; None for a finished run.
        findings: of the monitors.
        steered: one entry per prompt.
        ledger: totals of what it cost.
        seconds: that steering took.
        samples: to look at.
        damage: what is missing or cannot be read.
    """

    path: Path
    name: str
    steering: bool
    config: Mapping[str, Any]
    config_text: str
    rows: Sequence[Row]
    iterations: int
    before: Row
    after: Row
    after_iteration: int | None
    unfinished: str | None
    findings: Sequence[Finding]
    steered: Sequence[SteeredPrompt]
    ledger: Row
    seconds: float | None
    samples: Gallery | Particles | None
    damage: Sequence[str]

    def section(self, name: str) -> dict[str, Any]:
        """One section of the recipe; empty where it has none."""
        return mapping(self.config.get(name))


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read every directory once, in the order given.

    Raises:
        UserError: names every path that is no run directory.
    """
    problems = [problem for path in paths if (problem := _no_run(path)) is not None]
    if problems or not paths:
        raise UserError("\n".join(problems) or "report: name at least one run directory")
    once = list({path.resolve(): path for path in reversed(paths)}.values())[::-1]
    return [_read_run(path, name) for path, name in zip(once, _names(once), strict=True)]


def _no_run(path: Path) -> str | None:
    """Why a path is no run directory, or None."""
    try:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            return f"run {path} {what}: name the directory that `difftilt train` or `difftilt steer` wrote"
        there = {entry.name for entry in path.iterdir()}
    except OSError as error:
        return f"run {path} cannot be read ({error.strerror}): name another directory"
    if FITTED in there:
        return f"{path} holds what a steerer has learned, and no samples: name what `difftilt steer` wrote with it"
    if there.isdisjoint((*OF_TRAINING, *OF_STEERING, "config.yaml")):
        return f"{path} is no run directory (it has neither config.yaml nor metrics.jsonl): name a run"
    return None


def _names(paths: Sequence[Path]) -> list[str]:
    """For each path its last parts, as many as it takes to tell all of them apart."""
    full = [path.resolve().parts for path in paths]
    names = ["/".join(parts[-1:]) for parts in full]
    for length in range(2, max(map(len, full)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(parts[-length:]) if names.count(names[i]) > 1 else names[i] for i, parts in enumerate(full)]
    return names


def _read_run(path: Path, name: str) -> RunRecord:
    damage = Damage()
    config, text = _config(path / "config.yaml", damage)
    there = {entry.name for entry in path.iterdir()}
    if EVALUATION in there:
        return _read_evaluation(path, name, config, text, damage)
    steering = "steerer" in config or not (there & set(OF_TRAINING) or "method" in config)
    if steering:
        return _read_steering(path, name, config, text, damage)
    return _read_training(path, name, config, text, damage)


def _read_evaluation(path: Path, name: str, config: dict[str, Any], text: str, damage: Damage) -> RunRecord:
    """What ``difftilt evaluate --output`` kept: of the first and the last step."""
    held = mapping(read_object(path / EVALUATION, damage).get("steps"))
    steps = sorted(int(step) for step in held if step.isdecimal())
    ends = [numbers(mapping(held[str(step)])) for step in steps] or [{}]
    before = ends[0] if len(ends) > 1 else {}
    last = steps[-1] if steps else None
    samples = read_gallery(path, damage, evaluation=True)
    return RunRecord(
        path, name, False, config, text, [], last or 0, before, ends[-1], last, None, [], [], {}, None, samples,
        damage.lines,
    )  # fmt: skip


def _config(path: Path, damage: Damage) -> tuple[dict[str, Any], str]:
    text = read_plain(path, damage)
    if text is None:
        damage.add(f"{path.name} is missing: what was run is not known")
        return {}, ""
    try:
        return read(path)[0], text
    except UserError as error:
        damage.add(f"{path.name} is damaged ({str(error).splitlines()[0]})")
        return {}, text


def _read_training(path: Path, name: str, config: dict[str, Any], text: str, damage: Damage) -> RunRecord:
    rows, written = read_metrics(path / "metrics.jsonl", damage)
    if not (path / "metrics.jsonl").exists():
        damage.add("metrics.jsonl is missing: there are no curves")
    summary, stored = read_object(path / "summary.json", damage), read_object(path / "before.json", damage)
    planned = number(mapping(config.get("training")).get("iterations"))
    unfinished = _unfinished(rows, planned, bool(summary), damage)
    if unfinished is None and planned is not None:
        written = max(written, int(planned))
    before = numbers(stored) or numbers(summary.get("before"))
    lacking = [key for key in stored if key not in numbers(stored)]
    if lacking:
        damage.add(f"before.json has no finite number for {', '.join(lacking)}")
    if not (path / "before.json").exists():
        damage.add("before.json is missing" + ("" if before else ": there is nothing to compare with"))
    last = next((row for row in reversed(rows) if any(key.startswith("heldout/") for key in row)), {})
    after = {key[8:]: value for key, value in last.items() if key.startswith("heldout/")}
    after_iteration = int(last["iteration"]) + 1 if last else None
    if unfinished is None and (ended := numbers(summary.get("after"))):
        after, after_iteration = ended, int(rows[-1]["iteration"]) + 1 if rows else None
    told = (
        items(summary.get("verdicts"))
        if unfinished is None and "verdicts" in summary
        else _judged(rows, config, before, damage)
    )
    cost = {key: sum(row.get(key, 0.0) for row in rows) for key in _cost_keys(rows)}
    findings = [_finding(entry) for entry in map(mapping, told) if entry]
    samples = read_gallery(path, damage)
    return RunRecord(
        path, name, False, config, text, rows, written, before, after, after_iteration, unfinished, findings, [], cost,
        None, samples, damage.lines,
    )  # fmt: skip


def _cost_keys(rows: Sequence[Row]) -> list[str]:
    counted = ("nfe", "reward_calls", "gradient_passes", "auxiliary_calls")
    return [key for key in counted if any(key in row for row in rows)]


def _unfinished(rows: Sequence[Row], planned: float | None, summarised: bool, damage: Damage) -> str | None:
    """How far an unfinished run came; a summary is that of an earlier end if more rows than it planned follow."""
    done = int(rows[-1]["iteration"]) + 1 if rows else 0
    of = "" if planned is None else f" of {int(planned)}"
    if not summarised:
        return f"unfinished: {done}{of} iterations, no summary.json"
    if planned is None or not rows or done == int(planned):
        return None
    if done > planned:
        return f"unfinished: {done} iterations, {int(planned)} in the stored recipe; it was prolonged and not ended"
    damage.add(f"metrics.jsonl ends after {done} of {int(planned)} iterations, though the run has a summary")
    return None


def _thresholds(config: Mapping[str, Any], damage: Damage) -> MonitorConfig:
    """Those of the run; the default ones, with a note, where the recipe has none that can be read."""
    training = config.get("training", {})
    stored = mapping(training).get("monitors", {})
    problems = Problems()
    if not isinstance(training, Mapping):
        problems.add("training: is no mapping")
    elif not isinstance(stored, Mapping):
        problems.add("training.monitors: is no mapping")
    parsed = problems.parse(MonitorConfig, mapping(stored), "training.monitors")
    for line in problems.lines:
        damage.add(f"config.yaml: {line}; the run is judged by the default thresholds of the monitors")
    return parsed if parsed is not None and not problems.lines else MonitorConfig()


def _judged(rows: Sequence[Row], recipe: Mapping[str, Any], before: Row, damage: Damage) -> Sequence[Mapping[str, Any]]:
    """Verdicts anew, under the thresholds of the run where they can be read."""
    config = _thresholds(recipe, damage)
    verdicts: list[Verdict] = []
    for count in range(1, len(rows) + 1):
        verdicts += judge(rows[:count], config, before)
    return summarise(verdicts)


def _finding(entry: Mapping[str, Any]) -> Finding:
    def count(key: str, shift: int) -> int | None:
        value = number(entry.get(key))
        return None if value is None else int(value) + shift

    value, threshold = number(entry.get("value")), number(entry.get("threshold"))
    first = count("first_iteration", 1) if "first_iteration" in entry else count("iteration", 1)
    advice = str(entry.get("advice", ""))
    name = str(entry.get("monitor", "a monitor"))
    return Finding(name, value, threshold, first, count("iteration", 1), count("iterations", 0), advice)


def _read_steering(path: Path, name: str, config: dict[str, Any], text: str, damage: Damage) -> RunRecord:
    result = read_object(path / "result.json", damage)
    if not (path / "result.json").exists():
        damage.add("result.json is missing: there are no rewards and no prompts")
    steered = [_steered(entry) for entry in prompts_of(result)]
    samples, ledger = read_particles(path, damage), numbers(result.get("ledger"))
    return RunRecord(
        path, name, True, config, text, [], 0, {}, numbers(result.get("best")), None, None, [], steered, ledger,
        number(result.get("seconds")), samples, damage.lines,
    )  # fmt: skip


def _steered(entry: Mapping[str, Any]) -> SteeredPrompt:
    ends = {key: number(items(entry.get(key))[-1]) if items(entry.get(key)) else None for key in ("ess", "ancestors")}
    best, mean, log_z = (number(entry.get(key)) for key in ("reward_best", "reward_mean", "log_z"))
    return SteeredPrompt(str(entry.get("prompt", "")), best, mean, log_z, ends["ess"], ends["ancestors"])
