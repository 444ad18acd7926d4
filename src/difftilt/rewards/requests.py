"""What a prompt asks to be seen, in the form of GenEval: things with counts, colours and places, and too many."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from difftilt.errors import UserError, quoted
from difftilt.rewards.scenes import RELATIONS

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
ALIASES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "computer keyboard": "keyboard",
    "sofa": "couch",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "pottedplant": "potted plant",
    "tvmonitor": "tv",
}
"""Names that GenEval and some detectors use -> those of COCO."""
NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4}


@dataclass(frozen=True)
class Request:
    """Equal things.

    Attributes:
        thing: a class of the detector.
        count: how many.
        colour: None for any.
        relation: to the things of another request, or None.
        target: place of that request.
    """

    thing: str
    count: int = 1
    colour: str | None = None
    relation: str | None = None
    target: int = 0


@dataclass(frozen=True)
class Requests:
    """What should be there, at least, and what would be too many.

    Attributes:
        include: all of them, in order; a relation names an earlier one.
        exclude: thing -> the least number that is wrong.
        counting: whether the number is what is tested, which asks for surer detections.
    """

    include: tuple[Request, ...]
    exclude: Mapping[str, int]
    counting: bool = False


def canonical(thing: str) -> str:
    """The one name of a thing that has several."""
    return ALIASES.get(thing, thing)


def read_requests(values: Mapping[str, Any], prompt: str) -> Requests:
    """From ``include``, ``exclude`` and ``tag`` as the lines of GenEval's ``evaluation_metadata.jsonl`` have them.

    Raises:
        UserError: names the prompt and what is wrong.
    """
    try:
        include = tuple(_request(one) for one in values["include"])
        exclude = {canonical(str(one["class"])): int(one["count"]) for one in values.get("exclude", ())}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"geneval: the metadata of prompt {quoted(prompt)} has no class and count: {error}") from error
    for place, one in enumerate(include):
        if one.relation is not None and (one.relation not in RELATIONS or not 0 <= one.target < place):
            raise UserError(f"geneval: prompt {quoted(prompt)}: no relation {one.relation!r} to request {one.target}")
    return Requests(include, exclude, values.get("tag") == "counting")


def _request(one: Mapping[str, Any]) -> Request:
    relation, target = one.get("position") or (None, 0)
    return Request(canonical(str(one["class"])), int(one["count"]), one.get("color"), relation, int(target))


def parse_requests(prompt: str, things: Collection[str]) -> Requests:
    """From a prompt such as "a photo of two red cars left of a teddy bear".

    Groups are joined by "and", or two of them by a relation. A number above one may not be exceeded.

    Args:
        prompt: with or without "a photo of".
        things: classes of the detector, by their canonical names.

    Raises:
        UserError: names what is not understood.
    """
    text = re.sub(r"^a (photo|picture|image) of ", "", prompt.strip().rstrip(".").lower())
    for relation in RELATIONS:
        first, found, second = text.partition(f" {relation} ")
        if found:
            target, one = _group(second, prompt, things), _group(first, prompt, things)
            include = (target, Request(one.thing, one.count, one.colour, relation, 0))
            return Requests(include, {})
    groups = tuple(_group(part, prompt, things) for part in text.split(" and "))
    exclude = {one.thing: one.count + 1 for one in groups if one.count > 1}
    return Requests(groups, exclude, bool(exclude))


def _group(text: str, prompt: str, things: Collection[str]) -> Request:
    words = text.split()
    count = NUMBERS.get(words[0], 0) if words else 0
    colour = words[1] if len(words) > 2 and words[1] in COLOURS else None
    name = " ".join(words[1 if colour is None else 2 :])
    thing = next((form for form in map(canonical, _singular(name)) if form in things), None)
    if not count or thing is None:
        raise UserError(
            f"geneval: prompt {quoted(prompt)}: {quoted(text)} is not a number, a colour where one is wanted, "
            "and something that the detector knows, as in 'two red cars'; give the requests as metadata (include, "
            "exclude) instead"
        )
    return Request(thing, count, colour)


def _singular(name: str) -> Sequence[str]:
    """A name and what it may be the plural of."""
    forms = [name, name.removesuffix("s"), name.removesuffix("es")]
    forms += [re.sub(old, new, name) for old, new in (("ies$", "y"), ("ves$", "fe"), ("people$", "person"))]
    return forms
