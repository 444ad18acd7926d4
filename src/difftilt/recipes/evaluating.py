"""Evaluating the model of a recipe, as it comes or with the weights of a run's newest checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from difftilt.errors import UserError
from difftilt.models.roles import CopiedRoles
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


def checkpoint_of(run: Path) -> Path:
    """The newest checkpoint of a run directory.

    Raises:
        UserError: if the directory is no run, or a run without a checkpoint.
    """
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is no run directory ({CONFIG} is missing): name a run, or a recipe")
    newest = newest_checkpoint(run / "checkpoints")
    if newest is None:
        raise UserError(f"{run} has no checkpoint to evaluate: the run ended before it wrote one")
    return newest


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
    roles = CopiedRoles(model.network.to(device), method.roles())
    if checkpoint is not None:
        tensors, _ = load_checkpoint(checkpoint)
        roles.load_state_dict(tensors["weights"])
    noise = Noise(config.seed)
    run = LoopRun(replace(task, model=model), roles, World(), noise, config.forward_batch, device)
    sampler = method.sampler(task)
    return measure(run, method.evaluated_role, sampler, config.evaluation_samples, config.seed).numbers
