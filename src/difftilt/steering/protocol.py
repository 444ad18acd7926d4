"""What particles and a steerer are. A steerer spends computation at sampling time; the weights stay frozen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards.protocol import Reward
from difftilt.sampling.protocol import NoiseSource
from difftilt.steering.budget import Meter
from difftilt.training.protocol import Task
from difftilt.trees import Batched


@dataclass(frozen=True)
class Particles(Batched):
    """All that moves together when particles are gathered: ``trees.take(particles, ancestors)``.

    Particles of several prompts stand in one flat batch; ``group`` says whose they are.

    Attributes:
        x: states at the present time.
        group: prompt that the particle belongs to.
        condition: with per-trajectory state.
        log_weight: carried log-weights, float64; never dropped when resampling is skipped.
        prediction: cached network prediction at (x, t), or None when stale.
        memory: named tensors per particle (reward history, running sums, solver memory).
    """

    x: Shaped[Tensor, "particles *shape"]
    group: Int[Tensor, " particles"]
    condition: Condition
    log_weight: Float[Tensor, " particles"]
    prediction: Prediction | None = None
    memory: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


Progress = Callable[[int, int, Tensor | None], None]
"""``progress(step, steps, ess)`` after every step; ``ess`` (prompts,) where the particles were weighted, else None."""


@dataclass(frozen=True)
class Steered:
    """The outcome of steering a batch of prompts.

    Attributes:
        x_0: all particles, (prompts · particles, *shape), prompts outermost.
        media: decoded.
        group: prompt of each particle.
        weight: normalised in each group, float64; equal after a final resampling, 1 on the best where only the best
            comes out.
        rewards: r(x_0) of each particle.
        best: for each prompt the row with the highest reward.
        log_z: estimate of log E_p[exp(r / temperature)] for each prompt; NaN where a method has none.
        ess: effective sample size of each prompt at each weighting, (times, prompts); no rows if it never weights.
        ancestors: distinct first ancestors alive after each weighting and its selection, (times, prompts).
        ledger: NFE and reward calls of the whole call.
        components: further scores of each particle by name (the objectives of a Pareto search), (particles,).
        invalid: for each prompt how many scores were missing and counted as the worst; None where none could be.
        search: the weights name the best sample; they are not those of a law.
        history: what a search tells of its rounds, by name, (rounds, prompts).
        complete: False if the call was ended early, by Ctrl-C or because its seconds were over.
    """

    x_0: Tensor
    media: Tensor
    group: Tensor
    weight: Tensor
    rewards: Tensor
    best: Tensor
    log_z: Tensor
    ess: Tensor
    ancestors: Tensor
    ledger: Ledger
    components: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    invalid: Tensor | None = None
    search: bool = False
    history: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    complete: bool = True


class Steerer(Protocol):
    """A named inference-time algorithm."""

    def steer(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        index: Int[Tensor, " prompts"] | None = None,
        progress: Progress | None = None,
    ) -> Steered:
        """Sample for every prompt; weights of the model are not touched.

        Args:
            task: model, grid and kernel.
            denoise: the network; counts in its ledger.
            reward: what is steered to; need not be the task's.
            prompts: repeated ones are independent runs.
            noise: of the whole call.
            index: global index of each prompt, 0, 1, ... by default: fixes its noise, so a prompt's particles are the
                same in any batch of prompts.
            progress: told of every step.
        """
        ...


class Anytime(Protocol):
    """A steerer that works in rounds, each of which makes its result better: it can end after any of them.

    Its settings bound the number of rounds as well.
    """

    def steer(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        index: Int[Tensor, " prompts"] | None = None,
        progress: Progress | None = None,
        meter: Meter | None = None,
    ) -> Steered:
        """As :meth:`Steerer.steer`; asks ``meter`` before every round whether it still fits.

        Raises:
            UserError: if not even the first round fits.
        """
        ...


class Fitted(Steerer, Protocol):
    """A steerer with a learned part: ``difftilt train`` fits and saves it, ``difftilt steer`` uses what was saved.

    One that is asked to steer before it has been fitted fits itself first, and pays for it in the same ledger.
    """

    def fit(
        self,
        task: Task,
        denoise: Denoiser,
        reward: Reward,
        prompts: Sequence[str],
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
    ) -> Mapping[str, float]:
        """Learn from the model's own samples for these prompts; returns named metrics of the fit.

        Args:
            task: model, grid and kernel.
            denoise: the network, whose weights are not touched.
            reward: to learn about.
            prompts: to learn from; training prompts where the learned part serves all prompts.
            noise: of the whole fit.
            progress: told of every round.
        """
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """The learned part; empty before it was fitted."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take it back.

        Raises:
            UserError: if it belongs to another model, shape or grid.
        """
        ...


@dataclass(frozen=True)
class Lesson:
    """What a learned part is learned from, beside the model: with another one it would be another part.

    Attributes:
        rewards: name -> reward whose scores were learned; those of a sum that are learned one by one stand alone.
        settings: of the steerer, as far as what was learned depends on them and its shapes do not tell.
    """

    rewards: Mapping[str, Reward]
    settings: Mapping[str, float | str] = field(default_factory=dict[str, float | str])


@runtime_checkable
class Learns(Protocol):
    """A fitted steerer that says what its learned part belongs to; of others the reward and the model are known."""

    def lesson(self, reward: Reward) -> Lesson:
        """What it learns where it is fitted to this reward."""
        ...


@runtime_checkable
class Judges(Protocol):
    """A search that does not choose by the reward alone: rounds that are joined are judged as each of them was."""

    def judged(self, steered: Steered, reward: Reward) -> Steered:
        """The samples of several rounds with the best of each prompt chosen anew among all of them."""
        ...


@runtime_checkable
class SelfFitting(Protocol):
    """A fitted steerer whose fit serves all later calls: a budget is for what comes after it."""

    @property
    def unfitted(self) -> bool:
        """Whether there is something to learn that was not learned yet."""
        ...

    def fit_for(
        self, task: Task, denoise: Denoiser, reward: Reward, prompts: Sequence[str], noise: NoiseSource
    ) -> None:
        """The fit that a call makes first: to the task's training prompts, or to those of the call without any."""
        ...

    def fit_price(self, task: Task) -> Ledger:
        """What that fit costs if it has not been made; paid once, whatever the prompts."""
        ...
