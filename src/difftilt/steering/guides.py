"""Guided proposals: what moves a Gaussian step towards higher value."""

import torch
from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.gaussian import expand
from difftilt.sampling.protocol import Guide, Moment
from difftilt.sampling.steps import GaussianStep
from difftilt.steering.chain import Chain
from difftilt.values.estimates import LatentReward


def value_guide(reward: LatentReward, chain: Chain, scale: float) -> Guide:
    """The shift scale·std²·∇_{x_t} r(x0hat(x_t)) of a Gaussian step, as twisted diffusion samplers propose.

    Costs one gradient pass and one reward call per particle and step.

    Args:
        reward: differentiable reward of latents.
        chain: whose denoiser is differentiated and whose rows are guided.
        scale: strength over the temperature, in nats per unit of reward.

    Raises:
        UserError: if the reward is black-box; the guide, if the step is not Gaussian.
    """
    if not reward.reward.capabilities.differentiable:
        raise UserError(
            f"guide_scale needs a differentiable reward; {reward.reward.name!r} is black-box: use guide_scale 0"
        )

    def guide(moment: Moment) -> Float[Tensor, "batch *shape"]:
        if not isinstance(moment.step, GaussianStep):
            kind = type(moment.step).__name__
            raise UserError(f"guide_scale moves Gaussian steps; this kernel takes a {kind}: use guide_scale 0")
        x = moment.x_t.detach().requires_grad_()
        prediction = chain.denoise(x, moment.t, moment.condition)
        scores = reward(prediction.x0, chain.group)
        (gradient,) = torch.autograd.grad(scores.sum(), x)
        return scale * expand(moment.step.std**2, gradient) * gradient

    return guide
