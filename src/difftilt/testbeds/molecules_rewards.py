"""Properties of molecules as rewards: each a number in [0, 1], higher is better, 0 for what is no molecule.

0 is the worst value of every range. Whether a 0 is a bad molecule or none is told by the reward ``valid``, which a task
holds out whatever it optimises.
"""

import hashlib
import math
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.rewards.distinct import DistinctReward
from difftilt.rewards.protocol import Capabilities, Reward, Samples
from difftilt.testbeds.molecules_chemistry import BITS, Molecule, parse
from difftilt.testbeds.molecules_strings import training_smiles

Read = Callable[[Tensor], list[str]]
"""Tokens -> SMILES."""


class Targets(Config):
    """Where the rewards have their tops."""

    log_p: float = 2.5
    """Partition coefficient of the highest reward, a decimal logarithm."""
    log_p_width: float = Field(default=1.0, gt=0)
    """Standard deviation of its bell."""
    weight: float = Field(default=300.0, gt=0)
    """Molecular weight of the highest reward, g/mol."""
    weight_width: float = Field(default=50.0, gt=0)
    """Standard deviation of its bell, g/mol."""
    rings: int = Field(default=4, ge=1)
    """Rings from which on there are enough."""


class MoleculeReward:
    """A property of a molecule, 0 for strings that are none.

    Attributes:
        name: in reports.
        read: tokens -> SMILES.
        of: molecule -> [0, 1].
    """

    capabilities = Capabilities()

    def __init__(self, name: str, read: Read, of: Callable[[Molecule], float]) -> None:
        self.name = name
        self.read = read
        self.of = of

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        molecules = [parse(smiles) for smiles in self.read(samples.media)]
        scores = [0.0 if one is None else self.of(one) for one in molecules]
        return torch.tensor(scores, dtype=torch.float32, device=samples.media.device)


def property_rewards(read: Read, targets: Targets) -> dict[str, Reward]:
    """What a molecule is worth by itself.

    - ``qed``: drug-likeness, as RDKit has it.
    - ``logp``: exp(-((logP - target)/width)²/2).
    - ``sa``: (10 - synthetic accessibility)/9: 1 is easy to make.
    - ``weight``: exp(-((weight - target)/width)²/2).
    - ``rings``: min(1, rings/enough).
    - ``valid``: 1.
    """
    properties: dict[str, Callable[[Molecule], float]] = {
        "qed": lambda one: one.qed,
        "logp": lambda one: _bell(one.log_p, targets.log_p, targets.log_p_width),
        "sa": lambda one: (10 - one.synthetic_accessibility) / 9,
        "weight": lambda one: _bell(one.weight, targets.weight, targets.weight_width),
        "rings": lambda one: min(1.0, one.rings / targets.rings),
        "valid": lambda one: 1.0,
    }
    return {name: MoleculeReward(name, read, of) for name, of in properties.items()}


def watching_rewards(read: Read) -> dict[str, Reward]:
    """What shows that a reward is fooled.

    - ``novel``: 1 for a molecule that training has not seen.
    - ``distinct``: of a set, different molecules over samples.
    """
    return {
        "novel": MoleculeReward("novel", read, lambda one: float(one.smiles not in _trained_on())),
        "distinct": DistinctReward(lambda media: identity_codes(read(media))),
    }


def fingerprints(smiles: list[str]) -> Float[Tensor, "batch bits"]:
    """Morgan fingerprints; zeros for what is no molecule."""
    molecules = [parse(one) for one in smiles]
    return torch.stack([torch.zeros(BITS) if one is None else one.fingerprint for one in molecules])


def identity_codes(smiles: list[str]) -> Float[Tensor, "batch 3"]:
    """Three numbers below 2^21 from a hash of the canonical SMILES: equal for equal molecules; zeros for none."""
    return torch.tensor([_code(parse(one)) for one in smiles], dtype=torch.float32)


def _code(molecule: Molecule | None) -> list[int]:
    if molecule is None:
        return [0, 0, 0]
    digest = int.from_bytes(hashlib.sha256(molecule.smiles.encode()).digest()[:8])
    return [digest >> shift & 0x1FFFFF for shift in (0, 21, 42)]


def _bell(value: float, target: float, width: float) -> float:
    return math.exp(-(((value - target) / width) ** 2) / 2)


@cache
def _trained_on() -> frozenset[str]:
    return frozenset(training_smiles())


def whole_tokens(media: Tensor, vocab: int) -> Tensor:
    """The tokens, if they are finished sequences.

    Raises:
        UserError: for relaxed tokens, and for masks.
    """
    if media.is_floating_point():
        raise UserError("molecules are read from tokens: relaxed ones, as a gradient needs them, have no SMILES")
    if len(media) and (int(media.min()) < 0 or int(media.max()) >= vocab):
        raise UserError(f"tokens must lie in 0..{vocab - 1}: masked positions spell no molecule")
    return media
