"""The 1797 real 8×8 digits of scikit-learn, with two attributes and three fixed splits.

Prompts name two attributes, ``"bold three"``: the digit, and the weight of the stroke. A digit is bold if its ink (mean
grey level) is above the median of its class among the training images, else thin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from difftilt.errors import UserError, quoted
from difftilt.sampling.noise import Noise

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STROKES = ("thin", "bold")
CLASSES = len(DIGITS) * len(STROKES)

TEST_IMAGES = 360
"""Images that no network of this testbed has seen."""

HELDOUT = frozenset({"thin one", "thin four", "thin seven", "bold two", "bold five", "bold eight"})
"""Prompts that training never sees: each word of them occurs in training prompts, the combination does not."""


def all_prompts() -> list[str]:
    """The 20 prompts; the label of a prompt is its place, 2·digit + bold."""
    return [f"{stroke} {digit}" for digit in DIGITS for stroke in STROKES]


def labels_of(prompts: Sequence[str]) -> Int[Tensor, " prompts"]:
    """Label 0..19 of each prompt.

    Raises:
        UserError: for a prompt that is not one of :func:`all_prompts`.
    """
    known = {prompt: label for label, prompt in enumerate(all_prompts())}
    strange = [prompt for prompt in prompts if prompt not in known]
    if strange:
        raise UserError(f"{quoted(strange[0])} is no prompt of the digits: say 'thin' or 'bold' and a digit in words")
    return torch.tensor([known[prompt] for prompt in prompts], dtype=torch.int64)


def digit_of(prompts: Sequence[str]) -> Int[Tensor, " prompts"]:
    """The digit 0..9 that each prompt asks for."""
    return labels_of(prompts) // len(STROKES)


@dataclass(frozen=True)
class DigitImages:
    """Images with their attributes.

    Attributes:
        images: (count, 1, 8, 8) in [0, 1].
        digits: 0..9.
        labels: 2·digit + bold.
    """

    images: Float[Tensor, "count 1 8 8"]
    digits: Int[Tensor, " count"]
    labels: Int[Tensor, " count"]

    def rows(self, index: Int[Tensor, " kept"]) -> "DigitImages":
        """The images at ``index``."""
        return DigitImages(self.images[index], self.digits[index], self.labels[index])


@dataclass(frozen=True)
class DigitSplits:
    """Disjoint parts of the data, fixed for good.

    Attributes:
        first, second: halves of the training images: the two classifiers learn from one half each.
        test: never trained on by anything.
    """

    first: DigitImages
    second: DigitImages
    test: DigitImages

    @property
    def train(self) -> DigitImages:
        """Both halves: what the generative model learns from."""
        halves = (self.first, self.second)
        return DigitImages(
            torch.cat([half.images for half in halves]),
            torch.cat([half.digits for half in halves]),
            torch.cat([half.labels for half in halves]),
        )


@cache
def load_splits() -> DigitSplits:
    """The data as shipped with scikit-learn: nothing is downloaded, and the splits never change."""
    # imported here: scikit-learn takes a second to import, and a task only needs it for its reference images
    from sklearn.datasets import load_digits

    pixels, target = cast(tuple[NDArray[np.float64], NDArray[np.int64]], load_digits(return_X_y=True))
    images = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    digits = torch.from_numpy(target.astype(np.int64))
    order = Noise(0).permutation(len(images), purpose="digits split")
    train, test = order[TEST_IMAGES:], order[:TEST_IMAGES]
    ink = images.mean((1, 2, 3))
    median = torch.stack([ink[train][digits[train] == digit].median() for digit in range(10)])
    labels = 2 * digits + (ink > median[digits]).long()
    everything = DigitImages(images, digits, labels)
    half = len(train) // 2
    return DigitSplits(everything.rows(train[:half]), everything.rows(train[half:]), everything.rows(test))
