"""The digits testbed: what its shipped checkpoint is worth, and that its held-out parts are held out."""

from functools import cache

import torch
from torch import Tensor

from difftilt.checks.proof import Proof
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.testbeds.digits import CHECKPOINT, Digits
from difftilt.testbeds.digits_data import all_prompts, load_splits

_BED = Digits()
_COUNT = 1000


def _prompts(count: int = _COUNT) -> list[str]:
    return [all_prompts()[i % len(all_prompts())] for i in range(count)]


@cache
def _base_images() -> Tensor:
    """Images of the base by 10 Euler steps, all prompts in turn."""
    task = _BED.task()
    index, noise = torch.arange(_COUNT), Noise(0)
    start = noise.normal(index, task.model.shape, purpose="prior")
    with torch.no_grad():
        condition = task.model.encode(_prompts())
        x_0 = sample(denoiser(task.model), task.sampler, start, condition, noise=noise, index=index)
        return task.model.decode(x_0)


def _score(reward: str, images: Tensor, prompts: list[str]) -> Tensor:
    group = torch.zeros(len(images), dtype=torch.int64)
    return _BED.rewards()[reward].score(Samples(images, prompts, prompts, group))


def _test_accuracy(which: int) -> float:
    test = load_splits().test
    with torch.no_grad():
        return float((_BED.classifiers[which](test.images).argmax(1) == test.digits).double().mean())


def _base_accuracy() -> float:
    return _BED.accuracy(_base_images(), _prompts())


def _mean_reward() -> float:
    return float(_score("digit", _base_images(), _prompts()).mean())


def _stroke_share() -> float:
    """Difference in ink between bold and thin prompts of the base over that of the real training images."""
    train = load_splits().train
    bold = torch.tensor([prompt.startswith("bold") for prompt in _prompts()])
    made, real = _base_images().mean((1, 2, 3)), train.images.mean((1, 2, 3))
    marked = train.labels % 2 == 1
    return float((made[bold].mean() - made[~bold].mean()) / (real[marked].mean() - real[~marked].mean()))


def _distance_ratio() -> float:
    """Fréchet distance of the base to the training digits over that of plain noise."""
    images = _base_images()
    noise = Noise(1).uniform(torch.arange(_COUNT), (1, 8, 8), purpose="check")
    return _BED.distance_to_data(images) / _BED.distance_to_data(noise)


def _shared_prompts() -> float:
    """Prompts that are both trained and held out, plus words of held-out prompts that training never meets."""
    task = _BED.task()
    trained, heldout = set(task.prompts), set(task.heldout_prompts)
    words = {word for prompt in trained for word in prompt.split()}
    unknown = {word for prompt in heldout for word in prompt.split()} - words
    return float(len(trained & heldout) + len(unknown) + abs(len(trained | heldout) - len(all_prompts())))


def _shared_images() -> float:
    """Rows of the data set that two of the three splits share: 1797 less the rows in all of them together."""
    splits = load_splits()
    return 1797.0 - sum(len(part.images) for part in (splits.first, splits.second, splits.test))


@cache
def _fooling_images() -> Tensor:
    """Gradient ascent on the pixels of grey noise for the reward alone: 50 signed steps of 0.05."""
    prompts = _prompts()
    pixels = Noise(0).uniform(torch.arange(_COUNT), (1, 8, 8), purpose="fool")
    for _ in range(50):
        pixels.requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(_score("digit", pixels, prompts).clamp(min=1e-12).log().sum(), pixels)
        pixels = (pixels + 0.05 * slope.sign()).clamp(0, 1).detach()
    return pixels


def _fooling_reward() -> float:
    return float(_score("digit", _fooling_images(), _prompts()).mean())


def _fooling_distance() -> float:
    return _BED.distance_to_data(_fooling_images()) / _BED.distance_to_data(_base_images())


def _nearness_gap() -> float:
    """Loss of nearness from the base to the tuned pixels, in standard deviations of the base's own."""
    base, tuned = (_score("nearness", images, _prompts()) for images in (_base_images(), _fooling_images()))
    return float((base.mean() - tuned.mean()) / base.std())


def _megabytes() -> float:
    return sum(file.stat().st_size for file in CHECKPOINT.iterdir()) / 1e6


PROOFS = (
    # 0.95 is the demand; 360 test images give a standard error of 0.011 there
    Proof("the reward's classifier recognises unseen real digits", lambda: _test_accuracy(0), at_least=0.95),
    Proof("so does the held-out classifier", lambda: _test_accuracy(1), at_least=0.95),
    # neither useless nor finished: what a method can gain is at least several standard errors of 1000 samples
    Proof("the base draws the prompted digit, by the held-out classifier", _base_accuracy, 0.85, 0.97),
    Proof("the base leaves room for the reward", _mean_reward, 0.7, 0.9),
    Proof("bold prompts have more ink than thin ones, as much as in the data", _stroke_share, 0.8, 1.2),
    Proof("the base is near the data: Fréchet distance over that of noise", _distance_ratio, at_most=0.1),
    Proof("held-out prompts are new combinations of known words (violations)", _shared_prompts, at_most=0),
    Proof("the splits of the data are disjoint (rows too many)", _shared_images, at_least=0, at_most=0),
    Proof("pixels tuned to the reward alone reach a reward that no real digit needs", _fooling_reward, at_least=0.99),
    Proof("and the Fréchet distance tells them from the base, many times over", _fooling_distance, at_least=5),
    Proof("so does nearness, in standard deviations of the base", _nearness_gap, at_least=3),
    Proof("the checkpoint is small, in megabytes", _megabytes, at_most=1.5),
)
