"""Gaussian mixtures under Gaussian corruption: everything has a closed form, at every noise level.

With p_0 = Σ_k w_k N(m_k, q² I) and x_t = alpha·x_0 + sigma·eps, write v = alpha²q² + sigma² (a variance). Then
p_t = Σ_k w_k N(alpha·m_k, v I); the responsibilities are r_k(x_t) ∝ w_k N(x_t; alpha·m_k, v I); and within component k
x_0 given x_t is N((sigma²·m_k + alpha·q²·x_t)/v, q²·sigma²/v · I). ``std`` is q, a standard deviation.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.mlp import MLP
from difftilt.process.gaussian import GaussianPrediction, GaussianProcess, expand
from difftilt.process.protocol import Condition, Prediction

CARD = Card(
    name="mixture",
    entry="MixtureVelocity",
    paper="Gaussian mixture with closed-form velocity and a zero-initialised residual network; no paper.",
)

LogWeight = Float[Tensor, "#batch components"]


@dataclass(frozen=True)
class Tilted:
    """p*(x) = p(x)·exp(r(x)/temperature)/Z.

    Attributes:
        mixture: p*, again a mixture.
        log_z: log Z = log E_p[exp(r/temperature)], a scalar.
    """

    mixture: "GaussianMixture"
    log_z: Float[Tensor, ""]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Σ_k w_k N(m_k, std² I) in d dimensions.

    Methods that take ``log_weight`` use those normalised weights, one row per state, in place of the mixture's own:
    a class condition restricts the components that way. Results have the dtype of the state.

    Attributes:
        means: (components, dim).
        std: of every component, in every dimension.
        weights: (components,), positive, summing to 1.
    """

    means: Float[Tensor, "components dim"]
    std: float
    weights: Float[Tensor, " components"]

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise UserError(f"the standard deviation of a mixture must be positive, got {self.std}")

    @property
    def log_weight(self) -> Float[Tensor, "1 components"]:
        """Normalised log weights, one row."""
        return self.weights.log().log_softmax(-1)[None]

    def mean(self) -> Float[Tensor, " dim"]:
        """Σ_k w_k m_k."""
        return self.weights @ self.means

    def sample(self, noise: Float[Tensor, "batch noise"]) -> Float[Tensor, "batch dim"]:
        """x_0 from standard normal noise (batch, dim + 1), whose last coordinate picks the component."""
        return self._draw(1.0, self.std, noise)

    def sample_marginal(
        self, process: GaussianProcess, t: Float[Tensor, " batch"], noise: Float[Tensor, "batch noise"]
    ) -> Float[Tensor, "batch dim"]:
        """x_t from p_t itself (at t = 1: where an exact reverse chain starts, not N(0, I)); noise as in ``sample``."""
        alpha, _, variance = self._scales(process, t, noise)
        return self._draw(alpha, variance.sqrt(), noise)

    def _draw(self, scale: Tensor | float, std: Tensor | float, noise: Tensor) -> Tensor:
        # the same use of the noise as in a mixture step, which the room to the right owns
        level = torch.special.ndtr(noise[:, -1:])
        cumulative = self.weights.to(noise).cumsum(-1)
        component = (cumulative < level).sum(-1).clamp(max=len(self.weights) - 1)
        return scale * self.means.to(noise)[component] + std * noise[:, :-1]

    def _scales(self, process: GaussianProcess, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha, sigma² and v, each (batch, 1)."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = (alpha * self.std) ** 2 + sigma**2
        return expand(alpha, like), expand(sigma**2, like), expand(variance, like)

    def _log_joint(
        self, process: GaussianProcess, x_t: Tensor, t: Tensor, log_weight: Tensor | None
    ) -> Float[Tensor, "batch components"]:
        """Log w_k + log N(x_t; alpha·m_k, v I)."""
        alpha, _, variance = self._scales(process, t, x_t)
        gap = x_t[:, None] - alpha[..., None] * self.means.to(x_t)
        weight = (self.log_weight if log_weight is None else log_weight).to(x_t)
        norm = 0.5 * x_t.shape[1] * (2 * math.pi * variance).log()
        return weight - gap.square().sum(-1) / (2 * variance) - norm

    def log_density(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        log_weight: LogWeight | None = None,
    ) -> Float[Tensor, " batch"]:
        """Log p_t(x_t) in nats."""
        return self._log_joint(process, x_t, t, log_weight).logsumexp(-1)

    def log_responsibility(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        log_weight: LogWeight | None = None,
    ) -> Float[Tensor, "batch components"]:
        """Log r_k(x_t), normalised."""
        return self._log_joint(process, x_t, t, log_weight).log_softmax(-1)

    def posterior(
        self, process: GaussianProcess, x_t: Float[Tensor, "batch dim"], t: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch components dim"], Float[Tensor, "batch 1"]]:
        """Means and variance of x_0 given x_t within each component; weigh them by the responsibilities."""
        alpha, noise, variance = self._scales(process, t, x_t)
        pull = (alpha * self.std**2 / variance * x_t)[:, None]
        return pull + (noise / variance)[..., None] * self.means.to(x_t), self.std**2 * noise / variance

    def posterior_mean(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        log_weight: LogWeight | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """E[x_0 | x_t]."""
        return weighted(self.log_responsibility(process, x_t, t, log_weight).exp(), self.posterior(process, x_t, t)[0])

    def score(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        log_weight: LogWeight | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Gradient of log p_t(x_t): Σ_k r_k (alpha·m_k - x_t)/v."""
        alpha, _, variance = self._scales(process, t, x_t)
        centre = weighted(self.log_responsibility(process, x_t, t, log_weight).exp(), self.means.to(x_t)[None])
        return (alpha * centre - x_t) / variance

    def velocity(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        log_weight: LogWeight | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Velocity of the probability-flow ODE, E[alpha_dot·x_0 + sigma_dot·eps | x_t].

        Each component moves its mean by alpha_dot·m_k and scales about it by v_dot/(2v), which is finite at sigma = 0:
        Σ_k r_k [alpha_dot·m_k + (alpha·alpha_dot·q² + sigma·sigma_dot)/v · (x_t - alpha·m_k)].
        """
        alpha, _, variance = self._scales(process, t, x_t)
        alpha_dot = expand(process.alpha_dot(t), x_t)
        growth = alpha * alpha_dot * self.std**2 + expand(process.sigma(t) * process.sigma_dot(t), x_t)
        centre = weighted(self.log_responsibility(process, x_t, t, log_weight).exp(), self.means.to(x_t)[None])
        return alpha_dot * centre + growth / variance * (x_t - alpha * centre)

    def tilted_linear(self, b: Float[Tensor, " dim"], temperature: float) -> Tilted:
        """Tilt by r(x) = b·x: means m_k + q²b/β, weights ∝ w_k exp(b·m_k/β + q²|b|²/(2β²)), same std."""
        slope = b.to(self.means) / temperature
        lift = self.means @ slope + self.std**2 * slope.square().sum() / 2
        return self._tilted(self.means + self.std**2 * slope, self.std, lift)

    def tilted_quadratic(self, centre: Float[Tensor, " dim"], precision: float, temperature: float) -> Tilted:
        """Tilt by r(x) = -(precision/2)·|x - centre|², precision in units of reward per squared length.

        With h = precision/β: std² becomes q²/(1 + h·q²), means (m_k + h·q²·centre)/(1 + h·q²), and
        log weights gain -h|m_k - centre|²/(2(1 + h·q²)) - (d/2)·log(1 + h·q²).

        Raises:
            UserError: if the precision is so negative that the tilted law cannot be normalised.
        """
        pull = precision / temperature * self.std**2
        if pull <= -1:
            raise UserError(f"precision {precision} at temperature {temperature} outweighs the mixture: no tilted law")
        target = centre.to(self.means)
        means = (self.means + pull * target) / (1 + pull)
        distance = (self.means - target).square().sum(-1)
        lift = -precision / temperature * distance / (2 * (1 + pull)) - 0.5 * self.means.shape[1] * math.log1p(pull)
        return self._tilted(means, self.std / math.sqrt(1 + pull), lift)

    def _tilted(self, means: Tensor, std: float, lift: Tensor) -> Tilted:
        """Weights w_k·exp(lift_k), normalised; Z is their sum."""
        logits = self.log_weight[0].to(lift) + lift
        return Tilted(GaussianMixture(means, std, logits.softmax(-1)), logits.logsumexp(-1))

    def soft_value_linear(
        self,
        process: GaussianProcess,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        b: Float[Tensor, " dim"],
        temperature: float,
    ) -> Float[Tensor, " batch"]:
        """β·log E[exp(b·x_0/β) | x_t], in units of the reward; at t = 0 it is b·x_0."""
        log_responsibility = self.log_responsibility(process, x_t, t)
        means, variance = self.posterior(process, x_t, t)
        slope = b.to(x_t) / temperature
        lift = (means * slope).sum(-1) + variance * slope.square().sum() / 2
        return temperature * (log_responsibility + lift).logsumexp(-1)


def weighted(
    weight: Float[Tensor, "batch components"], values: Float[Tensor, "#batch components dim"]
) -> Float[Tensor, "batch dim"]:
    """Σ_k weight_k·values_k."""
    return (weight[..., None] * values).sum(1)


@dataclass(frozen=True)
class MixturePrediction(GaussianPrediction):
    """A prediction that knows the components behind its point estimate.

    Attributes:
        mixture: clean law that the base was built from.
        log_responsibility: (batch, components), of x_t under the base.
    """

    mixture: GaussianMixture
    log_responsibility: Float[Tensor, "batch components"]

    def posterior(self) -> tuple[Float[Tensor, "batch components dim"], Float[Tensor, "batch 1"]]:
        """Means and variance of x_0 given x_t within each component.

        Where the network differs from the exact base (its residual), every mean is moved by the difference of the two
        point estimates, so that the weighted means are the network's x_0.
        """
        means, variance = self.mixture.posterior(self.process, self.x_t, self.t)
        exact = weighted(self.log_responsibility.exp(), means)
        return means + (self.x0 - exact)[:, None], variance


class MixtureVelocity(nn.Module):
    """The exact velocity of a mixture plus a residual network that starts at zero: the trainable part.

    So the base is exact, and the reference of an alignment is the same network with its residual off.

    Args:
        mixture: clean law.
        process: corruption; the output is its velocity at x_t (batch, dim).
        classes: class of each component, (components,) in 0..C-1; the condition is then a tensor of labels (batch,)
            int64 that restricts the components, where C is the null label (all components). None ignores it.
        hidden: width of the residual network's two hidden layers.
        residual: False gives the exact base, bit for bit.
        seed: of the residual network's weights.
    """

    means: Tensor
    weights: Tensor
    classes: Tensor | None

    def __init__(
        self,
        mixture: GaussianMixture,
        process: GaussianProcess,
        *,
        classes: Int[Tensor, " components"] | None = None,
        hidden: int = 64,
        residual: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.process = process
        self.std = mixture.std
        self.residual = residual
        self.register_buffer("means", mixture.means.clone())
        self.register_buffer("weights", mixture.weights.clone())
        self.register_buffer("classes", None if classes is None else classes.clone())
        dim = mixture.means.shape[1]
        count = 0 if classes is None else int(classes.max()) + 1
        self.network = MLP(dim, hidden=hidden, classes=count, zero=True, seed=seed)

    @property
    def mixture(self) -> GaussianMixture:
        """The clean law of the base."""
        return GaussianMixture(self.means, self.std, self.weights)

    def forward(
        self, x_t: Float[Tensor, "batch dim"], t: Float[Tensor, " batch"], condition: Condition = None
    ) -> Float[Tensor, "batch dim"]:
        """Velocity, (batch, dim)."""
        base = self.mixture.velocity(self.process, x_t, t, self.class_log_weight(condition))
        return base + self.network(x_t, t, condition) if self.residual else base

    def class_log_weight(self, condition: Condition) -> Float[Tensor, "batch components"] | None:
        """Log weights of the components given each row's class; None without classes."""
        if self.classes is None:
            return None
        label = condition[:, None]
        allowed = (self.classes == label) | (label > self.classes.max())
        return torch.where(allowed, self.mixture.log_weight, -torch.inf).log_softmax(-1)

    def refine(self, prediction: Prediction, condition: Condition) -> MixturePrediction:
        """The prediction with its components beside it: what the exact reverse step needs."""
        assert isinstance(prediction, GaussianPrediction)
        x_t, t = prediction.x_t, prediction.t
        log_weight = self.class_log_weight(condition)
        responsibility = self.mixture.log_responsibility(self.process, x_t, t, log_weight)
        return MixturePrediction(
            prediction.process, prediction.output, prediction.kind, x_t, t, self.mixture, responsibility
        )
