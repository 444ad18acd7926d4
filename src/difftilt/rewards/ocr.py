"""How exactly an image shows the words that its prompt quotes, read by tesseract. Needs the extra [ocr].

The program that it calls is Debian's package ``tesseract-ocr``; pip installs only what calls it.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError, quoted
from difftilt.leaves import import_module
from difftilt.rewards.media import images_in
from difftilt.rewards.pictures import as_pictures
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="ocr",
    entry="Ocr",
    paper="Text accuracy by optical character recognition, as in Flow-GRPO (Liu et al. 2025, arXiv 2505.05470); exact "
    "words as in TextDiffuser (Chen et al. 2023, arXiv 2305.10855)",
    needs=("images", "the extra [ocr]", "prompts that quote words"),
)

QUOTES = re.compile(r"\"([^\"]+)\"|“([^”]+)”|(?<!\w)'([^']+)'(?!\w)")
"""Words in quotation marks; an apostrophe within a word is none."""


class Config(BaseConfig):
    """Settings of the reading."""

    form: Literal["edit", "words"] = "edit"
    """``edit``: 1 - edit distance / length, without spaces, 1 where the text is contained; ``words``: the share of the
    words that are read exactly."""
    language: str = Field(default="eng", min_length=1)
    """Of tesseract; others need its package of that language."""
    layout: int = Field(default=6, ge=0, le=13)
    """Page segmentation mode of tesseract: 6 is one block of text, 7 one line, 8 one word, 11 words anywhere."""
    height: int = Field(default=0, ge=0)
    """Images that are lower are enlarged to so many pixels: tesseract wants letters of 20 and more; 0 leaves them."""
    key: str = Field(default="text", min_length=1)
    """Of the metadata that says what should be read; without it, what the prompt quotes."""
    workers: int = Field(default=4, ge=1)
    """Images that are read at the same time, each by a process of one thread."""


class Ocr:
    """Accuracy of the words in an image, in [0, 1]; black-box.

    Args:
        config: see :class:`Config`.
    """

    name = "ocr"
    capabilities = Capabilities(cost=1.0)

    def __init__(self, config: Config | None = None) -> None:
        self.config = Config() if config is None else config
        self.reader = import_module("pytesseract", "ocr")
        languages = self._languages()
        for language in self.config.language.split("+"):
            if language not in languages:
                known = ", ".join(languages)
                raise UserError(f"ocr: tesseract has no language {language!r} here, only {known}: install its package")

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        wanted = wanted_texts(samples, self.config.key)
        found = self.read(images_in(samples.media, self.name))
        measure = text_accuracy if self.config.form == "edit" else word_accuracy
        return torch.tensor(list(map(measure, found, wanted)), device=samples.media.device)

    def read(self, images: Float[Tensor, "batch channel height width"]) -> list[str]:
        """What tesseract reads in each image."""
        read = partial(self.reader.image_to_string, lang=self.config.language, config=f"--psm {self.config.layout}")
        os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # read by tesseract: its threads slow each other down
        with ThreadPoolExecutor(self.config.workers) as pool:
            return list(pool.map(read, map(self._large, as_pictures(images))))

    def _large(self, picture: Image.Image) -> Image.Image:
        if picture.height >= self.config.height:
            return picture
        width = round(picture.width * self.config.height / picture.height)
        return picture.resize((width, self.config.height), Image.Resampling.BICUBIC)

    def _languages(self) -> Sequence[str]:
        missing: Any = self.reader.TesseractNotFoundError
        try:
            return self.reader.get_languages()
        except missing as error:
            raise UserError(
                "ocr calls the program tesseract, which is not on the path: install it (Debian: apt-get install "
                "tesseract-ocr)"
            ) from error


def wanted_texts(samples: Samples, key: str = "text") -> list[str]:
    """What each image should show: its metadata, or all that its prompt quotes, joined by spaces.

    Raises:
        UserError: for a prompt that quotes nothing, without metadata.
    """
    known = samples.metadata.get(key, [None] * len(samples.prompts))
    texts = [
        " ".join("".join(match) for match in QUOTES.findall(prompt)) if text is None else str(text)
        for prompt, text in zip(samples.prompts, known, strict=True)
    ]
    for prompt, text in zip(samples.prompts, texts, strict=True):
        if not text.strip():
            raise UserError(
                f"ocr: prompt {quoted(prompt)} quotes no words, as in 'a sign that says \"open\"', and has no {key}"
            )
    return texts


def text_accuracy(found: str, wanted: str) -> float:
    """1 - min(edit distance, n)/n of lower-case texts without spaces, n the length wanted; 1 if it is contained."""
    read, text = ("".join(words.lower().split()) for words in (found, wanted))
    return 1.0 if text in read else 1 - min(edit_distance(read, text), len(text)) / len(text)


def word_accuracy(found: str, wanted: str) -> float:
    """Share of the words wanted that are among those found, in lower case, without the marks around them."""
    read, words = _words(found), _words(wanted)
    hits = 0
    for word in words:
        if word in read:
            read.remove(word)
            hits += 1
    return hits / len(words)


def _words(text: str) -> list[str]:
    bare = [re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split()]
    return [word for word in bare if word] or text.lower().split()


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of letters that turn one text into the other (Levenshtein 1966)."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, start=1):
        corner, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            corner, row[column] = row[column], min(corner + (letter != other), row[column] + 1, row[column - 1] + 1)
    return row[-1]
