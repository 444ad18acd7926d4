"""Rollout: denoise a batch of states along a grid, with chosen steps stochastic and chosen steps recorded.

Chains, windows, trees and completions are one loop: at every step the rows that are under way are evaluated once,
copied where the plan splits, moved by the preset's kernel or by the ODE, and recorded where the plan says so.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.models.protocol import START, START_TIME, Denoiser, Stateful, remembers
from difftilt.process.grid import check_grid
from difftilt.process.protocol import Condition, Prediction, Process
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Siblings, siblings
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import (
    SHIFT,
    Edges,
    Guide,
    Moment,
    NoiseSource,
    Observe,
    Project,
    Sampler,
    Step,
    Trajectory,
)
from difftilt.sampling.recording import Recorder
from difftilt.sampling.steps import GaussianStep
from difftilt.sampling.windows import window_mask
from difftilt.statistics.folds import distinct
from difftilt.trees import Batched, take


@dataclass(frozen=True)
class Plan:
    """What a rollout does besides following its grid. Masks live on the CPU, so that no step waits for a device.

    Attributes:
        stochastic: steps that use the preset's kernel, (steps,) or (rows, steps); the others follow the ODE. None: all.
        record: steps that become edges, (steps,): those of their rows that are stochastic. None: no step.
        score: which law the log-probability of an edge is taken under, the step's own (``base``) or the one that a
            guide has shifted; ``none`` records states alone, of deterministic steps too.
        means: also record the means of the recorded steps.
        branch: step -> number of children that every row splits into before its draw.
        spread: private against shared noise of siblings, see ``noise.siblings``; None draws them independently. Normal
            noise only: a mean of uniforms is not uniform.
        siblings: what ``spread`` means.
        first: first step that each row takes, (rows,), for completion from stored states. None: all from step 0.
        output: finished samples are the last state, or the x0-prediction of the last evaluation (DanceGRPO).
    """

    stochastic: Bool[Tensor, " steps"] | Bool[Tensor, "rows steps"] | None = None
    record: Bool[Tensor, " steps"] | None = None
    score: Literal["base", "guided", "none"] = "base"
    means: bool = False
    branch: Mapping[int, int] = field(default_factory=dict[int, int])
    spread: float | None = None
    siblings: Siblings = "correlated"
    first: Int[Tensor, " rows"] | None = None
    output: Literal["state", "x0"] = "state"

    @property
    def leaves(self) -> int:
        """Finished samples per row."""
        return math.prod(self.branch.values())

    def stochastic_rows(self, rows: Tensor, position: int) -> Bool[Tensor, " rows"]:
        """Which of the given original rows take this step by the preset's kernel."""
        if self.stochastic is None:
            return torch.ones(len(rows), dtype=torch.bool)
        if self.stochastic.dim() == 1:
            return self.stochastic[position].expand(len(rows))
        return self.stochastic[rows, position]


PLAIN = Plan()


def start_state(
    process: Process,
    noise: NoiseSource,
    index: Int[Tensor, " rows"],
    shape: tuple[int, ...],
    condition: Condition = None,
    purpose: str = "start",
) -> Shaped[Tensor, "rows *shape"]:
    """The first state of each sample, from the noise that belongs to its index; see :func:`begun`."""
    law = noise.normal if process.noise_law == "normal" else noise.uniform
    return begun(process, law(index, shape, purpose=purpose), condition)


def begun(
    process: Process, noise: Shaped[Tensor, "rows *shape"], condition: Condition
) -> Shaped[Tensor, "rows *shape"]:
    """x_1, pure noise; or what the condition begins from, corrupted to the time that it names (image to image)."""
    state = condition.state if isinstance(condition, Stateful) else None
    if not isinstance(state, Mapping) or START not in state:
        return process.prior(noise)
    given = cast(Mapping[str, Tensor], state)
    return process.corrupt(given[START].to(noise), given[START_TIME].to(noise.device), noise)


def step_noise(
    step: Step, noise: NoiseSource, index: Int[Tensor, " rows"], position: int | Tensor, purpose: str = "step"
) -> Float[Tensor, "rows *noise"]:
    """The noise that ``step.draw`` consumes, of the law and shape that the step declares."""
    law = noise.normal if step.noise_law == "normal" else noise.uniform
    return law(index, step.noise_shape, purpose=purpose, step=position)


