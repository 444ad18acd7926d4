"""Rewards of x0-predictions that know how noisy they are, one set of weights per step (TTSnap, arXiv 2511.22242).

A reward is made of terms: a weighted sum has several, any other reward one. Early in a chain the x0-prediction is
blurred and the reward of it says little of the reward of the sample to come; a verifier is a function of the prediction
that was fitted to say just that (``values.curriculum``). Several terms are fused by their ranks within the prompt.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models.mlp import MLP
from difftilt.models.process_reward import labels_of, sizes_of, vector_of
from difftilt.models.protocol import Stateful
from difftilt.process.protocol import Condition, Prediction
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.masked import Masked
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import evaluate
from difftilt.values.estimates import LatentReward
from difftilt.values.protocol import Rows

SPREAD = 8.0
"""Standard deviation of what a regressor sees; at 1 the perceptron learns smooth rewards only."""


@dataclass(frozen=True)
class Term:
    """One reward that candidates are ranked by.

    Attributes:
        reward: scores samples one by one.
        sign: -1 where a weighted sum wants it low.
    """

    reward: Reward
    sign: float = 1.0

    @property
    def network(self) -> nn.Module | None:
        """The module whose scores these are, a copy of which can be fine-tuned; None for a plain function."""
        reward = self.reward.reward if isinstance(self.reward, Masked) else self.reward
        found = getattr(reward, "network", None)
        return found if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else None


def terms_of(reward: Reward, fuse: bool) -> dict[str, Term]:
    """Name -> term: the parts of a weighted sum that have a weight if they are to be fused, else the reward itself.

    Raises:
        UserError: for a part that scores sets, or a sum without a weight.
    """
    if not fuse or not isinstance(reward, WeightedSum):
        return {reward.name: Term(reward)}
    for name, part in reward.rewards.items():
        if part.capabilities.of_sets:
            raise UserError(f"candidates are ranked one by one; {name!r} scores sets: leave it out of the sum")
    weights = {name: weight for name, weight in reward.weights.items() if weight}
    if not weights:
        raise UserError("every weight of the sum is 0: there is nothing to rank candidates by")
    return {name: Term(reward.rewards[name], 1.0 if weight > 0 else -1.0) for name, weight in weights.items()}


class Verifier(Protocol):
    """Scores x0-predictions by weights that can be trained."""

    @property
    def module(self) -> nn.Module: ...

    def __call__(
        self, x0: Shaped[Tensor, "batch *shape"], condition: Condition, samples: Callable[[], Samples]
    ) -> Float[Tensor, " batch"]:
        """In units of the reward; ``samples`` gives what a reward sees of the same predictions."""
        ...


@dataclass(frozen=True)
class TunedReward:
    """A copy of a reward whose network may learn.

    Attributes:
        reward: the copy.
        module: its network.
    """

    reward: Reward
    module: nn.Module

    def __call__(self, x0: Tensor, condition: Condition, samples: Callable[[], Samples]) -> Float[Tensor, " batch"]:
        return self.reward.score(samples())


class Regressor(nn.Module):
    """A perceptron on the x0-prediction, for rewards that are no network: offset + scale·f(SPREAD·(x0 - mean)/std).

    Args:
        shape: of one latent.
        condition: encoded prompts, whose classes or vectors it reads too; None reads the prediction alone.
        vocab: of tokens, which enter one-hot; None for continuous latents.
        hidden: units of its two hidden layers.
        seed: of the initial weights.
    """

    offset: Tensor
    scale: Tensor
    mean: Tensor
    std: Tensor
    known: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        condition: Condition = None,
        *,
        vocab: int | None = None,
        hidden: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        classes, self.vector = sizes_of(condition)
        self.vocab = vocab
        size = torch.Size(shape).numel() * (vocab or 1) + self.vector
        # the time features are of no use: every step has weights of its own
        self.network = MLP(size, 1, hidden=hidden, classes=classes, features=2, seed=seed)
        for name, value in (("offset", 0.0), ("scale", 1.0), ("mean", 0.0), ("std", 1.0)):
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("known", torch.zeros(classes + 1, dtype=torch.bool))

    @property
    def module(self) -> nn.Module:
        """Itself."""
        return self

    def calibrate(
        self, x_0: Shaped[Tensor, "samples *shape"], condition: Condition, reward: Float[Tensor, " samples"]
    ) -> None:
        """Take the units of clean samples and of their rewards, and note which classes there are."""
        inner, reward = self._numbers(x_0).double(), reward.double()
        self.mean.copy_(inner.mean())
        self.std.copy_(inner.std(correction=0).clamp(min=1e-6))
        self.offset.copy_(reward.mean())
        self.scale.copy_(reward.std(correction=0).clamp(min=1e-6))
        labels = labels_of(condition)
        if labels is not None and len(self.known) > 1:
            self.known[labels.clamp(max=len(self.known) - 1)] = True

    def _numbers(self, x0: Tensor) -> Float[Tensor, "batch numbers"]:
        return (x0 if self.vocab is None else nn.functional.one_hot(x0, self.vocab)).flatten(1).float()

    def forward(
        self, x0: Tensor, condition: Condition, samples: Callable[[], Samples] | None = None
    ) -> Float[Tensor, " batch"]:
        """The predicted reward.

        Raises:
            UserError: for a class that it was not fitted on.
        """
        inner = SPREAD * (self._numbers(x0) - self.mean) / self.std
        labels = labels_of(condition) if len(self.known) > 1 else None
        if labels is not None and not bool(self.known[labels.clamp(max=len(self.known) - 1)].all()):
            raise UserError(
                "the noise-aware reward was fitted on other classes: fit it on prompts of all of them, or let it read "
                "the prediction alone (steerer.prompted=false)"
            )
        vector = vector_of(condition) if self.vector else None
        inner = inner if vector is None else torch.cat([inner, vector.to(inner)], 1)
        return self.offset + self.scale * self.network(inner, inner.new_zeros(len(inner)), labels)[:, 0]


def verifier_of(term: Term, regressor: Callable[[], Regressor]) -> Verifier:
    """A copy of the term's reward that can learn, or a new regressor where the reward is no network."""
    if term.network is None:
        return regressor()
    mine = Term(copy.deepcopy(term.reward), term.sign)
    assert mine.network is not None
    return TunedReward(mine.reward, mine.network.requires_grad_(True))


