"""The one door through which samples reach a reward: counted, checked, every component kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import RewardError, UserError, quoted
from difftilt.models.ledger import Ledger
from difftilt.rewards.compose import WeightedSum, to_members
from difftilt.rewards.protocol import Reward, Samples, Scores, SetReward

SHOWN = 5
"""How many rows an error message lists."""

Gather = Callable[[Tensor], Tensor]
"""The rows of this process -> the rows of all processes."""


def _alone(column: Tensor) -> Tensor:
    return column


def evaluate(reward: Reward, samples: Samples, ledger: Ledger, gather: Gather = _alone) -> Scores:
    """Score the samples: the total and each component, float32 (batch,), finite; gradients are kept.

    The members of a set receive the score of their set. A weighted sum counts one reward call per sample and
    component, in ``ledger``, and reports its components before weights and normalisation; nested sums are named
    ``outer/inner``. Any other reward is its own one component. The set of a pooled reward is what ``gather`` makes of
    the features of these samples, and every sample receives its score.

    Raises:
        RewardError: if a reward raises, or returns anything but one finite score for each sample (or set), NaN excepted
            for one whose capabilities say ``missing``.
    """
    components = score_components(reward, samples, ledger, gather)
    return Scores(add_up(reward, components, samples), components)


def same_scores(found: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> bool:
    """Whether two scorings of the same samples agree, name by name, up to the rounding of another batch or machine."""
    return found.keys() == held.keys() and all(
        torch.allclose(found[name].cpu(), held[name].cpu(), rtol=1e-3, atol=1e-4, equal_nan=True) for name in held
    )


def score_components(reward: Reward, samples: Samples, ledger: Ledger, gather: Gather = _alone) -> dict[str, Tensor]:
    """Component name -> checked float32 (batch,) scores; a sum that is itself a component is already added up.

    What depends on other rows (``WeightedSum.combine``) is left to the caller, who may hold the rows of all processes.
    """
    if not isinstance(reward, WeightedSum):
        return {reward.name: _checked(reward, reward.name, samples, ledger, gather)}
    found: dict[str, Tensor] = {}
    for key, part in reward.rewards.items():
        if isinstance(part, WeightedSum):
            inner = score_components(part, samples, ledger, gather)
            found |= {f"{key}/{name}": scores for name, scores in inner.items()}
            found[key] = add_up(part, inner, samples)
        else:
            found[key] = _checked(part, key, samples, ledger, gather)
    return found


def add_up(reward: Reward, components: dict[str, Tensor], samples: Samples) -> Float[Tensor, " batch"]:
    """The total that belongs to the components of a reward; of a sum over all samples whose components are given."""
    if not isinstance(reward, WeightedSum):
        return components[reward.name]
    if reward.capabilities.set_valued:
        # statistics of sets weigh every set once, however many members it has
        first = _first_members(samples.group)
        combined = reward.combine({key: components[key][first] for key in reward.rewards}, samples.group[first])
        return to_members(combined, samples.group)
    return reward.combine(components, samples.group)


def splits(reward: Reward) -> bool:
    """Whether samples may be scored part by part, whole groups together: each component then has the same scores.

    A pooled reward has one score for all of them; a sum inside a sum that standardises by the batch has added up
    before the parts are joined.
    """
    if reward.capabilities.pooled:
        return False
    if not isinstance(reward, WeightedSum):
        return True
    inner = [part for part in reward.rewards.values() if isinstance(part, WeightedSum)]
    return all(splits(part) for part in reward.rewards.values()) and all(
        part.normalise in (None, "group") for part in inner
    )


def _first_members(group: Tensor) -> Tensor:
    """Row of the first member of each group, in ascending order of group index."""
    labels = torch.unique(group)
    return (group == labels[:, None]).int().argmax(dim=1)


def encode(reward: SetReward, samples: Samples, ledger: Ledger) -> Float[Tensor, "batch dim"]:
    """Features of the samples, on their device: counted as one reward call each, finite, without gradient.

    Raises:
        RewardError: if the reward raises, or returns anything but one finite vector for each sample.
    """
    rows = len(samples.group)
    ledger.reward_calls += rows
    with _Blame(reward.name, rows):
        features = reward.features(samples).detach()
    if features.dim() != 2 or len(features) != rows:
        raise RewardError(
            f"reward {reward.name!r} encoded {rows} samples as shape {tuple(features.shape)}; its encoder must return "
            "one vector for each sample, shape (batch, dim)"
        )
    _check_finite(reward.name, features.double().sum(1), samples, None)
    # whatever device the encoder works on: a search indexes features by the samples' own columns
    return features.to(samples.group.device)


def _pooled(reward: Reward, samples: Samples, ledger: Ledger, gather: Gather) -> Float[Tensor, " batch"]:
    """The one score of all samples of all processes, for each of this one's."""
    if not isinstance(reward, SetReward):
        raise UserError(f"reward {reward.name!r} is pooled, but has no features that processes could share")
    features = gather(encode(reward, samples, ledger))
    with _Blame(reward.name, len(features)):
        score = torch.tensor([reward.score_features(features)])
    _check_finite(reward.name, score, samples, [0])
    return score.expand(len(samples.group)).to(features.device)


