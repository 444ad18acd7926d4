"""What is kept of a call of a steerer: a summary per prompt, and the particles."""

import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.rewards.protocol import Samples
from difftilt.rewards.scoring import evaluate
from difftilt.steering.protocol import Steered
from difftilt.training.logs import told_if_full
from difftilt.training.looks import Look, look_at
from difftilt.training.pictures import save_look
from difftilt.training.protocol import Task

STEERED = 24
"""Prompts of a steered run that are shown at all: there may be hundreds."""

PARTICLES = 16
"""Particles of one prompt that are shown, those of the largest weight."""

COMPONENT = "components/"
"""What stands before the name of a further score of each particle, among the tensors that are kept."""


@dataclass(frozen=True)
class SteerResult:
    """The outcome of ``difftilt.steer``.

    Attributes:
        prompts: what was sampled for; ``steered.group`` points into them.
        steered: samples, weights and cost.
        best: ``reward`` and every held-out reward of the best sample of a prompt, averaged over the prompts.
        seconds: wall clock of the steering.
        look: strings of all particles and drawings of those that are shown, where the task offers them.
    """

    prompts: Sequence[str]
    steered: Steered
    best: Mapping[str, float]
    seconds: float
    look: Look = field(default_factory=Look)

    def summary(self) -> dict[str, Any]:
        """Plain values: for each prompt best and weighted mean reward, log Z and how many lineages are left.

        Where samples have strings, also that of the best one, ``text``. ``equal`` counts the prompts all of whose
        samples have one reward.
        """
        rows = _rows(self.steered, self.prompts)
        if self.look.text is not None:
            for row, place in zip(rows, self.steered.best.tolist(), strict=True):
                row["text"] = self.look.text[place]
        return {
            "prompts": rows,
            "best": dict(self.best),
            "ledger": asdict(self.steered.ledger),
            "seconds": self.seconds,
            "complete": self.steered.complete,
            "equal": equal_rewards(self.steered),
        }

    def save(self, config: str, output: Path) -> None:
        """Write config, summary, samples, a picture and strings; the directory appears whole or not at all.

        Args:
            config: text of the resolved recipe.
            output: directory that does not exist or is empty.
        """
        with staged(output) as staging:
            (staging / "config.yaml").write_text(config, encoding="utf-8")
            (staging / "result.json").write_text(json.dumps(self.summary(), indent=2) + "\n", encoding="utf-8")
            save_file(_tensors(self.steered) | self.look.tensors(), staging / "samples.safetensors")
            save_look(staging, "samples", self.steered.media, self.look)


@contextmanager
def staged(output: Path) -> Generator[Path, None, None]:
    """A directory to write to, which becomes ``output`` when all is written, and is gone if anything fails."""
    staging = output.with_name(f".{output.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        with told_if_full(output, "or name another directory"):
            yield staging
            staging.replace(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def heaviest(group: Int[Tensor, " rows"], weight: Float[Tensor, " rows"], prompt: int) -> Int[Tensor, " shown"]:
    """The particles of one prompt that are shown, in order of weight."""
    mine = (group == prompt).nonzero().flatten()
    return mine[weight[mine].argsort(descending=True, stable=True)][:PARTICLES]


def steered_look(task: Task, steered: Steered) -> Look:
    """Strings of all particles; drawings of the best and the heaviest ones of the first prompts."""
    prompts = range(min(len(steered.best), STEERED))
    heavy = [heaviest(steered.group, steered.weight, prompt) for prompt in prompts]
    return look_at(task, steered.media, torch.cat([steered.best[: len(prompts)], *heavy]).unique())


def best_scores(task: Task, prompts: Sequence[str], steered: Steered) -> dict[str, float]:
    """Reward and held-out rewards of the best sample of each prompt, averaged over prompts; no rewards of sets."""
    group = torch.arange(len(prompts), device=steered.media.device)
    samples = Samples.of(steered.media[steered.best], prompts, group, task.model.encode(prompts))
    # the best of a few prompts are no set that a distance or a diversity could be measured of
    instance = {name: reward for name, reward in task.heldout.items() if not reward.capabilities.of_sets}
    scores = {name: evaluate(reward, samples, Ledger()).total for name, reward in instance.items()}
    scores = {"reward": steered.rewards[steered.best], **scores}
    return {name: float(values.double().mean()) for name, values in scores.items()}


def equal_rewards(steered: Steered) -> int:
    """Prompts with at least two samples that have a score, all of one score: the reward chose nothing there."""
    scored = [
        steered.rewards[(steered.group == prompt) & ~steered.rewards.isnan()] for prompt in range(len(steered.best))
    ]
    return sum(len(mine) > 1 and bool(mine.amax() == mine.amin()) for mine in scored)


def _rows(steered: Steered, prompts: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group, prompt in enumerate(prompts):
        mine = steered.group == group
        mine = mine & ~steered.rewards.isnan()  # of those there is nothing to average
        weights, rewards = steered.weight[mine].double(), steered.rewards[mine].double()
        log_z = float(steered.log_z[group])
        rows.append(
            {
                "prompt": prompt,
                "reward_best": float(steered.rewards[steered.best[group]]),
                "reward_mean": float((weights * rewards).sum() / weights.sum()),
                "log_z": None if log_z != log_z else log_z,
                "ess": [float(value) for value in steered.ess[:, group]],
                "ancestors": [int(value) for value in steered.ancestors[:, group]],
                "invalid": None if steered.invalid is None else int(steered.invalid[group]),
            }
        )
    return rows


def _tensors(steered: Steered) -> dict[str, Tensor]:
    names = ("x_0", "media", "group", "weight", "rewards", "best", "log_z", "ess", "ancestors")
    found: dict[str, Tensor] = {name: getattr(steered, name) for name in names}
    found |= {f"{COMPONENT}{name}": scores for name, scores in steered.components.items()}
    found |= {f"history/{name}": values for name, values in steered.history.items()}
    # own storage: safetensors refuses tensors that share memory, as media may with x_0
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in found.items()}
