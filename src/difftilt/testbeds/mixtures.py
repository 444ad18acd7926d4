"""Gaussian mixtures: the base model is exact, and for linear and quadratic rewards so is the tilted target.

The network is the closed-form velocity of the mixture plus a residual network that starts at zero. p_0 = Σ_k w_k
N(m_k, q² I), by default eight equal modes on a circle (the ring of Flow-GRPO's small proofs); q is ``std``.
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError, quoted
from difftilt.models.mixture import GaussianMixture, MixtureVelocity, Tilted
from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import GaussianProcess, RectifiedFlow, VariancePreserving
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards import as_reward
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.vector import bumps, distance, linear, quadratic
from difftilt.sampling.exact import ExactAncestral
from difftilt.sampling.kernels import DDIM, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Kernel, Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.statistics import energy_distance, histogram, total_variation
from difftilt.testbeds.mixture_sets import closeness, variety
from difftilt.training.protocol import Task

CARD = Card(
    name="mixtures",
    entry="Mixtures",
    paper="Gaussian mixture with closed-form velocity, reverse kernel, tilted law and soft value; no paper.",
)


_REFERENCE_SEED = 0x5EED
"""Of the draws that distances are measured to: a caller's own draws from a small seed must not be the same ones."""


TILTED = ("linear", "quadratic", "distance")
"""Rewards whose tilted law can be drawn from."""


