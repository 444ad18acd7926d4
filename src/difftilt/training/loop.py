"""The one loop: collect experience, learn from it phase by phase, measure, save. Every method runs here."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from difftilt.errors import UserError
from difftilt.models.execution import enable_checkpointing
from difftilt.models.lora import roles_of
from difftilt.models.protocol import Lagging, Roles, RoleSpec, Trained
from difftilt.sampling.noise import Noise
from difftilt.training.checkpoint import newest_checkpoint, save_checkpoint
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience
from difftilt.training.gallery import gallery_of, save_gallery, show
from difftilt.training.logs import append_row, read_rows, truncate_rows, write_text
from difftilt.training.measure import Measured, diversity_of, measure, quick_drift
from difftilt.training.monitors import Verdict, judge, summarise
from difftilt.training.needs import check_needs
from difftilt.training.protocol import Method, Task
from difftilt.training.run import LoopRun
from difftilt.training.sharded import sharded_run
from difftilt.training.state import check_saved, put_back, state_of
from difftilt.training.trackers import Trackers, tracking
from difftilt.training.update import Updater
from difftilt.training.world import World, join_world

Row = dict[str, float]
BEFORE = "before.json"
Hook = Callable[[Mapping[str, float], Sequence[Verdict]], None]
"""Called after every iteration with its row of metrics and the verdicts of the monitors."""


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
        directory: of the run, or None.
        rows: one per iteration.
        before, after: evaluations on held-out prompts.
        verdicts: of the monitors, over the whole run.
        run: task, roles and ledger, to go on with.
        role: whose weights are the outcome.
    """

    directory: Path | None
    rows: list[Row]
    before: dict[str, float]
    after: dict[str, float]
    verdicts: list[Verdict]
    run: LoopRun
    role: str = "current"


@dataclass
class Loop:
    """The parts of one run."""

    method: Method
    config: TrainingConfig
    directory: Path | None
    run: LoopRun
    updater: Updater
    hooks: Sequence[Hook]
    start: int = 0
    compared: bool = False
    rows: list[Row] = field(default_factory=list[Row])
    verdicts: list[Verdict] = field(default_factory=list[Verdict])
    before: dict[str, float] = field(default_factory=dict[str, float])
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def writes(self) -> Path | None:
        """The run directory in the one process that writes."""
        return self.directory if self.run.world.main else None

    def iterate(self, iteration: int) -> None:
        """One iteration: collect, learn, follow, log, judge."""
        run = self.run
        run.begin(iteration)
        self.updater.fresh = True
        before = run.ledger.copy()
        began = time.perf_counter()
        with torch.no_grad():
            experience = self.method.collect(run)
        collected, scored = time.perf_counter(), run.reward_seconds
        diversity = _diversity(run, experience)
        experience = experience.changed(media=None)  # not to be kept while the networks learn
        if self.config.offload_experience:
            experience = experience.resting()
        measured = time.perf_counter()
        learned: Row = {}
        for place, phase in enumerate(self.method.phases(run)):
            if phase.when(iteration):
                means = self.updater.run_phase(phase, experience, run.noise.named(f"phase{place}"))
                learned |= _named_by_role(means, phase.role)
        self.updater.follow()
        run.observe(experience.components)
        ended = time.perf_counter()
        row: Row = {"iteration": iteration, **_reward_row(run, experience), **learned}
        row |= _drift_row(run, self.method.evaluated_role, experience) | diversity
        spent = asdict(run.ledger - before)
        row |= dict(zip(spent, run.world.total(torch.tensor([*spent.values()])).tolist(), strict=True))
        row["time/reward"] = run.reward_seconds
        if run.hidden_seconds:
            row["hidden_reward_seconds"] = run.hidden_seconds
        drawing, learning = collected - began, ended - measured
        row["time/rollout"] = drawing - scored
        row["time/update"] = learning - (run.reward_seconds - scored)
        row["samples_per_second"] = sum(run.world.lengths(len(experience.index))) / (drawing + learning)
        every = self.config.evaluate_every
        if (every and (iteration + 1) % every == 0) or iteration + 1 == self.config.iterations:
            row |= {f"heldout/{name}": value for name, value in self.evaluate(iteration + 1).numbers.items()}
        self._finish(row)

    def _finish(self, row: Row) -> None:
        self.rows.append(row)
        if self.writes is not None:
            append_row(self.writes / "metrics.jsonl", row)
        self.trackers.row(len(self.rows), row)
        verdicts = judge(self.rows, self.config.monitors, self.before)
        self.verdicts += verdicts
        for hook in self.hooks if self.run.world.main else ():
            hook(row, verdicts)

    def evaluate(self, step: int) -> Measured:
        """Measure the evaluated role as the method means it to be sampled, and keep a picture."""
        sampler = self.method.sampler(self.run.task)
        count = self.config.evaluation_samples
        measured = measure(self.run, self.method.evaluated_role, sampler, count, self.config.seed)
        if self.writes is not None:
            gallery = gallery_of(self.run.task)
            shown = show(self.run, self.method.evaluated_role, sampler, gallery, self.config.seed)
            save_gallery(self.writes / "samples", step, gallery, shown)
            self.trackers.picture(step, self.writes / "samples" / f"step_{step}.png")
        return measured

    def save(self, step: int) -> None:
        """Checkpoint after ``step`` iterations; the first and the last that a process writes are read back."""
        if self.config.sharded(self.run.world.size):
            self.run.world.barrier()  # weights are gathered from all, when all have come here
        elif self.writes is None:
            return
        parts, state = state_of(self.method, self.updater, step, keep=self.run.world.main)
        if self.writes is None:
            return
        path = save_checkpoint(self.writes / "checkpoints", step, parts, state, self.config.keep_checkpoints)
        if not self.compared or step == self.config.iterations:
            check_saved(path, parts)
            self.compared = True

    def restore(self) -> None:
        """Continue from the newest checkpoint; the logs are cut back to it."""
        if self.directory is None:
            raise UserError("a run without a directory cannot be resumed: name the one it was begun in")
        latest = newest_checkpoint(self.directory / "checkpoints")
        if latest is None:
            raise UserError(
                f"{self.directory} has no checkpoint to resume from: remove it and start again without --resume"
            )
        self.start = put_back(latest, self.method, self.updater)
        if self.start > self.config.iterations:
            raise UserError(
                f"{self.directory} has {self.start} iterations already, training.iterations is "
                f"{self.config.iterations}: ask for at least {self.start}"
            )
        if self.writes is not None:
            truncate_rows(self.writes / "metrics.jsonl", self.start)
        self.run.world.barrier()
        self.rows = read_rows(self.directory / "metrics.jsonl")
        self.before = _stored_before(self.directory)
        for count in range(1, len(self.rows) + 1):
            self.verdicts += judge(self.rows[:count], self.config.monitors, self.before)


