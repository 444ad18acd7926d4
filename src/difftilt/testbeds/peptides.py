"""Peptides: sequences of amino acids with properties in closed form, and a tilted law that is exact at any length.

The base is a Markov chain with its exact masked posterior. Twenty letters at twelve places are far beyond enumeration;
a reward that is a sum over places tilts the chain into another chain, and the truth is computed.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError
from difftilt.models.markov import MarkovPosterior
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards import as_reward
from difftilt.rewards.distinct import DistinctReward
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.protocol import Sampler
from difftilt.statistics import histogram, total_variation
from difftilt.statistics.chains import Chain, chain_of, tilt_chain
from difftilt.testbeds import peptides_properties as properties
from difftilt.testbeds.peptides_properties import LETTERS
from difftilt.training.looks import spelled, unspelled
from difftilt.training.protocol import Task

CARD = Card(
    name="peptides",
    entry="Peptides",
    paper="Markov chain of amino acids with its exact masked posterior; objectives in the manner of arXiv 2412.17780.",
)

ADDITIVE = ("charge", "hydrophobicity")
"""Rewards that are sums over positions."""


class Config(BaseConfig):
    """The chain of amino acids, the sampler and the reward."""

    length: int = Field(default=12, ge=3, le=64)
    """Residues of a peptide."""
    repeats: float = Field(default=0.5, gt=0)
    """How likely a residue follows itself, relative to its background frequency."""
    steps: int = Field(default=24, ge=1)
    """Of the sampler, equally spaced in t."""
    reward: Literal["charge", "hydrophobicity", "weight", "moment", "valid"] = "charge"
    """Net charge at pH 7, mean hydrophobicity, nearness to a weight, hydrophobic moment of a helix, or whether a
    chemist would make it. The first two are sums over positions: their tilted law is exact."""
    weight_target: float = Field(default=1300.0, gt=0)
    """Molecular weight of the highest reward, g/mol."""
    weight_width: float = Field(default=100.0, gt=0)
    """Standard deviation of its bell, g/mol."""
    temperature: float = Field(default=1.0, gt=0)
    """Beta of the tilted target, in units of the reward."""
    hidden: int = Field(default=64, ge=1)
    """Width of the residual network's two hidden layers."""
    seed: int = Field(default=0, ge=0)
    """Of the residual network's weights."""


