"""What a step, a kernel, a solver and a trajectory are.

Time runs from noise (t = 1) to data (t = 0); a step goes from t to s < t. A rate, a standard deviation and a variance
never share a name: ``g`` is the diffusion coefficient of an SDE, ``std`` the standard deviation of one whole step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Condition, NoiseLaw, Prediction
from difftilt.trees import Batched, Pooled

Reduction = Literal["sum", "mean"]
"""How the dimensions of a latent are reduced: ``sum`` is the density, ``mean`` what most papers clip. Never implied."""


class Step(Protocol):
    """One reverse step as a distribution over x_s. Drawing and scoring share its one formula."""

    @property
    def deterministic(self) -> bool:
        """True if the step has no density, for all rows; known without looking at a device."""
        ...

    @property
    def varies(self) -> Bool[Tensor, " batch"]:
        """Rows whose draw depends on its noise: a second draw of the others would be a copy of the first."""
        ...

    @property
    def noise_law(self) -> NoiseLaw: ...

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape, without the batch, of the noise that :meth:`draw` consumes."""
        ...

    def draw(self, noise: Float[Tensor, "batch *noise"]) -> Shaped[Tensor, "batch *shape"]:
        """x_s as a function of noise of the declared law and shape."""
        ...

    def log_prob(
        self,
        x_s: Shaped[Tensor, "batch *shape"],
        *,
        reduce: Reduction,
        mask: Bool[Tensor, "batch *shape"] | None = None,
        clamp: tuple[float, float] | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log density of x_s in nats, float32 or better.

        ``mask`` keeps the dimensions where it is True; ``clamp`` bounds each dimension's term before the reduction.

        Raises:
            ValueError: if the step is deterministic: it has no density.
        """
        ...

    def kl(self, other: Self, *, reduce: Reduction) -> Float[Tensor, " batch"]:
        """KL(self || other) in nats between two steps from the same state."""
        ...

    def shift(self, delta: Float[Tensor, "batch ..."]) -> Self:
        """The step with its mean (continuous) or its logits (tokens) moved by ``delta``."""
        ...


class RelaxedStep(Step, Protocol):
    """A categorical step that can also be drawn with a gradient."""

    def relaxed_draw(
        self, noise: Float[Tensor, "batch *noise"], temperature: float
    ) -> Float[Tensor, "batch *shape vocab"]:
        """Gumbel-softmax draw: rows on the simplex over the vocabulary, mask symbol last. Same noise as ``draw``."""
        ...


class Kernel(Protocol):
    """One reverse step from one network evaluation."""

    def __call__(
        self,
        prediction: Prediction,
        x_t: Shaped[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        s: Float[Tensor, " batch"],
    ) -> Step: ...


class Solver(Protocol):
    """An ODE integrator with several evaluations or memory. No density."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Float[Tensor, "batch *shape"],
        condition: Condition,
        grid: Float[Tensor, " times"] | Float[Tensor, "batch times"],
    ) -> Float[Tensor, "batch *shape"]:
        """Integrate x from the first to the last time of ``grid`` (decreasing)."""
        ...


@dataclass(frozen=True)
class Moment(Batched):
    """What is known in a rollout just before a state is drawn.

    Attributes:
        prediction, x_t, t, s, condition: of the rows that take this step.
        step: the step's law, not yet shifted.
        index: global sample index of each row.
        position: index of the step on its grid, (rows,) or one for all.
    """

    prediction: Prediction
    x_t: Tensor
    t: Tensor
    s: Tensor
    condition: Condition
    step: Step
    index: Tensor
    position: int | Tensor


SHIFT = "shift"
"""Name in ``edges.extras`` of what a guide added, recorded where the log-probability is that of the guided law."""

Guide = Callable[[Moment], Tensor | None]
"""What ``step.shift`` adds before the draw, or None for nothing; called with gradients enabled."""

Observe = Callable[[Moment, Tensor], None]
"""Called with each moment and the state that was drawn: to cache predictions or to record more than edges hold."""

