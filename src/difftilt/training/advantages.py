"""From the rewards of an iteration to advantages, as configured: baseline, scale, several rewards, selection."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.credit.group import Aggregation, Normaliser, Scale, aggregate, best_worst, leave_one_out
from difftilt.credit.history import History, push_and_normalise
from difftilt.errors import UserError
from difftilt.sampling.windows import random_steps
from difftilt.training.experience import Experience
from difftilt.training.protocol import Run


class NormaliserConfig(Config):
    """What a centred reward is divided by. Defaults are Flow-GRPO's."""

    advantage_std: Scale = "group"
    """What a centred reward is divided by."""
    ddof: Literal[0, 1] = 0
    """Population (Flow-GRPO) or sample (DanceGRPO) standard deviation."""
    std_eps: float = Field(default=1e-4, gt=0)
    """Added to the standard deviation; DanceGRPO 1e-8."""
    advantage_clip: float = Field(default=5.0, gt=0)
    """Bound of the absolute advantage; a raw reward (``advantage: none``) is not bounded."""

    @property
    def normaliser(self) -> Normaliser:
        """The settings, bound together; the clip is left to the caller, who may add several first."""
        return Normaliser(self.advantage_std, self.ddof, self.std_eps)


class AdvantageConfig(NormaliserConfig):
    """How a reward is compared. Defaults are Flow-GRPO's."""

    advantage: Literal["group", "history", "leave_one_out", "none"] = "group"
    """Baseline: the group, DDPO's running buffer of each prompt, the other samples of the group, or nothing (DPOK)."""
    history: int = Field(default=32, ge=16)
    """Rewards remembered for each prompt."""
    aggregation: Aggregation | None = None
    """How the components of the reward meet; None takes its weighted total."""
    component_weights: dict[str, float] = Field(default_factory=dict[str, float])
    """Weights for ``aggregation``; a component not named counts 1."""
    best_worst: int | None = Field(default=None, ge=2)
    """Train only on so many samples of a group, half the best and half the worst; None on all."""


class Advantages:
    """Advantages over the rewards of all processes. The history is the only thing remembered."""

    def __init__(self, config: AdvantageConfig, prompts: int) -> None:
        self.config = config
        self.history = History.empty(prompts, config.history)

    def __call__(self, run: Run, experience: Experience) -> Float[Tensor, " samples"]:
        """Clipped advantage of each sample of this process."""
        assert experience.rewards is not None
        names = sorted(experience.components)
        strange = sorted(set(self.config.component_weights) - set(names))
        if strange:
            raise UserError(f"method.component_weights names {strange[0]!r}; the components are {', '.join(names)}")
        columns = [experience.components[name] for name in names]
        credit = partial(self._credit, names)
        advantage: Tensor = run.jointly(credit, experience.rewards, experience.group, experience.prompt, *columns)
        if self.config.advantage == "none":
            return advantage
        return advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def _credit(self, names: list[str], total: Tensor, group: Tensor, prompt: Tensor, *columns: Tensor) -> Tensor:
        config, normaliser = self.config, self.config.normaliser
        if config.aggregation is not None:
            weights = {name: config.component_weights.get(name, 1.0) for name in names}
            components = dict(zip(names, columns, strict=True))
            return aggregate(components, weights, group, config.aggregation, normaliser=normaliser)
        match config.advantage:
            case "history":
                # the history stays on the CPU, whatever the device of the rewards
                advantage, self.history = push_and_normalise(self.history, total.cpu(), prompt.cpu())
                return advantage.to(total.device)
            case "leave_one_out":
                return leave_one_out(total, group)
            case "none":
                return total
            case "group":
                return normaliser(total, group)

    def selected(
        self, run: Run, advantage: Float[Tensor, " samples"], group: Int[Tensor, " samples"]
    ) -> Bool[Tensor, " samples"]:
        """False for samples of advantage 0 (but for raw rewards), and for those between the best and the worst."""
        kept = advantage != 0 if self.config.advantage != "none" else torch.ones_like(advantage, dtype=torch.bool)
        if self.config.best_worst is None:
            return kept
        return kept & extremes(run, self.config.best_worst, advantage, group)


def check_best_worst(keep: int | None, group_size: int) -> None:
    """Refuse a ``best_worst`` that has no two halves, or that no group can fill."""
    if keep is not None and (keep % 2 or keep > group_size):
        raise UserError(f"method.best_worst = {keep} must be even and at most group_size = {group_size}")


def extremes(
    run: Run, keep: int, advantage: Float[Tensor, " samples"], group: Int[Tensor, " samples"]
) -> Bool[Tensor, " samples"]:
    """True for the ``keep`` best and worst samples of each group, whatever process holds its other samples."""
    return run.jointly(partial(best_worst, keep=keep), advantage, group)


def drawn_steps(run: Run, experience: Experience, fraction: float) -> Bool[Tensor, " edges"]:
    """True for the steps drawn for their sample, a ``fraction`` of those from the first recorded to the last."""
    edges = experience.edges
    if fraction == 1 or len(edges.step) == 0:
        return torch.ones_like(edges.step, dtype=torch.bool)
    first, last = int(edges.step.min()), int(edges.step.max())
    drawn = random_steps(run.noise, experience.index, last - first + 1, fraction)
    return drawn[edges.sample, edges.step - first]
