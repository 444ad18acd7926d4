"""Denoisers and their weights: closed-form and small networks, guidance, roles, saving.

A network maps (x_t, t, condition) to a raw output; ``NetworkDenoiser`` adds its process, guidance, the ledger and one
padded forward shape; ``CopiedRoles`` keeps the weights apart by what they are for. To add a network, write a file with
a ``CARD`` whose weights come from a generator of its own, and say in ``GenerativeModel`` what its output means.

Traps: the network must treat rows independently (no batch norm), or the first ratio is not 1. It sees exactly
``forward_batch`` rows at a time; multiples of 32 are bit-stable on CPU. State of one trajectory goes into the condition
as ``Stateful``, never onto the module. ``reference`` is the network as training began, not as it was downloaded.
"""

from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.dit import DiT
from difftilt.models.ledger import Ledger
from difftilt.models.markov import MarkovPosterior
from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.mixture import GaussianMixture, MixturePrediction, MixtureVelocity, Tilted
from difftilt.models.mlp import MLP
from difftilt.models.process_reward import ProcessReward
from difftilt.models.protocol import (
    Denoiser,
    Frozen,
    GenerativeModel,
    Lagging,
    Network,
    Roles,
    RoleSpec,
    Stateful,
    Trained,
)
from difftilt.models.roles import CopiedRoles
from difftilt.models.saving import from_pretrained, save_pretrained

__all__ = [
    "MLP",
    "CopiedRoles",
    "Denoiser",
    "DiT",
    "Frozen",
    "GaussianMixture",
    "GenerativeModel",
    "Lagging",
    "Ledger",
    "MarkovPosterior",
    "MaskedTransformer",
    "MixturePrediction",
    "MixtureVelocity",
    "Network",
    "NetworkDenoiser",
    "ProcessReward",
    "RoleSpec",
    "Roles",
    "Stateful",
    "Tilted",
    "Trained",
    "denoiser",
    "from_pretrained",
    "save_pretrained",
]
