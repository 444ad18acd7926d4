"""How good are the trade-offs? PepTune, independent samples and soft value-based decoding at equal reward calls.

On ``molecules`` (drug-likeness, ease of synthesis, nearness to a partition coefficient) and on ``peptides`` (charge,
hydrophobicity, hydrophobic moment). A reward call is one objective of one sample. What is invalid is told for free, by
the testbed's filter, and none of them scores it, but where soft value-based decoding guesses a clean sample of a noisy
state.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from difftilt.checks.trade_offs import hypervolume
from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.ledger import Ledger
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample, start_state
from difftilt.statistics.pareto import front
from difftilt.steering.archive import Goals
from difftilt.steering.budget import Budget
from difftilt.steering.peptune import PepTune, PepTuneConfig
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.steering.within import steer_within
from difftilt.testbeds.molecules import Config as MoleculesConfig
from difftilt.testbeds.molecules import Molecules
from difftilt.testbeds.peptides import Config as PeptidesConfig
from difftilt.testbeds.peptides import Peptides
from difftilt.training.protocol import Task

CALLS = {"full": 2100, "tiny": 60}
STEPS = {"full": 20, "tiny": 4}


@dataclass(frozen=True)
class Setting:
    """A testbed and what is traded off on it.

    Attributes:
        name: of the testbed.
        spread: objective -> standard deviation over samples of the base, to two digits: the unit of the sum, and of
            SVDD's temperature.
        make: steps -> the testbed.
    """

    name: str
    spread: Mapping[str, float]
    make: Callable[[int], Molecules | Peptides]


SETTINGS = (
    Setting(
        "molecules", {"qed": 0.15, "sa": 0.076, "logp": 0.33}, lambda steps: Molecules(MoleculesConfig(steps=steps))
    ),
    Setting(
        "peptides",
        {"charge": 1.7, "hydrophobicity": 0.25, "moment": 0.14},
        lambda steps: Peptides(PeptidesConfig(steps=steps)),
    ),
)


@dataclass(frozen=True)
class Row:
    """One search.

    Attributes:
        testbed, method, seed: which.
        hypervolume: that the found trade-offs dominate above 0.
        front: different ones of them.
        best: largest value of each objective.
        reward_calls, nfe: spent.
    """

    testbed: str
    method: str
    seed: int
    hypervolume: float
    front: int
    best: Mapping[str, float]
    reward_calls: int
    nfe: int


@dataclass(frozen=True)
class Bench:
    """The task, and the reward calls that a search may spend."""

    setting: Setting
    task: Task
    goals: Goals
    calls: int
    children: int

    def peptune(self, seed: int) -> Row:
        """Until the calls are spent."""
        model, budget = self.model(), Budget(reward_calls=self.calls)
        config = PepTuneConfig(iterations=self.calls, children=self.children)
        found = steer_within(PepTune(config), self.task, model, self.task.reward, [""], Noise(seed), budget=budget)
        scores = torch.stack([*found.components.values()], 1).double()
        return self.row("peptune", seed, scores, found.ledger)

    @torch.no_grad()
    def independent(self, seed: int) -> Row:
        """Samples of the model, the valid ones scored, until the calls are spent."""
        model, found, place = self.model(), torch.zeros(0, len(self.setting.spread)), 0
        while len(found) < self.calls // len(self.setting.spread):
            index, noise, place = torch.arange(place, place + 64), Noise(seed), place + 64
            start = start_state(model.process, noise, index, self.task.model.shape)
            x = sample(model, self.task.sampler, start, None, noise=noise, index=index)
            found = torch.cat(
                [found, self.scored(x, model.ledger, self.calls // len(self.setting.spread) - len(found))]
            )
        return self.row("independent samples", seed, found.double(), model.ledger)

    def alone(self, seed: int) -> Row:
        """SVDD on each objective with a third of the calls."""
        model = self.model()
        parts = [
            self.decoded(
                model, self.goals.reward.rewards[name], seed + 100 * place, self.calls // len(self.setting.spread)
            )
            for place, name in enumerate(self.setting.spread)
        ]
        return self.row("svdd, each objective alone", seed, torch.cat(parts).double(), model.ledger)

    def summed(self, seed: int) -> Row:
        """SVDD on the sum of the objectives."""
        model = self.model()
        return self.row("svdd, their sum", seed, self.decoded(model, self.goals.reward, seed, self.calls), model.ledger)

    def everything(self, seed: int) -> Row:
        """The same search, and all that it has scored on its way counts as found, its guesses included."""
        model, seen, total = self.model(), list[Tensor](), self.goals.reward
        first = next(iter(total.rewards))

        def watching(samples: Samples) -> Tensor:
            seen.append(samples.media)
            return total.rewards[first].score(samples)

        parts = {**total.rewards, first: FunctionReward(first, watching)}
        self.decoded(model, WeightedSum(parts, total.weights), seed, self.calls)
        x = torch.cat(seen).unique(dim=0)
        return self.row("svdd, their sum, all it scored", seed, self.scored(x, Ledger(), len(x)), model.ledger)

    def decoded(self, model: NetworkDenoiser, reward: Reward, seed: int, calls: int) -> Tensor:
        """Objectives of as many samples of SVDD as the calls allow, the scoring of what it found included."""
        each = len(self.setting.spread) if isinstance(reward, WeightedSum) else 1
        # a third of the spread of what is steered to
        temperature = 1 / 3 * (1 if isinstance(reward, WeightedSum) else self.setting.spread[reward.name])
        config = SVDDConfig(children=4, temperature=temperature, value="x0_samples", x0_samples=1)
        one = SVDD(config).price(len(self.task.sampler.grid) - 1).reward_calls * each + len(self.setting.spread)
        steerer = SVDD(config.model_copy(update={"particles": max(1, calls // one)}))
        x = steerer.steer(self.task, model, reward, [""], Noise(seed)).media
        return self.scored(x, model.ledger, len(x))

    def row(self, method: str, seed: int, scores: Tensor, spent: Ledger) -> Row:
        """What the scores of all valid samples that a search came up with are worth."""
        best = scores[front(scores)].unique(dim=0)
        tops: dict[str, float] = dict(zip(self.setting.spread, scores.amax(0).tolist(), strict=True))
        volume = hypervolume(best.clamp(min=0))
        return Row(self.setting.name, method, seed, volume, len(best), tops, spent.reward_calls, spent.nfe)

    def model(self) -> NetworkDenoiser:
        """With a ledger of its own."""
        return denoiser(self.task.model, forward_batch=64)

    def scored(self, x: Tensor, ledger: Ledger, most: int) -> Tensor:
        """Objectives of the valid ones among some samples, of so many at most."""
        assert self.task.valid is not None
        x = x[self.task.valid(x)][:most]
        every = [""] * len(x)
        return self.goals.score(Samples(x, every, every, torch.zeros(len(x), dtype=torch.int64)), ledger).float()


def run(size: str, seeds: int, path: Path) -> list[Row]:
    """Every search of every testbed with every seed; ``path`` gets every row when it is there."""
    rows = list[Row]()
    path.parent.mkdir(parents=True, exist_ok=True)
    for setting in SETTINGS:
        bench = bench_of(setting, size)
        searches = (bench.peptune, bench.independent, bench.alone, bench.summed, bench.everything)
        for seed, search in product(range(seeds), searches):
            rows.append(search(seed))
            path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def bench_of(setting: Setting, size: str) -> Bench:
    """The task of a setting; the sum of its objectives is in units of their spread."""
    testbed = setting.make(STEPS[size])
    offered = testbed.rewards()
    reward = WeightedSum(
        {name: offered[name] for name in setting.spread}, {name: 1 / one for name, one in setting.spread.items()}
    )
    task = replace(testbed.task(), reward=reward)
    return Bench(setting, task, Goals.of(reward), CALLS[size], 10 if size == "full" else 4)


def table(rows: Sequence[Row]) -> Table:
    """One row per testbed and method, mean and standard deviation over the seeds."""
    names = ("testbed", "method", "hypervolume", "front", "best of each objective", "reward calls", "nfe")
    shown = Table(*names, box=None)
    for testbed, method in dict.fromkeys((row.testbed, row.method) for row in rows):
        mine = [row for row in rows if (row.testbed, row.method) == (testbed, method)]
        columns = [[row.hypervolume for row in mine], [float(row.front) for row in mine]]
        cells = [f"{statistics.mean(one):.3g} ± {statistics.pstdev(one):.2g}" for one in columns]
        best = ", ".join(f"{name} {statistics.mean(row.best[name] for row in mine):.3g}" for name in mine[0].best)
        spent = (statistics.mean(row.reward_calls for row in mine), statistics.mean(row.nfe for row in mine))
        shown.add_row(testbed, method, *cells, best, *(f"{value:.0f}" for value in spent))
    return shown