def train_task(
    task: Task,
    method: Method,
    config: TrainingConfig,
    directory: Path | None = None,
    *,
    laws: Sequence[str] = (),
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    world: World | None = None,
) -> TrainResult:
    """Train.

    Args:
        task: model, reward, prompts.
        method: what to do with them.
        config: of the run.
        directory: for metrics, checkpoints and pictures; None writes nothing.
        laws: declared by the method's card; ``ratio_one`` becomes a guard.
        resume: continue from the newest checkpoint in ``directory``.
        hooks: called after every iteration.
        world: processes; None joins those of ``torchrun``.

    Raises:
        UserError: for a configuration, a directory or a checkpoint that cannot work.
        RewardError: for a reward that fails; the last checkpoint stays.
        GuardError: if something that theory promises does not hold.
    """
    world = world or join_world()
    if directory is not None and not resume and world.main and (directory / "metrics.jsonl").exists():
        raise UserError(f"{directory} holds a run already: resume it, or name another directory")
    loop = assemble(task, method, config, directory, laws, hooks, world)
    if config.track and directory is None:
        raise UserError("training.track follows a run directory, and this run has none: name one, or leave track out")
    if resume:
        loop.restore()
    with tracking(config.track, loop.writes, loop.rows) as loop.trackers:
        if not resume:
            loop.before = _before(loop)
            loop.save(0)
        _iterate(loop)
    after = {name[8:]: value for name, value in loop.rows[-1].items() if name.startswith("heldout/")}
    if loop.writes is not None:
        summary = {"before": loop.before, "after": after, "verdicts": summarise(loop.verdicts)}
        write_text(loop.writes / "summary.json", json.dumps(summary, indent=1))
    return TrainResult(directory, loop.rows, loop.before, after, loop.verdicts, loop.run, method.evaluated_role)


def _iterate(loop: Loop) -> None:
    """All iterations that are left, with a checkpoint where one is due."""
    config = loop.config
    for iteration in range(loop.start, config.iterations):
        loop.iterate(iteration)
        if (iteration + 1) % config.checkpoint_every == 0 or iteration + 1 == config.iterations:
            loop.save(iteration + 1)
    loop.run.world.barrier()  # nobody leaves while another one may still need it


