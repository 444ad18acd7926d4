"""Rewards along a chain: what the ODE would make of each of its states (DenseGRPO, TP-GRPO)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.sampling.completion import Start, complete
from difftilt.statistics.folds import distinct
from difftilt.training.experience import PromptBatch
from difftilt.training.protocol import Run
from difftilt.trees import take


def rewards_along(
    run: Run, batch: PromptBatch, starts: Sequence[Start], *, one_first_state: bool = False
) -> Float[Tensor, "samples states"]:
    """Reward of the completion of each start by the current weights; no gradient.

    Args:
        run: completes with ``current`` and scores.
        batch: whose chains they are, one row per row of a start.
        starts: states of the same chains at several times, one column each.
        one_first_state: the chains of a group have the first of these states in common, which is then completed and
            scored once for the group.
    """
    every = torch.arange(len(batch.index), device=batch.index.device)
    once = distinct(batch.group) if one_first_state else (every, every)
    kept = [once, *[(every, every)] * (len(starts) - 1)]
    x_0 = complete(run.denoiser("current"), [take(start, rows) for start, (rows, _) in zip(starts, kept, strict=True)])
    columns = [
        run.score(run.samples(x, take(batch, rows))).total[again] for x, (rows, again) in zip(x_0, kept, strict=True)
    ]
    return torch.stack(columns, 1)
