"""One phase of one iteration: split the experience into updates, accumulate row by row, step.

The gradient of an update is the sum over its rows on all processes divided by their number, so it does not depend on
microbatches, accumulation or the number of processes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from difftilt.errors import GuardError
from difftilt.models.protocol import Lagging, RoleSpec
from difftilt.sampling.noise import Noise
from difftilt.training.experience import Experience
from difftilt.training.protocol import Loss, Phase
from difftilt.training.run import LoopRun


@dataclass
class Sums:
    """Sums of per-row numbers over microbatches and processes, from which means and spreads are read."""

    count: int = 0
    first: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    second: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take in the rows of a microbatch."""
        for name, values in rows.items():
            values = values.detach().double()
            self.first[name] = self.first.get(name, torch.zeros((), dtype=torch.float64)) + values.sum()
            self.second[name] = self.second.get(name, torch.zeros((), dtype=torch.float64)) + values.square().sum()

    def mean(self, name: str) -> float:
        """Mean over all rows."""
        return float(self.first[name]) / max(self.count, 1)

    def std(self, name: str) -> float:
        """Population standard deviation over all rows."""
        mean = self.mean(name)
        return max(float(self.second[name]) / max(self.count, 1) - mean**2, 0.0) ** 0.5

    def means(self) -> dict[str, float]:
        """Mean of every name."""
        return {name: self.mean(name) for name in self.first}