def _checked(reward: Reward, name: str, samples: Samples, ledger: Ledger, gather: Gather) -> Float[Tensor, " batch"]:
    """Call the reward and hold it to its contract."""
    if reward.capabilities.pooled:
        return _pooled(reward, samples, ledger, gather)
    ledger.reward_calls += len(samples.group)
    scores = call(reward, name, samples)
    sets = reward.capabilities.set_valued
    known = torch.where(scores.isnan(), 0.0, scores) if reward.capabilities.missing else scores
    _check_finite(name, known, samples, torch.unique(samples.group).tolist() if sets else None)
    return to_members(scores, samples.group) if sets else scores


def call(reward: Reward, name: str, samples: Samples) -> Float[Tensor, " scores"]:
    """What the reward says, float32: (batch,), or (groups,) in order of group index; it may not be finite.

    Raises:
        RewardError: if it raises, or returns anything but one number for each sample (or set).
    """
    rows = len(samples.group)
    with _Blame(name, rows):
        scores = reward.score(samples)
    sets = reward.capabilities.set_valued
    _check_shape(name, scores, rows, len(torch.unique(samples.group)) if sets else rows, "set" if sets else "sample")
    return scores.float()


def blamed(name: str, rows: int) -> AbstractContextManager[None]:
    """Within it, whatever is raised names the reward and its samples."""
    return _Blame(name, rows)


@dataclass(frozen=True)
class _Blame(AbstractContextManager[None]):
    """Turns whatever a reward raises into a :class:`RewardError` that names it; the cause is chained.

    A reward is foreign code and may raise anything; a context manager sees every exception without a handler that
    could swallow one. What is not an ``Exception`` (an interrupt, an exit) passes, and so does a ``UserError``, with
    which a reward says what is wrong with the run.
    """

    name: str
    rows: int

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, RewardError | UserError):
            said = str(error).partition("\n")[0][:200]
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__} on samples 0 to {self.rows - 1}: {said}; "
                "mend it, or drop it from the rewards (--debug shows where it happened)"
            ) from error


def _check_shape(name: str, scores: object, rows: int, expected: int, unit: str) -> None:
    if not isinstance(scores, Tensor):
        raise RewardError(
            f"reward {name!r} returned {type(scores).__name__}; its score must be a tensor: see as_reward"
        )
    if scores.is_complex() or tuple(scores.shape) != (expected,):
        kind = "complex values of " if scores.is_complex() else ""
        raise RewardError(
            f"reward {name!r} returned {kind}shape {tuple(scores.shape)} for {rows} samples; "
            f"return one number per {unit}, shape ({expected},)"
        )


def _check_finite(name: str, scores: Tensor, samples: Samples, labels: Sequence[int] | None) -> None:
    bad: list[int] = (~scores.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return
    shown = [_describe(i, scores[i].item(), samples, labels) for i in bad[:SHOWN]]
    more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise RewardError(
        f"reward {name!r} is not finite for {len(bad)} of {len(scores)} scores: {'; '.join(shown)}{more}; "
        "return a finite number, a low one for a sample that cannot be judged"
    )


def _describe(place: int, value: float, samples: Samples, labels: Sequence[int] | None) -> str:
    if labels is not None:
        return f"group {labels[place]} is {value}"
    return f"row {place} (prompt {quoted(samples.prompts[place])}) is {value}"
