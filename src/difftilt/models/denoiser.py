"""A network bound to its process: classifier-free guidance in one pass, the ledger, one padded forward shape."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.execution import PLAIN, Execution, compile_network
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import GenerativeModel, Network, Stateful
from difftilt.models.shards import COMPUTES_ON
from difftilt.process.gaussian import at_least_float32
from difftilt.process.protocol import Condition, Prediction, PredictionKind, Process
from difftilt.trees import join, tree_map

Output = TypeVar("Output")


def in_chunks(
    function: Callable[[Tensor, Tensor, Condition], Output],
    x_t: Shaped[Tensor, "rows *shape"],
    t: Float[Tensor, " rows"],
    condition: Condition,
    size: int | None,
) -> Output:
    """``function`` of all rows, called with exactly ``size`` of them at a time; None calls it once with all.

    The last chunk is filled up with detached copies of its first row, whose results are dropped, so the filling
    gets no gradient. At one shape a row's result does not depend on where the row stands. On CPU that holds bit for bit
    at sizes that are multiples of 32 (all tried, up to 128); an AMD EPYC did so at multiples of 4, an Intel Xeon with
    AVX-512 did not. At other sizes the matrix kernels treat the last rows in another order of summation, and silu and
    sigmoid the last values that do not fill a vector by another formula: differences in the last bit.

    Args:
        function: tree of rows to tree of rows.
        x_t: states.
        t: times.
        condition: tree with one row per state, or None.
        size: rows per call.
    """
    rows = len(x_t)
    if size is None or rows == size:
        return function(x_t, t, condition)
    if rows == 0:
        raise ValueError("a batch without rows cannot be filled up to the padded forward shape")
    parts: list[Output] = []
    for start in range(0, rows, size):
        kept = min(size, rows - start)
        chunk = tree_map(lambda leaf, a=start, b=start + kept: leaf[a:b], (x_t, t, condition))
        if kept < size:
            filling = tree_map(lambda leaf, n=size - kept: leaf[:1].detach().expand(n, *leaf.shape[1:]), chunk)
            chunk = join([chunk, filling])
        parts.append(tree_map(lambda leaf, n=kept: leaf[:n], function(*chunk)))
    return join(parts)


@dataclass(frozen=True)
class NetworkDenoiser:
    """The one implementation of ``Denoiser``.

    Guided output: ``null + guidance·(conditional - null)`` in the space of the network's raw output (Ho and Salimans,
    arXiv 2207.12598), both branches in one batch. One row counts one network evaluation, two with guidance: as
    ``nfe`` where gradients are off, as ``gradient_passes`` where they are on. Filling rows are not counted.

    A network may offer ``prepare(x_t, t, condition) -> condition`` (per-trajectory state) and
    ``refine(prediction, condition) -> prediction`` (a prediction that says more than its point estimate, such as the
    components of a mixture); the latter is not asked where two branches are combined.

    Attributes:
        network: raw network; it sees times in float32, or in float64 where the state is float64.
        process: turns the raw output into a prediction.
        kind: what the raw output means.
        ledger: what every evaluation is counted in.
        guidance: 1 evaluates the conditional branch only, 0 the unconditional one only.
        null_condition: number of rows -> condition of the unconditional branch.
        forward_batch: the network is only ever called with this many rows, best a multiple of 32 (:func:`in_chunks`);
            None calls it with what comes.
        execution: precision of the network, and whether it is compiled; with ``bf16`` the raw output is raised to
            float32 before anything is made of it.
    """

    network: Network
    process: Process
    kind: PredictionKind
    ledger: Ledger
    guidance: float = 1.0
    null_condition: Callable[[int], Condition] | None = None
    forward_batch: int | None = None
    execution: Execution = PLAIN

    def __post_init__(self) -> None:
        if self.guidance != 1 and self.null_condition is None:
            raise UserError(
                f"guidance {self.guidance:g} needs a model with an unconditional branch; "
                "this one has no null condition: use guidance 1"
            )
        if self.forward_batch is not None and self.forward_batch < 1:
            raise UserError(f"forward_batch must be at least 1 (or left out), got {self.forward_batch}")
        compile_network(self.network, self.execution)

    def prepare(
        self, x_t: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition
    ) -> Condition:
        """The network's own ``prepare``, at the padded shape; the identity where it has none."""
        own: Callable[[Tensor, Tensor, Condition], Condition] | None = getattr(self.network, "prepare", None)
        if own is None:
            return condition
        with self.execution.autocast(x_t.device):
            return in_chunks(own, x_t, _network_time(x_t, t), condition, self.forward_batch)

    def __call__(
        self, x_t: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], condition: Condition
    ) -> Prediction:
        rows = len(x_t)
        branch = self._unconditional(condition, rows) if self.guidance == 0 else condition
        guided = self.guidance not in (0, 1)
        output = self._guided(x_t, t, condition) if guided else self._evaluate(x_t, t, branch)
        self._count(2 * rows if guided else rows)
        prediction = self.process.predict(output, x_t, t, self.kind)
        refine: Callable[[Prediction, Condition], Prediction] | None = getattr(self.network, "refine", None)
        return prediction if refine is None or guided else refine(prediction, branch)

    def _evaluate(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self.execution.autocast(x_t.device):
            output = in_chunks(self.network, x_t, _network_time(x_t, t), condition, self.forward_batch)
        return output if self.execution.precision == "fp32" else at_least_float32(output)

    def _guided(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        null = self._unconditional(condition, len(x_t))
        output = self._evaluate(torch.cat([x_t, x_t]), torch.cat([t, t]), join([condition, null]))
        conditional, unconditional = at_least_float32(output).chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def _unconditional(self, condition: Condition, rows: int) -> Condition:
        """The null condition, beside the state of a condition that has one."""
        assert self.null_condition is not None  # __post_init__ refuses it
        null = self.null_condition(rows)
        return replace(condition, condition=null) if isinstance(condition, Stateful) else null

    def _count(self, evaluations: int) -> None:
        if torch.is_grad_enabled():
            self.ledger.gradient_passes += evaluations
        else:
            self.ledger.nfe += evaluations


def _network_time(x_t: Tensor, t: Tensor) -> Tensor:
    return t.to(torch.float64 if x_t.dtype == torch.float64 else torch.float32)


def denoiser(
    model: GenerativeModel,
    network: Network | None = None,
    *,
    ledger: Ledger | None = None,
    guidance: float = 1.0,
    forward_batch: int | None = None,
    execution: Execution = PLAIN,
) -> NetworkDenoiser:
    """The denoiser of ``model``, or of another ``network`` (another role) in its place.

    Args:
        model: gives process, kind of output and null condition.
        network: evaluated instead of the model's own.
        ledger: shared with other parts of a run; None starts a new one.
        guidance: scale of classifier-free guidance; 1 is off.
        forward_batch: rows of every network call; None does not pad.
        execution: precision and compilation.
    """
    return NetworkDenoiser(
        network=model.network if network is None else network,
        process=model.process,
        kind=model.output,
        ledger=Ledger() if ledger is None else ledger,
        guidance=guidance,
        null_condition=model.null_condition,
        forward_batch=forward_batch,
        execution=execution,
    )


def device_of(network: Network) -> torch.device:
    """Where the network computes: where its weights lie, if it says nothing else; the CPU for one without weights."""
    said: torch.device | None = getattr(network, COMPUTES_ON, None)
    if said is not None:
        return said
    parameters: Callable[[], Iterable[Tensor]] | None = getattr(network, "parameters", None)
    first = None if parameters is None else next(iter(parameters()), None)
    return torch.device("cpu") if first is None else first.device
