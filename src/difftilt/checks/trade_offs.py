"""Searches for trade-offs on a toy, whole and with one idea taken out.

Ten positions of four symbols, independent with the law (0.2, 0.2, 0.2, 0.4), ten steps. A sequence without two adjacent
"3" is valid (29 % of the base's). Three objectives in [0, 1] that conflict: the share of "0", the share of "1", and a
fifth of the number of "02" pairs.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.models.denoiser import denoiser
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.statistics.pareto import dominates, pareto_rank
from difftilt.steering.archive import Archive
from difftilt.steering.peptune import ParetoSearch, PepTuneConfig
from difftilt.steering.tree import Forest, Ids, Rule
from difftilt.steering.tree_rules import ParetoFront
from difftilt.training.protocol import Task


def share(symbol: int) -> Callable[[Samples], Tensor]:
    """Share of the positions that hold a symbol."""
    return lambda samples: (samples.media == symbol).float().mean(1)


def _pairs(samples: Samples) -> Tensor:
    x = samples.media
    return ((x[:, :-1] == 0) & (x[:, 1:] == 2)).float().sum(1) / 5


def valid(x: Int[Tensor, "rows position"]) -> Tensor:
    """No two adjacent "3"."""
    return ~((x[:, :-1] == 3) & (x[:, 1:] == 3)).any(1)


def toy() -> Task:
    """The task; its reward is the sum of the three objectives."""
    law = torch.tensor([0.2, 0.2, 0.2, 0.4]).log()
    model = GenerativeModel(
        lambda x, t, c: law.expand(*x.shape, 4), MaskedProcess(4), "logits", (10,), lambda p: None, lambda x: x
    )
    objectives: dict[str, Reward] = {
        "zeros": FunctionReward("zeros", share(0)),
        "ones": FunctionReward("ones", share(1)),
        "pairs": FunctionReward("pairs", _pairs),
    }
    reward = WeightedSum(objectives, dict.fromkeys(objectives, 1.0))
    return Task("toy", model, reward, ("",), ("",), Sampler(uniform_grid(10), Unmasking()), valid=valid)


def hypervolume(scores: Float[Tensor, "rows objectives"]) -> float:
    """Volume that the scores dominate above 0."""
    from pymoo.indicators.hv import HV

    found = HV(ref_point=np.zeros(scores.shape[1]))(-scores.double().numpy())
    assert found is not None
    return float(found)


def begun(runs: int, kind: type[ParetoSearch] = ParetoSearch, seed: int = 0, **settings: Any) -> ParetoSearch:
    """Searches of the toy that have not begun, one for each run."""
    task, config = toy(), PepTuneConfig.model_validate({"iterations": 100, "children": 10, **settings})
    return kind.begin(config, task, denoiser(task.model), task.reward, [""] * runs, Noise(seed))


@torch.no_grad()
def advanced(search: ParetoSearch) -> ParetoSearch:
    """After all its iterations."""
    while search.done < search.config.iterations and search.advance():
        pass
    return search


class RandomPolicy(ParetoSearch):
    """The same tree and archive, but any child is as good as another."""

    @property
    def rule(self) -> Rule:
        return lambda forest, children, u: int(children[int(u * len(children))])


class SumPolicy(ParetoSearch):
    """The same tree and archive, but the child with the largest sum of its bounds over the objectives is next."""

    @property
    def rule(self) -> Rule:
        return _largest_sum(ParetoFront(self.config.exploration))


def _largest_sum(bound: ParetoFront) -> Rule:
    def choose(forest: Forest, children: Ids, u: float) -> int:
        return int(children[bound.bounds(forest, children).sum(1).argmax()])

    return choose


class Circling(ParetoSearch):
    """Nothing is retired but whole sequences: a walk that ends above them begins anew at the root, up to 200 times."""

    def retire(self, nodes: Ids) -> None:
        self.forest.closed[nodes] = True

    def select(self, roots: Ids, purpose: str = "restart") -> Ids:
        for attempt in range(200):
            at = super().select(roots, f"{purpose} {attempt}")
            if self.unexpanded(int(at[0])):
                return at
        return roots[:0]


class Everyone(Archive):
    """The ablation: a sample enters if it is at least as good as *every* member in every objective."""

    def add(
        self,
        x: Int[Tensor, "rows position"],
        scores: Float[Tensor, "rows components"],
        objectives: Int[Tensor, " objectives"],
        active: Int[Tensor, " active"],
        names: Sequence[Hashable] | None = None,
    ) -> Float[Tensor, "rows objectives"]:
        ranks = list[Tensor]()
        for one, score in zip(x[:, None], scores[:, None], strict=True):
            ranks.append(pareto_rank(score, self.scores)[0])
            if bool((score >= self.scores).all()):
                kept = ~dominates(score, self.scores)[0]
                self.x, self.scores = torch.cat([self.x[kept], one]), torch.cat([self.scores[kept], score])
        return torch.stack(ranks) if ranks else scores.new_zeros(0, scores.shape[1])
