"""Losses of masked models, one row per sequence: the likelihood bound with token-wise schedules, and the invalid loss.

A masked token v is revealed by the reverse process at the rate p(v)·c_v, c_v = m_v'/m_v, and by the forward process
seen backwards at the rate c_l of the token x_l that it hides. The bound on -log p(x_0) is the divergence of the two:

    ∫ dt E_{z_t} Σ_{l masked} [ -c_l·log p(x_l) + Σ_v p(v)·c_v - c_l ]

If all tokens have one schedule the last two terms cancel (MDLM, arXiv 2406.07524). PepTune (arXiv 2412.17780) leaves
them out with two schedules as well; what then minimises the loss is c_v·q(v) over its sum, q the posterior, which
draws too many bonds. With them it is q.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.process.masked import TokenPrediction


def masked_error(
    prediction: TokenPrediction, x_0: Int[Tensor, "batch position"], *, rate_term: bool = True
) -> Float[Tensor, " batch"]:
    """The integrand of the bound at the state and time of the prediction, in nats per unit of t, summed over positions.

    Its mean over t uniform on (0, 1) and z_t drawn by ``corrupt`` bounds -log p(x_0) from above.

    Args:
        prediction: at z_t, a corruption of ``x_0``.
        x_0: clean tokens.
        rate_term: False is PepTune's loss; nothing changes where all tokens have one schedule. A process whose bonds
            are known by a function of clean sequences needs False.
    """
    process, log_probs = prediction.process, prediction.log_probs
    weight = process.loss_weight(x_0, prediction.t)
    each = -weight * log_probs.gather(-1, x_0[..., None])[..., 0]
    if rate_term and not process.one_class:
        every = torch.arange(process.vocab, device=x_0.device).expand(len(x_0), -1)
        rates = process.loss_weight(every, prediction.t)
        each = each + (log_probs.exp() * rates[:, None]).sum(-1) - weight
    return torch.where(process.is_masked(prediction.x_t), each, 0).sum(-1)


def invalid_loss(prediction: TokenPrediction, invalid: Bool[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Σ_l p(x̃_l) over masked positions of rows whose most likely sequence x̃ is invalid, 0 in the others (PepTune).

    The flag carries no gradient; the gradient lowers the probability of the tokens that were chosen, ∂/∂logit_v =
    p(x̃_l)·(1[v = x̃_l] - p(v)). Visible positions, which cannot change, are not counted.

    Args:
        prediction: ``prediction.x0`` is x̃.
        invalid: of each x̃.
    """
    chosen = prediction.log_probs.max(-1).values.exp()
    masked = prediction.process.is_masked(prediction.x_t)
    return torch.where(masked & invalid[:, None], chosen, 0).sum(-1)