Project = Callable[[Tensor, Tensor, Condition], Tensor]
"""``project(x_s, s, condition) -> x_s``: imposes known pixels, goals or past actions on the drawn state."""


@dataclass(frozen=True)
class Edges(Batched):
    """Transitions x_t -> x_s, or single noise levels of finished samples: one row is one term of a loss.

    Attributes:
        sample: row of the sample that the edge belongs to; of an edge that leaves of a tree share, the first leaf.
        step: index of the step on its grid, 0 at the noise end.
        t: time at which the edge starts, float32.
        s: time at which it ends; None where a method has no transitions (forward-process methods).
        start: state at t, kept once where an earlier edge ends in it or siblings share it; ``x_t`` reads it.
        end: state at s, exactly as stored: its log-probability was computed from this value; ``x_s`` reads it.
        log_prob: behaviour log-probability of x_s under the preset's convention.
        mean: mean of the behaviour step, recorded only when asked for.
        parent: row of the nearest recorded edge before this one on its path; -1 if there is none.
        mask: False where an edge carries no gradient (pruning): it never reaches a loss and is not counted.
        advantage: (edges, terms), filled by credit; one column per clipped term.
        extras: further tensors, indexed and saved with the rest.
    """

    sample: Int[Tensor, " edges"]
    step: Int[Tensor, " edges"]
    t: Float[Tensor, " edges"]
    s: Float[Tensor, " edges"] | None = None
    start: Pooled | None = None
    end: Pooled | None = None
    log_prob: Float[Tensor, " edges"] | None = None
    mean: Float[Tensor, "edges *shape"] | None = None
    parent: Int[Tensor, " edges"] | None = None
    mask: Bool[Tensor, " edges"] | None = None
    advantage: Float[Tensor, "edges terms"] | None = None
    extras: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def x_t(self) -> Shaped[Tensor, "edges *shape"] | None:
        """State at which each edge starts, gathered anew at every call."""
        return None if self.start is None else self.start.rows

    @property
    def x_s(self) -> Shaped[Tensor, "edges *shape"] | None:
        """State at which each edge ends, gathered anew at every call."""
        return None if self.end is None else self.end.rows


@dataclass(frozen=True)
class Trajectory:
    """The outcome of a rollout.

    Leaves of one root stand together, in the order of the roots; the noise of a shared node is keyed by its first leaf.

    Attributes:
        x_0: finished samples (the leaves, where the rollout branched).
        root: for each sample the row of ``x_T`` that it grew from; arange without branching.
        condition: one row per sample, without per-trajectory state.
        edges: the recorded transitions, ordered by step; ``edges.sample`` points into ``x_0``.
        last_edge: for each sample the row of its last recorded edge, -1 if none.
        ledger: what it cost.
    """

    x_0: Shaped[Tensor, "samples *shape"]
    root: Int[Tensor, " samples"]
    condition: Condition
    edges: Edges
    last_edge: Int[Tensor, " samples"]
    ledger: Ledger


@dataclass(frozen=True)
class Sampler:
    """How a task samples when a method does not say otherwise.

    Attributes:
        grid: times from 1 to 0, float64, shape (steps + 1,).
        solver: ODE solver (continuous processes); None where only the kernel applies (tokens).
        kernel: stochastic kernel of plain sampling.
        guidance: scale of classifier-free guidance; 1 is off.
        clean_end: the last step of stochastic sampling follows the ODE, as is usual for images: its noise would stay in
            the sample.
        begins: samples begin from what their condition gives, corrupted to the first time of this very grid.
    """

    grid: Float[Tensor, " times"]
    kernel: Kernel
    solver: Solver | None = None
    guidance: float = 1.0
    clean_end: bool = False
    begins: bool = False


class NoiseSource(Protocol):
    """Noise of one iteration: a pure function of (seed, iteration, purpose, sample index, step)."""

    def normal(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Standard normal float32 (len(index), *shape)."""
        ...

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Uniform float32 on (0, 1), (len(index), *shape)."""
        ...
