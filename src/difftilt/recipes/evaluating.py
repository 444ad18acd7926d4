"""Evaluating the model of a recipe, as it comes or with the weights of a checkpoint of a run."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from difftilt.errors import UserError
from difftilt.models.lora import roles_of
from difftilt.recipes.building import build_task
from difftilt.recipes.directory import CONFIG
from difftilt.recipes.schema import Recipe
from difftilt.sampling.noise import Noise
from difftilt.training.base import MethodBase
from difftilt.training.checkpoint import load_checkpoint, newest_checkpoint
from difftilt.training.measure import measure
from difftilt.training.protocol import Method
from difftilt.training.run import LoopRun
from difftilt.training.world import World

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


def evaluate_recipe(recipe: Recipe, checkpoint: Path | None) -> dict[str, float]:
    """Reward, drift and diversity on held-out prompts: the same numbers, prompts and noise as in training.

    Args:
        recipe: names task, method and the settings of evaluation.
        checkpoint: whose weights; None evaluates the pretrained model.
    """
    task, config = build_task(recipe), recipe.training
    # a steerer's recipe has no method: its model is evaluated as it comes
    method = MethodBase() if recipe.method is None else cast(Method, recipe.method.build(task))
    model = method.adapt(task.model)
    if not isinstance(model.network, nn.Module):
        raise UserError(f"task {task.name} has no weights to evaluate: its network is not an nn.Module")
    device = torch.device(config.device)
    model.network.to(device)
    roles = roles_of(model, method.roles(), config.lora, config.seed)
    if checkpoint is not None:
        tensors, _ = load_checkpoint(checkpoint)
        if "weights" not in tensors:
            raise UserError(f"checkpoint {checkpoint} holds no weights: name another step of the run")
        roles.load_state_dict(tensors["weights"])
    noise = Noise(config.seed)
    run = LoopRun(replace(task, model=model), roles, World(), noise, config.forward_batch, device)
    sampler = method.sampler(task)
    return measure(run, method.evaluated_role, sampler, config.evaluation_samples, config.seed).numbers
