"""Regularisation only where it is needed: a gated penalty to a reference that follows, and a bonus for being unlike.

Three parts that any method with groups and a penalty can take (GARDO, arXiv 2512.24138). The penalty holds the samples
that the reward ranks far above what auxiliary rewards say of them; the reference is replaced by the trained weights now
and then; the advantage of a good sample is multiplied by its distance to the nearest other of its group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from difftilt.config import Config
from difftilt.credit.diversity import favour_unlike, nearest_distance
from difftilt.credit.group import group_advantage
from difftilt.credit.uncertainty import Fraction, mean_doubt, scope_of, suspects, uncertainty
from difftilt.errors import UserError
from difftilt.leaves import nearest
from difftilt.models.protocol import Frozen, RoleSpec
from difftilt.rewards.protocol import Samples
from difftilt.training.experience import Experience
from difftilt.training.protocol import Loss, Phase, Run, Task
from difftilt.training.surrogate import KL_GATE

ANCHOR = "anchor"
"""Role that the penalty pulls to."""


class GatingConfig(Config):
    """Who is held back, to what, and what being unlike is worth."""

    auxiliary: tuple[str, ...] = ()
    """Held-out rewards of the task that doubt the trained one; they are ranked, never optimised."""
    gate: Literal["suspects", "all"] = "suspects"
    """Whom the penalty holds: those of highest uncertainty, or everybody, which is a plain KL penalty."""
    gate_scope: Literal["batch", "group"] = "batch"
    """Samples that are ranked together: all of the iteration (released code), or those of one prompt."""
    gate_positive: bool = False
    """Take the quantile over the samples with U >= 0 only (released code): about half as many are held."""
    gate_fraction: float = Field(default=0.1, gt=0, le=1)
    """Share k of the samples that is held at first."""
    gate_low: float = Field(default=0.02, gt=0, le=1)
    """Smallest k."""
    gate_high: float = Field(default=0.2, gt=0, le=1)
    """Largest k; the paper's text bounds it by 1 only."""
    kl_mean: Literal["gated", "all"] = "gated"
    """The penalty is the mean over the rows that are held (released code), or over all rows (the paper's equation)."""
    kl_limit: float | None = Field(default=1e-4, gt=0)
    """Mean KL of the held rows of an update above which the reference is replaced; None never."""
    reset_steps: int | None = Field(default=100, ge=1)
    """Optimiser steps after which the reference is replaced; None never."""
    diversity: Literal["normalised", "plain", "none"] = "normalised"
    """Factor of a positive advantage: distance over its group mean (released code), the distance, or 1."""

    @model_validator(mode="after")
    def _within(self) -> Self:
        if not self.gate_low <= self.gate_fraction <= self.gate_high:
            raise ValueError(
                f"gate_fraction = {self.gate_fraction} must lie between gate_low = {self.gate_low} and "
                f"gate_high = {self.gate_high}"
            )
        return self


@dataclass(frozen=True)
class Credit:
    """What the rewards of an iteration come to.

    Attributes:
        advantage: of each sample, shaped.
        held: True for the samples that the penalty holds; None where there is no penalty.
    """

    advantage: Float[Tensor, " samples"]
    held: Bool[Tensor, " samples"] | None