def rollout(
    denoise: Denoiser,
    preset: Preset,
    grid: Float[Tensor, " times"] | Float[Tensor, "rows times"],
    x: Shaped[Tensor, "rows *shape"],
    condition: Condition,
    *,
    noise: NoiseSource,
    index: Int[Tensor, " rows"],
    plan: Plan = PLAIN,
    guide: Guide | None = None,
    project: Project | None = None,
    observe: Observe | None = None,
) -> Trajectory:
    """Denoise ``x`` along ``grid``.

    Args:
        denoise: counts its evaluations in its ledger; a node of a tree is evaluated once however many children it has.
        preset: kernel and log-probability convention of the stochastic steps.
        grid: falling times, float64 on the CPU, one for all or one per row; a step of length 0 does nothing.
        x: state of each row at the first time of its grid (at ``plan.first`` for completions).
        condition: one row per state.
        noise: source of the step noise.
        index: global sample index of each row. Where the plan branches it must leave room for the leaves: the
            children of a node take every (leaves below them)-th index from its own.
        plan: what to do at which step.
        guide: shifts the law that draws.
        project: imposes known parts on every drawn state.
        observe: sees every moment and the state drawn.

    Returns:
        The trajectory, with what it cost.

    Raises:
        ValueError: for a grid that does not fall, or a plan that both branches and staggers its rows.
    """
    check_grid(grid)
    before = denoise.ledger.copy()
    walk = _Walk(denoise, preset, grid, noise, plan, guide, project, observe)
    row = torch.arange(len(x))
    nothing = torch.full_like(index, -1)
    front = _Front(x, condition, index, row, nothing, nothing, plan.leaves)
    for position in range(grid.shape[-1] - 1):
        moving = walk.moving(front.row, position)
        if bool(moving.all()):
            front = walk.advance(front, position)
        elif bool(moving.any()):
            before_step = take(front, moving.nonzero()[:, 0])
            after_step = walk.advance(before_step, position)
            _refuse_memory(before_step.condition, after_step.condition)
            front = _merge(front, after_step, moving)
    edges = walk.recorder.collected(front.last_edge)
    root = front.row.to(x.device)
    return Trajectory(front.x, root, take(condition, root), edges, front.last_edge, denoise.ledger - before)


@dataclass(frozen=True)
class _Front(Batched):
    """The states under way, one row for every leaf so far.

    ``row`` is the input row it grew from, on the CPU, where it selects grids and windows; ``last_edge`` its newest
    recorded edge; ``stored`` the place of its state among the recorded ones, -1 if it is not there; ``leaves`` the
    finished samples that will come of each row.
    """

    x: Tensor
    condition: Condition
    index: Tensor
    row: Tensor
    last_edge: Tensor
    stored: Tensor
    leaves: int


