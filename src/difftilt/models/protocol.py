"""What a denoiser, a set of weights by role, and a generative model are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from difftilt.models.ledger import Ledger
from difftilt.process.protocol import Condition, Prediction, PredictionKind, Process
from difftilt.trees import Batched

Network = Callable[[Tensor, Tensor, Condition], Tensor]
"""``(x_t, t, condition) -> raw output``, x_t (batch, *shape), t (batch,); an ``nn.Module`` if it has weights."""


@dataclass(frozen=True)
class Stateful(Batched):
    """A condition with per-trajectory state beside it; both branches of guidance share the state."""

    condition: Condition
    state: Condition


def remembers(given: Condition, prepared: Condition) -> bool:
    """Whether a model has added state of its own to a condition, or renewed it, before a step.

    State that a condition brings with it (known pixels, a beginning) stays as it is: :meth:`Denoiser.prepare` then
    returns the very condition that it was given.
    """
    return isinstance(prepared, Stateful) and prepared is not given


START, START_TIME = "start", "start_time"
"""Names in the state of a condition whose samples begin from a given one, corrupted, instead of from pure noise: clean
latents (batch, *shape), and the time (batch,), float64, that they are corrupted to."""


class Denoiser(Protocol):
    """A network bound to its process, its guidance and its ledger: what a rollout calls.

    Guidance 1 evaluates the conditional branch only, 0 the unconditional one only (one evaluation each), any other
    scale both in one pass.
    """

    @property
    def process(self) -> Process: ...

    @property
    def ledger(self) -> Ledger: ...

    def prepare(
        self, x_t: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition
    ) -> Condition:
        """Called before every step: returns the condition, with per-trajectory state added or renewed.

        Delegates to ``network.prepare(x_t, t, condition)`` where the network has it, else the identity. State is
        returned as :class:`Stateful`, so it is gathered with the particles, and a new trajectory (whose condition is
        not stateful yet) can never see a stale one.
        """
        ...

    def __call__(
        self, x_t: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition
    ) -> Prediction:
        """One network evaluation (two with guidance, in one pass), counted in the ledger."""
        ...


@dataclass(frozen=True)
class Lagging:
    """A role that follows another: ``lagging <- d·lagging + (1 - d)·source``.

    Attributes:
        source: the role that it follows.
        decay: d as a function of the number of optimiser steps that the source has taken so far; 0 copies.
        every: ``"iteration"``, or an integer: after that many optimiser steps.
    """

    source: str
    decay: Callable[[int], float]
    every: Literal["iteration"] | int = "iteration"


@dataclass(frozen=True)
class Frozen:
    """A role that keeps the weights that its source had when training began, or a network of its own (a teacher)."""

    source: str = "current"
    network: nn.Module | None = None


@dataclass(frozen=True)
class Trained:
    """A role with an optimiser of its own.

    Attributes:
        source: role whose first weights it copies; None if it brings a network of its own.
        network: the network of its own (a critic, a discriminator, a process reward model).
        optimizer: settings that differ from the run's (``lr``, ``betas``, ``weight_decay``, ``max_grad_norm``).
    """

    source: str | None = "current"
    network: nn.Module | None = None
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])


RoleSpec = Lagging | Frozen | Trained


class Roles(Protocol):
    """Weights by role. Copies of a network, or adapters on one backbone: callers cannot tell.

    Roles are made in the order of their declaration, after ``current`` and ``reference``; a source must come earlier.
    """

    @property
    def names(self) -> Sequence[str]: ...

    def network(self, role: str) -> Network:
        """The network that evaluates with the weights of ``role``."""
        ...

    def module(self, role: str) -> nn.Module:
        """The module behind a role that brought a network of its own signature (a critic)."""
        ...

    def parameters(self, role: str) -> Sequence[nn.Parameter]:
        """The parameters an optimiser of ``role`` moves, in a fixed order."""
        ...

    def held(self, role: str) -> "Weights":
        """The weights of ``role``, to be written down."""
        ...

    def stepped(self, role: str) -> None:
        """Note that an optimiser has moved the weights of ``role``."""
        ...

    def blend(self, role: str, source: str, decay: float) -> None:
        """``role <- decay·role + (1 - decay)·source``; decay 0 copies and makes the two :meth:`same`."""
        ...

    def same(self, role: str, other: str) -> bool:
        """True if the two roles are known to hold the same weights: one forward pass then serves both."""
        ...

    def state_dict(self, *, keep: bool = True) -> dict[str, Tensor]:
        """Every tensor of every role, keyed ``role/name``, in a form ``load_state_dict`` takes back bit for bit.

        Processes that hold weights in parts call it together; those that pass ``keep=False`` get nothing.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Weights(Protocol):
    """Weights of one role, to be written down."""

    @property
    def module(self) -> nn.Module:
        """The network; with adapters, all of it."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is the role's own: everything, or one adapter, under the names of the layers."""
        ...

    def assembled(self, keep: bool = True) -> "Weights":
        """The same where every tensor is whole.

        Processes that hold them in parts call it together; one that passes ``keep=False`` only helps the others.
        """
        ...

    def lora(self) -> dict[str, Any] | None:
        """Settings of the adapter as ``peft`` writes them; None without one."""
        ...


@dataclass(frozen=True)
class GenerativeModel:
    """A pretrained model as every method sees it: network, process, and the way in and out of its latent space.

    Attributes:
        network: raw network.
        process: corruption that it was trained on.
        output: what its raw output means.
        shape: of one latent, without the batch.
        encode: prompts -> condition with one row per prompt; called once per prompt and cached by the caller.
        decode: latents (batch, *shape) -> media a reward may see; must keep gradients where the model has them.
        null_condition: batch size -> condition of the unconditional branch of guidance; None if untrained for it.
        dtype_tokens: True if latents are token indices (int64) rather than floats.
        export: writes weights of the network into a folder as the model's own library loads them; None: it has none.
        lora_targets: ends of the names of the layers that adapters go on by default; none: all linear ones.
        latents: inverse of ``decode``, for media that the model did not make; None where there is none.
    """

    network: Network
    process: Process
    output: PredictionKind
    shape: tuple[int, ...]
    encode: Callable[[Sequence[str]], Condition]
    decode: Callable[[Tensor], Tensor]
    null_condition: Callable[[int], Condition] | None = None
    dtype_tokens: bool = False
    export: Callable[[Weights, Path], None] | None = None
    lora_targets: tuple[str, ...] = ()
    latents: Callable[[Tensor], Tensor] | None = None
