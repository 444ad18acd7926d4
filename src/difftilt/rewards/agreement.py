"""How often a reward prefers what people preferred."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import evaluate
from difftilt.statistics.proportions import wilson_interval

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Agreement:
    """What a reward says of pairs.

    Attributes:
        gap: reward of the chosen sample minus that of the rejected one, of each pair.
    """

    gap: Float[Tensor, " pairs"]

    def summary(self) -> dict[str, float]:
        """Plain numbers.

        ``pairs``; how many are ``right``, ``tied`` and ``wrong``; ``accuracy``, a tie counting half, with its 95 %
        interval from ``low`` to ``high``, pairs taken as independent; ``gap``, the mean difference.
        """
        count = len(self.gap)
        right, tied = int((self.gap > 0).sum()), int((self.gap == 0).sum())
        accuracy = (right + tied / 2) / count
        low, high = wilson_interval(accuracy, count)
        counts = {"pairs": count, "right": right, "tied": tied, "wrong": count - right - tied}
        return {**counts, "accuracy": accuracy, "low": low, "high": high, "gap": float(self.gap.mean())}


def agreement(reward: Reward, batches: Iterable[tuple[Samples, Samples]], tell: Tell = lambda done: None) -> Agreement:
    """Score both members of every pair, side by side in one batch.

    Args:
        reward: of single samples.
        batches: chosen and rejected samples, row by row of the same prompts.
        tell: told how many pairs are done.

    Raises:
        UserError: for a reward that scores sets, may have no score, or standardises by a batch: none of these compares
            two samples.
        RewardError: for a reward that fails.
    """
    _refuse(reward)
    gaps: list[Tensor] = []
    done = 0
    for chosen, rejected in batches:
        with torch.no_grad():
            won, lost = evaluate(reward, Samples.join([chosen, rejected]), Ledger()).total.double().chunk(2)
        gaps.append((won - lost).cpu())
        done += len(won)
        tell(done)
    if not done:
        raise UserError("there are no pairs to judge: give at least one")
    return Agreement(torch.cat(gaps))


def _refuse(reward: Reward) -> None:
    if reward.capabilities.of_sets:
        raise UserError(f"reward {reward.name!r} scores sets, and a pair is none: judge pairs by a reward of samples")
    if reward.capabilities.missing:
        raise UserError(f"reward {reward.name!r} may have no score for a sample, so it cannot judge pairs: unmask it")
    if not isinstance(reward, WeightedSum):
        return
    if reward.normalise is not None:
        raise UserError(
            f"reward {reward.name!r} standardises by {reward.normalise}, which depends on who stands beside a pair: "
            "judge by a sum without normalise"
        )
    for part in reward.rewards.values():
        _refuse(part)
