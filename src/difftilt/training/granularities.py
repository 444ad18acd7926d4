"""Completions of perturbed states at several granularities, and their rewards (G2RPO, arXiv 2510.01982)."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Scores
from difftilt.sampling.completion import Granularity, Start, complete
from difftilt.sampling.protocol import Edges
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Run
from difftilt.trees import take

Branches = Mapping[int, tuple[Edges, Condition]]
"""Step of the grid -> the steps that were drawn there, one for each of its samples, and their conditions."""


def scored_views(
    run: Run, batch: PromptBatch, branches: Branches, grid: Float[Tensor, " times"], granularities: Sequence[int]
) -> tuple[Shaped[Tensor, "samples *shape"], Sequence[Scores]]:
    """Samples of the finest granularity, and the rewards of all samples at each, the finest first.

    Near the data several granularities leave one schedule. It is completed and scored once, and stands in the view of
    each: in rising order those that coincide are neighbours.

    Args:
        run: gives ``current`` and the reward.
        batch: of all samples; each belongs to one branch.
        branches: whose ends are completed, as x0-predictions of the last evaluation.
        grid: falling times.
        granularities: see ``Granularity``.
    """
    fine: Tensor | None = None
    views, before = list[Scores](), dict[int, tuple[float, ...]]()
    for skip in sorted(granularities):
        times = {step: tuple(Granularity(skip)(grid, step + 1).tolist()) for step in branches}
        new = [step for step in branches if times[step] != before.get(step)]
        before = times
        if not new:
            views.append(views[-1])
            continue
        rows, order = torch.cat([branches[step][0].sample for step in new]).sort()
        starts = [_start(*branches[step], times[step]) for step in new]
        x_0 = torch.cat(complete(run.denoiser("current"), starts, output="x0"))[order]
        scores = run.score(run.samples(x_0, take(batch, rows)))
        fine = x_0 if fine is None else fine
        views.append(_renewed(views[-1], rows, scores) if views else scores)
    assert fine is not None
    return fine, views


def _start(edges: Edges, condition: Condition, times: tuple[float, ...]) -> Start:
    assert edges.x_s is not None
    return Start(edges.x_s, condition, times)


def _renewed(scores: Scores, rows: Int[Tensor, " rows"], newer: Scores) -> Scores:
    """The scores of all samples, with those of some rows replaced."""

    def put(values: Tensor, changed: Tensor) -> Tensor:
        return values.index_copy(0, rows, changed)

    components = {name: put(values, newer.components[name]) for name, values in scores.components.items()}
    return Scores(put(scores.total, newer.total), components)
