"""The shapes testbed: the verifier is exact on true renders, and the shipped model leaves room to learn."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.testbeds.shapes import CHECKPOINT, Config, Shapes
from difftilt.testbeds.shapes_verifier import judge, see
from difftilt.testbeds.shapes_world import CATEGORIES, Category, all_wishes, balanced, draw, parse, splits

_RENDERS = 3000
_EACH = 80


@cache
def _judgements() -> tuple[list[float], list[float]]:
    """Of true renders: accuracy for the prompt that was drawn, and for another one."""
    generator, wishes = torch.Generator().manual_seed(0), all_wishes()
    chosen = [wishes[i] for i in torch.randint(len(wishes), (_RENDERS,), generator=generator).tolist()]
    pictures = see(torch.stack([draw(wish, generator) for wish in chosen]))
    own = [judge(picture, wish).accuracy for picture, wish in zip(pictures, chosen, strict=True)]
    others = chosen[1:] + chosen[:1]
    return own, [judge(picture, wish).accuracy for picture, wish in zip(pictures, others, strict=True)]


def _renders_right() -> float:
    return sum(_judgements()[0]) / _RENDERS


def _strangers_right() -> float:
    return sum(_judgements()[1]) / _RENDERS


@cache
def _base() -> tuple[Tensor, list[str]]:
    """Pictures of the shipped model on the test prompts, and the prompts."""
    bed = Shapes(Config(heldout="test"))
    task, prompts = bed.task(), balanced("test", CATEGORIES, _EACH)
    index, noise = torch.arange(len(prompts)), Noise(0)
    start = noise.normal(index, task.model.shape, purpose="prior")
    with torch.no_grad():
        condition = task.model.encode(prompts)
        x_0 = sample(denoiser(task.model), task.sampler, start, condition, noise=noise, index=index)
        return task.model.decode(x_0), prompts


def _score(name: str) -> Tensor:
    images, prompts = _base()
    samples = Samples(images, prompts, prompts, torch.zeros(len(images), dtype=torch.int64))
    return Shapes().rewards()[name].score(samples)


def _base_accuracy() -> float:
    return float(_score("accuracy").double().mean())


def _base_accuracy_of(category: Category) -> float:
    places = [parse(prompt).category == category for prompt in _base()[1]]
    return float(_score("accuracy")[torch.tensor(places)].double().mean())


def _base_fidelity() -> float:
    return float(_score("fidelity").double().mean())


def _shared_prompts() -> float:
    parts = [{prompt for category in CATEGORIES for prompt in splits(category)[split]} for split in _SPLITS]
    return float(len(parts[0] & parts[1]) + len(parts[0] & parts[2]) + len(parts[1] & parts[2]))


_SPLITS = ("train", "validation", "test")


def _megabytes() -> float:
    return sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) / 1e6


PROOFS = (
    Proof("the verifier finds true renders right", _renders_right, at_least=0.98),
    # renders of one prompt may also show another: "and" where the first stands left of the second
    Proof("the verifier finds renders of another prompt wrong", _strangers_right, at_most=0.01),
    Proof("prompts that two splits share", _shared_prompts, at_most=0),
    Proof("megabytes of the shipped model", _megabytes, at_most=5),
    Proof("the base is worth aligning: its accuracy on test prompts leaves room", _base_accuracy, 0.4, 0.75),
    Proof("the base draws what is easy: one object", lambda: _base_accuracy_of("single"), at_least=0.9),
    Proof("pictures of the base have the colours of the world", _base_fidelity, at_least=-0.01),
)