class Peptides:
    """The testbed: :meth:`task` for methods, the rewards by name, and the tilted law where it is exact.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        self.process = MaskedProcess(len(LETTERS))
        frequency = properties.table(properties.FREQUENCY)
        self.initial = frequency / frequency.sum()
        weight = self.initial * torch.where(torch.eye(len(LETTERS), dtype=torch.bool), self.config.repeats, 1.0)
        self.transition = weight / weight.sum(1, keepdim=True)
        self.base = self._network(residual=False)
        self.chain: Chain = chain_of(self.initial, self.transition, self.config.length)

    def _network(self, residual: bool) -> MarkovPosterior:
        config = self.config
        return MarkovPosterior(
            self.initial, self.transition, config.length, hidden=config.hidden, residual=residual, seed=config.seed
        )

    def rewards(self) -> dict[str, Reward]:
        """Properties and validity, ``naturalness``, the log-likelihood under the chain, and ``distinct``, of a set.

        ``weight`` is exp(-((weight - target)/width)²/2), ``valid`` 0 or 1, the others as they are.
        """
        config = self.config

        def weight(samples: Samples) -> Tensor:
            gap = (properties.weight(samples.media.cpu()) - config.weight_target) / config.weight_width
            return (-gap.square() / 2).exp()

        rewards = [
            as_reward(lambda samples: properties.charge(samples.media.cpu()), "charge"),
            as_reward(lambda samples: properties.hydrophobicity(samples.media.cpu()), "hydrophobicity"),
            as_reward(weight, "weight"),
            as_reward(lambda samples: properties.moment(samples.media.cpu()), "moment"),
            as_reward(lambda samples: self.valid(samples.media).float(), "valid"),
            as_reward(self.naturalness, "naturalness"),
            # token 0 as 1: a row of zeros would stand for no sample at all
            DistinctReward(lambda media: media.float() + 1),
        ]
        return {reward.name: reward for reward in rewards}

    def task(self) -> Task:
        """A new model with its reward; all others are held out, ``valid`` always."""
        config, rewards = self.config, self.rewards()
        model = GenerativeModel(
            network=self._network(residual=True),
            process=self.process,
            output="logits",
            shape=(config.length,),
            encode=_unconditional,
            decode=_tokens,
            dtype_tokens=True,
        )
        return Task(
            name="peptides",
            model=model,
            reward=rewards[config.reward],
            prompts=("",),
            heldout_prompts=("",),
            sampler=Sampler(uniform_grid(config.steps), Unmasking()),
            heldout={name: reward for name, reward in rewards.items() if name == "valid" or name != config.reward},
            features=self.features,
            temperature=config.temperature if config.reward in ADDITIVE else None,
            truth=self.marginal_distance if config.reward in ADDITIVE else None,
            text=self.text,
            read=self.read,
            valid=self.valid,
        )

    def text(self, media: Int[Tensor, "batch position"]) -> list[str]:
        """One-letter codes."""
        return spelled(media, LETTERS)

    def read(self, texts: Sequence[str]) -> Int[Tensor, "batch position"]:
        """Inverse of :meth:`text`."""
        return unspelled(texts, LETTERS)

    def valid(self, media: Int[Tensor, "batch position"]) -> Bool[Tensor, " batch"]:
        """Whether a chemist would make it, see :func:`difftilt.testbeds.peptides_properties.valid`."""
        return properties.valid(media.cpu()).to(media.device)

    def naturalness(self, samples: Samples) -> Float[Tensor, " batch"]:
        """Log-probability under the chain, in nats per residue."""
        return (self.chain.log_prob(samples.media.cpu()) / self.config.length).float()

    def features(self, media: Int[Tensor, "batch position"]) -> Float[Tensor, "batch features"]:
        """One-hot residues, flattened: distances between features count differing positions."""
        return one_hot(media, len(LETTERS)).flatten(1).float()

    def additive(self) -> tuple[Float[Tensor, "position vocab"], float]:
        """The reward as a sum: a number for each residue at each position, and a constant.

        Raises:
            UserError: if the reward is no such sum.
        """
        length = self.config.length
        if self.config.reward == "charge":
            return properties.residue_charges().expand(length, -1), properties.end_charge()
        if self.config.reward == "hydrophobicity":
            return properties.table(properties.HYDROPHOBICITY).expand(length, -1) / length, 0.0
        raise UserError(f"the tilted law of reward {self.config.reward!r} is not known: use {' or '.join(ADDITIVE)}")

    def tilted(self, temperature: float | None = None) -> Chain:
        """p* ∝ p·exp(r/temperature), p the Markov chain: its law, marginals and exact draws."""
        return tilt_chain(self.chain, self.additive()[0] / self._beta(temperature))[0]

    def log_z(self, temperature: float | None = None) -> float:
        """Log E_p exp(r/temperature), nats."""
        scores, constant = self.additive()
        beta = self._beta(temperature)
        return float(tilt_chain(self.chain, scores / beta)[1]) + constant / beta

    def soft_value(
        self, x_t: Int[Tensor, "batch position"], temperature: float | None = None
    ) -> Float[Tensor, " batch"]:
        """β·log E[exp(r(x_0)/β) | visible residues] under the chain, in units of the reward, float64."""
        scores, constant = self.additive()
        beta, vocab = self._beta(temperature), len(LETTERS)
        fits = (x_t[..., None] == torch.arange(vocab)) | (x_t == self.process.mask)[..., None]
        known = torch.zeros(fits.shape, dtype=torch.float64).masked_fill(~fits, -torch.inf)
        return constant + beta * (tilt_chain(self.chain, known + scores / beta)[1] - tilt_chain(self.chain, known)[1])

    def expected_reward(self, temperature: float | None = None) -> float:
        """Mean reward under p*."""
        scores, constant = self.additive()
        return float((self.tilted(temperature).marginals() * scores).sum()) + constant

    def marginal_distance(
        self,
        tokens: Int[Tensor, "batch position"],
        temperature: float | None = None,
        weights: Float[Tensor, " batch"] | None = None,
    ) -> float:
        """Total variation between (weighted) samples and p* at each position, averaged over positions.

        n samples of p* itself are not at 0 but near sqrt(19/(2·pi·n)).
        """
        truth = self.tilted(temperature).marginals()
        laws = [histogram(column, len(LETTERS), weights) for column in tokens.unbind(1)]
        return sum(float(total_variation(law, one)) for law, one in zip(laws, truth, strict=True)) / len(laws)

    def _beta(self, temperature: float | None) -> float:
        return self.config.temperature if temperature is None else temperature


def _unconditional(prompts: Sequence[str]) -> None:
    """There is nothing to condition on."""


def _tokens(x: Tensor) -> Tensor:
    return x
