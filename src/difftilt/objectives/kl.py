"""Penalties that hold a policy to its reference, one number per transition.

The exact KL of two Gaussian steps with one std is |mean - mean_ref|²/(2·std²). Published codes use three other numbers
under the same name; a published weight belongs to one of them. The reference carries no gradient.
"""

from typing import Literal, assert_never

from jaxtyping import Float
from torch import Tensor

from difftilt.process.gaussian import GaussianProcess, as_gaussian
from difftilt.process.protocol import Prediction
from difftilt.sampling.protocol import Reduction, Step
from difftilt.sampling.steps import GaussianStep, reduce_dims

Rows = Float[Tensor, " rows"]

KLMode = Literal["exact", "flow_grpo", "velocity", "mean"]
"""``exact``: the KL of the step. ``flow_grpo``: the code of Flow-GRPO, which divides by the diffusion coefficient and
not by the std of the step, hence exact·(t - s). ``velocity``, ``mean``: squared error of the velocity, of the mean."""


def exact_kl(step: Step, reference: Step, *, reduce: Reduction = "mean") -> Rows:
    """KL(step || reference) in nats; ``mean`` divides it by the number of dimensions, as in the log-probability."""
    return step.kl(reference, reduce=reduce)


def mean_gap(step: GaussianStep, reference: GaussianStep, *, reduce: Reduction = "mean") -> Rows:
    """|mean - mean_ref|²."""
    return reduce_dims((step.mean - reference.mean) ** 2, reduce)


def flow_grpo_kl(step: GaussianStep, reference: GaussianStep, t: Rows, s: Rows, *, reduce: Reduction = "mean") -> Rows:
    """|mean - mean_ref|²/(2·g²) with g = std/sqrt(t - s): the released code, weaker than the KL by t - s.

    Raises:
        ValueError: if the steps are deterministic: there is no noise to divide by.
    """
    return exact_kl(step, reference, reduce=reduce) * (t - s).to(step.mean)


def velocity_gap(prediction: Prediction, reference: Prediction, *, reduce: Reduction = "mean") -> Rows:
    """|velocity - velocity_ref|², whatever the network predicts; needs no noise, so it serves forward processes too."""
    return reduce_dims((as_gaussian(prediction).velocity - as_gaussian(reference).velocity) ** 2, reduce)


def step_kl(
    mode: KLMode,
    step: Step,
    reference: Step,
    t: Rows,
    s: Rows,
    *,
    predictions: tuple[Prediction, Prediction] | None = None,
    reduce: Reduction = "mean",
) -> Rows:
    """The penalty of the named kind; categorical steps have the exact one only.

    Args:
        mode: see :data:`KLMode`.
        step: of the present weights, with gradient.
        reference: of the reference weights, from the same state.
        t: start of the step.
        s: its end, s < t.
        predictions: those that ``step`` and ``reference`` were made from; only ``velocity`` looks at them.
        reduce: over the dimensions of a latent; published weights belong to ``mean``.
    """
    if mode == "exact":
        return exact_kl(step, reference, reduce=reduce)
    if not (isinstance(step, GaussianStep) and isinstance(reference, GaussianStep)):
        raise TypeError(f"the {mode} penalty needs Gaussian steps, not {type(step).__name__}: use exact")
    match mode:
        case "flow_grpo":
            return flow_grpo_kl(step, reference, t, s, reduce=reduce)
        case "velocity":
            if predictions is None:
                raise ValueError("the velocity penalty needs the predictions that the steps were made from")
            return velocity_gap(*predictions, reduce=reduce)
        case "mean":
            return mean_gap(step, reference, reduce=reduce)
        case _:
            assert_never(mode)


def sde_kl(process: GaussianProcess, g: Rows, t: Rows, s: Rows, squared_velocity_gap: Rows) -> Rows:
    """The exact KL of two Flow-SDE or Dance-SDE steps in closed form, from the gap of their velocities alone.

    (t - s)/2 · (1/g + g·alpha/(2·sigma·w))² · |Δvelocity|² with w = alpha·sigma' - sigma·alpha', which is 1 for
    rectified flow: (t - s)/2 · (g(1 - t)/(2t) + 1/g)² · |Δv|² (Flow-GRPO, arXiv 2505.05470). A test holds it equal to
    :func:`exact_kl`. It does not hold for CPS, whose std is not g·sqrt(t - s).
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    w = alpha * process.sigma_dot(t) - sigma * process.alpha_dot(t)
    factor = 1 / g + g * alpha / (2 * sigma * w)
    return (t - s) / 2 * factor**2 * squared_velocity_gap