@dataclass
class Updater:
    """Optimisers of the trained roles, and the guards that watch every update.

    Attributes:
        run: gives roles and the world.
        optimizers: role -> optimiser.
        max_grad_norm: role -> clip.
        specs: declared roles, for those that follow another after a number of steps.
        laws: declared by the method's card; ``ratio_one`` is checked here.
        steps: optimiser steps taken so far, by role.
    """

    run: LoopRun
    optimizers: Mapping[str, torch.optim.Optimizer]
    max_grad_norm: Mapping[str, float]
    specs: Mapping[str, RoleSpec]
    laws: Sequence[str]
    steps: dict[str, int]
    fresh: bool = True

    def run_phase(self, phase: Phase, experience: Experience, noise: Noise) -> dict[str, float]:
        """All updates of a phase; returns means of its terms and metrics over them."""
        roles = _roles(phase)
        chosen = _trainable_edges(phase, experience)
        totals: dict[str, float] = {}
        count = 0
        for epoch in range(phase.epochs):
            source = noise.named(f"{'+'.join(roles)}/{epoch}")
            for part in self._parts(phase, experience, chosen, source):
                total = sum(self.run.world.lengths(len(part)))
                if total == 0:
                    continue
                rows = experience.rows(part, share=True)
                if phase.before is not None:
                    rows = phase.before(rows)
                metrics = self._update(phase, rows, total, source)
                count += 1
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0.0) + value
                if phase.after is not None:
                    phase.after(metrics)
                if phase.stop is not None and phase.stop(metrics):
                    return {name: value / count for name, value in totals.items()} | {"updates": float(count)}
        return {name: value / max(count, 1) for name, value in totals.items()} | {"updates": float(count)}

    def _parts(self, phase: Phase, experience: Experience, chosen: Tensor, noise: Noise) -> list[Int[Tensor, " edges"]]:
        """The local edges of each update: as the phase says, or units in a random order.

        The order is the same for any number of processes.
        """
        if phase.updates == 1:
            return [chosen]
        if phase.part is not None:
            which = phase.part(experience)[chosen]
            return [chosen[which == update] for update in range(phase.updates)]
        edges = experience.edges
        sample = edges.sample[chosen]
        unit = experience.group[sample] if phase.unit in ("group", "level") else experience.index[sample]
        step = edges.step[chosen] if phase.unit == "edge" else torch.zeros_like(unit)
        key = noise.uniform(unit, (1,), purpose="order", step=step)[:, 0].double()

        def assign(key: Tensor, unit: Tensor, step: Tensor) -> Tensor:
            # two units may draw one key (it has 23 bits): their own numbers break the tie
            units, place = torch.unique(torch.stack([key, unit, step], dim=1), dim=0, return_inverse=True)
            return place * phase.updates // len(units)

        if sum(self.run.world.lengths(len(chosen))) == 0:
            return []
        which = self.run.jointly(assign, key, unit.double(), step.double())
        return [chosen[which == update] for update in range(phase.updates)]

    def _update(self, phase: Phase, rows: Experience, total: int, noise: Noise) -> dict[str, float]:
        """One optimiser step on ``total`` rows, of which this process may hold none."""
        roles = _roles(phase)
        parameters = [parameter for role in roles for parameter in self.run.roles.parameters(role)]
        for parameter in parameters:
            parameter.grad = None
        sums = Sums(total)
        weighted = False
        for micro in _microbatches(rows, phase, self._fill(phase)):
            loss = phase.loss(micro, noise)
            self._check(loss, phase, len(micro.edges.step))
            weighted |= any(term.weight != 0 for term in loss.terms.values())
            value = sum(((term.weight * term.value.sum()) for term in loss.terms.values()), start=torch.zeros(()))
            if value.requires_grad:
                (value / total).backward()
            sums.add({f"loss/{name}": term.value for name, term in loss.terms.items()} | dict(loss.metrics))
        self.run.world.sum_gradients(parameters)
        if weighted:
            self._check_reached(roles)
        self._reduce(sums)
        norm = self._step(roles)
        metrics = sums.means() | {"grad_norm": norm}
        if "ratio" in sums.first:
            metrics |= {"ratio_mean": sums.mean("ratio"), "ratio_std": sums.std("ratio")}
            del metrics["ratio"]
        self.fresh &= "current" not in roles
        return metrics

    def _fill(self, phase: Phase) -> int:
        """Rows of the loss that fill a call of the network."""
        doubled = phase.guided and self.run.task.sampler.guidance not in (0, 1)
        return self.run.forward_batch // 2 if doubled else self.run.forward_batch

    def _reduce(self, sums: Sums) -> None:
        """Add up the sums of all processes, in one message."""
        if self.run.world.size == 1:
            return
        names = self.run.world.names(sums.first)
        own = [store.get(name, torch.zeros(())).double() for store in (sums.first, sums.second) for name in names]
        if names:
            first, second = self.run.world.total(torch.stack([number.cpu() for number in own])).chunk(2)
            sums.first, sums.second = (dict(zip(names, column, strict=True)) for column in (first, second))

    def _step(self, roles: Sequence[str]) -> float:
        """Clip, step, note the step, let the roles that count steps follow."""
        norms: list[float] = []
        for role in roles:
            parameters = list(self.run.roles.parameters(role))
            norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm[role]))
            if norm != norm or norm == float("inf"):
                raise GuardError(
                    f"iteration {self.run.iteration}: the gradient of role {role} is {norm}; weights are unchanged. "
                    "Lower training.optimizer.lr, or look for a reward or log-probability that overflows"
                )
            norms.append(norm)
        for role in roles:
            self.optimizers[role].step()
            self.run.roles.stepped(role)
            self.steps[role] += 1
            for name, spec in self.specs.items():
                if isinstance(spec, Lagging) and self._trained(spec) == role and _due(spec, self.steps[role]):
                    self.run.roles.blend(name, spec.source, spec.decay(self.steps[role]))
        return max(norms)

    def follow(self) -> None:
        """End of an iteration: the roles that follow another once per iteration do so."""
        for name, spec in self.specs.items():
            if isinstance(spec, Lagging) and spec.every == "iteration":
                self.run.roles.blend(name, spec.source, spec.decay(self.steps.get(self._trained(spec), 0)))

    def _trained(self, spec: Lagging) -> str:
        """The role at the head of a chain of followers: the one whose optimiser steps are counted."""
        source = self.specs.get(spec.source)
        return self._trained(source) if isinstance(source, Lagging) else spec.source

    def _check_reached(self, roles: Sequence[str]) -> None:
        for role in roles:
            if all(parameter.grad is None for parameter in self.run.roles.parameters(role)):
                raise GuardError(
                    f"the loss has a gradient, but none of it reaches role {role}: evaluate the loss with that role, "
                    "or name another one in the phase"
                )

    def _check(self, loss: Loss, phase: Phase, rows: int) -> None:
        for name, values in {**{name: term.value for name, term in loss.terms.items()}, **loss.metrics}.items():
            if values.shape != (rows,):
                raise GuardError(
                    f"loss term or metric {name} has shape {tuple(values.shape)}, not one value for each of the {rows} "
                    "rows: leave the mean to the loop"
                )
        for name, term in loss.terms.items():
            if term.weight != 0 and not term.value.requires_grad:
                raise GuardError(
                    f"loss term {name} has weight {term.weight:g} but no gradient: it was computed under no_grad, from "
                    f"detached tensors, or without the role {phase.role}"
                )
        if self.fresh and "ratio_one" in self.laws and "ratio" in loss.metrics:
            worst = float((loss.metrics["ratio"] - 1).abs().max())
            if not worst <= 1e-5:
                raise GuardError(
                    f"iteration {self.run.iteration}: before the first update the ratio differs from 1 by {worst:.2g}: "
                    "rollout and replay disagree (a stateful network, dropout, or guidance that differs between them)"
                )


