"""What people see of samples that are neither images nor sound: strings and drawings, where the task offers them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from difftilt.errors import UserError
from difftilt.training.protocol import Task


@dataclass(frozen=True)
class Look:
    """Strings and drawings of samples.

    Attributes:
        text: of each sample; None where the task has none.
        drawn: pictures as bytes, (drawings, channel, height, width); None where the task has none.
        rows: sample of each drawing.
    """

    text: Sequence[str] | None = None
    drawn: Shaped[Tensor, "drawings channel height width"] | None = None
    rows: Int[Tensor, " drawings"] | None = None

    def take(self, index: Int[Tensor, " samples"]) -> "Look":
        """Of some of the samples, in that order; without drawings unless all of them are drawn."""
        rows: list[int] = index.tolist()
        text = None if self.text is None else [self.text[row] for row in rows]
        if self.drawn is None or self.rows is None:
            return Look(text)
        place = {row: drawing for drawing, row in enumerate(self.rows.tolist())}
        if not all(row in place for row in rows):
            return Look(text)
        return Look(text, self.drawn[[place[row] for row in rows]], torch.arange(len(rows)))

    def tensors(self) -> dict[str, Tensor]:
        """The drawings as files keep them."""
        return {} if self.drawn is None or self.rows is None else {"drawn": self.drawn, "drawn_rows": self.rows}


def look_at(task: Task, media: Shaped[Tensor, "samples ..."], rows: Int[Tensor, " drawings"] | None = None) -> Look:
    """Strings of all samples and drawings of the given ones, or of all.

    Args:
        task: may offer ``text`` and ``draw``.
        media: decoded.
        rows: which samples to draw, each once.
    """
    media = media.detach().cpu()
    text = None if task.text is None else list(task.text(media))
    if task.draw is None:
        return Look(text)
    rows = torch.arange(len(media)) if rows is None else rows.cpu()
    return Look(text, as_bytes(task.draw(media[rows])), rows)


def spelled(tokens: Int[Tensor, "batch position"], alphabet: Sequence[str]) -> list[str]:
    """Every sequence as the symbols of its tokens, one after the other."""
    rows: list[list[int]] = tokens.tolist()
    return ["".join(alphabet[token] for token in row) for row in rows]


def unspelled(texts: Sequence[str], alphabet: Sequence[str]) -> Int[Tensor, "batch position"]:
    """Inverse of :func:`spelled`, for symbols of one letter.

    Raises:
        UserError: names a text of other letters, or of another length than the first.
    """
    place = {letter: token for token, letter in enumerate(alphabet)}
    for text in texts:
        strange = sorted(set(text) - place.keys())
        if strange or not text or len(text) != len(texts[0]):
            said = f"has the letters {''.join(strange)}" if strange else f"is not of the length {len(texts[0])}"
            raise UserError(f"{text!r:.60} {said}; it is written in {''.join(alphabet)}")
    return torch.tensor([[place[letter] for letter in text] for text in texts])


def as_bytes(images: Shaped[Tensor, "batch channel height width"]) -> Shaped[Tensor, "batch channel height width"]:
    """Images in [0, 1] as uint8, and bytes as they are; what is not finite is black."""
    if not images.is_floating_point():
        return images
    finite = images.float().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    return (finite * 255).round().clamp(0, 255).byte()
