"""How often one model beats another on a reward, of single samples or of sets."""

import torch

from difftilt.errors import UserError
from difftilt.rewards.instances import as_set
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.noise import Noise


def win_rate(reward: Reward, ours: Samples, theirs: Samples, noise: Noise, sets: int = 200) -> float:
    """Share of comparisons that our samples win, a tie counting half.

    An instance reward compares row with row: draw both from the same prompts and noise. A reward of sets compares
    ``sets`` bootstrap sets of all rows, the same rows for both, so that what a finite set is biased by cancels; shares
    of sets are not shares of samples, and near 0 or 1 as soon as the models differ by more than the sampling error.

    Args:
        reward: of either kind.
        ours: samples of the one model.
        theirs: of the other, as many, row by row of the same prompts.
        noise: of the bootstrap.
        sets: of the bootstrap.
    """
    count = len(ours.group)
    if count != len(theirs.group) or list(ours.prompts) != list(theirs.prompts):
        raise UserError("a win rate compares samples of the same prompts, row by row: draw both from one batch")
    if not reward.capabilities.set_valued:
        gap = reward.score(ours) - reward.score(theirs)
    else:
        scorer = as_set(reward)
        features = scorer.features(ours), scorer.features(theirs)
        rows = (noise.uniform(torch.arange(sets), (count,), purpose="bootstrap") * count).long()
        gap = torch.tensor(
            [scorer.score_features(features[0][row]) - scorer.score_features(features[1][row]) for row in rows]
        )
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean())
