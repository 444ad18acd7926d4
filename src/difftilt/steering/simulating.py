"""Looking ahead by simulated next states: what a particle learns of its future without a value network.

A particle draws M next states from one evaluation, has each of them scored, and gets back the gradient of
log E[weight] with respect to its own state, of which only the mean of its step is differentiated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, as_gaussian, expand
from difftilt.process.protocol import Condition, Prediction
from difftilt.sampling.noise import copies
from difftilt.sampling.presets import Preset
from difftilt.sampling.steps import GaussianStep
from difftilt.steering.chain import Chain
from difftilt.steering.protocol import Particles
from difftilt.trees import Batched, take, tree_map
from difftilt.values.likelihood_ratio import antithetic, noise_score
from difftilt.values.protocol import Rows, Value, reads_prediction

SIGNAL_LEFT = 1e-6
"""Below this alpha a state says nothing of x_0, and every function of x_0 has the same mean: t = 1 of a flow."""


@dataclass(frozen=True)
class Look(Batched):
    """What the simulations of some particles say.

    Attributes:
        condition, prediction: of the particles at their present time.
        gradient: of log E[weight]; 0 where nothing was differentiated.
        scores: of the simulated states; NaN where one is missing.
        best: the simulated state with the highest score.
        ess: effective number of simulations, 0 where none has a weight.
    """

    condition: Condition
    prediction: GaussianPrediction
    gradient: Float[Tensor, "particles *shape"]
    scores: Float[Tensor, "particles simulations"]
    best: Float[Tensor, "particles *shape"]
    ess: Float[Tensor, " particles"]


@dataclass(frozen=True)
class Simulator:
    """Draws and scores next states of particles.

    Attributes:
        preset: of the simulated steps.
        value: of the simulated states.
        count: simulated states of each particle, M.
        mirrored: the noise of one half is minus that of the other.
        reuse: the prediction at a simulated state is made from the noise that the network sees at its particle.
        weigh: scores (particles, simulations) -> weights.
    """

    preset: Preset
    value: Value
    count: int
    mirrored: bool
    reuse: bool
    weigh: Callable[[Tensor], Tensor]

    def look(
        self, chain: Chain, particles: Particles, slots: Int[Tensor, " particles"], position: int, slope: bool = True
    ) -> Look:
        """Simulate the step from grid point ``position``.

        Costs one gradient pass for each particle, or one evaluation without ``slope``, and what the value costs.

        Args:
            chain: whose sampler it is.
            particles: of the chain, all or some.
            slots: noise index of each.
            position: grid point where they are.
            slope: differentiate the mean of the step.
        """
        x = particles.x.detach().clone().requires_grad_(slope)
        t, s = chain.time(position, x), chain.time(position + 1, x)
        condition = chain.denoise.prepare(x.detach(), t, particles.condition)
        with torch.set_grad_enabled(slope):
            prediction = as_gaussian(chain.denoise(x, t, condition))
            step = self.preset.step(prediction, x, t, s)
        assert isinstance(step, GaussianStep)
        prediction = tree_map(Tensor.detach, prediction)
        noise = self._noise(chain, slots, step, position)
        states = step.mean.detach()[:, None] + expand(step.std, noise) * noise
        rows = Rows(slots, particles.group, position + 1)
        scores = self._scores(chain, states, s, condition, prediction, rows)
        weight, gradient = self.weigh(scores), torch.zeros_like(step.mean)
        if slope:
            (gradient,) = torch.autograd.grad(step.mean, x, noise_score(weight, noise, step.std))
        best = scores.nan_to_num(nan=-torch.inf).argmax(1)
        ess = weight.sum(1).square() / weight.square().sum(1).clamp(min=1e-300)
        chosen = states[torch.arange(len(best), device=best.device), best]
        return Look(condition, prediction, gradient.detach(), scores, chosen, ess)

    def _noise(
        self, chain: Chain, slots: Tensor, step: GaussianStep, position: int
    ) -> Float[Tensor, "particles simulations *shape"]:
        drawn = self.count // 2 if self.mirrored else self.count
        _, index = copies(slots, drawn)
        noise = chain.noise.normal(index, step.noise_shape, purpose="simulate", step=position)
        noise = noise.unflatten(0, (len(slots), drawn)).to(step.mean)
        return antithetic(noise) if self.mirrored else noise

    def _scores(
        self,
        chain: Chain,
        states: Shaped[Tensor, "particles simulations *shape"],
        s: Tensor,
        condition: Condition,
        seen: GaussianPrediction,
        rows: Rows,
    ) -> Float[Tensor, "particles simulations"]:
        """Value of every simulated state; ``seen`` is the prediction at the particles."""
        again, index = copies(rows.index, self.count)
        x, s, condition = states.flatten(0, 1), s[again], take(condition, again)
        prediction: Prediction | None = None
        if rows.step < chain.steps and self.reuse:
            prediction = GaussianPrediction(seen.process, seen.epsilon[again], "epsilon", x, s)
        elif rows.step < chain.steps and reads_prediction(self.value):
            condition = chain.denoise.prepare(x, s, condition)
            prediction = chain.denoise(x, s, condition)
        scores = self.value(x, s, condition, prediction, Rows(index, rows.prompt[again], rows.step))
        return scores.unflatten(0, (len(states), self.count)).double()


def noisy_steps(chain: Chain, preset: Preset, smallest: float, shape: tuple[int, ...]) -> frozenset[int]:
    """Steps of the chain's grid in which the preset's standard deviation is at least ``smallest``.

    Raises:
        UserError: if its steps are not Gaussian, or none has noise.
    """
    process, grid = chain.denoise.process, chain.grid
    t, s = grid[:-1].float(), grid[1:].float()
    nothing = torch.zeros(len(t), *shape)
    try:
        step = preset.step(process.predict(nothing, nothing, t, "epsilon"), nothing, t, s)
    except TypeError as error:
        raise UserError(f"simulated next states need Gaussian steps: {error}; set simulate_eta to 1") from error
    if not isinstance(step, GaussianStep) or step.deterministic:
        raise UserError("the simulated steps have no noise to learn from: set simulate_eta to 1")
    return frozenset((step.std >= smallest).nonzero()[:, 0].tolist())


def informed_steps(chain: Chain) -> frozenset[int]:
    """Steps that begin where the state says something of x_0; elsewhere the gradient is 0 and x0 has no epsilon."""
    process = chain.denoise.process
    assert isinstance(process, GaussianProcess)
    return frozenset((process.alpha(chain.grid[:-1]) > SIGNAL_LEFT).nonzero()[:, 0].tolist())
