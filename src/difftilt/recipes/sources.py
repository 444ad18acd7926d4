"""What somebody holds as a Python object instead of a recipe: a task, a model, or a pipeline of ``diffusers``."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from difftilt.config import parse
from difftilt.errors import UserError
from difftilt.models.diffusers import is_pipeline
from difftilt.models.fingerprint import fingerprint
from difftilt.models.protocol import GenerativeModel
from difftilt.recipes.loading import escaped
from difftilt.recipes.parts import given
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.rewards import as_reward
from difftilt.rewards.base import ScoreFunction
from difftilt.rewards.prompts import plain
from difftilt.rewards.protocol import Reward
from difftilt.sampling.presets import default_sampler
from difftilt.sampling.protocol import Sampler
from difftilt.testbeds.pipeline import TaskOptions, pipeline_task
from difftilt.training.prompts import Given, as_prompts
from difftilt.training.protocol import Task

Scored = Reward | ScoreFunction
"""A reward, or a plain function of samples."""

Object = Task | GenerativeModel | Any
"""A task, a model alone, or a pipeline of ``diffusers``."""


def is_object(source: object) -> bool:
    """Whether a source is an object, and not what a recipe can be given as."""
    return isinstance(source, Task | GenerativeModel) or is_pipeline(source)


def task_of(
    source: Object,
    reward: Scored | None = None,
    prompts: Given | None = None,
    heldout_prompts: Given | None = None,
    sampler: Sampler | None = None,
    options: Mapping[str, Any] | None = None,
) -> Task:
    """The task that an object makes, with what is given in place of its own.

    Args:
        source: a task has everything; the others need a reward and prompts.
        reward: of the samples.
        prompts: to train on.
        heldout_prompts: to evaluate on; None takes the task's own, or the training prompts.
        sampler: None takes the task's own or the pipeline's; for a model alone, 50 stochastic steps.
        options: of a pipeline: fields of :class:`~difftilt.testbeds.pipeline.TaskOptions`.

    Raises:
        UserError: if a reward, prompts or an option is missing or wrong.
    """
    prompts = None if prompts is None else as_prompts(prompts)
    heldout_prompts = None if heldout_prompts is None else as_prompts(heldout_prompts)
    if options is not None and not is_pipeline(source):
        raise UserError("pipeline: these options belong to a pipeline of diffusers, and the source is none")
    if isinstance(source, Task):
        task, changed = source, {"prompts": prompts, "heldout_prompts": heldout_prompts}
        task = replace(task, **{name: list(value) for name, value in changed.items() if value is not None})
        task = task if reward is None else replace(task, reward=as_reward(reward))
        return task if sampler is None else replace(task, sampler=sampler)
    kind = "model" if isinstance(source, GenerativeModel) else "pipeline"
    if reward is None:
        raise UserError(f"a {kind} alone has no reward: give one, or a function of samples that returns scores")
    if prompts is None:
        raise UserError(f"a {kind} alone has no prompts: give a list ([''] for a model without prompts)")
    if not isinstance(source, GenerativeModel):
        chosen = parse(TaskOptions, options or {}, "pipeline")
        task = pipeline_task(source, as_reward(reward), prompts, heldout_prompts, chosen)
        return task if sampler is None else replace(task, sampler=sampler)
    sampler = default_sampler(source.process) if sampler is None else sampler
    heldout = list(prompts if heldout_prompts is None else heldout_prompts)
    return Task(type(source.network).__name__, source, as_reward(reward), list(prompts), heldout, sampler)


def recipe_of_objects(
    task: Task, method: str | Mapping[str, Any], settings: Sequence[str], options: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of a training on an object; its task and its reward can be named in it, but not made again.

    Args:
        task: what :func:`task_of` made.
        method: name of a method, or its section of a recipe.
        settings: ``dotted.key=value``.
        options: of the pipeline, to be noted.
    """
    texts = {"prompts": task.prompts, "heldout_prompts": task.heldout_prompts}
    facts: dict[str, Any] = {name: [plain(prompt) for prompt in prompts] for name, prompts in texts.items()}
    facts |= {"fingerprint": fingerprint(task.model.network)} | dict(options or {})
    testbed, reward = given("testbeds", task, facts), given("rewards", task.reward)
    section: Mapping[str, Any] = {"name": method} if isinstance(method, str) else method
    values = {"testbed": testbed.resolved(), "reward": reward.resolved(), "method": dict(section)}
    return replace(load_recipe(escaped(values), settings), testbed=testbed, reward=reward)