class Config(BaseConfig):
    """The mixture, its corruption, the default sampler and the reward."""

    modes: int = Field(default=8, ge=1)
    """Modes on the ring, equally spaced, equal weights."""
    radius: float = Field(default=2.0, gt=0)
    """Of the ring, which lies in the first two dimensions; in units of the data."""
    dimension: int = Field(default=2, ge=2)
    """Of the space of a ring."""
    means: tuple[tuple[float, ...], ...] = ()
    """Explicit modes in place of the ring, one row each, of any dimension; ``modes``, ``radius`` and ``dimension`` are
    then not used."""
    weights: tuple[float, ...] = ()
    """Of the modes, normalised here; empty is equal weights."""
    std: float = Field(default=0.2, gt=0)
    """Standard deviation of every mode, in units of the data."""
    classes: int = Field(default=0, ge=0)
    """0 is unconditional; C > 1 gives mode k the class k mod C, and prompts ``class 0`` to ``class C-1``, of which the
    last is held out."""
    process: Literal["flow", "vp"] = "flow"
    """Rectified flow, or variance preserving with abar = cos², falling from 1 to 1e-4."""
    steps: int = Field(default=10, ge=1)
    """Of the default sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid; 1 is uniform."""
    kernel: Literal["sde", "ancestral", "exact"] = "sde"
    """Stochastic kernel of plain sampling: Flow-SDE, DDIM with eta 1, or the exact reverse step."""
    noise_level: float = Field(default=0.7, gt=0)
    """Of the Flow-SDE."""
    reward: Literal["linear", "quadratic", "distance", "bumps", "frechet", "vendi"] = "distance"
    """b·x, -|x - c|², or -|x - c| and ``bumps``, hills and valleys, whose tilted laws have no closed form; or of a set
    of samples minus the squared Fréchet distance to N(c, reference_std²·I), or the effective number of different
    samples. Sets have no tilted law."""
    reference_std: float = Field(default=0.5, gt=0)
    """Of the law that ``frechet`` compares with."""
    embedding: Literal["modes", "coordinates"] = "modes"
    """What ``vendi`` sees: the soft membership in the modes, or the coordinates under an RBF kernel of bandwidth 1,
    which pays for leaving the data."""
    direction: tuple[float, ...] = ()
    """b of the linear reward; empty is the first unit vector."""
    centre: tuple[float, ...] = ()
    """c of the other two; empty is the first mode."""
    temperature: float = Field(default=1.0, gt=0)
    """Beta of the tilted target, in units of the reward."""
    hidden: int = Field(default=64, ge=1)
    """Width of the residual network's two hidden layers."""
    seed: int = Field(default=0, ge=0)
    """Of the residual network's weights."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        dimensions = {len(row) for row in self.means} or {self.dimension}
        count = len(self.means) or self.modes
        if len(dimensions) > 1 or 0 in dimensions:
            raise ValueError(f"means must be rows of one length, at least 1; got lengths {sorted(dimensions)}")
        if self.weights and (len(self.weights) != count or min(self.weights) <= 0):
            raise ValueError(f"weights must be {count} positive numbers, one per mode; got {self.weights}")
        for name, value in (("direction", self.direction), ("centre", self.centre)):
            if value and {len(value)} != dimensions:
                raise ValueError(
                    f"{name} must have {dimensions.pop()} numbers, the dimension of the space; got {value}"
                )
        if self.classes == 1 or self.classes > count:
            raise ValueError(f"classes must be 0 or lie in 2..{count}, the number of modes; got {self.classes}")
        return self


class Mixtures:
    """The testbed: :meth:`task` for methods, the rest for whoever wants to know how far they are from the truth.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        self.process = self._process()
        self.mixture = self._mixture()
        self.labels: Int[Tensor, " components"] | None = None
        if self.config.classes:
            self.labels = torch.arange(len(self.mixture.means)) % self.config.classes

    def _process(self) -> GaussianProcess:
        if self.config.process == "flow":
            return RectifiedFlow()
        level = torch.arange(1, 1001, dtype=torch.float64) / 1000
        # the angle stops where abar is 1e-4: a floor instead would make the schedule flat, and its velocity empty
        return VariancePreserving((level * math.acos(0.01)).cos() ** 2)

    def _mixture(self) -> GaussianMixture:
        config = self.config
        means = torch.tensor(config.means) if config.means else ring(config.modes, config.radius, config.dimension)
        weights = torch.tensor(config.weights) if config.weights else torch.ones(len(means))
        return GaussianMixture(means, config.std, weights / weights.sum())

    @property
    def direction(self) -> Float[Tensor, " dim"]:
        """B of the linear reward."""
        first = torch.zeros(self.mixture.means.shape[1]).index_fill(0, torch.tensor([0]), 1.0)
        return torch.tensor(self.config.direction) if self.config.direction else first

    @property
    def centre(self) -> Float[Tensor, " dim"]:
        """C of the quadratic and the distance reward."""
        return torch.tensor(self.config.centre) if self.config.centre else self.mixture.means[0]

    def reward(self) -> Reward:
        """What the configuration names; differentiable unless it is of sets."""
        if self.config.reward == "frechet":
            return closeness(self.centre, self.config.reference_std)
        if self.config.reward == "vendi":
            return variety(self.mixture if self.config.embedding == "modes" else None)
        if self.config.reward == "linear":
            return linear(self.direction)
        if self.config.reward == "bumps":
            return bumps()
        return quadratic(self.centre) if self.config.reward == "quadratic" else distance(self.centre)

    def task(self) -> Task:
        """A new model with its reward; ``on_mode`` is the held-out reward that falls when a method leaves the data."""
        config = self.config
        prompts = [f"class {label}" for label in range(config.classes)] or [""]
        network = MixtureVelocity(
            self.mixture, self.process, classes=self.labels, hidden=config.hidden, seed=config.seed
        )
        model = GenerativeModel(
            network=network,
            process=self.process,
            output="velocity",
            shape=(self.mixture.means.shape[1],),
            encode=self.encode,
            decode=_identity,
            null_condition=self._null if config.classes else None,
        )
        kernels: dict[str, Kernel] = {
            "sde": FlowSDE(config.noise_level),
            "ancestral": DDIM(1.0),
            "exact": ExactAncestral(),
        }
        return Task(
            name="mixtures",
            model=model,
            reward=self.reward(),
            prompts=prompts[:-1] or prompts,
            heldout_prompts=prompts[-1:],
            sampler=Sampler(uniform_grid(config.steps, config.shift), kernels[config.kernel], EulerSolver()),
            heldout={"on_mode": as_reward(self.on_mode, name="on_mode")},
            features=_identity,
            temperature=config.temperature,
            # of classes every prompt has a target of its own, and a set reward has none
            truth=self.distance_to_target if not config.classes and config.reward in TILTED else None,
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Label of each prompt, (batch,) int64; None without classes."""
        if not self.config.classes:
            return None
        known = {f"class {label}": label for label in range(self.config.classes)}
        strange = [prompt for prompt in prompts if prompt not in known]
        if strange:
            raise UserError(
                f"{quoted(strange[0])} is no prompt of this mixture: say 'class 0' to 'class {len(known) - 1}'"
            )
        return torch.tensor([known[prompt] for prompt in prompts], dtype=torch.int64)

    def _null(self, rows: int) -> Int[Tensor, " rows"]:
        return torch.full((rows,), self.config.classes)

    def on_mode(self, samples: Samples) -> Float[Tensor, " batch"]:
        """1 for samples within 3 std of some mode, else 0; the base has 0.989 in two dimensions."""
        gap = torch.cdist(samples.media.double(), self.mixture.means.double()).amin(1)
        return (gap <= 3 * self.mixture.std).float()

    def base(self, label: int | None = None) -> GaussianMixture:
        """The exact clean law: of all modes, or of those of one class."""
        if label is None or self.labels is None:
            return self.mixture
        own = self.labels == label
        weights = self.mixture.weights[own]
        return GaussianMixture(self.mixture.means[own], self.mixture.std, weights / weights.sum())

    def tilted(self, temperature: float | None = None, label: int | None = None) -> Tilted:
        """p* and log Z in closed form, for the whole mixture or for one class.

        Raises:
            UserError: for the distance reward, whose tilted law is no mixture.
        """
        beta = self.config.temperature if temperature is None else temperature
        if self.config.reward == "linear":
            return self.base(label).tilted_linear(self.direction, beta)
        if self.config.reward == "quadratic":
            return self.base(label).tilted_quadratic(self.centre, 2.0, beta)
        raise UserError(
            f"the {self.config.reward} reward has no closed-form tilted law: use linear or quadratic, or for distance "
            "target_samples"
        )

    def soft_value(
        self,
        x_t: Float[Tensor, "batch dim"],
        t: Float[Tensor, " batch"],
        temperature: float | None = None,
        label: int | None = None,
    ) -> Float[Tensor, " batch"]:
        """β·log E[exp(r(x_0)/β) | x_t], in units of the reward.

        Within component k, x_0 is N(mu_k, u I); with h = 2/β the quadratic reward gives
        log E exp(-|x_0 - c|²/β) = -h|mu_k - c|²/(2(1 + h·u)) - (d/2)·log(1 + h·u).

        Raises:
            UserError: for the distance reward.
        """
        beta = self.config.temperature if temperature is None else temperature
        base = self.base(label)
        if self.config.reward == "linear":
            return base.soft_value_linear(self.process, x_t, t, self.direction, beta)
        if self.config.reward != "quadratic":
            raise UserError(f"the {self.config.reward} reward has no closed-form soft value: use linear or quadratic")
        means, variance = base.posterior(self.process, x_t, t)
        spread = 1 + 2 / beta * variance
        gap = (means - self.centre.to(x_t)).square().sum(-1)
        lift = -gap / (beta * spread) - 0.5 * x_t.shape[1] * spread.log()
        return beta * (base.log_responsibility(self.process, x_t, t) + lift).logsumexp(-1)

    def target_samples(
        self, count: int, temperature: float | None = None, label: int | None = None, seed: int = 0
    ) -> Float[Tensor, "count dim"]:
        """Independent exact draws of p*: from its closed form, or for the distance reward by rejection from the base.

        Rejection is exact because that reward is at most 0: a draw is kept with probability exp(r/temperature).
        """
        beta = self.config.temperature if temperature is None else temperature
        noise, dim = Noise(seed), self.mixture.means.shape[1]
        if self.config.reward != "distance":
            exact = self.tilted(beta, label).mixture
            return exact.sample(noise.normal(torch.arange(count), (dim + 1,), purpose="target"))
        kept: list[Tensor] = []
        base = self.base(label)
        size = max(count, 4096)
        for attempt in range(50):
            index = torch.arange(attempt * size, (attempt + 1) * size)
            x = base.sample(noise.normal(index, (dim + 1,), purpose="target"))
            accept = (-(x - self.centre).norm(dim=1) / beta).exp()
            kept.append(x[noise.uniform(index, (1,), purpose="accept")[:, 0] < accept])
            if sum(map(len, kept)) >= count:
                return torch.cat(kept)[:count]
        raise UserError(f"at temperature {beta:g} hardly a draw of the base is kept: raise it, or use another reward")

    def distance_to_target(
        self,
        x: Float[Tensor, "batch dim"],
        temperature: float | None = None,
        label: int | None = None,
        count: int = 4096,
    ) -> float:
        """Energy distance to ``count`` exact draws of p*. Finite sets keep it above 0: compare at one batch size."""
        return float(energy_distance(x, self.target_samples(count, temperature, label, _REFERENCE_SEED)))

    def mode_distance(
        self, x: Float[Tensor, "batch dim"], temperature: float | None = None, label: int | None = None
    ) -> float:
        """Total variation between the shares of the modes in x (each sample to the nearest) and the weights of p*."""
        target = self.tilted(temperature, label).mixture
        nearest = torch.cdist(x.double(), target.means.double()).argmin(1)
        return float(total_variation(histogram(nearest, len(target.means)), target.weights))


def ring(modes: int, radius: float, dimension: int) -> Float[Tensor, "modes dimension"]:
    """Points at equal angles on a circle in the first two dimensions, the first at angle 0.

    >>> ring(4, 1.0, 2).round().abs().tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    flat = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.nn.functional.pad(flat, (0, dimension - 2)).float()


def _identity(x: Tensor) -> Tensor:
    return x
