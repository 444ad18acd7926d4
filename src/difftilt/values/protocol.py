"""What a value is: a function of a noisy state. A reward sees decoded samples only; a value sees states."""

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition, Prediction
from difftilt.trees import Batched


@dataclass(frozen=True)
class Rows(Batched):
    """Whose states a batch holds: what a value needs beside the state to draw noise and to find the prompt.

    Attributes:
        index: keys the noise of each row, as in :class:`NoiseSource`; the slot, never the particle that stands in it.
        prompt: row of each state's prompt in the prompts that the reward was bound to.
        step: index of the state on its grid, 0 at the noise end.
    """

    index: Int[Tensor, " batch"]
    prompt: Int[Tensor, " batch"]
    step: int


class Value(Protocol):
    """``(x_t, t, condition, prediction, rows) -> (batch,)`` in units of the reward.

    ``prediction`` is the network's at (x_t, t), already paid for, or None where there is none: at t = 0, and for a
    value that does not read it (:func:`reads_prediction`). Values that need further evaluations count them in the
    ledger of the denoiser they hold.
    """

    def __call__(
        self,
        x_t: Shaped[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        condition: Condition,
        prediction: Prediction | None,
        rows: Rows,
    ) -> Float[Tensor, " batch"]: ...


def reads_prediction(value: Value) -> bool:
    """Whether a value wants the network's prediction at the state.

    An attribute ``reads_prediction = False`` says that it does not: of candidates that will be dropped it is then not
    computed.
    """
    return bool(getattr(value, "reads_prediction", True))
