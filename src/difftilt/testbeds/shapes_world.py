"""The world of the shapes testbed: a grammar of prompts, drawn scenes, and splits of the prompts.

A scene is a square lattice of cells of 8 pixels on a grey ground, with at most one object of 7 pixels in a cell, so
objects never touch. A prompt names one group of equal objects (``"two red circles"``), or two different groups, joined
by ``and`` or by a relation (``"two red circles left of a blue square"``).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from itertools import permutations, product
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from difftilt.errors import UserError, quoted
from difftilt.rewards.scenes import RELATIONS, related

CELL = 8
"""Pixels of a cell."""
OBJECT = 7
"""Pixels of an object; the rest of its cell is the gutter to the next one."""

BACKGROUND = (226, 226, 222)
"""Colour of the ground, in levels of 255."""
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 70), "blue": (40, 90, 210), "yellow": (240, 190, 20)}
"""Word -> colour in levels of 255."""
SHAPES = ("circle", "square", "triangle")
NUMBERS = {"a": 1, "two": 2, "three": 3}

WORDS = (
    *NUMBERS,
    *COLOURS,
    *SHAPES,
    *(f"{shape}s" for shape in SHAPES),
    "and",
    "left",
    "right",
    "of",
    "above",
    "below",
)
"""The vocabulary."""

Category = Literal["single", "count", "binding", "position", "count_position"]
CATEGORIES: tuple[Category, ...] = ("single", "count", "binding", "position", "count_position")
"""One object; several equal ones; two different ones; two in a relation; several in a relation to one."""

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Kind:
    """Equal objects.

    Attributes:
        count: 1 to 3.
        colour: one of ``COLOURS``.
        shape: one of ``SHAPES``.
    """

    count: int
    colour: str
    shape: str

    @property
    def text(self) -> str:
        """``"two red circles"``."""
        number = next(word for word, count in NUMBERS.items() if count == self.count)
        return f"{number} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Wish:
    """What a prompt asks for: one or two kinds, and how the first stands to the second.

    Attributes:
        kinds: one, or two that differ in colour or shape.
        relation: of ``RELATIONS``; every object of the first kind is on that side of every object of the second.
    """

    kinds: tuple[Kind, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        """The prompt."""
        return f" {self.relation or 'and'} ".join(kind.text for kind in self.kinds)

    @property
    def category(self) -> Category:
        """By what the prompt tests."""
        several = any(kind.count > 1 for kind in self.kinds)
        if self.relation is not None:
            return "count_position" if several else "position"
        if len(self.kinds) > 1:
            return "binding"
        return "count" if several else "single"


@cache
def parse(prompt: str) -> Wish:
    """The wish that a prompt states.

    Raises:
        UserError: names the first word that is not in the vocabulary, or the form that prompts have.
    """
    words = prompt.split()
    for place, word in enumerate(words):
        if word not in WORDS:
            raise UserError(
                f"prompt {quoted(prompt)}: {quoted(word)} is not in the vocabulary; {_instead(words, place)}"
            )
    for joint in ("and", *RELATIONS):
        first, found, second = f" {' '.join(words)} ".partition(f" {joint} ")
        if found:
            kinds = (_kind(first.split(), prompt), _kind(second.split(), prompt))
            if kinds[0].colour == kinds[1].colour and kinds[0].shape == kinds[1].shape:
                raise UserError(f"prompt {quoted(prompt)}: the two groups must differ in colour or shape")
            return Wish(kinds, None if joint == "and" else joint)
    return Wish((_kind(words, prompt),))


CLOSE = 0.6
"""Least similarity (difflib's ratio) of a word that is offered in place of an unknown one."""


def _instead(words: Sequence[str], place: int) -> str:
    """What to write for an unknown word: a close one that fits its place in the prompt, else all that fit there."""
    word = words[place]
    if word.lower() in WORDS:
        return f"prompts are in lower case: {quoted(word.lower())}"
    joints = [i for i in range(place) if words[i] in _JOINTS]
    group = words[joints[-1] + 1 if joints else 0 :]
    role, fitting = _role(len(words) - len(group), place, group)
    close = get_close_matches(word.lower(), fitting, 2, CLOSE)
    return f"did you mean {' or '.join(close)}?" if close else f"known {role}: {', '.join(fitting)}"


_JOINTS = ("and", *(word for relation in RELATIONS for word in relation.split()))


def _role(start: int, place: int, group: Sequence[str]) -> tuple[str, Sequence[str]]:
    """What stands at a place of a group that begins at ``start``, and the words for it."""
    shapes = SHAPES if group[0] == "a" else [f"{shape}s" for shape in SHAPES] if group[0] in NUMBERS else _FORMS
    roles = (("numbers", tuple(NUMBERS)), ("colours", tuple(COLOURS)), ("shapes", shapes))
    between = ("words between two groups", ("and", *RELATIONS))
    return roles[place - start] if place - start < len(roles) else between


_FORMS = (*SHAPES, *(f"{shape}s" for shape in SHAPES))


def _kind(words: Sequence[str], prompt: str) -> Kind:
    if len(words) == 3 and words[0] in NUMBERS and words[1] in COLOURS:
        count, shape = NUMBERS[words[0]], words[2]
        if count == 1 and shape in SHAPES:
            return Kind(1, words[1], shape)
        if count > 1 and shape[:-1] in SHAPES:
            return Kind(count, words[1], shape[:-1])
    raise UserError(
        f"prompt {quoted(prompt)}: {quoted(' '.join(words))} names no group; a group is a number, a colour and a "
        "shape, as in 'a red circle' or 'two blue squares', and a prompt is one group, or two with 'and', 'left of', "
        "'right of', 'above' or 'below' between"
    )


@cache
def all_wishes() -> tuple[Wish, ...]:
    """Every wish of every category, in a fixed order."""
    kinds = {count: [Kind(count, *pair) for pair in product(COLOURS, SHAPES)] for count in NUMBERS.values()}
    single = [Wish((kind,)) for kind in kinds[1]]
    count = [Wish((kind,)) for number in (2, 3) for kind in kinds[number]]
    pairs = list(permutations(kinds[1], 2))
    binding = [Wish(pair) for pair in pairs]
    position = [Wish(pair, relation) for relation in RELATIONS for pair in pairs]
    several = [
        Wish((Kind(number, a.colour, a.shape), b), relation)
        for number in (2, 3)
        for relation in RELATIONS
        for a, b in pairs
    ]
    return (*single, *count, *binding, *position, *several)


@cache
def splits(category: Category) -> Mapping[Split, tuple[str, ...]]:
    """The prompts of a category: a sixth for validation, a sixth for test, the rest for training.

    The order is that of a hash of the text, so it is fixed and not that of the grammar. Every word and every pair of
    words occurs in training prompts; the held-out combinations do not.
    """
    texts = sorted((wish.text for wish in all_wishes() if wish.category == category), key=_digest)
    part = len(texts) // 6
    return {"validation": tuple(texts[:part]), "test": tuple(texts[part : 2 * part]), "train": tuple(texts[2 * part :])}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def balanced(split: Split, categories: Sequence[Category], each: int) -> list[str]:
    """``each`` prompts of every category in turn; a category that has fewer goes round."""
    columns = [splits(category)[split] for category in categories]
    return [column[place % len(column)] for place in range(each) for column in columns]


def stamp(shape: str, height: int = OBJECT, width: int = OBJECT) -> Bool[Tensor, "height width"]:
    """Pixels of an object of the given size, by nearest pixel of the drawn one."""
    drawn = torch.tensor([[pixel == "#" for pixel in row] for row in _STAMPS[shape]])
    rows = (torch.arange(height) * 2 + 1) * OBJECT // (2 * height)
    columns = (torch.arange(width) * 2 + 1) * OBJECT // (2 * width)
    return drawn[rows][:, columns]


_STAMPS = {
    "circle": ("..###..", ".#####.", "#######", "#######", "#######", ".#####.", "..###.."),
    "square": ("#######",) * 7,
    "triangle": ("...#...", "...#...", "..###..", "..###..", ".#####.", ".#####.", "#######"),
}


def ground(size: int) -> Float[Tensor, "3 size size"]:
    """An empty picture, in [0, 1]."""
    return (torch.tensor(BACKGROUND) / 255)[:, None, None].repeat(1, size, size)


def draw_object(image: Float[Tensor, "3 height width"], colour: str, shape: str, top: int, left: int) -> None:
    """Draw an object with its upper left corner at a pixel, in place."""
    mask = stamp(shape)
    image[:, top : top + OBJECT, left : left + OBJECT][:, mask] = (torch.tensor(COLOURS[colour]) / 255)[:, None]


def layout(wish: Wish, cells: int, generator: torch.Generator) -> Int[Tensor, "objects 2"]:
    """Different cells (row, column) for the objects, those of the first kind first, that obey the relation."""
    total, first = sum(kind.count for kind in wish.kinds), wish.kinds[0].count
    while True:
        flat = torch.randperm(cells**2, generator=generator)[:total]
        place = torch.stack([flat // cells, flat % cells], dim=1)
        if wish.relation is None or related(place[:first], place[first:], wish.relation, 1).all():
            return place


def draw(wish: Wish, generator: torch.Generator, cells: int = 4) -> Float[Tensor, "3 size size"]:
    """A picture of a random layout, in [0, 1]."""
    image, place = ground(cells * CELL), iter(layout(wish, cells, generator).tolist())
    for kind in wish.kinds:
        for _ in range(kind.count):
            row, column = next(place)
            draw_object(image, kind.colour, kind.shape, row * CELL, column * CELL)
    return image