class Gating:
    """Gates, shapes, and moves the reference. A method calls the public functions in the order in which they stand.

    Args:
        config: of all three parts.
        task: has the auxiliary rewards.
        weight: of the penalty; at 0 nobody is held and no auxiliary is needed; those that are named must exist.
    """

    def __init__(self, config: GatingConfig, task: Task, weight: float) -> None:
        self.config = config
        self.active = weight > 0
        _check(config, task, self.active)
        self.auxiliary = [task.heldout[name] for name in config.auxiliary] if self.active else []
        self.uncertainty = uncertainty
        self.fraction = Fraction(config.gate_fraction, low=config.gate_low, high=config.gate_high)
        self.steps = 0
        self.resets = 0
        self._rows_per_held = 1.0

    def roles(self) -> Mapping[str, RoleSpec]:
        """The reference that follows; the first one, from which drift is reported, stays where it is."""
        return {ANCHOR: Frozen("current")} if self.active else {}

    def credit(self, run: Run, experience: Experience, samples: Samples) -> Credit:
        """Centred and shaped advantages, not divided by any std, and who is held.

        Args:
            run: gives the auxiliary scores and the samples of the other processes.
            experience: scored.
            samples: decoded, of this experience.
        """
        assert experience.rewards is not None
        advantage = run.jointly(partial(group_advantage, std="none"), experience.rewards, experience.group)
        if self.config.diversity != "none":
            media, features = samples.media, run.task.features
            # a group never straddles processes, so features need not travel
            distance = nearest_distance(
                media.flatten(1).float() if features is None else features(media), samples.group
            )
            normalise = self.config.diversity == "normalised"
            advantage = favour_unlike(advantage, distance, samples.group, normalise=normalise)
        return Credit(advantage, self._held(run, experience, samples) if self.active else None)

    def _held(self, run: Run, experience: Experience, samples: Samples) -> Bool[Tensor, " samples"]:
        if self.config.gate == "all":
            return torch.ones_like(experience.group, dtype=torch.bool)
        assert experience.rewards is not None
        scores = [run.score_with(reward, samples).total for reward in self.auxiliary]
        return run.jointly(self._select, experience.rewards, experience.group, torch.stack(scores, dim=1))

    def _select(self, proxy: Tensor, group: Tensor, auxiliary: Tensor) -> Tensor:
        """The suspects of all processes, after k has seen how doubtful they are."""
        scope = scope_of(group, whole_batch=self.config.gate_scope == "batch")
        doubt = self.uncertainty(proxy, auxiliary, scope)
        self.fraction = self.fraction.after(mean_doubt(doubt))
        return suspects(doubt, scope, self.fraction.value, positive_only=self.config.gate_positive)

    def gated(self, experience: Experience, credit: Credit) -> Experience:
        """The record whose edges carry the gate of their sample."""
        if credit.held is None:
            return experience
        edges = experience.edges
        gate = credit.held[edges.sample].float()
        return replace(experience, edges=replace(edges, extras={**edges.extras, KL_GATE: gate}))

    def watched(self, phase: Phase, run: Run) -> Phase:
        """The phase, told how many of an update's rows are held, and reported to when the weights have moved."""
        if not self.active:
            return phase
        return replace(phase, before=partial(self._before, run), after=partial(self.moved, run))

    def _before(self, run: Run, rows: Experience) -> Experience:
        """Rows of one update, the gate scaled so that the mean over rows is the mean over those that are held."""
        gate = rows.edges.extras[KL_GATE]
        (every,) = run.gather(gate)
        self._rows_per_held = len(every) / max(int((every > 0).sum()), 1)
        if self.config.kl_mean == "all":
            return rows
        extras = {**rows.edges.extras, KL_GATE: gate * self._rows_per_held}
        return rows.changed(edges=replace(rows.edges, extras=extras))

    def told(self, loss: Loss, rows: Experience) -> Loss:
        """The loss with what the gate and the reference are doing among its diagnostics."""
        if not self.active:
            return loss
        gate = rows.edges.extras[KL_GATE]
        numbers = {"gate_share": self.fraction.value, "resets": float(self.resets)}
        if self.fraction.seen:
            numbers["doubt"] = self.fraction.seen[-1]
        constant = {name: torch.full_like(gate, number) for name, number in numbers.items()}
        return replace(loss, metrics={**loss.metrics, "gated": gate > 0, **constant})

    def moved(self, run: Run, metrics: Mapping[str, float]) -> None:
        """After an update: replace the reference where it is too far away, or old.

        The KL is that of the update's rows before the step, averaged over the rows that are held; 0 if none is.
        """
        kl = metrics.get("loss/kl", 0.0) * (self._rows_per_held if self.config.kl_mean == "all" else 1.0)
        self.steps += 1
        far = self.config.kl_limit is not None and kl > self.config.kl_limit
        old = self.config.reset_steps is not None and self.steps >= self.config.reset_steps
        if far or old:
            run.roles.blend(ANCHOR, "current", 0.0)
            self.steps, self.resets = 0, self.resets + 1

    def state_dict(self) -> dict[str, Tensor]:
        """K, the doubts it has seen, the age of the reference and the number of resets."""
        return {
            "fraction": torch.tensor(self.fraction.value, dtype=torch.float64),
            "seen": torch.tensor(self.fraction.seen, dtype=torch.float64),
            "steps": torch.tensor(self.steps),
            "resets": torch.tensor(self.resets),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        seen: list[float] = state["seen"].tolist()
        self.fraction = replace(self.fraction, value=float(state["fraction"]), seen=tuple(seen))
        self.steps, self.resets = int(state["steps"]), int(state["resets"])


def _check(config: GatingConfig, task: Task, active: bool) -> None:
    """Refuse a gate without anybody to ask, and names that nobody bears, whether they are asked or not."""
    known = ", ".join(sorted(task.heldout)) or "none"
    if active and config.gate == "suspects" and not config.auxiliary:
        raise UserError(
            "method.auxiliary is empty, so nobody can doubt the reward: name held-out rewards of "
            f"{task.name} ({known}), or set method.gate to all"
        )
    for name in config.auxiliary:
        if name not in task.heldout:
            raise UserError(
                f"method.auxiliary: {task.name} has no held-out reward {name!r}; {nearest(name, task.heldout)}"
            )
        if task.heldout[name].capabilities.of_sets:
            raise UserError(f"method.auxiliary: {name} scores sets, and the gate ranks samples: name another one")
