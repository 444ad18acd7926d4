"""A pipeline of ``diffusers`` as a task: Stable Diffusion, FLUX, Wan and their relatives, with a reward of your own.

The one testbed whose truth is not known: it is here because a recipe names its task like the others.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from pydantic import Field

from difftilt.card import Card
from difftilt.models.diffusers import Adapter, PipelineOptions, adapt
from difftilt.models.diffusers.schedules import Schedule
from difftilt.process.gaussian import RectifiedFlow
from difftilt.rewards.base import Unrewarded
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import CPS, DDIM, FlowSDE
from difftilt.sampling.protocol import Kernel, Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.training.prompts import Prompts, as_prompts
from difftilt.training.protocol import Task

CARD = Card(
    name="pipeline",
    entry="Pipeline",
    paper="The pipelines of the diffusers library (von Platen et al. 2022); each family names its own paper.",
)


class TaskOptions(PipelineOptions):
    """The pipeline, and how methods that need noise in its steps sample it."""

    noise_level: float | None = Field(default=None, gt=0)
    """Of the stochastic steps that steerers propose with: ``a`` of the Flow-SDE, ``eta`` of DDIM; null is 0.7 and 1. A
    consistency model has no choice. The last step follows the ODE: its noise would stay in the sample."""


class Config(TaskOptions):
    """Which pipeline, which prompts, and how it is sampled."""

    source: str = Field(min_length=1)
    """Local folder of a pipeline, or its id on the hub."""
    prompts: Prompts
    """What is trained on: a list, a file (.txt, .jsonl), a data set, or a mapping with ``source`` and its columns."""
    heldout_prompts: Prompts | None = None
    """What is evaluated; null evaluates the training prompts."""


class Pipeline:
    """The testbed; nothing is loaded before :meth:`task`.

    Args:
        config: as in :class:`Config`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def prompts(self) -> Sequence[str]:
        """Training prompts."""
        return as_prompts(self.config.prompts)

    @cached_property
    def heldout_prompts(self) -> Sequence[str]:
        """Prompts of evaluations."""
        other = self.config.heldout_prompts
        return self.prompts if other is None else as_prompts(other)

    def task(self) -> Task:
        """The pipeline, loaded anew, without a reward."""
        options = TaskOptions(**self.config.model_dump(include=set(TaskOptions.model_fields)))
        prompts, heldout = self.prompts, self.heldout_prompts
        return pipeline_task(self.config.source, Unrewarded(), prompts, heldout, options)


def pipeline_task(
    source: Any,
    reward: Reward,
    prompts: Sequence[str],
    heldout_prompts: Sequence[str] | None = None,
    options: TaskOptions | None = None,
) -> Task:
    """A task of a pipeline, or of the folder or hub id of one.

    Args:
        source: a pipeline keeps its own weights, which training then moves.
        reward: of decoded samples.
        prompts: to train on.
        heldout_prompts: to evaluate on; None evaluates on the same.
        options: of loading and sampling.

    Raises:
        UserError: if there is no such pipeline, no family serves it, or it cannot be sampled like this.
    """
    options = TaskOptions() if options is None else options
    return task_of_adapter(adapt(source, options), reward, prompts, heldout_prompts, options.noise_level)


def task_of_adapter(
    adapter: Adapter,
    reward: Reward,
    prompts: Sequence[str],
    heldout_prompts: Sequence[str] | None = None,
    noise_level: float | None = None,
) -> Task:
    """The task of a pipeline that has its adapter; arguments as in :func:`pipeline_task`."""
    return Task(
        name=type(adapter.pipe).__name__,
        model=adapter.model,
        reward=reward,
        prompts=list(prompts),
        heldout_prompts=list(prompts if heldout_prompts is None else heldout_prompts),
        sampler=sampler_of(adapter, noise_level),
    )


def sampler_of(adapter: Adapter, noise_level: float | None = None) -> Sampler:
    """The grid of the pipeline's scheduler, its guidance, its deterministic steps, and stochastic ones beside them."""
    kernel = kernel_of(adapter.schedule, noise_level)
    solver = EulerSolver() if adapter.schedule.law == "ode" else None  # else the pipeline itself follows the kernel
    return Sampler(adapter.grid, kernel, solver, adapter.guidance, clean_end=True, begins=adapter.begins)


def kernel_of(schedule: Schedule, noise_level: float | None = None) -> Kernel:
    """The stochastic step: the model's own if it has one; Flow-SDE for rectified flows, DDIM for the others."""
    if schedule.law == "renoise":
        return CPS(1.0)  # alpha_s·x0 + sigma_s·noise
    if isinstance(schedule.process, RectifiedFlow):
        return FlowSDE(0.7 if noise_level is None else noise_level)
    return DDIM(1.0 if noise_level is None else noise_level)
