"""Drawn text-to-image: "two red circles left of a blue square", a small trained model, and an exact verifier.

The smallest testbed with the problems of a real text-to-image model: counting, binding of attributes, positions, and
combinations of words that training has not seen. Its tilted law is not known; what is known is whether a picture is
right.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.models.protocol import GenerativeModel
from difftilt.models.saving import from_pretrained
from difftilt.models.text_encoder import TextEncoder
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.process.protocol import Condition
from difftilt.rewards.protocol import Reward
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.solvers import EulerSolver
from difftilt.testbeds.shapes_verifier import SCORES, Fidelity, Saturated, ShapesReward, Verifier
from difftilt.testbeds.shapes_world import CATEGORIES, CELL, Category, balanced, parse
from difftilt.training.protocol import Task

CARD = Card(
    name="shapes",
    entry="Shapes",
    paper="Drawn here; judged in the manner of GenEval, Ghosh et al. 2023, arXiv 2310.11513.",
)

CHECKPOINT = Path(__file__).parent / "checkpoints" / "shapes"
CELLS = 4
"""Rows and columns of the lattice."""
TRAINED, HELDOUT = 105, 40
"""Prompts of each category in a task: a category with fewer different ones goes round."""


class Config(BaseConfig):
    """The sampler, the reward, and which prompts."""

    steps: int = Field(default=8, ge=1)
    """Of the default sampler."""
    shift: float = Field(default=3.0, gt=0)
    """Time shift of the grid: layouts are decided at high noise, so most steps are spent there; 1 is uniform."""
    noise_level: float = Field(default=0.7, gt=0)
    """Of the Flow-SDE that steerers propose with; its last step follows the ODE, for its noise would count as paint."""
    guidance: float = Field(default=1.0, ge=0)
    """Scale of classifier-free guidance; 1 is off."""
    reward: Literal["dense", "accuracy", "loose", "saturated"] = "dense"
    """Partly right pictures score partly; only right ones score; or two that are known to be fooled: ``dense`` without
    the rule on stray paint, and ``dense`` with a bonus for saturated colour."""
    categories: tuple[Category, ...] = Field(default=CATEGORIES, min_length=1)
    """What is trained on, in equal parts; all are evaluated."""
    heldout: Literal["validation", "test"] = "validation"
    """Prompts that are evaluated: settings are chosen on ``validation``, numbers are reported on ``test``."""


class Shapes:
    """The testbed: :meth:`task` for methods, and the rewards by name.

    Args:
        config: as in :class:`Config`; None is the defaults.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Trained with the model; frozen from then on."""
        encoder = from_pretrained(CHECKPOINT / "text")
        assert isinstance(encoder, TextEncoder)
        return encoder.requires_grad_(False)

    def rewards(self) -> dict[str, Reward]:
        """Every score of the verifier, and ``fidelity``, which sees what the verifier tolerates."""
        verifier = Verifier()
        rewards: dict[str, Reward] = {name: ShapesReward(name, verifier) for name in SCORES}
        return rewards | {"fidelity": Fidelity(), "saturated": Saturated(verifier)}

    def task(self) -> Task:
        """A new copy of the pretrained model with its reward; the other rewards are held out."""
        config, rewards = self.config, self.rewards()
        # the headline is reported whatever is rewarded; the fooled judges only where they are rewarded
        hidden = {"loose", "saturated", config.reward} - {"accuracy"}
        model = GenerativeModel(
            network=from_pretrained(CHECKPOINT / "denoiser"),
            process=RectifiedFlow(),
            output="velocity",
            shape=(3, CELLS * CELL, CELLS * CELL),
            encode=self.encode,
            decode=decode,
            latents=latents_of,
            null_condition=lambda rows: self.text_encoder.condition([""] * rows),
        )
        return Task(
            name="shapes",
            model=model,
            reward=rewards[config.reward],
            prompts=balanced("train", config.categories, TRAINED),
            heldout_prompts=balanced(config.heldout, CATEGORIES, HELDOUT),
            sampler=Sampler(
                uniform_grid(config.steps, config.shift),
                FlowSDE(config.noise_level),
                EulerSolver(),
                config.guidance,
                clean_end=True,
            ),
            heldout={name: reward for name, reward in rewards.items() if name not in hidden},
            headline="accuracy",
            categories=lambda prompt: parse(prompt).category,
        )

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Token vectors and their mean.

        Raises:
            UserError: for a prompt outside the grammar, which the verifier could not judge.
        """
        for prompt in prompts:
            parse(prompt)
        return self.text_encoder.condition(prompts)


def latents_of(media: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Inverse of :func:`decode`."""
    return 2 * media - 1


def decode(latents: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Latents in [-1, 1] to colours in [0, 1], clipped; a clipped value passes no gradient."""
    return ((latents + 1) / 2).clamp(0, 1)