def assemble(
    task: Task,
    method: Method,
    config: TrainingConfig,
    directory: Path | None,
    laws: Sequence[str],
    hooks: Sequence[Hook],
    world: World,
) -> Loop:
    """A loop ready to iterate: adapted model, roles, optimisers. Arguments as in :func:`train_task`."""
    check_needs(method, task, getattr(method, "config", None))
    model = method.adapt(task.model)
    if not isinstance(model.network, nn.Module):
        raise UserError(f"task {task.name} has no weights to train: its network is not an nn.Module")
    device = torch.device(config.device)
    specs: dict[str, RoleSpec] = dict(method.roles())
    for spec in specs.values():
        if not isinstance(spec, Lagging) and spec.network is not None:
            spec.network.to(device)
    if config.activation_checkpointing:
        enable_checkpointing(model.network, "training.activation_checkpointing")
    if config.sharded(world.size):
        run = sharded_run(replace(task, model=model), specs, config, world)
    else:
        model.network.to(device)
        roles = roles_of(model, specs, config.lora, config.seed)
        noise, execution = Noise(config.seed), config.execution
        run = LoopRun(replace(task, model=model), roles, world, noise, config.forward_batch, device, execution)
    roles = run.roles
    trained: dict[str, Mapping[str, Any]] = {"current": {}}
    trained |= {name: spec.optimizer for name, spec in specs.items() if isinstance(spec, Trained)}
    defaults = config.optimizer.model_dump()
    settings = {role: OptimizerConfig(**{**defaults, **changes}) for role, changes in trained.items()}
    optimizers = {role: _optimizer(roles, role, chosen) for role, chosen in settings.items()}
    clips = {role: chosen.max_grad_norm for role, chosen in settings.items()}
    updater = Updater(run, optimizers, clips, specs, laws, dict.fromkeys(trained, 0))
    if directory is not None and world.main:
        directory.mkdir(parents=True, exist_ok=True)
    return Loop(method, config, directory, run, updater, hooks)


def _optimizer(roles: Roles, role: str, config: OptimizerConfig) -> torch.optim.Optimizer:
    parameters = list(roles.parameters(role))
    if not parameters:
        raise UserError(f"role {role!r} has no parameter with a gradient: there is nothing to train")
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)


def _named_by_role(means: Row, role: str | tuple[str, ...]) -> Row:
    """Numbers of ``current`` under their plain names, those of other roles with the role behind."""
    if "current" in ((role,) if isinstance(role, str) else role):
        return means
    return {f"{name}/{role if isinstance(role, str) else '+'.join(role)}": value for name, value in means.items()}


def _before(loop: Loop) -> dict[str, float]:
    """Measure before training; the numbers are kept in the run directory."""
    numbers = loop.evaluate(0).numbers
    if loop.writes is not None:
        write_text(loop.writes / BEFORE, json.dumps(numbers, indent=1))
    loop.trackers.row(0, {f"heldout/{name}": value for name, value in numbers.items()})
    return numbers


def _stored_before(directory: Path) -> dict[str, float]:
    """The evaluation before training, as the run wrote it when it began."""
    path = directory / BEFORE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the run directory was changed; start again in a new one") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): start again in a new directory") from error


def _reward_row(run: LoopRun, experience: Experience) -> Row:
    """Mean and spread of the reward and its components, and the share of groups without variance."""
    if experience.rewards is None:
        return {}
    rewards, group = run.gather(experience.rewards.double(), experience.group)
    row: Row = {"reward_mean": float(rewards.mean())}
    for name, values in experience.components.items():
        row[f"reward/{name}"] = float(run.gather(values)[0].double().mean())
    if run.task.reward.capabilities.set_valued:
        return row  # a set has one score: there is no spread over its members
    row["reward_std"] = float(rewards.std(correction=0))
    groups = [rewards[group == one] for one in group.unique()]
    spread = [float(members.std(correction=0)) for members in groups if len(members) > 1]
    if spread:  # a single sample has no variance to lose
        row["zero_std_fraction"] = sum(value < 1e-8 for value in spread) / len(spread)
    return row


def _drift_row(run: LoopRun, role: str, experience: Experience) -> Row:
    """Drift, measured at this iteration's own samples."""
    if experience.x_0 is None:
        return {}
    return {"kl_reference": quick_drift(run, role, experience.x_0, experience.condition, experience.index)}


def _diversity(run: LoopRun, experience: Experience) -> Row:
    """Diversity of this iteration's own samples."""
    if experience.x_0 is None:
        return {}
    with torch.no_grad():
        media = run.task.model.decode(experience.x_0) if experience.media is None else experience.media
        return {"diversity": diversity_of(run, media, experience.group)}
