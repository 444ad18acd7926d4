"""The Python interface: what the command line does, with objects in and out."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from difftilt.checks.collect import collect as proofs_under
from difftilt.checks.collect import run
from difftilt.checks.proof import Result
from difftilt.environment import environment
from difftilt.errors import UserError
from difftilt.evaluation.arena.records import ArenaResult
from difftilt.evaluation.arena.run import compare_arena
from difftilt.evaluation.report.page import write_report
from difftilt.recipes.building import build_reward, build_task, laws_of, require
from difftilt.recipes.calls import call_of_objects, call_of_recipe, run_call
from difftilt.recipes.collecting import collect_groups
from difftilt.recipes.directory import CONFIG, check_free, check_output, run_directory
from difftilt.recipes.estimating import Diagnosis, estimate
from difftilt.recipes.evaluating import checkpoint_of, evaluate_recipe, run_of
from difftilt.recipes.exporting import export_checkpoint, export_result
from difftilt.recipes.fitting import FitResult, fit_recipe
from difftilt.recipes.judging import Pairs, judge_pairs
from difftilt.recipes.loading import escaped
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.recipes.sources import Object, Scored, is_object, recipe_of_objects, task_of
from difftilt.recipes.steered import SteerResult
from difftilt.rewards.agreement import Agreement
from difftilt.rewards.prompts import plain
from difftilt.rewards.protocol import Reward
from difftilt.rewards.served.server import RewardServer
from difftilt.rewards.served.service import MAX_BYTES, Service
from difftilt.sampling.protocol import Sampler
from difftilt.steering.budget import Budget
from difftilt.steering.protocol import Anytime, Progress, Steerer
from difftilt.training.logs import told_if_full
from difftilt.training.loop import Hook, TrainResult, train_task
from difftilt.training.prompts import Given, as_prompts
from difftilt.training.protocol import Method
from difftilt.training.stored import Manifest
from difftilt.training.world import join_world

RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""A packaged name, ``<testbed>/<method>``, a path, plain values, or a recipe already typed."""


def train(
    source: RecipeLike | Object,
    output: str | Path,
    *,
    reward: Scored | None = None,
    prompts: Given | None = None,
    heldout_prompts: Given | None = None,
    method: str | Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    pipeline: Mapping[str, Any] | None = None,
    resume: bool = False,
    hooks: Sequence[Hook] = (),
    overrides: Sequence[str] = (),
    **settings: object,
) -> TrainResult:
    """Fine-tune a model.

    ``train("mixtures/flow-grpo", "runs/ring")`` or ``train(pipe, "runs/cats", reward=function, prompts=["a cat"],
    method="flow-grpo", pipeline={"steps": 10}, iterations=50)``. The weights of a model that is given are moved.

    Args:
        source: what a recipe can be given as, or a task, a model, or a pipeline of ``diffusers``.
        output: run directory; new, or with ``resume`` the one of the same run.
        reward: of an object: a reward, or a function of samples that returns one score for each.
        prompts: of an object: what to train on; texts, mappings with ``prompt`` and metadata for the reward, or a file
            or data set of them.
        heldout_prompts: of an object: what to evaluate on; None evaluates on the training prompts.
        method: of an object: name of a method, or its section of a recipe; None is ``flow-grpo``.
        sampler: of an object: grid and kernel in place of its own.
        pipeline: options of a pipeline, see ``difftilt describe pipeline``.
        resume: go on from the newest checkpoint in ``output``.
        hooks: called after every iteration with its row of metrics and the verdicts of the monitors.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword: ``seed``, ``iterations``, or ``**{"method.clip_range": 0.1}``.

    Raises:
        UserError: for everything that is wrong before any work is done.
    """
    given = {"reward": reward, "prompts": prompts, "heldout_prompts": heldout_prompts, "method": method}
    given |= {"sampler": sampler, "pipeline": pipeline}
    if is_object(source):
        task = task_of(source, reward, prompts, heldout_prompts, sampler, pipeline)
        typed = recipe_of_objects(task, method or "flow-grpo", _overrides(overrides, settings), pipeline)
    else:
        _refuse(given)
        typed = _typed(cast(RecipeLike, source), overrides, settings)
    directory, world = Path(output), join_world()
    part = require(typed, "method")
    if world.main:
        check_output(directory, typed, resume=resume)
    world.barrier()  # no process may create the directory before the main one has looked
    task = build_task(typed)
    algorithm = cast(Method, part.build(task))
    with run_directory(directory, typed, resume=resume, writes=world.main):
        return train_task(
            task, algorithm, typed.training, directory, laws=laws_of(part), resume=resume, hooks=hooks, world=world
        )


