"""What a task, an experience, a phase and a method are: the seams between a method's file and the one loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser, GenerativeModel, Roles, RoleSpec
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward, Samples, Scores, SetReward
from difftilt.sampling.protocol import NoiseSource, Sampler
from difftilt.training.experience import Experience, PromptBatch


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
        headline: the number that a comparison quotes: ``reward``, or the name of a held-out reward.
        categories: prompt -> the kind of prompt it is; evaluations then report the headline of each kind as well.
        temperature: beta of the tilted target where the testbed knows it exactly; None otherwise.
        truth: media -> their distance to the tilted law at ``temperature``, where the testbed knows it; of finite sets
            it is never 0.
        data: offline experience for methods that learn from it (preferred samples, scored groups).
        rate: samples per second of audio media; None for other media.
        text: media -> one string per sample, where people read samples better than numbers (tokens that spell).
        read: inverse of ``text``, for samples that the model did not make.
        draw: media -> pictures in [0, 1], (batch, channel, height, width), all of one size, where media are no images
            but have a picture.
        valid: media -> (batch,) bool: which samples mean anything at all. A search may drop the others unscored; in a
            per-sample reward they have the worst value of its range.
        environment: for control; its rewards take the place of ``reward``.
    """

    name: str
    model: GenerativeModel
    reward: Reward
    prompts: Sequence[str]
    heldout_prompts: Sequence[str]
    sampler: Sampler
    heldout: Mapping[str, Reward] = field(default_factory=dict[str, Reward])
    features: Callable[[Tensor], Tensor] | None = None
    headline: str = "reward"
    categories: Callable[[str], str] | None = None
    temperature: float | None = None
    truth: Callable[[Tensor], float] | None = None
    data: Experience | None = None
    rate: int | None = None
    text: Callable[[Tensor], Sequence[str]] | None = None
    read: Callable[[Sequence[str]], Tensor] | None = None
    draw: Callable[[Tensor], Tensor] | None = None
    valid: Callable[[Tensor], Tensor] | None = None
    environment: "Environment | None" = None


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


Unit = Literal["edge", "sample", "group", "level"]
"""A row, the rows of a sample, of a group, or of a group at one step."""


