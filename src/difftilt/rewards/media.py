"""Which kind of media a reward was given, said by name where it is the wrong one."""

from jaxtyping import Float
from torch import Tensor

from difftilt.errors import UserError

SHAPES = {
    "images": "(batch, channel, height, width)",
    "a video": "(batch, frame, channel, height, width)",
    "audio": "(batch, channel, time)",
    "tokens": "(batch, position)",
    "vectors": "(batch, dim)",
}
"""Kind of media -> its shape, as in :class:`~difftilt.rewards.protocol.Samples`."""

_BY_DIMENSION = {5: "a video", 4: "images", 3: "audio", 2: "vectors"}


def kind_of(media: Tensor) -> str:
    """The kind of media that has so many dimensions."""
    if not media.is_floating_point():
        return "tokens"
    return _BY_DIMENSION.get(media.dim(), "something else")


def images_in(media: Tensor, user: str) -> Float[Tensor, "batch channel height width"]:
    """The images, or an error that says what they are instead.

    Raises:
        UserError: for media that are not images of 1 or 3 channels.
    """
    _refuse(media, user, "images", "wrap it in a video reward" if kind_of(media) == "a video" else "")
    if media.shape[1] not in (1, 3):
        raise UserError(f"{user} scores images of 1 or 3 channels, and these have {media.shape[1]}: drop the others")
    return media


def videos_in(media: Tensor, user: str) -> Float[Tensor, "batch frame channel height width"]:
    """The videos, or an error that says what they are instead."""
    _refuse(media, user, "a video", "use the image reward that it wraps" if kind_of(media) == "images" else "")
    return media


def audio_in(media: Tensor, user: str) -> Float[Tensor, "batch channel time"]:
    """The audio, or an error that says what it is instead."""
    _refuse(media, user, "audio", "")
    return media


def _refuse(media: Tensor, user: str, wanted: str, remedy: str) -> None:
    found = kind_of(media)
    if found != wanted:
        tail = f": {remedy}" if remedy else ""
        raise UserError(
            f"{user} scores {wanted}, {SHAPES[wanted]}, and was given {found} of shape {tuple(media.shape)}{tail}"
        )
