"""Pictures of samples where people look for them: ``samples/`` of a run."""

import json
import math
from pathlib import Path

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from difftilt.training.looks import Look

SHOWN = 64
SPECTROGRAM = 64
"""Pixels of the height and width of a spectrogram."""
LARGEST = 1e30
"""Points farther out are left out of a plot: the arithmetic of its layout overflows on them."""


def save_picture(directory: Path, name: str, media: Tensor, columns: int | None = None) -> Path:
    """A grid of images, or of spectrograms of audio, a scatter plot of vectors, tokens as JSON; returns the file.

    Of complex numbers the modulus is drawn. What is not finite is black in an image and left out of a plot.

    Args:
        directory: made if it is not there.
        name: without suffix.
        media: at most :data:`SHOWN` images or tokens are shown, evenly over the batch, unless ``columns`` is given.
        columns: of the grid of images, all of which are then shown; None makes a square.
    """
    directory.mkdir(parents=True, exist_ok=True)
    media = media.detach().cpu()
    media = media.abs() if media.is_complex() else media
    if not media.is_floating_point():
        path = directory / f"{name}.json"
        path.write_text(json.dumps(_spread(media).tolist()))
        return path
    path = directory / f"{name}.png"
    if media.dim() == 3:
        media = spectrograms(media)
    if media.dim() == 4:
        shown = _spread(media) if columns is None else media
        image_grid(shown.float(), columns).save(path)
    else:
        _scatter(media.flatten(1)[:1024].float(), path)
    return path


def save_look(directory: Path, name: str, media: Tensor, look: Look, columns: int | None = None) -> None:
    """The picture of samples, which is of their drawings where there are any, and all their strings as JSON.

    Args:
        directory: made if it is not there.
        name: without suffix.
        media: as for :func:`save_picture`.
        look: of the same samples.
        columns: of a grid of images, drawings or spectrograms.
    """
    shown = media if look.drawn is None else look.drawn.float() / 255
    if look.text is None or look.drawn is not None:
        save_picture(directory, name, shown, columns=columns if shown.dim() in (3, 4) else None)
    if look.text is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.json").write_text(json.dumps(look.text, indent=1))


def _spread(media: Tensor) -> Tensor:
    """At most :data:`SHOWN` rows, evenly over the batch, so that every prompt is seen."""
    return media[torch.linspace(0, len(media) - 1, min(SHOWN, len(media))).round().long()]


def image_grid(images: Float[Tensor, "batch channel height width"], columns: int | None = None) -> Image.Image:
    """Images in [0, 1] in rows, small ones enlarged without smoothing; of other than 3 channels the first in grey."""
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    scale = max(1, 64 // max(height, width))
    rows = math.ceil(count / columns)
    canvas = torch.ones(rows * (height + 1) - 1, columns * (width + 1) - 1, 3)
    for place, image in enumerate(images.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(0, 1)):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        colour = image if channels == 3 else image[:1].expand(3, -1, -1)
        canvas[top : top + height, left : left + width] = colour.permute(1, 2, 0)
    picture = Image.fromarray((canvas * 255).round().to(torch.uint8).numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def spectrograms(audio: Float[Tensor, "batch channel time"]) -> Float[Tensor, "batch 1 height width"]:
    """Pictures of audio in [-1, 1], the mean over channels: time to the right, frequency upwards, loud is white.

    Power in decibels from -70 (black) to 0, where a sine of full scale is 0; linear in frequency, up to half the rate.
    What is not finite is silence.
    """
    waves = audio.detach().float().nan_to_num(0.0, posinf=0.0, neginf=0.0).mean(1)
    window = torch.hann_window(max(16, waves.shape[1] // 4))
    length = len(window)
    padded = torch.nn.functional.pad(waves, (length // 2, length // 2))
    spectrum = torch.stft(padded, length, max(1, length // 8), window=window, center=False, return_complex=True)
    level = 20 * (spectrum.abs() / (window.sum() / 2)).clamp(min=1e-6).log10()
    shown = torch.nn.functional.adaptive_max_pool2d((level / 70 + 1).clamp(0, 1)[:, None], SPECTROGRAM)
    return shown.flip(2)


def _scatter(points: Float[Tensor, "batch dim"], path: Path) -> None:
    """First two coordinates against each other, or a histogram of a single one."""
    points = points[(points.abs() <= LARGEST).all(dim=1)]
    figure = Figure(figsize=(4, 4), dpi=100)
    axes = figure.subplots()
    if points.shape[1] == 1:
        axes.hist(points[:, 0].numpy(), bins=60)
    else:
        axes.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=4, alpha=0.5)
        axes.set_aspect("equal", adjustable="datalim")
    figure.savefig(path)