@dataclass(frozen=True)
class Phase:
    """One optimiser's turn in an iteration.

    Attributes:
        role: whose weights move; several roles step together on one loss (an actor and its critic).
        loss: (rows, noise) -> loss. ``rows`` come from :meth:`Experience.rows`; ``noise`` is new in each epoch.
        unit: what stays together when the experience is shuffled and split, microbatches included. ``level`` keeps a
            group together in an update, but only its rows of one step together in a microbatch.
        micro: what stays together in a microbatch. None is ``unit``, but of samples nothing: one whose steps leave
            a call of the network half empty costs as much as a full one. Losses of groups that are linear in their rows
            once ``before`` has seen them (``training.two_pass``) take ``edge``; a loss that compares the steps of a
            sample takes ``sample``.
        updates: optimiser steps per epoch, over disjoint parts of the experience. Methods whose roles alternate use 1.
        epochs: passes over the experience in one iteration.
        select: experience -> edges that this phase trains on; None is all that are not masked.
        before: the rows of one whole update -> the same rows, changed: statistics of an update go here (with
            ``run.jointly``), never into ``loss``, which sees a microbatch. What is large is shared by these rows: see
            :class:`~difftilt.training.experience.Experience`, and ``training.two_pass.in_pieces``.
        when: iteration -> whether the phase runs.
        stop: means of the metrics of the last update -> whether to end the phase early (a KL limit).
        part: experience -> number of the update, 0..updates - 1, that each edge belongs to, in place of a random split.
        after: told the means of the metrics of every update, when the weights have moved (a reference that follows).
        one_state: the rows of a unit share their state, and the loss evaluates the network once for them: a microbatch
            holds so many units as it otherwise holds rows.
        guided: the loss evaluates the network with the guidance of the task, which may take two rows for each of its
            own: half as many then fill a call, and more would only keep more activations.
    """

    role: str | tuple[str, ...]
    loss: "Callable[[Experience, NoiseSource], Loss]"
    unit: Unit = "edge"
    micro: Unit | None = None
    updates: int = 1
    epochs: int = 1
    select: Callable[[Experience], Tensor] | None = None
    before: Callable[[Experience], Experience] | None = None
    when: Callable[[int], bool] = lambda iteration: True
    stop: Callable[[Mapping[str, float]], bool] | None = None
    part: Callable[[Experience], Tensor] | None = None
    after: Callable[[Mapping[str, float]], None] | None = None
    one_state: bool = False
    guided: bool = False

    @property
    def together(self) -> Unit:
        """What stays together in a microbatch."""
        return self.micro or ("edge" if self.unit == "sample" else self.unit)


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

    @property
    def forward_batch(self) -> int:
        """Rows of every network call."""
        ...

    def denoiser(self, role: str, guidance: float | None = None) -> Denoiser:
        """The model with the weights of ``role``; guidance None is the task's own scale."""
        ...

    def prompts(self, groups: int, size: int) -> PromptBatch:
        """This process's share of ``groups`` prompts, ``size`` samples each; fixed by seed and iteration.

        A group never straddles processes.
        """
        ...

    def stored(self, data: Experience, rows: Int[Tensor, "count size"], groups: int) -> Experience:
        """This process's share of ``groups`` groups of a data set; fixed by seed and iteration.

        Endless passes over all groups, each in another order. ``rows`` has one line of places in ``data`` for each
        group. Index and group are numbered anew within the iteration; conditions are encoded from the prompts.
        """
        ...

    def samples(self, x_0: Tensor, batch: PromptBatch | Experience) -> Samples:
        """Decode latents into what a reward may see; gradients flow where grad mode is on."""
        ...

    def score(self, samples: Samples) -> Scores:
        """Score; raises ``RewardError`` for anything that is not a finite score per sample."""
        ...

    def score_with(self, reward: Reward, samples: Samples) -> Scores:
        """The same with another reward than the task's own, counted all the same."""
        ...

    def parts(self, batch: PromptBatch) -> Sequence[PromptBatch]:
        """The parts that a batch is drawn in: whole groups, where the reward works in the background; else one."""
        ...

    def score_parts(self, drawn: Iterable[Samples]) -> tuple[Samples, Scores]:
        """All samples and their scores, equal to those of :meth:`score`; each part is scored while the next is drawn.

        The iterable does the drawing. See ``training.drawing``.
        """
        ...

    def features(self, reward: SetReward, samples: Samples) -> Float[Tensor, "samples dim"]:
        """Embeddings that a reward of sets sees, one reward call per sample."""
        ...

    def gather(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """The columns of all processes, in the order of processes, which is the order of the global index."""
        ...

    def jointly(self, function: Callable[..., Any], *columns: Tensor) -> Any:
        """Apply a pure function to the gathered columns and return this process's rows of its tensor results.

        Credit runs here, so that group statistics are the same for any number of processes. Columns of one call share
        one length, of samples or of edges.
        """
        ...


class Environment(Protocol):
    """A vectorised environment: a batch of observations as conditions, stepped with action chunks."""

    def observe(self) -> PromptBatch:
        """The present observation of every instance of this process; ``group`` numbers its episode."""
        ...

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Condition]:
        """(reward, terminated, truncated, final observation), each with one row per instance; finished ones restart."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Method(Protocol):
    """A named training algorithm: ``collect`` makes experience, ``phases`` learn from it. The loop does the rest.

    ``training.MethodBase`` has the defaults of everything but ``collect`` and ``phases``.
    """

    @property
    def evaluated_role(self) -> str:
        """The role that is evaluated, saved for use, and whose drift is reported; ``current`` by default."""
        ...

    def adapt(self, model: GenerativeModel) -> GenerativeModel:
        """The model to train, before roles are made: where adapters and hypernetworks go in. Identity by default."""
        ...

    def sampler(self, task: Task) -> Sampler:
        """How the result is meant to be sampled; the task's sampler by default."""
        ...

    def roles(self) -> Mapping[str, RoleSpec]:
        """Roles besides ``current`` and ``reference``, which always exist."""
        ...

    def collect(self, run: Run) -> Experience:
        """Sample, score and credit; no gradient."""
        ...

    def phases(self, run: Run) -> Sequence[Phase]:
        """In order; asked anew in every iteration."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """What the method remembers between iterations, equal on all processes; part of every checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