@dataclass
class _Walk:
    """The constants of one rollout, and what is recorded so far: edges, and the states that they point into."""

    denoise: Denoiser
    preset: Preset
    grid: Tensor
    noise: NoiseSource
    plan: Plan
    guide: Guide | None
    project: Project | None
    observe: Observe | None
    recorder: Recorder = field(default_factory=Recorder)

    def moving(self, row: Int[Tensor, " rows"], position: int) -> Bool[Tensor, " rows"]:
        """Rows that have begun and whose step has a length."""
        times = self.grid[..., position : position + 2].expand(int(row.max()) + 1, 2)[row]
        moving = times[:, 0] > times[:, 1]
        if self.plan.first is not None:
            moving = moving & (self.plan.first[row] <= position)
        if self.plan.branch and not bool(moving.all()):
            raise ValueError(
                "a rollout that branches must move all its rows together: give it one grid and no first step"
            )
        return moving

    def advance(self, front: _Front, position: int) -> _Front:
        """One step of every row: evaluate, split, draw, record."""
        pair = self.grid[..., position : position + 2]
        t, s = _times(pair if pair.dim() == 1 else pair[front.row], front.x)
        condition = self.denoise.prepare(front.x, t, front.condition)
        prediction = self.denoise(front.x, t, condition)
        front = replace(front, condition=condition)
        children = self.plan.branch.get(position, 1)
        shared, parent = None, torch.arange(len(front.x), device=front.x.device)
        if children > 1:
            shared = front.index.repeat_interleave(children)
            again = parent = parent.repeat_interleave(children)
            front, prediction, t, s = _split(front, again, children), take(prediction, again), t[again], s[again]
        stochastic = self.plan.stochastic_rows(front.row, position)
        step = self._step(prediction, front.x, t, s, stochastic)
        moment = Moment(prediction, front.x, t, s, front.condition, step, front.index, position)
        drawing, shift = self._guided(moment)
        x_s = drawing.draw(self._noise(drawing, front.index, shared, position))
        if self.project is not None:
            x_s = self.project(x_s, s, front.condition)
        if self.observe is not None:
            self.observe(moment, x_s)
        last_edge, stored = self._record(front, moment, drawing, shift, x_s, stochastic, parent)
        if self.plan.output == "x0" and position == self.grid.shape[-1] - 2:
            x_s = prediction.x0
        return replace(front, x=x_s, last_edge=last_edge, stored=stored)

    def _step(self, prediction: Prediction, x: Tensor, t: Tensor, s: Tensor, stochastic: Tensor) -> Step:
        if bool(stochastic.all()):
            return self.preset.step(prediction, x, t, s)
        ode = Euler()(prediction, x, t, s)
        if not bool(stochastic.any()):
            return ode
        step = self.preset.step(prediction, x, t, s)
        if not isinstance(step, GaussianStep):
            raise ValueError(f"a window of stochastic steps needs a Gaussian kernel, not the preset {self.preset.name}")
        return step.only(stochastic.to(x.device), otherwise=ode)

    def _guided(self, moment: Moment) -> tuple[Step, Tensor | None]:
        """The law that draws, and what the guide added to it; None where nothing was."""
        if self.guide is None:
            return moment.step, None
        with torch.enable_grad():
            delta = self.guide(moment)
        return (moment.step, None) if delta is None else (moment.step.shift(delta.detach()), delta.detach())

    def _noise(self, step: Step, index: Tensor, shared: Tensor | None, position: int) -> Tensor:
        if step.deterministic:
            return torch.zeros((), device=index.device).expand(len(index), *step.noise_shape)
        own = step_noise(step, self.noise, index, position)
        if shared is None or self.plan.spread is None:
            return own
        if step.noise_law != "normal":
            raise ValueError("siblings share normal noise only: leave spread out, and they are drawn independently")
        common = step_noise(step, self.noise, shared, position, purpose="siblings")
        return siblings(common, own, self.plan.spread, self.plan.siblings)

    def _record(
        self,
        front: _Front,
        moment: Moment,
        drawing: Step,
        shift: Tensor | None,
        x_s: Tensor,
        stochastic: Tensor,
        parent: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Append the recorded rows of this step; returns every row's newest edge, and where its new state is stored.

        Rows of one ``parent`` start from one state.
        """
        position, nowhere = int(moment.position), torch.full_like(front.stored, -1)
        if self.plan.record is None or not bool(self.plan.record[position]):
            return front.last_edge, nowhere
        scored = self.plan.score != "none"
        keep = stochastic if scored and not drawing.deterministic else torch.full_like(stochastic, not scored)
        rows = keep.nonzero()[:, 0].to(x_s.device)
        if not len(rows):
            return front.last_edge, nowhere
        guided = self.plan.score == "guided" and self.guide is not None
        extras: dict[str, Tensor] = {}
        if guided:
            still = moment.t.new_zeros((len(x_s), *drawing.noise_shape))
            extras[SHIFT] = still if shift is None else shift
        kept = _Passage(
            moment.t,
            moment.s,
            front.x,
            x_s,
            drawing if guided else moment.step,
            front.stored,
            front.last_edge,
            parent,
            extras,
        )
        if len(rows) < len(keep):
            kept = take(kept, rows)
        edges = Edges(
            sample=torch.zeros_like(rows),
            step=torch.full_like(rows, position),
            t=kept.t,
            s=kept.s,
            log_prob=self.preset.log_prob(kept.step, kept.x_s) if scored else None,
            mean=kept.step.mean if self.plan.means and isinstance(kept.step, GaussianStep) else None,
            parent=kept.last_edge,
            extras=kept.extras,
        )
        number, ends = self.recorder.add(edges, kept.x_t, kept.x_s, kept.stored, kept.parent)
        return front.last_edge.index_copy(0, rows, number), nowhere.index_copy(0, rows, ends)


@dataclass(frozen=True)
class _Passage(Batched):
    """What is recorded of one step, for all of its rows or the kept ones."""

    t: Tensor
    s: Tensor
    x_t: Tensor
    x_s: Tensor
    step: Step
    stored: Tensor
    last_edge: Tensor
    parent: Tensor
    extras: dict[str, Tensor]


def _times(
    pair: Float[Tensor, " two"] | Float[Tensor, "rows two"], x: Shaped[Tensor, "rows *shape"]
) -> tuple[Tensor, Tensor]:
    """(t, s), each (rows,), on the device of x; float32, or float64 if x is."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pair = pair.to(device=x.device, dtype=dtype).expand(len(x), 2)
    return pair[:, 0].contiguous(), pair[:, 1].contiguous()


def _split(front: _Front, again: Tensor, children: int) -> _Front:
    """Every row ``children`` times, each child with the noise index of its own first leaf."""
    split = take(front, again)
    leaves = front.leaves // children
    offset = torch.arange(children, device=front.index.device).repeat(len(front.index)) * leaves
    return replace(split, index=split.index + offset, leaves=leaves)


CHANGED = ("x", "last_edge", "stored")
"""What a step changes in a row that goes on."""


def _refuse_memory(given: Condition, prepared: Condition) -> None:
    """Refuse a model that keeps state along a trajectory, which rows that have not begun do not have yet."""
    if remembers(given, prepared):
        raise ValueError("rows with state of their own must move together: complete states of one time at a time")


def _merge(front: _Front, moved: _Front, moving: Bool[Tensor, " rows"]) -> _Front:
    """``front`` with the moved rows written back."""
    rows = moving.nonzero()[:, 0].to(front.x.device)
    return replace(front, **{name: getattr(front, name).index_copy(0, rows, getattr(moved, name)) for name in CHANGED})


def sample(
    denoise: Denoiser,
    sampler: Sampler,
    x: Shaped[Tensor, "rows *shape"],
    condition: Condition,
    *,
    noise: NoiseSource,
    index: Int[Tensor, " rows"],
) -> Shaped[Tensor, "rows *shape"]:
    """Plain sampling: by the sampler's solver if it has one, else by its kernel, with a clean end where asked for."""
    if sampler.solver is not None:
        return sampler.solver(denoise, x, condition, sampler.grid)
    return sample_by_kernel(denoise, sampler, x, condition, noise=noise, index=index).x_0


def sample_by_kernel(
    denoise: Denoiser,
    sampler: Sampler,
    x: Shaped[Tensor, "rows *shape"],
    condition: Condition,
    *,
    noise: NoiseSource,
    index: Int[Tensor, " rows"],
    observe: Observe | None = None,
) -> Trajectory:
    """Plain stochastic sampling, whether the sampler has a solver or not."""
    preset = Preset("plain", sampler.kernel)
    steps = len(sampler.grid) - 1
    plan = Plan(stochastic=window_mask(steps, 0, steps - 1)) if sampler.clean_end else Plan()
    return rollout(denoise, preset, sampler.grid, x, condition, noise=noise, index=index, plan=plan, observe=observe)


def replay(
    denoise: Denoiser,
    preset: Preset,
    edges: Edges,
    condition: Condition,
    *,
    state: Int[Tensor, " edges"] | None = None,
) -> Moment:
    """The moment of recorded edges under the weights of ``denoise``, with their gradient; its ``step`` drew them.

    A guide moved it by what ``edges.extras`` holds as ``shift``, where the guided law was scored.

    Args:
        denoise: with the weights to score.
        preset: the one of the rollout.
        edges: rows of transitions.
        condition: one row per edge.
        state: label of the state that each edge starts from: edges of one label are evaluated once, together.
    """
    if edges.x_t is None or edges.s is None:
        raise ValueError("replay needs transitions: record states in the rollout plan")
    first, again = (None, None) if state is None else distinct(state)
    x_t, t = (edges.x_t, edges.t) if first is None else (edges.x_t[first], edges.t[first])
    condition = denoise.prepare(x_t, t, condition if first is None else take(condition, first))
    prediction = denoise(x_t, t, condition)
    if again is not None:
        prediction, condition = take(prediction, again), take(condition, again)
    step = preset.step(prediction, edges.x_t, edges.t, edges.s)
    return Moment(prediction, edges.x_t, edges.t, edges.s, condition, step, edges.sample, edges.step)
