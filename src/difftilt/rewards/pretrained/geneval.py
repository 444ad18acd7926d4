"""Whether an image holds the things that its prompt asks for, with their number, colour and place, by a detector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.leaves import nearest
from difftilt.rewards.pictures import as_pictures
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.clip import Clip, load_clip
from difftilt.rewards.pretrained.loading import PretrainedOptions, Text, frozen, load_network, load_part, needs_both
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.rewards.requests import COLOURS, Request, Requests, canonical, parse_requests, read_requests
from difftilt.rewards.scenes import Judgement, compare, share_related

CARD = Card(
    name="geneval",
    entry="geneval",
    paper="Ghosh et al. 2023, GenEval (arXiv 2310.11513)",
    needs=("images", "the extra [rewards]", "prompts or metadata that name things"),
)

Form = Literal["geneval", "dense", "count", "colour", "shape", "binding", "position"]
MOST = 16
"""Detections of one class that are looked at."""
NEAR = 0.1
"""Share of the summed sizes of two things that their centres must be apart, in each direction."""
TEMPLATES = ("a photo of a {colour} {thing}", "a photo of a {colour}-colored {thing}", "a photo of a {colour} object")


class Config(PretrainedOptions):
    """Settings of the detector and the verdict."""

    source: Text = "hustvl/yolos-base"
    """Folder or hub id of an object detector of ``transformers`` with its image processor."""
    clip: Text | None = "openai/clip-vit-large-patch14"
    """Folder or hub id of the ``CLIPModel`` that names colours; null refuses prompts with colours."""
    form: Form = "geneval"
    """``geneval`` is the published verdict, 0 or 1; the others are graded, see the page."""
    threshold: float = Field(default=0.3, ge=0, le=1)
    """Least confidence of a detection."""
    counting_threshold: float = Field(default=0.9, ge=0, le=1)
    """The same where the number of things is tested."""


@dataclass(frozen=True)
class Box:
    """One detection.

    Attributes:
        centre: (row, column) in pixels.
        size: (height, width) in pixels.
        colour: once it has been named.
    """

    centre: tuple[float, float]
    size: tuple[float, float]
    colour: str | None = None


Found = Mapping[str, Sequence[Box]]
"""Class -> its detections, the surest first."""


class GenEval(PretrainedReward):
    """The verdict on what is detected, in [0, 1]; black-box.

    Metadata ``include``, with ``exclude`` and ``tag`` where they are there, says what is asked for; else the prompt is
    read.

    Args:
        model: object detector.
        processor: its image processor, with ``post_process_object_detection``.
        clip: names colours; None refuses to.
        options: see :class:`Config`.
    """

    capabilities = Capabilities(cost=2.0)

    def __init__(self, model: Any, processor: Any, clip: Clip | None, options: Config) -> None:
        parts = {"detector": model} if clip is None else {"detector": model, "clip": clip.model}
        super().__init__("geneval", nn.ModuleDict(parts), options)
        self.model, self.processor, self.clip, self.config = model, processor, clip, options
        self.names = {int(label): canonical(name) for label, name in model.config.id2label.items()}

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        wanted = [self._requests(samples, row) for row in range(len(samples.group))]
        seen = self.detect(samples.media, [self._threshold(one) for one in wanted])
        scores = [self._score(*row) for row in zip(samples.media, seen, wanted, strict=True)]
        return torch.tensor(scores, device=samples.media.device)

    def detect(self, images: Float[Tensor, "batch channel height width"], least: Sequence[float]) -> list[Found]:
        """What is seen in each image with at least its confidence."""
        inputs = self.processor(images=as_pictures(images), return_tensors="pt").to(images.device)
        outputs = self.model(**{name: value.to(self.model.dtype) if value.is_floating_point() else value
                                for name, value in inputs.items()})  # fmt: skip
        sizes = torch.tensor([images.shape[-2:]] * len(images))
        found = self.processor.post_process_object_detection(outputs, threshold=min(least), target_sizes=sizes)
        return [self._sorted(one, limit) for one, limit in zip(found, least, strict=True)]

    def _sorted(self, found: Mapping[str, Tensor], least: float) -> Found:
        seen = dict[str, list[Box]]()
        for place in found["scores"].argsort(descending=True).tolist():
            boxes = seen.setdefault(self.names[int(found["labels"][place])], [])
            if float(found["scores"][place]) > least and len(boxes) < MOST:
                left, top, right, bottom = found["boxes"][place].tolist()
                boxes.append(Box(((top + bottom) / 2, (left + right) / 2), (bottom - top, right - left)))
        return seen

    def _requests(self, samples: Samples, row: int) -> Requests:
        known = {key: samples.metadata[key][row] for key in ("include", "exclude", "tag") if key in samples.metadata}
        values = {key: value for key, value in known.items() if value is not None}  # lines have different keys
        if "include" not in values:
            return parse_requests(samples.prompts[row], set(self.names.values()))
        wanted = read_requests(values, samples.prompts[row])
        for thing in (*(one.thing for one in wanted.include), *wanted.exclude):
            if thing not in self.names.values():
                raise UserError(f"geneval: this detector knows no {thing!r}; {nearest(thing, self.names.values())}")
        return wanted

    def _threshold(self, wanted: Requests) -> float:
        return self.config.counting_threshold if wanted.counting else self.config.threshold

    def _score(self, image: Tensor, seen: Found, wanted: Requests) -> float:
        coloured = {one.thing for one in wanted.include if one.colour is not None}
        named = {
            thing: self.name_colours(image, boxes, thing) if thing in coloured else boxes
            for thing, boxes in seen.items()
        }
        if self.config.form == "geneval":
            return float(verdict(named, wanted))
        return float(getattr(judge(named, wanted), self.config.form))

    def name_colours(self, image: Float[Tensor, "channel height width"], boxes: Sequence[Box], thing: str) -> list[Box]:
        """The boxes with the likeliest colour of what is in them, by CLIP, of :data:`~.requests.COLOURS`."""
        if self.clip is None:
            raise UserError("geneval: this prompt asks for a colour: name a CLIP model that tells colours (clip=...)")
        texts = [pattern.format(colour=colour, thing=thing) for colour in COLOURS for pattern in TEMPLATES]
        kinds = normalize(self.clip.texts(texts).unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)
        crops = [_crop(image, box) for box in boxes]
        likely = [int((self.clip.images(crop[None]) @ kinds.T).argmax()) for crop in crops]
        return [Box(box.centre, box.size, COLOURS[place]) for box, place in zip(boxes, likely, strict=True)]


def _crop(image: Tensor, box: Box) -> Tensor:
    """The pixels of a box, at least one."""
    (row, column), (height, width) = box.centre, box.size
    top, left = (max(0, min(round(low), edge - 1)) for low, edge in
                 ((row - height / 2, image.shape[1]), (column - width / 2, image.shape[2])))  # fmt: skip
    bottom, right = max(top + 1, round(row + height / 2)), max(left + 1, round(column + width / 2))
    return image[:, top:bottom, left:right]


def verdict(seen: Found, wanted: Requests) -> bool:
    """The published one: of each request the surest things are looked at, as many as were asked for.

    All must have the colour, and stand to all of the other request as the relation says; and nothing is too many.
    """
    matched = list[Sequence[Box] | None]()
    for one in wanted.include:
        boxes = seen.get(one.thing, ())[: one.count]
        right = len(boxes) == one.count and all(one.colour in (None, box.colour) for box in boxes)
        target = matched[one.target] if one.relation is not None else None
        if one.relation is not None:
            right = right and target is not None and _share(boxes, target, one.relation) == 1
        matched.append(boxes if right else None)
    many = any(len(seen.get(thing, ())) >= count for thing, count in wanted.exclude.items())
    return None not in matched and not many


def judge(seen: Found, wanted: Requests) -> Judgement:
    """Graded, and strict about more than was asked for: of the kinds asked for, all that are seen count."""
    asked = [(one.colour, one.thing) for one in wanted.include for _ in range(one.count)]
    coloured = {one.thing for one in wanted.include if one.colour is not None}
    kinds = dict.fromkeys(one.thing for one in wanted.include)
    found = [(box.colour if thing in coloured else None, thing) for thing in kinds for box in seen.get(thing, ())]
    shares = [
        _share(_meant(seen, one), _meant(seen, wanted.include[one.target]), one.relation)
        for one in wanted.include
        if one.relation is not None
    ]
    return compare(asked, found, min(shares, default=1.0))


def _meant(seen: Found, one: Request) -> Sequence[Box]:
    return [box for box in seen.get(one.thing, ()) if one.colour in (None, box.colour)]


def _share(first: Sequence[Box], second: Sequence[Box], relation: str) -> float:
    """Share of the pairs in the relation; 0 where either side has nothing.

    With the offset o between the centres, and m a tenth of the summed sizes, in the direction of the relation, a pair
    is in it if (o - m)/|o| is more than a half, with |o| over both directions.
    """
    if not first or not second:
        return 0.0
    here, there = (torch.tensor([box.centre for box in boxes], dtype=torch.float64) for boxes in (first, second))
    along = 0 if relation in ("above", "below") else 1
    ours, theirs = (torch.tensor([box.size[along] for box in boxes], dtype=torch.float64) for boxes in (first, second))
    margin = NEAR * (ours[:, None] + theirs) + 0.5 * torch.cdist(here, there)
    return share_related(here, there, relation, margin.clamp(min=1e-3))


def geneval(
    config: Config | None = None, *, model: Any = None, processor: Any = None, clip: Clip | None = None
) -> GenEval:
    """The reward.

    Args:
        config: where to load from, and how it judges.
        model: a detector in place of that, with its ``processor``; colours then need ``clip``.
        processor: of the model.
        clip: names colours.
    """
    config, user = Config() if config is None else config, "geneval"
    needs_both(user, model=model, processor=processor)
    if model is None:
        processor = load_part("AutoImageProcessor", config.source, user)
        model = load_network("AutoModelForObjectDetection", config.source, config, user)
        clip = load_clip(config.clip, config, user) if clip is None and config.clip is not None else clip
    return GenEval(frozen(model, config), processor, clip, config)
