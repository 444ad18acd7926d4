"""Samples with their scores: drawn in parts, each scored while the next is drawn, where the reward works elsewhere.

A part is whole groups, and noise is keyed by sample, so neither the samples nor their scores depend on the parts.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from difftilt.rewards.protocol import Samples, Scores
from difftilt.sampling.protocol import Trajectory
from difftilt.sampling.recording import join_trajectories
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Run

T = TypeVar("T")


def rolled(
    run: Run, batch: PromptBatch, roll: Callable[[PromptBatch], Trajectory]
) -> tuple[Trajectory, Samples, Scores]:
    """Rollouts of all rows, decoded and scored.

    Args:
        run: decodes and scores.
        batch: what is drawn for.
        roll: rolls out some of its groups; called once for each part.
    """
    made, samples, scores = in_turn(run, batch, roll, lambda path, part: run.samples(path.x_0, part))
    return join_trajectories(made), samples, scores


def drawn(
    run: Run, batch: PromptBatch, draw: Callable[[PromptBatch], Shaped[Tensor, "samples *shape"]]
) -> tuple[Shaped[Tensor, "samples *shape"], Samples, Scores]:
    """Finished samples of all rows, decoded and scored; arguments as in :func:`rolled`."""
    made, samples, scores = in_turn(run, batch, draw, run.samples)
    return torch.cat(made), samples, scores


def in_turn(
    run: Run, batch: PromptBatch, make: Callable[[PromptBatch], T], decode: Callable[[T, PromptBatch], Samples]
) -> tuple[list[T], Samples, Scores]:
    """What ``make`` made of each part of the batch, all samples and their scores."""
    made: list[T] = []

    def parts() -> Generator[Samples]:
        for part in run.parts(batch):
            made.append(make(part))
            yield decode(made[-1], part)

    samples, scores = run.score_parts(parts())
    return made, samples, scores
