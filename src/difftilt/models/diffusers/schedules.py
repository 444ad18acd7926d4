"""Schedulers of ``diffusers`` in terms of difftilt: a process, what the network's output means, a clock and a grid.

Only schedulers whose step is one of difftilt's kernels are taken: a step that remembers earlier ones (PNDM, UniPC,
DPM-Solver) is no distribution that a policy gradient or a search could ask. The pipeline's scheduler is never changed.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.gaussian import GaussianProcess, RectifiedFlow, VariancePreserving
from difftilt.process.protocol import PredictionKind

KINDS: Mapping[str, PredictionKind] = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
"""``prediction_type`` of a scheduler -> what the output means."""

SMALLEST = 2.0**-48
"""Stands for abar = 0 (zero terminal signal), whose logarithm is infinite; the signal is then 6e-8 of the noise."""


@dataclass(frozen=True)
class Clock:
    """From t to what the network is told: ``scale·t + offset``, not below ``floor``.

    Whole numbers are met exactly: in float32 a time on the table comes out a few 1e-5 beside its timestep.
    """

    scale: float
    offset: float = 0.0
    floor: float = 0.0

    def __call__(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        told = (self.scale * t + self.offset).clamp(min=self.floor)
        whole = told.round()
        return torch.where((told - whole).abs() < 2e-4, whole, told)


@dataclass(frozen=True)
class Schedule:
    """What a scheduler with a number of steps comes to.

    Attributes:
        process: forward corruption.
        predicts: what the raw output of the network means.
        clock: what the network is told of a time.
        grid: the scheduler's own times and the end of its last step, (steps + 1,) float64, falling.
        law: of a step of the pipeline: ``ode`` is deterministic, ``ancestral`` DDPM's posterior, and ``renoise`` the
            predicted clean sample with fresh noise (consistency models).
        mixing: of consistency models: the time as they know it is so many times the network's clock; it says how much
            of the state goes into the predicted clean sample. None for others.
    """

    process: GaussianProcess
    predicts: PredictionKind
    clock: Clock
    grid: Float[Tensor, " times"]
    law: Literal["ode", "ancestral", "renoise"] = "ode"
    mixing: float | None = None

    @property
    def output(self) -> PredictionKind:
        """What the output means, mixed or not."""
        return self.predicts if self.mixing is None else "x0"


def schedule_of(
    scheduler: Any, steps: int, *, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Schedule:
    """The schedule of ``steps`` network evaluations.

    Args:
        scheduler: of a pipeline; it is copied.
        steps: as ``num_inference_steps``.
        sigmas: that the pipeline hands to ``set_timesteps``; None lets the scheduler choose.
        mu: of a dynamic time shift.

    Raises:
        UserError: names the scheduler, or its setting, that the kernels cannot reproduce.
    """
    name = type(scheduler).__name__
    if name not in READERS:
        raise UserError(
            f"the steps of {name} cannot be reproduced: a kernel takes one network evaluation and remembers none; "
            f"known are {', '.join(sorted(READERS))}. {_remedy(scheduler)}"
        )
    # copied whole: made anew from its settings it would lose those that a pipeline has corrected
    return READERS[name](deepcopy(scheduler), steps, sigmas, mu)


def _remedy(scheduler: Any) -> str:
    flow = scheduler.config.get("use_flow_sigmas") or "flow" in str(scheduler.config.get("prediction_type", ""))
    other = "FlowMatchEulerDiscreteScheduler" if flow or "Flow" in type(scheduler).__name__ else "DDIMScheduler"
    return f"Set scheduler={other} (an option of the pipeline), which takes over its settings"


def replaced(scheduler: Any, name: str) -> Any:
    """Another scheduler with the settings of this one, those with another name included.

    Raises:
        UserError: if ``diffusers`` has no such scheduler.
    """
    import diffusers

    made = getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or made is None:
        raise UserError(
            f"scheduler = {name!r}: diffusers has no such scheduler; {', '.join(sorted(READERS))} are known"
        )
    config = scheduler.config
    extra: dict[str, Any] = {}
    if name.startswith("FlowMatch") and config.get("flow_shift") is not None:
        extra["shift"] = config["flow_shift"]
    if "clip_sample" not in config:
        extra["clip_sample"] = False  # a scheduler that does not know it does not do it; DDIM's default is to clip
    return made.from_config(config, **extra)


def _ddim(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Schedule:
    _refuse(scheduler, thresholding=False, clip_sample=False)
    scheduler.set_timesteps(steps)
    process = _variance_preserving(scheduler, prior_std=1.0)
    times: list[int] = scheduler.timesteps.tolist()
    ends = [time - process.steps // steps for time in times]
    if any(end != start for end, (_, start) in zip(ends, pairwise(times), strict=False)):
        spacing = scheduler.config.timestep_spacing
        raise UserError(
            f"DDIMScheduler with timestep_spacing={spacing!r} and {steps} steps ends a step where the next one does "
            f"not begin: no grid has such steps; use timestep_spacing='leading', or a number of steps that divides "
            f"{process.steps} with 'trailing'"
        )
    last = process.time(torch.tensor(max(ends[-1], 0))) if ends[-1] >= 0 or not scheduler.config.set_alpha_to_one else 0
    grid = torch.cat([process.time(scheduler.timesteps), torch.as_tensor(last, dtype=torch.float64)[None]])
    return Schedule(process, _kind(scheduler), _clock(process), grid)


def _euler(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Schedule:
    """Euler's rule in the coordinates x_0 + ratio·eps is the first-order rule of the variance-preserving process.

    Between whole timesteps (spacing ``linspace``) the scheduler interpolates the ratio and the process log abar. On the
    schedule of Stable Diffusion they are less than a thousandth of a timestep apart from timestep 100 on, 0.04 at most.
    """
    _refuse(
        scheduler,
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        interpolation_type="linear",
        timestep_type="discrete",
    )
    scheduler.set_timesteps(steps)
    largest = float(scheduler.sigmas.max())
    std = float(scheduler.init_noise_sigma) / (1 + largest**2) ** 0.5
    process = _variance_preserving(scheduler, prior_std=std)
    end = 0.0 if scheduler.config.get("final_sigmas_type", "zero") == "zero" else 1 / process.steps
    grid = torch.cat([process.time(scheduler.timesteps), torch.tensor([end], dtype=torch.float64)])
    return Schedule(process, _kind(scheduler), _clock(process), grid)


def _ancestral(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Schedule:
    """Euler's ancestral step in those coordinates is DDPM's."""
    return replace(_euler(scheduler, steps, sigmas, mu), law="ancestral")


def _lcm(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Schedule:
    _refuse(scheduler, thresholding=False, clip_sample=False)
    scheduler.set_timesteps(steps)
    process = _variance_preserving(scheduler, prior_std=1.0)
    grid = torch.cat([process.time(scheduler.timesteps), torch.zeros(1, dtype=torch.float64)])
    mixing = float(scheduler.config.timestep_scaling)
    return Schedule(process, _kind(scheduler), _clock(process), grid, "renoise", mixing)


def _flow(scheduler: Any, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> Schedule:
    _refuse(scheduler, invert_sigmas=False)
    given = {} if sigmas is None else {"sigmas": list(sigmas)}
    shift = {"mu": mu} if scheduler.config.use_dynamic_shifting else {}
    scheduler.set_timesteps(**(given or {"num_inference_steps": steps}), **shift)
    clock = Clock(float(scheduler.config.num_train_timesteps))
    law = "renoise" if scheduler.config.stochastic_sampling else "ode"
    return Schedule(RectifiedFlow(), "velocity", clock, scheduler.sigmas.double(), law)


READERS: Mapping[str, Callable[[Any, int, Sequence[float] | None, float | None], Schedule]] = {
    "DDIMScheduler": _ddim,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "EulerDiscreteScheduler": _euler,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "LCMScheduler": _lcm,
}
"""Class of a scheduler -> how it is read."""


def dynamic_shift(scheduler: Any, tokens: int) -> float | None:
    """``mu`` for a latent of so many tokens: linear between the two lengths of the settings; None if it is static."""
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return None
    rise = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + rise * (tokens - config.base_image_seq_len)


def _variance_preserving(scheduler: Any, prior_std: float) -> VariancePreserving:
    return VariancePreserving(scheduler.alphas_cumprod.double().clamp(min=SMALLEST), prior_std=prior_std)


def _clock(process: VariancePreserving) -> Clock:
    return Clock(process.steps, offset=-1.0)


def _kind(scheduler: Any) -> PredictionKind:
    kind = scheduler.config.prediction_type
    if kind not in KINDS:
        raise UserError(f"{type(scheduler).__name__} has prediction_type {kind!r}; known are {', '.join(KINDS)}")
    return KINDS[kind]


def _refuse(scheduler: Any, **needed: object) -> None:
    """Refuse settings of a scheduler that change its step into something that no kernel does."""
    for name, value in needed.items():
        found = scheduler.config.get(name, value) or value
        if found != value:
            raise UserError(
                f"{type(scheduler).__name__} with {name}={found!r} cannot be reproduced: set {name}={value!r}, as in "
                f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, {name}={value!r})"
            )
