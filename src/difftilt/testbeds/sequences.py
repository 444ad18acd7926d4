"""Short sequences from a Markov chain: every law is enumerated, and every distance is exact.

The network is the exact masked posterior of the chain plus a residual network that starts at zero. A masked sampler
with finitely many steps reveals positions of one step independently, so its law differs from the Markov chain's: the
target of a method is the tilted law of the *chain of the sampler* (DRAKES, arXiv 2410.13643).
"""

from collections.abc import Sequence
from functools import cached_property
from string import ascii_uppercase
from typing import Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import one_hot

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError
from difftilt.models.markov import MarkovPosterior
from difftilt.models.protocol import GenerativeModel, Network
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.rewards.tokens import Pairs, TokenWeights
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.protocol import Sampler
from difftilt.statistics import empirical, enumerate_sequences, tilted, total_variation
from difftilt.testbeds.enumeration import chain_law, chain_soft_value
from difftilt.training.looks import spelled, unspelled
from difftilt.training.protocol import Task

CARD = Card(
    name="sequences",
    entry="Sequences",
    paper="Markov chain with exact masked posterior, after the small proof of DRAKES, arXiv 2410.13643.",
)

_MOST_STATES = 20_000


class Config(BaseConfig):
    """The Markov chain, the sampler and the reward."""

    length: int = Field(default=4, ge=2)
    """Tokens of a sequence."""
    letters: int = Field(default=4, ge=2)
    """Size of the alphabet; (letters + 1)^length states must not exceed 20 000."""
    onward: float = Field(default=0.7, gt=0, lt=1)
    """Probability that a letter is followed by the next one of the alphabet (cyclic); the rest is shared equally."""
    steps: int = Field(default=8, ge=1)
    """Of the sampler, equally spaced in t."""
    weights: tuple[float, ...] = ()
    """Reward of each letter; empty is 0 for the first letter up to 1 for the last, equally spaced."""
    pairs: Pairs = "equal"
    """Which neighbours earn the bonus: equal ones (rare under the chain), or those in alphabetical order."""
    bonus: float = 0.5
    """Reward per counted pair."""
    temperature: float = Field(default=0.5, gt=0)
    """Beta of the tilted target, in units of the reward."""
    hidden: int = Field(default=64, ge=1)
    """Width of the residual network's two hidden layers."""
    seed: int = Field(default=0, ge=0)
    """Of the residual network's weights."""

    @model_validator(mode="after")
    def _small_enough(self) -> Self:
        states = (self.letters + 1) ** self.length
        if states > _MOST_STATES:
            raise ValueError(
                f"{states} states of {self.length} tokens are too many to enumerate: at most {_MOST_STATES}"
            )
        if self.weights and len(self.weights) != self.letters:
            raise ValueError(f"weights must be {self.letters} numbers, one per letter; got {self.weights}")
        return self


