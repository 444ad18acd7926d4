"""One call of a steerer: from a recipe, or from a model, a reward and prompts as objects."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from difftilt.config import Problems, dump
from difftilt.errors import UserError
from difftilt.leaves import load
from difftilt.models.denoiser import denoiser
from difftilt.recipes.building import build_task, require
from difftilt.recipes.fitting import load_fitted
from difftilt.recipes.loading import to_yaml
from difftilt.recipes.parts import Part, read_part
from difftilt.recipes.prompts import prompts_of
from difftilt.recipes.schema import Recipe, SteeringConfig
from difftilt.recipes.sources import Object, Scored, task_of
from difftilt.recipes.steered import SteerResult, best_scores, steered_look
from difftilt.rewards import Masked, as_reward
from difftilt.rewards.masked import parts_masked
from difftilt.rewards.prompts import plain
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.steering.protocol import Anytime, Progress, Steerer
from difftilt.steering.within import steer_within
from difftilt.training.needs import check_needs
from difftilt.training.prompts import Given, as_prompts
from difftilt.training.protocol import Task


@dataclass(frozen=True)
class SteerCall:
    """Everything that one call needs.

    Attributes:
        task: model, sampler and reward.
        steerer: what runs.
        prompts: what to sample for.
        steering: settings of the call.
        config: the resolved settings as YAML, to be kept beside the result.
    """

    task: Task
    steerer: Steerer | Anytime
    prompts: Sequence[str]
    steering: SteeringConfig
    config: str

    @property
    def reward(self) -> Reward:
        """The task's, with NaN for scores that are missing if that was asked for."""
        reward = as_reward(self.task.reward)
        return parts_masked(Masked(reward)) if self.steering.invalid == "mask" else reward


def call_of_recipe(recipe: Recipe) -> SteerCall:
    """The call that a recipe describes."""
    part = require(recipe, "steerer")
    task = build_task(recipe)
    prompts = prompts_of(task, recipe.steering)
    if recipe.steering.prompts is not None:  # a file may change after the run: its prompts are kept, not its path
        recipe = replace(recipe, steering=recipe.steering.model_copy(update={"prompts": tuple(map(plain, prompts))}))
    return SteerCall(task, cast(Steerer, part.build(task)), prompts, recipe.steering, recipe.to_yaml())


def call_of_objects(
    source: Object,
    reward: Scored | None,
    prompts: Given | None,
    method: str | Steerer | Anytime,
    sampler: Sampler | None,
    settings: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> SteerCall:
    """The call of a steerer on a model that somebody holds.

    Args:
        source: a task, a model alone, or a pipeline of ``diffusers``.
        reward: of the samples; None takes the task's own.
        prompts: None takes the task's held-out ones.
        method: name of a steerer, ``module:Class``, or a steerer.
        sampler: None takes the task's own; for a model alone, 50 stochastic steps.
        settings: fields of the steerer and of :class:`SteeringConfig`.
        options: of a pipeline.

    Raises:
        UserError: with everything that is wrong with the settings.
    """
    ours = {key: value for key, value in settings.items() if key in SteeringConfig.model_fields}
    theirs = {key: value for key, value in settings.items() if key not in ours}
    problems = Problems()
    steering = problems.parse(SteeringConfig, ours, "steer")
    part = read_part("steerers", "method", {"name": method, **theirs}, problems) if isinstance(method, str) else None
    if theirs and not isinstance(method, str):
        problems.add(f"{', '.join(theirs)}: settings of a steerer belong into it, where it is given as an object")
    problems.check("steer")
    task = task_of(source, reward, None if isinstance(source, Task) else prompts, None, sampler, options)
    if part is None:
        check_needs(method, task, getattr(method, "config", None))
    else:
        check_needs(load("steerers", part.name), task, part.config)
    steerer = cast(Steerer, method if part is None else part.build(task))
    wanted = list(task.heldout_prompts) if prompts is None else as_prompts(prompts)
    if not wanted:
        raise UserError("prompts is empty: give at least one ('' for a model without prompts)")
    steering = cast(SteeringConfig, steering)
    kept = {
        "steerer": _named(steerer, part, steering),
        "steering": dump(steering) | {"prompts": [plain(prompt) for prompt in wanted]},
    }
    return SteerCall(task, steerer, wanted, steering, to_yaml(kept))


def _named(steerer: object, part: Part | None, steering: SteeringConfig) -> dict[str, Any]:
    """The steerer as it is written down: a number that a budget decides is no setting."""
    if part is None:
        return {"name": type(steerer).__name__}
    return part.unsized() if steering.budget.bounded else part.resolved()


def run_call(call: SteerCall, progress: Progress | None = None) -> SteerResult:
    """Run it, within its budget."""
    task, steering = call.task, call.steering
    if isinstance(task.model.network, nn.Module):
        task.model.network.to(steering.device)
    denoise = denoiser(
        task.model,
        guidance=task.sampler.guidance,
        forward_batch=steering.forward_batch,
        execution=steering.execution,
    )
    if steering.fitted is not None:
        load_fitted(call.steerer, Path(steering.fitted), task, call.reward)
    began = time.perf_counter()
    steered = steer_within(
        call.steerer, task, denoise, call.reward, call.prompts, Noise(steering.seed), progress=progress,
        budget=steering.budget,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    best, look = best_scores(task, call.prompts, steered), steered_look(task, steered)
    return SteerResult(call.prompts, steered, best, seconds, look)
