"""Denoisers and their weights: closed-form and small networks, guidance, roles, saving."""

from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.dit import DiT
from difftilt.models.ledger import Ledger
from difftilt.models.markov import MarkovPosterior
from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.mixture import GaussianMixture, MixturePrediction, MixtureVelocity, Tilted
from difftilt.models.mlp import MLP
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
    "RoleSpec",
    "Roles",
    "Stateful",
    "Tilted",
    "Trained",
    "denoiser",
    "from_pretrained",
    "save_pretrained",
]