class Sequences:
    """The testbed: :meth:`task` for methods, the rest for whoever wants to know how far they are from the truth.

    Laws are float64 vectors over all letters^length sequences, in the order of ``sequences`` (lexicographic).

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        config = self.config
        self.process = MaskedProcess(config.letters)
        self.grid = uniform_grid(config.steps)
        others = (1 - config.onward) / (config.letters - 1)
        stay = torch.full((config.letters, config.letters), others, dtype=torch.float64)
        onward = torch.eye(config.letters, dtype=torch.float64).roll(1, dims=1)
        self.transition = stay + (config.onward - others) * onward
        self.initial = torch.full((config.letters,), 1 / config.letters, dtype=torch.float64)
        self.base = self._network(residual=False)

    def _network(self, residual: bool) -> MarkovPosterior:
        config = self.config
        return MarkovPosterior(
            self.initial, self.transition, config.length, hidden=config.hidden, residual=residual, seed=config.seed
        )

    def reward(self) -> TokenWeights:
        """Letter weights and pair bonus; differentiable on relaxed tokens."""
        config = self.config
        weights = torch.tensor(config.weights) if config.weights else torch.linspace(0, 1, config.letters)
        return TokenWeights(weights, config.pairs, config.bonus)

    def task(self) -> Task:
        """A new model with its reward; ``naturalness``, the log-likelihood under the chain, is the held-out reward."""
        config = self.config
        model = GenerativeModel(
            network=self._network(residual=True),
            process=self.process,
            output="logits",
            shape=(config.length,),
            encode=_encode,
            decode=_identity,
            dtype_tokens=True,
        )
        return Task(
            name="sequences",
            model=model,
            reward=self.reward(),
            prompts=("",),
            heldout_prompts=("",),
            sampler=Sampler(self.grid, Unmasking()),
            heldout={"naturalness": as_reward(self.naturalness, name="naturalness")},
            features=self.features,
            temperature=config.temperature,
            truth=self.distance_to_target,
            text=self.text,
            read=self.read,
        )

    def naturalness(self, samples: Samples) -> Float[Tensor, " batch"]:
        """Log-probability of each sequence under the Markov chain, in nats per token."""
        return (self.base.log_prob(samples.media) / self.config.length).float()

    def text(self, media: Int[Tensor, "batch position"]) -> list[str]:
        """Sequences as capital letters, A for token 0; of more than 26 letters as numbers."""
        count = self.config.letters
        return spelled(media, ascii_uppercase if count <= len(ascii_uppercase) else [f"{n} " for n in range(count)])

    def read(self, texts: Sequence[str]) -> Int[Tensor, "batch position"]:
        """Inverse of :meth:`text`.

        Raises:
            UserError: for other letters, or more of them than have letters.
        """
        if self.config.letters > len(ascii_uppercase):
            raise UserError(f"sequences of {self.config.letters} letters have no spelling: give tokens")
        return unspelled(texts, ascii_uppercase[: self.config.letters])

    def features(self, media: Int[Tensor, "batch position"]) -> Float[Tensor, "batch features"]:
        """One-hot tokens, flattened: distances between features count differing positions."""
        return one_hot(media, self.config.letters).flatten(1).float()

    @cached_property
    def sequences(self) -> Int[Tensor, "sequences position"]:
        """All sequences."""
        return enumerate_sequences(self.config.letters, self.config.length)

    @cached_property
    def rewards(self) -> Float[Tensor, " sequences"]:
        """The reward of every sequence, float64."""
        every = [""] * len(self.sequences)
        index = torch.zeros(len(self.sequences), dtype=torch.int64)
        return self.reward().score(Samples(self.sequences, every, every, index)).double()

    @cached_property
    def markov_law(self) -> Float[Tensor, " sequences"]:
        """Law of the Markov chain itself: where the sampler ends as its steps grow."""
        return self.base.log_prob(self.sequences).exp()

    def law(self, network: Network | None = None) -> Float[Tensor, " sequences"]:
        """Exact law of the sampler with the given network (a trained one, say); None is the base."""
        return chain_law(self.base if network is None else network, self.process, self.config.length, self.grid)

    @cached_property
    def base_law(self) -> Float[Tensor, " sequences"]:
        """Law of the base's sampler: what tilting starts from."""
        return self.law()

    def tilted(self, temperature: float | None = None) -> Float[Tensor, " sequences"]:
        """p* ∝ base_law·exp(r/temperature)."""
        return tilted(self.base_law, self.rewards, self._beta(temperature))

    def log_z(self, temperature: float | None = None) -> float:
        """Log E exp(r/temperature) under the base's sampler, in nats."""
        return float((self.base_law.log() + self.rewards / self._beta(temperature)).logsumexp(0))

    def _beta(self, temperature: float | None) -> float:
        return self.config.temperature if temperature is None else temperature

    def soft_value(
        self, x_t: Int[Tensor, "batch position"], t: Float[Tensor, " batch"], temperature: float | None = None
    ) -> Float[Tensor, " batch"]:
        """β·log E[exp(r(x_0)/β) | x_t] under the base's sampler, in units of the reward; t lies on its grid.

        Raises:
            ValueError: for a time that the sampler does not visit.
        """
        table = chain_soft_value(
            self.base, self.process, self.config.length, self.grid, self.rewards, self._beta(temperature)
        )
        return table(x_t, t)

    def distance_to_target(
        self,
        tokens: Int[Tensor, "batch position"],
        temperature: float | None = None,
        weights: Float[Tensor, " batch"] | None = None,
    ) -> float:
        """Total variation between (weighted) samples and p*; n samples of p* itself are not at 0 but at O(n^-1/2)."""
        return float(total_variation(empirical(tokens, self.config.letters, weights), self.tilted(temperature)))

    def law_distance(self, network: Network, temperature: float | None = None) -> float:
        """Total variation between the exact law of a network's sampler and p*: no sampling error."""
        return float(total_variation(self.law(network), self.tilted(temperature)))


def _encode(prompts: Sequence[str]) -> None:
    """There is nothing to condition on."""


def _identity(x: Tensor) -> Tensor:
    return x
