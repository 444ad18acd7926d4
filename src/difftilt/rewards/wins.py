"""How often one model beats another on a reward, of single samples or of sets."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.ledger import Ledger
from difftilt.rewards.checked import CheckedSets
from difftilt.rewards.instances import as_set
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import encode, evaluate
from difftilt.sampling.noise import Noise


def win_rate(reward: Reward, ours: Samples, theirs: Samples, noise: Noise, sets: int = 200) -> float:
    """Share of comparisons that our samples win, a tie counting half.

    An instance reward compares row with row: draw both from the same prompts and noise. Both sides are scored as one
    batch, so that a sum that standardises its parts does so over both together. A reward of sets compares ``sets``
    bootstrap sets of all rows, the same rows for both, so that what a finite set is biased by cancels; shares of sets
    are not shares of samples, and near 0 or 1 as soon as the models differ by more than the sampling error.

    Args:
        reward: of either kind.
        ours: samples of the one model.
        theirs: of the other, as many, row by row of the same prompts.
        noise: of the bootstrap.
        sets: of the bootstrap.

    Raises:
        UserError: for samples of other prompts, for none, and for a sum in which only some parts score sets.
        RewardError: for a reward that fails, or is not finite: what has no score can be neither won nor lost.
    """
    count = len(ours.group)
    if count != len(theirs.group) or list(ours.prompts) != list(theirs.prompts):
        raise UserError("a win rate compares samples of the same prompts, row by row: draw both from one batch")
    if count == 0 or sets < 1:
        raise UserError(f"a win rate of {count} samples and {sets} sets compares nothing: give at least one of each")
    if reward.capabilities.missing:
        raise UserError(f"reward {reward.name!r} may have no score for a sample, which cannot win or lose: unmask it")
    gap = _by_sets(reward, ours, theirs, noise, sets) if reward.capabilities.of_sets else _by_rows(reward, ours, theirs)
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())


def _by_rows(reward: Reward, ours: Samples, theirs: Samples) -> Float[Tensor, " rows"]:
    won, lost = evaluate(reward, Samples.join([ours, theirs]), Ledger()).total.chunk(2)
    return won - lost


def _by_sets(reward: Reward, ours: Samples, theirs: Samples, noise: Noise, sets: int) -> Float[Tensor, " sets"]:
    scorer, count = CheckedSets(as_set(reward)), len(ours.group)
    one, other = (encode(scorer, samples, Ledger()) for samples in (ours, theirs))
    rows = (noise.uniform(torch.arange(sets), (count,), purpose="bootstrap") * count).long().to(one.device)
    return torch.tensor([scorer.score_features(one[row]) - scorer.score_features(other[row]) for row in rows])
