"""Laws of the initial noise that were learned, one for each prompt: an artefact that a file can hold."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from difftilt.errors import UserError, quoted
from difftilt.sampling.diagonal import DiagonalGaussian
from difftilt.trees import take

REMEDY = "fit it again with `difftilt train`"


@dataclass(frozen=True)
class Learned:
    """What was learned: the artefact.

    Attributes:
        prompts: whose laws they are.
        policy: of the initial noise of each, unscaled: the prior is N(0, I).
        history: name -> (iterations, prompts), the learner's metrics; ``reward`` is the mean of an iteration's samples.
    """

    prompts: tuple[str, ...]
    policy: DiagonalGaussian
    history: dict[str, Tensor]

    def law(self, prompts: Sequence[str], shape: tuple[int, ...]) -> DiagonalGaussian:
        """The laws of these prompts for a model of this shape; repeated prompts take turns among equal ones.

        Raises:
            UserError: for a prompt that nothing was learned of, or another shape.
        """
        found: list[int] = []
        for place, prompt in enumerate(prompts):
            mine = [row for row, known in enumerate(self.prompts) if known == prompt]
            if not mine:
                raise UserError(
                    f"no noise was learned for the prompt {quoted(prompt)}: name it in steering.prompts of `difftilt "
                    "train`, or steer without a fit"
                )
            found.append(mine[prompts[:place].count(prompt) % len(mine)])
        own = tuple(self.policy.mean.shape[1:])
        if own != shape:
            raise UserError(f"the noise was fitted for the shape {own}, and this model has {shape}: fit it again")
        return take(self.policy, torch.tensor(found))

    def state_dict(self) -> dict[str, Tensor]:
        """As tensors; texts are their bytes."""
        text = torch.tensor(list(json.dumps(self.prompts).encode()), dtype=torch.uint8)
        history = {f"history/{name}": column for name, column in self.history.items()}
        return {"mean": self.policy.mean, "std": self.policy.std, "prompts": text, **history}

    @staticmethod
    def of_state(state: Mapping[str, Tensor]) -> "Learned":
        """From the tensors.

        Raises:
            UserError: if these are no laws of noise.
        """
        absent = [name for name in ("mean", "std", "prompts") if name not in state]
        if absent:
            raise UserError(f"this is no fitted noise: {', '.join(absent)} is missing; {REMEDY}")
        mean, std, prompts = state["mean"], state["std"], _texts(state["prompts"])
        if mean.shape != std.shape or mean.shape[:1] != (len(prompts),):
            raise UserError(
                f"this is no fitted noise: mean {tuple(mean.shape)} and std {tuple(std.shape)} are not one row for "
                f"each of {len(prompts)} prompts; {REMEDY}"
            )
        if not bool(mean.isfinite().all() & std.isfinite().all() & (std > 0).all()):
            raise UserError(
                f"this is no fitted noise: mean and std must be finite, and std greater than 0, everywhere; {REMEDY}"
            )
        history = {name.removeprefix("history/"): leaf for name, leaf in state.items() if name.startswith("history/")}
        return Learned(prompts, DiagonalGaussian(mean, std), history)


def _texts(packed: Tensor) -> tuple[str, ...]:
    """The prompts that a tensor of bytes holds."""
    known: object = None
    if packed.dtype == torch.uint8 and packed.dim() == 1:
        try:
            known = json.loads(bytes(packed.cpu().tolist()))
        except ValueError:
            known = None
    found = cast(list[object], known) if isinstance(known, list) else [None]
    if not all(isinstance(prompt, str) for prompt in found):
        raise UserError(f"this is no fitted noise: its prompts cannot be read; {REMEDY}")
    return tuple(map(str, found))
