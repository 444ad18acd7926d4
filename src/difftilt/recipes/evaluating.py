"""Evaluating the model of a recipe, as it comes or with the weights of a checkpoint of a run."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from difftilt.errors import UserError
from difftilt.models.lora import roles_of
from difftilt.models.roles import CopiedRoles
from difftilt.recipes.building import build_task
from difftilt.recipes.directory import CONFIG, check_free, differences
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.sampling.noise import Noise
from difftilt.training.base import MethodBase
from difftilt.training.checkpoint import load_checkpoint, newest_checkpoint
from difftilt.training.gallery import gallery_of, save_gallery, show
from difftilt.training.logs import finite, told_if_full, write_text
from difftilt.training.measure import measure
from difftilt.training.protocol import Method, Task
from difftilt.training.run import LoopRun
from difftilt.training.world import World

EVALUATION, SAMPLES = "evaluation.json", "samples"
"""Of the output of an evaluation: numbers by step, and what to look at."""
CHECKPOINTS = "checkpoints"
"""Of a run directory: ``step_0``, ``step_20``, ..., and ``latest``."""


def checkpoint_of(path: Path) -> Path | None:
    """The newest checkpoint of a run directory, or the one that is named itself; None for what is no directory.

    Raises:
        UserError: if a directory is neither a run nor a checkpoint in one, or a run without a checkpoint.
    """
    path = path.absolute() if path.absolute().parent.name == CHECKPOINTS else path
    if path.parent.name == CHECKPOINTS and (run_of(path) / CONFIG).is_file():
        return _named(path)
    if not path.is_dir():
        return None
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} is no run directory ({CONFIG} is missing) and no checkpoint in one: name a run, a folder "
            f"RUN/{CHECKPOINTS}/step_N, or a recipe"
        )
    newest = newest_checkpoint(path / CHECKPOINTS)
    if newest is None:
        raise UserError(f"{path} has no checkpoint to evaluate: the run ended before it wrote one")
    return newest


def run_of(checkpoint: Path) -> Path:
    """The run directory that a checkpoint lies in."""
    return checkpoint.parent.parent


def _named(path: Path) -> Path:
    """The checkpoint under a name of its own, ``latest`` included."""
    found = path.with_name(path.resolve().name) if path.is_symlink() else path
    if found.name.startswith("step_") and found.is_dir():
        return found
    steps = [one.name for one in path.parent.glob("step_*")]
    known = ", ".join(sorted(steps, key=lambda name: (len(name), name))) or "none"
    raise UserError(f"{run_of(path)} has no checkpoint {path.name!r}; there are: {known}")


@dataclass(frozen=True)
class Restored:
    """A model with the weights of a checkpoint in its roles.

    Attributes:
        task: its model is the one that the roles belong to.
        method: that trained them; one that does nothing for the recipe of a steerer.
        roles: weights.
        step: iterations that they have been trained for.
    """

    task: Task
    method: Method
    roles: CopiedRoles
    step: int


def restore(recipe: Recipe, checkpoint: Path | None) -> Restored:
    """Build what a recipe names and put the weights of a checkpoint back.

    Args:
        recipe: names task, method and settings.
        checkpoint: whose weights; None leaves the pretrained ones.

    Raises:
        UserError: if there are no weights, or those of another model.
    """
    task = build_task(recipe)
    # a steerer's recipe has no method: its model is evaluated as it comes
    method = cast(Method, MethodBase() if recipe.method is None else recipe.method.build(task))
    model = method.adapt(task.model)
    if not isinstance(model.network, nn.Module):
        raise UserError(f"task {task.name} has no weights to evaluate: its network is not an nn.Module")
    model.network.to(torch.device(recipe.training.device))
    roles = roles_of(model, method.roles(), recipe.training.lora, recipe.training.seed)
    step = 0
    if checkpoint is not None:
        tensors, state = load_checkpoint(checkpoint)
        if "weights" not in tensors:
            raise UserError(f"checkpoint {checkpoint} holds no weights: name another step of the run")
        roles.load_state_dict(tensors["weights"])
        step = int(state["iteration"])
    return Restored(replace(task, model=model), method, roles, step)


def evaluate_recipe(recipe: Recipe, checkpoint: Path | None, output: Path | None = None) -> dict[str, float]:
    """Reward, drift and diversity on held-out prompts: the same numbers, prompts and noise as in training.

    Args:
        recipe: names task, method and the settings of evaluation.
        checkpoint: whose weights; None evaluates the pretrained model.
        output: directory for the numbers and for samples of a few prompts, with the same noise for every step.

    Raises:
        UserError: for an output that holds anything but evaluations of the same recipe.
    """
    held = {} if output is None else _held(output, recipe)
    restored, config = restore(recipe, checkpoint), recipe.training
    noise, device = Noise(config.seed), torch.device(config.device)
    run = LoopRun(restored.task, restored.roles, World(), noise, config.forward_batch, device, config.execution)
    method = restored.method
    sampler = method.sampler(restored.task)
    numbers = measure(run, method.evaluated_role, sampler, config.evaluation_samples, config.seed).numbers
    if output is not None:
        gallery = gallery_of(restored.task)
        shown = show(run, method.evaluated_role, sampler, gallery, config.seed)
        with told_if_full(output, "or name another directory"):
            save_gallery(output / SAMPLES, restored.step, gallery, shown)
            write_text(output / CONFIG, recipe.to_yaml())
            steps = held | {str(restored.step): finite(numbers)}
            write_text(output / EVALUATION, json.dumps({"steps": steps}, indent=1) + "\n")
    return numbers


def _held(output: Path, recipe: Recipe) -> dict[str, Any]:
    """The steps that a directory holds evaluations of; refused if prompts, noise or reward were others there."""
    if not (output / EVALUATION).is_file():
        check_free(output, "name another one, or one that an evaluation wrote, to compare steps")
        return {}
    changed = differences(load_recipe(output / CONFIG).resolved(), recipe.resolved())
    if changed:
        lines = [f"  {key}: {was!r} there, {now!r} asked for" for key, (was, now) in changed.items()]
        raise UserError("\n".join([f"{output} holds evaluations of another recipe: name another directory", *lines]))
    try:
        return dict(json.loads((output / EVALUATION).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output / EVALUATION} is damaged: name another directory") from error