def fit(
    recipe: RecipeLike,
    output: str | Path | None = None,
    *,
    progress: Progress | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> FitResult:
    """Fit a steerer that has a learned part, on the training prompts; the weights of the model stay as they are.

    Args:
        recipe: what to fit, with a section ``steerer``; ``steering.prompts`` takes the place of the training prompts.
        output: new directory for ``config.yaml``, ``result.json`` and ``fitted.safetensors``, which ``steering.fitted``
            names when steering; None writes nothing.
        progress: called after every round with its number, the number of rounds and None.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword.

    Raises:
        UserError: for everything that is wrong before any work is done, a steerer that learns nothing included.
    """
    typed = _typed(recipe, overrides, settings)
    if output is not None:
        check_free(Path(output))
    result = fit_recipe(typed, progress)
    if output is not None:
        result.save(typed.to_yaml(), Path(output))
    return result


def steer(
    source: RecipeLike | Object,
    reward: Scored | None = None,
    prompts: Given | None = None,
    *,
    method: str | Steerer | Anytime | None = None,
    budget: Budget | Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    pipeline: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> SteerResult:
    """Sample with a steerer; the weights stay as they are.

    ``steer(model, reward, prompts, method="svdd", temperature=0.1, budget={"nfe": 2000})`` or
    ``steer("digits/fk-steering")``.

    Args:
        source: a model, a task, a pipeline of ``diffusers``, or what a recipe can be given as.
        reward: a reward, or a function of samples that returns one score for each; None takes the task's.
        prompts: what to sample for, all in one batch, as for :func:`train`; None takes the task's held-out prompts.
        method: name of a steerer, ``module:Class``, or a steerer; a recipe names its own.
        budget: what the call may spend, ``nfe`` and ``reward_calls`` for each prompt, ``seconds`` for the whole.
        sampler: grid and kernel in place of the task's; a model alone takes 50 stochastic steps.
        pipeline: options of a pipeline, see ``difftilt describe pipeline``.
        output: new directory for ``config.yaml``, ``result.json``, ``samples.safetensors`` and a picture; None writes
            nothing.
        progress: called after every step with its number, the number of steps and the effective sample sizes.
        overrides: of a recipe, ``dotted.key=value``, as on the command line.
        settings: fields of the steerer and ``seed``, ``forward_batch``, ``device``, ``invalid``; of a recipe by their
            dotted names, ``**{"steerer.particles": 8}``, and ``seed``.

    Returns:
        All particles with their weights and rewards, effective sample sizes, and the cost.

    Raises:
        UserError: for everything that is wrong before any work is done.
    """
    if output is not None:
        check_free(Path(output))
    if budget is not None:
        settings |= {"budget": budget.model_dump() if isinstance(budget, Budget) else dict(budget)}
    if is_object(source):
        if overrides:
            raise UserError("overrides change a recipe; give the settings of a steerer by keyword")
        call = call_of_objects(source, reward, prompts, method or "fk-steering", sampler, settings, pipeline)
    else:
        _refuse({"method": method, "sampler": sampler, "reward": reward, "pipeline": pipeline})
        chosen = {f"steering.{key}" if key == "budget" else key: value for key, value in settings.items()}
        chosen |= {} if prompts is None else {"steering.prompts": [plain(prompt) for prompt in as_prompts(prompts)]}
        call = call_of_recipe(_typed(cast(RecipeLike, source), overrides, chosen))
    result = run_call(call, progress)
    if output is not None:
        result.save(call.config, Path(output))
    return result


def collect(
    recipe: RecipeLike,
    output: str | Path,
    *,
    groups: int = 256,
    group_size: int = 6,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> Manifest:
    """Draw groups from the untrained model of a recipe and score them once, for methods that learn offline.

    Args:
        recipe: gives testbed, reward and seed; its method or steerer is not used.
        output: new directory for ``data.safetensors`` and ``manifest.json``, or with ``resume`` one that was begun.
        groups: number of groups; the training prompts take turns.
        group_size: samples of each.
        resume: draw what is missing.
        progress: called with a sentence after every part.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword, e.g. ``seed``.
    """
    typed = _typed(recipe, overrides, settings)
    with told_if_full(Path(output), "then go on with --resume"):
        return collect_groups(typed, Path(output), groups, group_size, resume=resume, tell=progress or _silent)


def evaluate(
    what: RecipeLike,
    output: str | Path | None = None,
    *,
    progress: Callable[[str], None] | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> dict[str, float]:
    """Reward, drift and diversity on held-out prompts.

    Args:
        what: a run directory, whose newest checkpoint is evaluated, or one of its checkpoints
            (``RUN/checkpoints/step_20``), or a recipe, whose pretrained model is.
        output: directory for ``evaluation.json`` and ``samples``: a picture of a few prompts, with the same noise for
            every step; further steps of the same run may be added; ``difftilt report`` shows the first and the last.
        progress: called with a sentence that says which step of which run is evaluated.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword, e.g. ``**{"training.evaluation_samples": 512}``.
    """
    kept = None if output is None else Path(output)
    checkpoint = checkpoint_of(Path(what)) if isinstance(what, str | Path) else None
    if checkpoint is None:
        return evaluate_recipe(_typed(what, overrides, settings), None, kept)
    run = run_of(checkpoint)
    (progress or _silent)(f"{checkpoint.name.replace('_', ' ')} of {run}")
    return evaluate_recipe(_typed(run / CONFIG, overrides, settings), checkpoint, kept)


def judge(
    what: RecipeLike | Scored,
    pairs: Pairs,
    *,
    batch: int = 32,
    progress: Callable[[str], None] | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> Agreement:
    """How often a reward prefers the sample that people preferred.

    Args:
        what: a reward, a function of samples, the name of a reward, or a recipe, whose reward is judged.
        pairs: a .jsonl file, a data set, or a mapping with ``source`` and the names of its columns.
        batch: pairs scored at once.
        progress: called with a sentence after every batch.
        overrides: ``key=value`` of the reward, or dotted ones of the recipe.
        settings: the same by keyword.

    Returns:
        The difference of every pair; ``summary()`` has the accuracy with its interval, and counts ties.
    """
    chosen, tell = _overrides(overrides, settings), progress or _silent
    return judge_pairs(what, pairs, chosen, batch, lambda done: tell(f"{done} pairs"))


def export(what: str | Path | TrainResult, output: str | Path, *, role: str | None = None) -> Path:
    """Write trained weights as the model's own library loads them, with a model card and the recipe beside them.

    Of a pipeline of ``diffusers`` a LoRA becomes ``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights``,
    and a folder ``peft``; all weights become a whole pipeline. Of other models a LoRA becomes a ``peft`` folder.

    Args:
        what: a run directory, whose newest checkpoint is taken, one of its checkpoints, or what :func:`train` returned
            (the only way where the model was given as an object).
        output: new directory.
        role: whose weights; None takes those that the method's evaluations measure.

    Raises:
        UserError: if there is no such run or role, or ``output`` is not free.
    """
    check_free(Path(output))
    if isinstance(what, TrainResult):
        return export_result(what, role, Path(output))
    checkpoint = checkpoint_of(Path(what))
    if checkpoint is None:
        raise UserError(f"export: {what} is no run directory and no checkpoint of one")
    return export_checkpoint(checkpoint, role, Path(output))


def report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one self-contained HTML page about runs of training and of steering, finished or not.

    Args:
        runs: one run directory or several, shown side by side.
        output: file to write; None is ``report.html`` in the first run directory.

    Returns:
        The file.

    Raises:
        UserError: if a path is no run directory, or the file cannot be written or would replace something else.
    """
    return write_report([runs] if isinstance(runs, str | Path) else runs, output)


def compare(
    recipe: str | Path | Mapping[str, Any],
    output: str | Path,
    *,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
    overrides: Sequence[str] = (),
    **settings: object,
) -> ArenaResult:
    """Several methods and steerers on one task at equal cost, over seeds.

    Args:
        recipe: of an arena: a packaged name such as ``arena/digits``, a path, or plain values.
        output: new directory for ``config.yaml``, ``result.json``, ``table.md``, ``picture.png`` and one record per
            member and seed; or with ``resume`` the one of the same arena.
        resume: leave out what is done.
        progress: called with a sentence whenever there is something to tell.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword, e.g. ``**{"arena.seeds": [0]}``.

    Raises:
        UserError: for everything that is wrong before any work is done, budgets that a member cannot meet included.
    """
    chosen = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    with told_if_full(Path(output), "then go on with --resume"):
        return compare_arena(recipe, Path(output), chosen, resume=resume, tell=progress or _silent)


def doctor(
    recipe: RecipeLike | None = None,
    *,
    processes: int = 1,
    sharded: bool = False,
    overrides: Sequence[str] = (),
    **settings: object,
) -> Diagnosis:
    """What this machine has and what is installed; of a recipe also the memory that it needs.

    Args:
        recipe: of training or steering; None looks at the machine alone.
        processes: share the samples of an iteration.
        sharded: weights, gradients and optimiser state are cut among them.
        overrides: ``dotted.key=value``, as on the command line.
        settings: the same by keyword.

    Raises:
        UserError: if the recipe is wrong, or a pipeline's settings cannot be had.
    """
    if recipe is None:
        if overrides or settings:
            raise UserError("overrides change a recipe: name one with --recipe")
        return Diagnosis(environment())
    typed = _typed(recipe, overrides, settings)
    return Diagnosis(environment(), estimate(typed, processes, sharded=sharded))


def reward_server(
    reward: str | Reward,
    settings: Sequence[str] = (),
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> RewardServer:
    """A server for a reward, which answers inside ``with`` (``server.url`` is what a recipe names).

    Args:
        reward: ``package.module:Name``, a packaged reward, or one that somebody holds.
        settings: ``field=value`` of a reward that is named.
        host: address to listen at; any but this machine's own needs a token.
        port: 0 takes a free one.
        token: that clients must know.
        max_bytes: largest request.

    Raises:
        UserError: for a reward that cannot be made or served, or an address that cannot be listened at.
    """
    if isinstance(reward, str):
        reward = build_reward(reward, settings)
    return RewardServer(Service(reward, max_bytes), host, port, token)


def _silent(text: str) -> None:
    """Tells nothing."""


def check(names: Iterable[str] = (), quick: bool = False) -> list[Result]:
    """Measure the claims under the given names, or all of them; see :func:`difftilt.checks.collect.collect`."""
    return list(run(proofs_under(tuple(names), quick=quick)))


def _typed(recipe: RecipeLike, overrides: Sequence[str], settings: Mapping[str, object]) -> Recipe:
    values = escaped(recipe.open()) if isinstance(recipe, Recipe) else recipe
    return load_recipe(values, _overrides(overrides, settings))


def _overrides(overrides: Sequence[str], settings: Mapping[str, object]) -> Sequence[str]:
    return [*overrides, *(f"{key}={json.dumps(escaped(value))}" for key, value in settings.items())]


def _refuse(given: Mapping[str, object]) -> None:
    """Refuse what belongs to an object where a recipe was given."""
    for name in [name for name, value in given.items() if value is not None]:
        raise UserError(f"{name} belongs to a model or a task; this recipe names its own: override it there")
