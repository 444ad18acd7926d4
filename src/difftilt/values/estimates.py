"""Values that ask the reward: of the point prediction, of draws of the clean sample, or of completed chains.

The value that makes steering exact in one step is the soft value V_t(x) = β·log E[exp(r(x_0)/β) | x_t = x] under the
base model, β the temperature; every estimate here is a way to come near it. At t = 0, where there is no prediction, all
of them are the reward itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import evaluate
from difftilt.sampling.kernels import Euler
from difftilt.sampling.noise import Apart, copies
from difftilt.sampling.presets import Preset
from difftilt.sampling.protocol import NoiseSource
from difftilt.sampling.rollout import PLAIN, Plan, rollout
from difftilt.sampling.windows import window_mask
from difftilt.trees import take
from difftilt.values.protocol import Rows


@dataclass(frozen=True)
class LatentReward:
    """The reward of clean latents: decodes, names the prompt of each row, counts, and checks what comes back.

    Attributes:
        reward: scores samples one by one.
        decode: latents -> media.
        prompts: texts that ``rows.prompt`` points into.
        ledger: where reward calls are counted.
    """

    reward: Reward
    decode: Callable[[Tensor], Tensor]
    prompts: Sequence[str]
    ledger: Ledger

    def samples(self, x_0: Shaped[Tensor, "batch *shape"], prompt: Int[Tensor, " batch"]) -> Samples:
        """What the reward will see; samples of one prompt form a group."""
        rows: list[int] = prompt.tolist()
        texts = [self.prompts[row] for row in rows]
        return Samples.of(self.decode(x_0), texts, prompt)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        """Finite scores, one per sample, counted; anything else is a ``RewardError``."""
        return evaluate(self.reward, samples, self.ledger).total

    def __call__(self, x_0: Shaped[Tensor, "batch *shape"], prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """r(x_0)."""
        return self.score(self.samples(x_0, prompt))


@dataclass(frozen=True)
class PosteriorMean:
    """r(x0hat(x_t, t)): free of network evaluations, and off by Jensen's gap where the posterior is wide.

    For tokens x0hat takes the most likely token at each masked position.
    """

    reward: LatentReward

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        return self.reward(x_t if prediction is None else prediction.x0, rows.prompt)


@dataclass(frozen=True)
class SampledX0:
    """Mean over ``count`` draws x_0 ~ p(x_0 | x_t) from the prediction: no network evaluation, ``count`` reward calls.

    For tokens every masked position is drawn from its own marginal.

    Attributes:
        reward: of latents.
        count: draws per state.
        temperature: β of the soft mean β·log mean exp(r/β); 1 is the paper's log mean exp r (arXiv 2501.06848).
        noise: source of the draws.
        soft: False takes the plain mean of r.
    """

    reward: LatentReward
    count: int
    temperature: float
    noise: NoiseSource
    soft: bool = True

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        if prediction is None:
            return self.reward(x_t, rows.prompt)
        again, index = copies(rows.index, self.count)
        many = take(prediction, again)
        noise = self.noise.uniform(index, many.x0_noise_shape(), purpose="value", step=rows.step)
        scores = self.reward(many.draw_x0(noise), rows.prompt[again])
        return average(scores.reshape(len(x_t), self.count), self.temperature, self.soft)


@dataclass(frozen=True)
class Rollout:
    """Mean over ``count`` completions of the chain: the true law of x_0 given x_t, at full price.

    Costs ``count`` times the remaining steps in network evaluations, counted in the denoiser's ledger.

    Attributes:
        reward: of latents.
        denoise, preset, grid: the chain to complete; ``rows.step`` is the place on the grid.
        clean_end: the last step follows the ODE, as the sampler's does.
        count, temperature, noise, soft: as in :class:`SampledX0`.
    """

    reward: LatentReward
    denoise: Denoiser
    preset: Preset
    grid: Float[Tensor, " times"]
    count: int
    temperature: float
    noise: NoiseSource
    soft: bool = True
    clean_end: bool = False
    reads_prediction: ClassVar[bool] = False

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        if rows.step >= len(self.grid) - 1:
            return self.reward(x_t, rows.prompt)
        again, index = copies(rows.index, self.count)
        left = len(self.grid) - 1 - rows.step
        path = rollout(
            self.denoise,
            self.preset,
            self.grid[rows.step :],
            x_t[again],
            take(condition, again),
            noise=Apart(self.noise, f"value {rows.step}"),
            index=index,
            plan=Plan(stochastic=window_mask(left, 0, left - 1)) if self.clean_end else PLAIN,
        )
        scores = self.reward(path.x_0, rows.prompt[again])
        return average(scores.reshape(len(x_t), self.count), self.temperature, self.soft)


@dataclass(frozen=True)
class Lookahead:
    """r of the x0-prediction after ``count`` deterministic evaluations from the state (DLBS, arXiv 2501.19252).

    The first of them is the prediction at the state, already paid for; the others stand at the times t·j/count, off the
    sampler's grid, so it costs count - 1 evaluations. 1 is :class:`PosteriorMean`. Continuous processes only.

    Attributes:
        reward: of latents.
        denoise: evaluated at the further times.
        count: evaluations, T'.
        clock: the times are rounded down to multiples of 1/clock, as a sampler with integer times does, and equal ones
            visited once; None keeps them.
    """

    reward: LatentReward
    denoise: Denoiser
    count: int
    clock: int | None = None

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        if prediction is None:
            return self.reward(x_t, rows.prompt)
        times, x = lookahead_times(float(t[0]), self.count, self.clock), x_t
        for u, v in pairwise(times):
            here, there = torch.full_like(t, u), torch.full_like(t, v)
            x = Euler()(prediction, x, here, there).mean
            condition = self.denoise.prepare(x, there, condition)
            prediction = self.denoise(x, there, condition)
        return self.reward(prediction.x0, rows.prompt)


def lookahead_times(t: float, count: int, clock: int | None) -> list[float]:
    """Where a lookahead from t evaluates: t first, then t·j/count for j = count - 1, ..., 1, each once, none at 0."""
    later = [t * j / count for j in range(count - 1, 0, -1)]
    if clock is not None:
        # the times of a grid are such multiples but for rounding
        later = [math.floor(u * clock + 1e-6) / clock for u in later]
    return [t, *(u for u in dict.fromkeys(later) if 0 < u < t)]


@dataclass(frozen=True)
class ClosedForm:
    """A value known as a formula ``function(x_t, t, condition)``, in units of the reward."""

    function: Callable[[Tensor, Tensor, Condition], Tensor]
    reads_prediction: ClassVar[bool] = False

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        return self.function(x_t, t, condition)


def average(scores: Float[Tensor, "batch draws"], temperature: float, soft: bool) -> Float[Tensor, " batch"]:
    """β·log mean exp(r/β) over the last axis if ``soft``, else the mean of r; float64."""
    scores = scores.double()
    if not soft:
        return scores.mean(-1)
    return temperature * ((scores / temperature).logsumexp(-1) - math.log(scores.shape[-1]))
