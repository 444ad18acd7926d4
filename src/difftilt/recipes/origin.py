"""What a learned part was learned from: kept beside it, and compared before it is used.

Shapes and grids do not tell a value that was learned for another reward, other weights of the model or another
temperature. So a few samples of the model are kept with their scores and with a prediction on their way, beside the
fingerprint of the model (which sees no closed form) and the settings that the learned part depends on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser, device_of
from difftilt.models.fingerprint import fingerprint
from difftilt.models.ledger import Ledger
from difftilt.models.protocol import Denoiser
from difftilt.process.protocol import Prediction
from difftilt.rewards.prompts import plain, prompt_of
from difftilt.rewards.protocol import Reward, Samples
from difftilt.rewards.scoring import evaluate, same_scores
from difftilt.sampling.noise import Apart
from difftilt.sampling.protocol import Moment, NoiseSource
from difftilt.sampling.rollout import sample_by_kernel, start_state
from difftilt.steering.protocol import Learns, Lesson
from difftilt.training.protocol import Task
from difftilt.trees import leaves, to_device

SAMPLES = 4
"""Samples whose scores tell one reward from another."""
PREFIX = "origin/"
"""Begins the names of the tensors that are no part of what was learned."""
STATES = ("x_0", "x_t", "t", "predicted")
"""Tensors of an origin, one row for each sample."""
KEY = "origin"
"""Of the metadata of the file."""


@dataclass(frozen=True)
class Origin:
    """What a learned part belongs to.

    Attributes:
        weights: fingerprint of the model.
        guidance: of the sampler that it was learned under.
        rewards: name -> scores of the samples; empty where a reward does not repeat itself.
        names: of the rewards, in order.
        settings: of the steerer that the learned part depends on.
        prompts: of the samples.
        x_0: the samples.
        x_t, t: their states halfway down the grid, and its time.
        predicted: what the model said there, (samples, numbers).
    """

    weights: str
    guidance: float
    names: tuple[str, ...]
    settings: Mapping[str, float | str]
    prompts: tuple[str, ...]
    x_0: Tensor
    x_t: Tensor
    t: Tensor
    predicted: Tensor
    rewards: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """To be kept beside what was learned."""
        own = {f"{PREFIX}{name}": getattr(self, name) for name in STATES}
        return own | {f"{PREFIX}score/{name}": column for name, column in self.rewards.items()}

    def metadata(self) -> dict[str, str]:
        """Everything else, as text."""
        known = {
            "weights": self.weights,
            "guidance": self.guidance,
            "names": list(self.names),
            "settings": dict(self.settings),
            "prompts": [plain(prompt) for prompt in self.prompts],
        }
        return {KEY: json.dumps(known)}


def lesson_of(steerer: object, task: Task, reward: Reward) -> Lesson:
    """What the steerer learns from this reward; of one that does not say, the reward itself."""
    return steerer.lesson(task, reward) if isinstance(steerer, Learns) else Lesson({reward.name: reward})


def origin_of(
    steerer: object, task: Task, denoise: Denoiser, reward: Reward, prompts: Sequence[str], noise: NoiseSource
) -> Origin:
    """Draw the samples, and score them twice: a reward that does not repeat itself tells nothing. Both are counted."""
    lesson = lesson_of(steerer, task, reward)
    device = device_of(task.model.network)
    texts, index = [prompts[row % len(prompts)] for row in range(SAMPLES)], torch.arange(SAMPLES, device=device)
    apart, seen = Apart(noise, "origin"), list[Moment]()
    with torch.no_grad():
        condition = to_device(task.model.encode(texts), device)
        x = start_state(task.model.process, apart, index, task.model.shape, condition)
        x_0 = sample_by_kernel(
            denoise, task.sampler, x, condition, noise=apart, index=index, observe=lambda moment, _: seen.append(moment)
        ).x_0
    middle = seen[len(seen) // 2]
    first, again = (_scores(lesson.rewards, task, denoise.ledger, texts, x_0) for _ in range(2))
    kept = {name: column for name, column in first.items() if same_scores({name: again[name]}, {name: column})}
    return Origin(
        fingerprint(task.model.network),
        task.sampler.guidance,
        tuple(lesson.rewards),
        lesson.settings,
        tuple(texts),
        x_0.cpu(),
        middle.x_t.cpu(),
        middle.t.cpu(),
        _numbers(middle.prediction).cpu(),
        {name: column.cpu() for name, column in kept.items()},
    )


def _scores(
    rewards: Mapping[str, Reward], task: Task, ledger: Ledger, prompts: Sequence[str], x_0: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        media = task.model.decode(x_0.to(device_of(task.model.network)))
    group = torch.arange(len(media), device=media.device)
    samples = Samples.of(media, prompts, group)
    with torch.no_grad():
        return {name: evaluate(reward, samples, ledger).total for name, reward in rewards.items()}


def read_origin(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> Origin | None:
    """Take it back from a file; None where the file has none.

    Raises:
        ValueError: if it is damaged.
    """
    if metadata is None or KEY not in metadata or any(f"{PREFIX}{name}" not in tensors for name in STATES):
        return None
    scores = f"{PREFIX}score/"
    rewards = {name.removeprefix(scores): column for name, column in tensors.items() if name.startswith(scores)}
    states = {name: tensors[f"{PREFIX}{name}"] for name in STATES}
    try:
        origin = _origin(json.loads(metadata[KEY]), rewards, states)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what it was learned from is damaged: {error}") from error
    rows = {leaf.shape[:1] for leaf in (*states.values(), *rewards.values())}
    if rows != {(len(origin.prompts),)}:
        raise ValueError("what it was learned from is damaged: its tensors have not one row for each sample")
    return origin


def _origin(known: dict[str, Any], rewards: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> Origin:
    return Origin(
        str(known["weights"]),
        float(known["guidance"]),
        tuple(map(str, known["names"])),
        dict(known["settings"]),
        tuple(map(prompt_of, known["prompts"])),
        rewards=rewards,
        **states,
    )


def check_origin(where: str, origin: Origin, steerer: object, task: Task, reward: Reward) -> None:
    """Refuse a learned part of another model, reward or setting; scores a few samples, outside the call's ledger.

    Raises:
        UserError: one sentence with all that differs and what to do.
    """
    lesson, found = lesson_of(steerer, task, reward), list[str]()
    if origin.guidance != task.sampler.guidance:
        found.append(f"guidance {origin.guidance:g} (here {task.sampler.guidance:g})")
    elif origin.weights != fingerprint(task.model.network) or not _predicts_so(origin, task):
        found.append("another model")
    changed = [name for name, there in origin.settings.items() if lesson.settings.get(name) != there]
    # the first alone: another regression may have no temperature
    for name in changed[:1]:
        here = lesson.settings.get(name)
        found.append(f"{name} {_short(origin.settings[name])} (here {'none' if here is None else _short(here)})")
    if set(origin.names) != set(lesson.rewards):
        here = ", ".join(map(repr, lesson.rewards))
        found.append(f"the reward {', '.join(map(repr, origin.names))} (here {here})")
    elif not found:
        # scored only where the samples are those of this model
        known = {name: lesson.rewards[name] for name in origin.rewards}
        fresh = _scores(known, task, Ledger(), origin.prompts, origin.x_0)
        changed = [name for name in known if not same_scores({name: fresh[name]}, {name: origin.rewards[name]})]
        found += [f"a reward {name!r} that scores the same samples otherwise" for name in changed]
    if found:
        raise UserError(
            f"{where} was learned for {', '.join(found)}: fit the steerer again with `difftilt train` and these "
            "settings, or set them back"
        )


def _predicts_so(origin: Origin, task: Task) -> bool:
    """Whether the model says of the kept states what it said."""
    if origin.x_t.shape[1:] != tuple(task.model.shape):
        return False
    device = device_of(task.model.network)
    denoise = denoiser(task.model, guidance=task.sampler.guidance)
    x, t = origin.x_t.to(device), origin.t.to(device)
    with torch.no_grad():
        condition = to_device(task.model.encode(origin.prompts), device)
        predicted = _numbers(denoise(x, t, denoise.prepare(x, t, condition)))
    return same_scores({"": predicted}, {"": origin.predicted})


def _numbers(prediction: Prediction) -> Tensor:
    """All floating point numbers of a prediction, one row for each state."""
    parts = [leaf.float().reshape(len(leaf), -1) for leaf in leaves(prediction) if leaf.is_floating_point()]
    return torch.cat(parts, 1)


def _short(value: float | str) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
