"""The process reward of a run: its network in its own role, fitted before training and, if asked for, beside it."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor, nn

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.models.process_reward import ProcessReward, labels_of, process_reward_for, sizes_of
from difftilt.models.protocol import Frozen, RoleSpec, Trained
from difftilt.models.saving import from_pretrained
from difftilt.process.protocol import Condition
from difftilt.sampling.protocol import NoiseSource
from difftilt.sampling.rollout import sample, start_state
from difftilt.training.experience import Experience
from difftilt.training.protocol import Loss, Phase, Run, Task, Term
from difftilt.trees import to_device
from difftilt.values.learned import Regression, noised_loss
from difftilt.values.process_reward import PURPOSE, Scorer, fit_process_reward

ROLE = "process_reward"
_APART = 1 << 40
"""Added to the index of the samples of the fit: their noise is not that of the rollouts."""


class ProcessRewardConfig(Config):
    """Where the process reward comes from, and what it learns."""

    process_reward: str | None = None
    """Directory of a saved process reward, which is not fitted again; null fits a small one at the first iteration."""
    temperature: float = Field(default=3.125, gt=0)
    """β of a soft value, of ``guidance: kl`` and of the limit of distillation, in units of the reward."""
    fit: Regression = "mean"
    """``mean``: E[r | x_t]; ``stationary``, ``exponential``: the soft value, which the exact tilt asks for."""
    fit_samples: int = Field(default=512, ge=2)
    """Samples of the base model that it is fitted to."""
    fit_steps: int = Field(default=300, ge=0)
    """Optimiser steps of the fit; 0 leaves the network as it is."""
    fit_batch: int = Field(default=128, ge=1)
    """Rows per step of the fit."""
    fit_lr: float = Field(default=3e-3, gt=0)
    """Learning rate of the fit, and of the training beside."""
    fit_hidden: int = Field(default=64, ge=1)
    """Width of the network."""
    train_beside: bool = False
    """One more optimiser step of the process reward in every iteration, on its samples."""


def process_reward_of(config: ProcessRewardConfig, task: Task) -> nn.Module:
    """The saved network, or a new one for the task's states and conditions.

    Raises:
        UserError: if the directory holds another kind of network, or the conditions are of no known kind.
    """
    if config.process_reward is None:
        return process_reward_for(task.model.shape, condition_of(task), hidden=config.fit_hidden)
    saved = from_pretrained(config.process_reward)
    if not isinstance(saved, ProcessReward):
        raise UserError(
            f"method.process_reward = {config.process_reward} holds a {type(saved).__name__}: save a ProcessReward"
        )
    _check_saved(saved, config.process_reward, task)
    return saved.eval()


def condition_of(task: Task) -> Condition:
    """A condition as the task has them: that of every prompt where they are classes, else that of the first alone."""
    prompts = list(dict.fromkeys([*task.prompts, *task.heldout_prompts]))
    with torch.no_grad():
        first = task.model.encode(prompts[:1])
        return first if labels_of(first) is None else task.model.encode(prompts)


def _check_saved(saved: ProcessReward, directory: str, task: Task) -> None:
    """Refuse a network that was made for other states or conditions than the task's, or whose score is not finite."""
    condition, shape = to_device(condition_of(task), "cpu"), tuple(task.model.shape)
    classes, vector = sizes_of(condition)
    # a class that it does not know would be read as its null label
    known = saved.classes == 0 or 0 < classes <= saved.classes
    if saved.shape != shape or not known or saved.vector not in (0, vector):
        made, wanted = _sizes(saved.shape, saved.classes, saved.vector), _sizes(shape, classes, vector)
        raise UserError(
            f"method.process_reward = {directory} was made for {made}, and {task.name} has {wanted}: save one for this "
            "model, or leave it out to fit a small one"
        )
    read = saved.read(condition)
    with torch.no_grad():
        score = saved(torch.zeros(1, *shape), torch.full((1,), 0.5), None if read is None else read[:1])
    if not bool(score.isfinite().all()):
        raise UserError(f"method.process_reward = {directory} gives a score that is not finite: fit and save it again")


def _sizes(shape: tuple[int, ...], classes: int, vector: int) -> str:
    """States and conditions in words."""
    kinds = [f"{classes} classes"] * (classes > 0) + [f"vectors of width {vector}"] * (vector > 0)
    return f"states of shape {shape} and {' and '.join(kinds) or 'no class or vector'}"


def process_role(config: ProcessRewardConfig, network: nn.Module) -> Mapping[str, RoleSpec]:
    """The role of the network, trained where it learns beside."""
    if config.train_beside:
        return {ROLE: Trained(source=None, network=network, optimizer={"lr": config.fit_lr})}
    return {ROLE: Frozen(network=network)}


def scorer(run: Run) -> Scorer:
    """The process reward of the run, counted."""
    return Scorer(run.roles.module(ROLE), run.ledger)


def fit_to_base(config: ProcessRewardConfig, run: Run) -> None:
    """Fit the process reward to scored samples of the base, those of all processes; saved ones stay as they are."""
    network, model = run.roles.module(ROLE), run.task.model
    if not isinstance(network, ProcessReward) or config.process_reward is not None or config.fit_steps == 0:
        return
    batch = run.prompts(config.fit_samples, 1)
    index = batch.index + _APART
    start = start_state(model.process, run.noise, index, model.shape, batch.condition)
    denoise = run.denoiser("reference")
    x_0 = sample(denoise, run.task.sampler, start, batch.condition, noise=run.noise, index=index)
    reward = run.score(run.samples(x_0, batch)).total
    x_0, reward = run.gather(x_0, reward)
    read = network.read(batch.condition)
    fit_process_reward(
        network,
        model.process,
        x_0,
        reward,
        None if read is None else run.gather(read)[0],
        run.noise,
        temperature=config.temperature,
        kind=config.fit,
        updates=config.fit_steps,
        batch=config.fit_batch,
        learning_rate=config.fit_lr,
    )
    run.ledger.auxiliary_calls += config.fit_steps * config.fit_batch


def beside(config: ProcessRewardConfig, run: Run) -> Phase:
    """The regression of the fit, on one row of every sample of the iteration."""
    return Phase(ROLE, partial(_regression, config, run), select=_once)


def _regression(config: ProcessRewardConfig, run: Run, rows: Experience, noise: NoiseSource) -> Loss:
    assert rows.x_0 is not None
    assert rows.rewards is not None
    run.ledger.auxiliary_calls += len(rows.index)
    network = run.roles.module(ROLE)
    assert isinstance(network, ProcessReward)
    value = noised_loss(
        network,
        run.task.model.process,
        rows.x_0,
        rows.rewards,
        rows.condition,
        rows.index,
        noise,
        temperature=config.temperature,
        kind=config.fit,
        ceiling=float(network.ceiling),
        unit=float(network.scale),
        purpose=PURPOSE,
    )
    return Loss({"regression": Term(value)})


def _once(experience: Experience) -> Int[Tensor, " samples"]:
    edges = experience.edges
    return (edges.step == edges.step.min()).nonzero()[:, 0] if len(edges.step) else edges.step
