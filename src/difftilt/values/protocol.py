"""What a value is: a function of a noisy state. A reward sees decoded samples only; a value sees states."""

from typing import Protocol

from jaxtyping import Float, Shaped
from torch import Tensor

from difftilt.process.protocol import Condition, Prediction


class Value(Protocol):
    """``(x_t, t, condition, prediction) -> (batch,)`` in units of the reward.

    ``prediction`` is the network's at (x_t, t), already paid for, or None where there is none (t = 0). Values that need
    further evaluations count them in the ledger of the denoiser they hold.
    """

    def __call__(
        self,
        x_t: Shaped[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        condition: Condition,
        prediction: Prediction | None,
    ) -> Float[Tensor, " batch"]: ...
