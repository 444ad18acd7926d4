"""Molecules: a small masked model of real ones, and what RDKit says of its samples.

The tilted law is not known; what is known of every sample is whether it is a molecule, and its properties. Its tokens
are words of SELFIES, its text is SMILES. Needs the extra ``molecules``.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError
from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.protocol import GenerativeModel
from difftilt.models.saving import from_pretrained
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.protocol import Sampler
from difftilt.testbeds.molecules_chemistry import parse, picture
from difftilt.testbeds.molecules_rewards import (
    Targets,
    fingerprints,
    property_rewards,
    watching_rewards,
    whole_tokens,
)
from difftilt.testbeds.molecules_strings import smiles_of, tokens_of, training_smiles
from difftilt.training.protocol import Task

CARD = Card(
    name="molecules",
    entry="Molecules",
    paper="The first 5000 molecules of the NCI open database, which RDKit carries; searched as in arXiv 2412.17780.",
)

CHECKPOINT = Path(__file__).parent / "checkpoints" / "molecules"


class Config(BaseConfig):
    """The sampler and the reward."""

    steps: int = Field(default=16, ge=1)
    """Of the sampler, equally spaced in t; a sequence has 12 tokens."""
    reward: Literal["qed", "logp", "sa", "weight", "rings", "valid"] = "qed"
    """Drug-likeness, nearness to a partition coefficient, ease of synthesis, nearness to a weight, number of rings, or
    whether there is a molecule at all; each in [0, 1], and 0 where there is none."""
    targets: Targets = Targets()
    """Where ``logp``, ``weight`` and ``rings`` have their tops."""


class Molecules:
    """The testbed: :meth:`task` for methods, the rewards by name, strings and pictures of samples.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        self.words = _network().words

    def rewards(self) -> dict[str, Reward]:
        """Properties, validity, and what watches over them: ``novel``, and ``distinct``, which is of a set."""
        return property_rewards(self._read, self.config.targets) | watching_rewards(self._read)

    def task(self) -> Task:
        """A new copy of the pretrained model with its reward; all others are held out, ``valid`` always."""
        config, rewards = self.config, self.rewards()
        network = _network()
        model = GenerativeModel(
            network=network,
            process=MaskedProcess(network.vocab),
            output="logits",
            shape=(network.length,),
            encode=_unconditional,
            decode=_tokens,
            dtype_tokens=True,
        )
        return Task(
            name="molecules",
            model=model,
            reward=rewards[config.reward],
            prompts=("",),
            heldout_prompts=("",),
            sampler=Sampler(uniform_grid(config.steps), Unmasking()),
            heldout={name: reward for name, reward in rewards.items() if name == "valid" or name != config.reward},
            features=self.features,
            text=self.text,
            read=self.read,
            draw=self.draw,
            valid=self.valid,
        )

    def text(self, media: Shaped[Tensor, "batch position ..."]) -> list[str]:
        """Canonical SMILES; empty where there is no molecule.

        Raises:
            UserError: for relaxed tokens and for masks.
        """
        return [one if (molecule := parse(one)) is None else molecule.smiles for one in self._read(media)]

    def read(self, texts: Sequence[str]) -> Int[Tensor, "batch position"]:
        """Molecules in SMILES as tokens.

        Raises:
            UserError: names what is no molecule, or one that the model has no words for.
        """
        rows: list[Tensor] = []
        for text in texts:
            molecule = parse(text)
            found = None if molecule is None else tokens_of([molecule.smiles], self.words)
            if found is None or not len(found):
                said = "is no molecule" if found is None else "is too large for this model, or of symbols it lacks"
                raise UserError(f"{text!r:.60} {said}: give another SMILES")
            rows.append(found)
        return torch.cat(rows)

    def valid(self, media: Int[Tensor, "batch position"]) -> Bool[Tensor, " batch"]:
        """Which samples are molecules: RDKit reads them, and there is an atom in them."""
        flags = [parse(smiles) is not None for smiles in self._read(media)]
        return torch.tensor(flags, dtype=torch.bool, device=media.device)

    def draw(self, media: Int[Tensor, "batch position"]) -> Float[Tensor, "batch 3 side side"]:
        """The molecules as chemists draw them; a red cross for what is none."""
        return torch.stack([picture(smiles) for smiles in self._read(media)])

    def features(self, media: Int[Tensor, "batch position"]) -> Float[Tensor, "batch bits"]:
        """Morgan fingerprints: a distance between features is the root of the number of differing bits."""
        return fingerprints(self._read(media)).to(media.device)

    def training_smiles(self) -> tuple[str, ...]:
        """The molecules that the model was trained on, as canonical SMILES."""
        return training_smiles()

    def _read(self, media: Shaped[Tensor, "batch position ..."]) -> list[str]:
        """SMILES as SELFIES writes them: equal molecules may differ, and none is read by RDKit twice."""
        return smiles_of(whole_tokens(media, len(self.words)), self.words)


def _network() -> MaskedTransformer:
    network = from_pretrained(CHECKPOINT).float()
    assert isinstance(network, MaskedTransformer)
    return network


def _unconditional(prompts: Sequence[str]) -> None:
    """There is nothing to condition on."""


def _tokens(x: Tensor) -> Tensor:
    return x
