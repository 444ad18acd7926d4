"""What a corruption process and a prediction are.

t = 0 is data, t = 1 is noise; tensors of times have shape (batch,).
"""

from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Shaped
from torch import Tensor

Condition = Any
"""What the network is conditioned on: a tree (``difftilt.trees``) with one row per sample, or None."""

PredictionKind = Literal["epsilon", "x0", "v", "velocity", "score", "logits"]
"""What a raw network output means. ``v`` = alpha·eps - sigma·x0; ``velocity`` = d x_t / dt at fixed (x0, eps)."""

NoiseLaw = Literal["normal", "uniform"]
"""The law of the noise that a draw consumes: standard normal, or uniform on the open interval (0, 1)."""


@runtime_checkable
class Prediction(Protocol):
    """What one network evaluation at ``(x_t, t)`` says of the clean sample. Rows are gathered by ``trees.take``."""

    @property
    def x0(self) -> Shaped[Tensor, "batch *shape"]:
        """The point estimate of the clean sample: the posterior mean, or for tokens the most likely tokens."""
        ...

    def x0_noise_shape(self) -> tuple[int, ...]:
        """Shape, without the batch, of the uniform noise that :meth:`draw_x0` consumes."""
        ...

    def draw_x0(self, noise: Float[Tensor, "batch *noise"]) -> Shaped[Tensor, "batch *shape"]:
        """One draw of the clean sample from the prediction (tokens: every masked position from its own marginal).

        Raises:
            TypeError: if the prediction is a point (continuous processes): use a completion of the chain.
        """
        ...


class Process(Protocol):
    """Forward corruption of clean samples, and all conversions between the ways of naming its denoiser.

    ``GaussianProcess`` adds alpha, sigma, targets and conditional re-noising with its velocity; ``MaskedProcess`` the
    mask probability and relaxed states (batch, position, vocab + 1), which its ``predict`` takes as well as tokens.
    """

    @property
    def noise_law(self) -> NoiseLaw:
        """The law of the noise that :meth:`corrupt`, :meth:`renoise` and :meth:`prior` consume."""
        ...

    @property
    def point_prior(self) -> bool:
        """True if x_1 is always the same state (all mask), so that a tree of trajectories has one root."""
        ...

    def prior(self, noise: Float[Tensor, "batch *shape"]) -> Shaped[Tensor, "batch *shape"]:
        """x_1: pure noise (continuous), or all mask (tokens), from noise of the sample's own shape."""
        ...

    def corrupt(
        self, x_0: Shaped[Tensor, "batch *shape"], t: Float[Tensor, " batch"], noise: Float[Tensor, "batch *shape"]
    ) -> Shaped[Tensor, "batch *shape"]:
        """x_t drawn from q(x_t | x_0)."""
        ...

    def renoise(
        self,
        x_s: Shaped[Tensor, "batch *shape"],
        s: Float[Tensor, " batch"],
        tau: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch *shape"],
    ) -> Shaped[Tensor, "batch *shape"]:
        """x_tau drawn from q(x_tau | x_s), tau >= s: after ``corrupt`` to s it equals ``corrupt`` to tau in law."""
        ...

    def predict(
        self,
        output: Float[Tensor, "batch ..."],
        x_t: Shaped[Tensor, "batch *shape"],
        t: Float[Tensor, " batch"],
        kind: PredictionKind,
    ) -> Prediction:
        """The prediction that a raw network output of the named kind stands for."""
        ...