@dataclass(frozen=True)
class Verified:
    """The value of a state by the terms of a reward of its x0-prediction; several are fused by ranks in the prompt.

    Calls of a reward count as reward calls, those of a verifier as auxiliary ones.

    Attributes:
        latent: makes samples of latents; its prompts and its ledger.
        terms: what is ranked.
        fuse: (terms, prompts, candidates) -> (prompts, candidates).
        tuned: step -> term -> verifier; a step without them asks the rewards themselves.
    """

    latent: LatentReward
    terms: Mapping[str, Term]
    fuse: Callable[[Tensor], Tensor]
    tuned: Mapping[int, Mapping[str, Verifier]]

    def __call__(
        self, x_t: Tensor, t: Tensor, condition: Condition, prediction: Prediction | None, rows: Rows
    ) -> Float[Tensor, " batch"]:
        x0 = x_t if prediction is None else prediction.x0
        samples, ledger = cache(lambda: self.latent.samples(x0, rows.prompt)), self.latent.ledger
        tuned = self.tuned.get(rows.step)
        if tuned is None:
            found = {name: evaluate(term.reward, samples(), ledger).total for name, term in self.terms.items()}
        else:
            ledger.auxiliary_calls += len(x0) * len(tuned)
            found = {name: tuned[name](x0, plain(condition), samples) for name in self.terms}
        return self.fused(found, rows.prompt)

    def fused(self, scores: Mapping[str, Tensor], prompt: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One score per row, from those of every term; the rows of a prompt stand together and are equally many."""
        table = torch.stack([term.sign * scores[name].double() for name, term in self.terms.items()])
        return self.fuse(table.unflatten(1, (len(prompt.unique()), -1))).flatten()


def plain(condition: Condition) -> Condition:
    """The condition without per-trajectory state."""
    return condition.condition if isinstance(condition, Stateful) else condition
