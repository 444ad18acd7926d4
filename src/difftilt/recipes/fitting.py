"""Steerers that learn: fitted once by ``difftilt train``, kept in a directory, read again by ``difftilt steer``."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.ledger import Ledger
from difftilt.recipes.building import build_task, require
from difftilt.recipes.origin import PREFIX, Origin, check_origin, origin_of, read_origin
from difftilt.recipes.prompts import prompts_of
from difftilt.recipes.schema import Recipe
from difftilt.recipes.steered import staged
from difftilt.rewards import Masked, as_reward
from difftilt.rewards.protocol import Reward
from difftilt.sampling.noise import Noise
from difftilt.steering.protocol import Fitted, Progress
from difftilt.training.protocol import Task

FITTED = "fitted.safetensors"
"""What a steerer has learned."""


@dataclass(frozen=True)
class FitResult:
    """The outcome of fitting a steerer.

    Attributes:
        state: what it has learned.
        metrics: of the fit, by the steerer's own names.
        ledger: what the fit cost, the samples of ``origin`` included.
        seconds: wall clock.
        origin: model, reward and settings that it belongs to.
    """

    state: Mapping[str, Tensor]
    metrics: Mapping[str, float]
    ledger: Ledger
    seconds: float
    origin: Origin

    def save(self, config: str, output: Path) -> None:
        """Write config, result and what was learned; the directory appears whole or not at all."""
        known = {name: value if abs(value) < float("inf") else None for name, value in self.metrics.items()}
        result: dict[str, Any] = {"metrics": known, "ledger": asdict(self.ledger), "seconds": self.seconds}
        with staged(output) as staging:
            (staging / "config.yaml").write_text(config, encoding="utf-8")
            (staging / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            every = {**self.state, **self.origin.tensors()}
            own = {name: value.detach().cpu().contiguous().clone() for name, value in every.items()}
            save_file(own, staging / FITTED, self.origin.metadata())


def learns(steerer: object) -> TypeGuard[Fitted]:
    """Whether a steerer has a learned part."""
    return all(callable(getattr(steerer, name, None)) for name in ("fit", "state_dict", "load_state_dict"))


def fit_recipe(recipe: Recipe, progress: Progress | None = None) -> FitResult:
    """Fit the steerer of a recipe, on the prompts that it names, or else on the training prompts of the task.

    Raises:
        UserError: if it has nothing to learn.
    """
    part = require(recipe, "steerer")
    task, steering = build_task(recipe), recipe.steering
    steerer = part.build(task)
    if not learns(steerer):
        raise UserError(f"{part.name} learns nothing before it steers: use `difftilt steer`")
    prompts = list(task.prompts) if steering.prompts is None else prompts_of(task, steering)
    if isinstance(task.model.network, nn.Module):
        task.model.network.to(steering.device)
    denoise = denoiser(
        task.model,
        guidance=task.sampler.guidance,
        forward_batch=steering.forward_batch,
        execution=steering.execution,
    )
    reward = as_reward(task.reward)
    reward = Masked(reward) if steering.invalid == "mask" else reward
    noise, began = Noise(steering.seed), time.perf_counter()
    metrics = steerer.fit(task, denoise, reward, prompts, noise, progress=progress)
    origin = origin_of(steerer, task, denoise, reward, prompts, noise)
    return FitResult(steerer.state_dict(), metrics, denoise.ledger, time.perf_counter() - began, origin)


def load_fitted(steerer: object, directory: Path, task: Task, reward: Reward) -> None:
    """Give a steerer what ``difftilt train`` has written, if it was fitted for this model, reward and these settings.

    Raises:
        UserError: for a steerer that learns nothing, a directory without a fit, or a fit of another steerer, model,
            reward or setting.
    """
    if not learns(steerer):
        raise UserError(f"steering.fitted: {type(steerer).__name__} learns nothing: leave it out")
    file = directory / FITTED
    if not file.is_file():
        raise UserError(f"steering.fitted = {directory}: there is no {FITTED} in it; `difftilt train` makes it")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: cast(Tensor, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
            origin = read_origin(tensors, opened.metadata())
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): fit the steerer again with `difftilt train`") from error
    if origin is None:
        raise UserError(f"{file} does not say what it was learned from: fit the steerer again with `difftilt train`")
    steerer.load_state_dict({name: value for name, value in tensors.items() if not name.startswith(PREFIX)})
    check_origin(f"steering.fitted = {directory}", origin, steerer, task, reward)