def _roles(phase: Phase) -> tuple[str, ...]:
    return (phase.role,) if isinstance(phase.role, str) else phase.role


def _due(spec: Lagging, steps: int) -> bool:
    """Whether a role that counts optimiser steps follows its source now."""
    return spec.every != "iteration" and steps % spec.every == 0


def _trainable_edges(phase: Phase, experience: Experience) -> Int[Tensor, " edges"]:
    """Edges of the phase that are not masked."""
    edges = experience.edges
    every = torch.arange(len(edges.step), device=edges.step.device)
    chosen = every if phase.select is None else phase.select(experience)
    return chosen if edges.mask is None else chosen[edges.mask[chosen]]


def _microbatches(rows: Experience, phase: Phase, size: int) -> Iterator[Experience]:
    """Microbatches of at most ``size`` rows, or of one whole unit where that is larger, each gathered in its turn.

    Where the rows of a unit share one state, of at most ``size`` units.
    """
    return (rows.rows(piece) for piece in _pieces(rows, phase, size))


def _pieces(rows: Experience, phase: Phase, size: int) -> Sequence[Int[Tensor, " rows"]]:
    """The rows of each microbatch."""
    count = len(rows.edges.step)
    if count == 0:
        return ()
    if phase.together == "edge":
        return torch.arange(count, device=rows.index.device).split(size)
    unit = _unit(rows, phase)
    order = unit.argsort(stable=True)
    lengths: list[int] = torch.unique_consecutive(unit[order], return_counts=True)[1].tolist()
    packed = _joined(lengths, size) if phase.one_state else _pack(lengths, size)
    return order.split(packed)


def _unit(rows: Experience, phase: Phase) -> Int[Tensor, " rows"]:
    """The label of what each row may not be parted from."""
    match phase.together:
        case "group":
            return rows.group
        case "level":
            steps = int(rows.edges.step.max()) + 1 if len(rows.group) else 1
            return rows.group * steps + rows.edges.step
        case _:
            return rows.index


def _joined(lengths: Sequence[int], size: int) -> list[int]:
    """``size`` neighbouring lengths at a time, added up."""
    return [sum(lengths[start : start + size]) for start in range(0, len(lengths), size)]


def _pack(lengths: Sequence[int], size: int) -> list[int]:
    """Neighbouring lengths added up while they fit into ``size``."""
    packed: list[int] = []
    for length in lengths:
        if packed and packed[-1] + length <= size:
            packed[-1] += length
        else:
            packed.append(length)
    return packed
