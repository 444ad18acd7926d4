"""What a task, an experience, a phase and a method are: the seams between a method's file and the one loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser, GenerativeModel, Roles, RoleSpec
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import Edges, Kernel, Solver
from difftilt.trees import Batched


@dataclass(frozen=True)
class Sampler:
    """How a task samples when a method does not say otherwise.

    Attributes:
        grid: times from 1 to 0, float64, shape (steps + 1,).
        solver: ODE solver (continuous processes); None where only the kernel applies (tokens).
        kernel: stochastic kernel of plain sampling.
        guidance: scale of classifier-free guidance; 1 is off.
    """

    grid: Float[Tensor, " times"]
    kernel: Kernel
    solver: Solver | None = None
    guidance: float = 1.0


@dataclass(frozen=True)
class Task:
    """A model, a reward and prompts: everything that is the same for all methods in a comparison.

    Attributes:
        name: shown in reports.
        model: its network holds the weights that training moves (role ``current``).
        reward: what is optimised; ``heldout`` rewards are only reported.
        prompts: training prompts; ``heldout_prompts`` are never trained on.
        sampler: default sampling for rollout and evaluation.
        features: media -> (batch, dim) float features for diversity; default is the flattened media.
        temperature: beta of the tilted target where the testbed knows it exactly; None otherwise.
    """

    name: str
    model: GenerativeModel
    reward: Reward
    prompts: Sequence[str]
    heldout_prompts: Sequence[str]
    sampler: Sampler
    heldout: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    features: Callable[[Tensor], Tensor] | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class PromptBatch(Batched):
    """This process's share of the prompts of one iteration, one row per sample to draw.

    Attributes:
        index: global sample index within the iteration: with seed and iteration it fixes all noise of the sample.
        group: global group index; samples of one group share their prompt.
        prompt: index into the task's prompts.
        condition: encoded, one row per sample.
    """

    index: Int[Tensor, " samples"]
    group: Int[Tensor, " samples"]
    prompt: Int[Tensor, " samples"]
    condition: Condition


@dataclass(frozen=True)
class Scores:
    """Rewards of this process's samples: the weighted total and each component, float32 (samples,)."""

    total: Float[Tensor, " samples"]
    components: dict[str, Tensor]


@dataclass(frozen=True)
class Experience(Batched):
    """The one record from rollout to loss: fields per sample, and ``edges`` with one row per term of a loss.

    An edge is a transition, or for forward-process methods one noise level of one sample. Offline methods load the
    same record from disk. For environments a sample is one executed action (chunk): its group is the episode.

    Attributes:
        index, group, prompt, condition: as in :class:`PromptBatch`.
        x_0: clean latents; None for methods that sample inside their loss.
        rewards, components: as in :class:`Scores`.
        edges: terms of the loss; ``edges.sample`` points to rows of this record.
        weight: importance of each sample; None means 1.
        pair: row of the other member of a preference pair, or -1.
        label: method's own target in [0, 1] or {-1, +1} (an optimality probability, membership of D+ or D-).
        media: decoded samples, kept only when asked for.
        value, terminated, truncated: environment steps only.
        extras: further tensors per sample, indexed and saved with the rest.
    """

    index: Int[Tensor, " samples"]
    group: Int[Tensor, " samples"]
    prompt: Int[Tensor, " samples"]
    condition: Condition
    x_0: Shaped[Tensor, "samples *shape"] | None
    rewards: Float[Tensor, " samples"]
    components: dict[str, Tensor]
    edges: Edges
    weight: Float[Tensor, " samples"] | None = None
    pair: Int[Tensor, " samples"] | None = None
    label: Float[Tensor, " samples"] | None = None
    media: Tensor | None = None
    value: Float[Tensor, " samples"] | None = None
    terminated: Tensor | None = None
    truncated: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def rows(self, edge: Int[Tensor, " rows"]) -> "Experience":
        """The given edges with per-sample fields repeated, so that row i of every field belongs to edge i."""
        ...


@dataclass(frozen=True)
class Term:
    """One term of a loss, ``weight · mean over rows of value``. A positive weight promises a gradient: checked."""

    value: Float[Tensor, " rows"]
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Per-row terms and diagnostics of a microbatch.

    The loop sums rows and divides by the number of rows of the whole update on all processes, so neither
    accumulation nor the number of processes changes the gradient.

    Attributes:
        terms: name -> term.
        metrics: name -> (rows,) detached diagnostics; ``ratio`` also feeds the guard of the law ``ratio_one``.
    """

    terms: Mapping[str, Term]
    metrics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


@dataclass(frozen=True)
class Phase:
    """One optimiser's turn in an iteration.

    Attributes:
        role: whose weights move.
        loss: rows of experience -> loss. ``rows`` come from :meth:`Experience.rows`.
        unit: what stays together when the experience is shuffled and split.
        updates: optimiser steps per iteration, over disjoint parts of the experience.
        epochs: passes over the experience.
        when: iteration -> whether the phase runs.
        stop: means of the metrics of the last update -> whether to end the phase early (a KL limit).
    """

    role: str
    loss: Callable[[Experience], Loss]
    unit: Literal["edge", "sample", "group"] = "edge"
    updates: int = 1
    epochs: int = 1
    when: Callable[[int], bool] = lambda iteration: True
    stop: Callable[[Mapping[str, float]], bool] | None = None


class NoiseSource(Protocol):
    """Noise of one iteration: a pure function of (seed, iteration, purpose, sample index, step)."""

    def normal(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Standard normal float32 (len(index), *shape)."""
        ...

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Uniform float32 on (0, 1), (len(index), *shape)."""
        ...


class Run(Protocol):
    """What the loop lends to a method during one iteration."""

    @property
    def iteration(self) -> int: ...

    @property
    def task(self) -> Task: ...

    @property
    def roles(self) -> Roles: ...

    @property
    def ledger(self) -> Ledger: ...

    @property
    def noise(self) -> NoiseSource: ...

    def denoiser(self, role: str, guidance: float | None = None) -> Denoiser:
        """The model with the weights of ``role``; guidance None is the task's own scale."""
        ...

    def prompts(self, groups: int, size: int) -> PromptBatch:
        """This process's share of ``groups`` prompts, ``size`` samples each; fixed by seed and iteration."""
        ...

    def score(self, x_0: Tensor, batch: PromptBatch) -> Scores:
        """Decode and score; raises ``RewardError`` for anything that is not a finite score per sample."""
        ...

    def jointly(self, function: Callable[..., Any], *columns: Tensor) -> Any:
        """Apply a pure function to the columns of all processes and return this process's rows of its tensor results.

        Credit runs here, so that group statistics are the same for any number of processes.
        """
        ...


class Method(Protocol):
    """A named training algorithm: ``collect`` makes experience, ``phases`` learn from it. The loop does the rest."""

    def roles(self) -> Mapping[str, RoleSpec]:
        """Roles besides ``current`` and ``reference``, which always exist."""
        ...

    def collect(self, run: Run) -> Experience:
        """Sample, score and credit; no gradient."""
        ...

    def phases(self, run: Run) -> Sequence[Phase]:
        """In order. Most methods have one."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the method remembers between iterations (a reward history), saved in every checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
