"""Images are shown to networks as the processors of transformers show them."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from difftilt.errors import UserError
from difftilt.rewards.media import audio_in, images_in, videos_in
from difftilt.rewards.pretrained.pixels import IMAGENET_MEAN, IMAGENET_STD, Preparation
from pipelines import made
from pretrained import images


def bound(before: int, after: int, resample: str) -> float:
    """Largest sum of the absolute weights that make one new pixel of a row."""
    weights = interpolate(torch.eye(before)[None, :, None], (1, after), mode=resample, antialias=True)
    return float(weights[0, :, 0].abs().sum(0).max())


def tolerance(size: tuple[int, int], new: tuple[int, int], resample: str, std: float) -> float:
    """Pillow rounds to bytes twice: after one direction, by half a level that the other then weighs, and after that."""
    weighed = max(bound(before, after, resample) for before, after in zip(size, new, strict=True))
    return (0.5 * weighed + 0.5 + 0.01) / 255 / std


def processed(processor: Any, x: Tensor) -> Tensor:
    """What a processor makes of the same images as files."""
    pictures = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for image in x]
    return torch.stack([torch.as_tensor(image) for image in processor(pictures)["pixel_values"]])


CASES = {
    "clip": ("CLIPImageProcessorPil", {}),
    "clip, small": ("CLIPImageProcessorPil", {"size": {"shortest_edge": 30}, "crop_size": 28}),
    "blip": ("BlipImageProcessorPil", {"size": {"height": 48, "width": 48}}),
    "dinov2": (
        "BitImageProcessorPil",
        {"size": {"shortest_edge": 32}, "crop_size": 28, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
    ),
    "vit": ("ViTImageProcessorPil", {"size": {"height": 28, "width": 32}}),
}


@pytest.mark.parametrize("size", [(35, 52), (61, 33), (28, 28)])
@pytest.mark.parametrize("case", CASES)
def test_it_prepares_as_the_processor_does(case: str, size: tuple[int, int]) -> None:
    name, settings = CASES[case]
    processor = made(name, **settings)
    preparation = Preparation.read(processor.to_dict())
    x = images(3, *size)
    new = preparation._target(*size)  # pyright: ignore[reportPrivateUsage]
    allowed = tolerance(size, new, preparation.resample, min(preparation.std))
    expected = processed(processor, x)
    found = preparation(x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= allowed


def test_without_antialias_it_would_differ() -> None:
    x = (torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1)) * 255).round() / 255
    processor = made("CLIPImageProcessorPil", size={"shortest_edge": 28}, crop_size=28)
    expected, allowed = processed(processor, x), tolerance((96, 96), (28, 28), "bicubic", 0.26)
    preparation = Preparation.square(28)
    assert float((preparation(x) - expected).abs().max()) <= allowed
    mean, std = torch.tensor(preparation.mean), torch.tensor(preparation.std)
    coarse = (interpolate(x, (28, 28), mode="bicubic") - mean[:, None, None]) / std[:, None, None]
    assert float((coarse - expected).abs().max()) > 10 * allowed


def test_the_longest_edge_is_fitted_and_the_rest_is_black() -> None:
    # torchvision's Resize and Pad are Pillow's, so Pillow is the other implementation here
    x = images(1, 40, 61)
    preparation = Preparation(size=(28, 28), fit="longest", crop=None, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    picture = Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    small = picture.resize((28, round(40 * 28 / 61)), Image.Resampling.BICUBIC)
    expected = np.zeros((28, 28, 3), dtype=np.float32)
    expected[(28 - small.height) // 2 : (28 - small.height) // 2 + small.height] = np.asarray(small) / 255
    found = preparation(x)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= tolerance((40, 61), (18, 28), "bicubic", 1.0)
    assert not found[:5].any()


def test_gray_images_have_three_equal_channels() -> None:
    gray = images()[:, :1]
    plain = Preparation(size=(28, 28), crop=(28, 28), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    shown = plain(gray)
    assert torch.equal(shown[:, 0], shown[:, 2])
    assert torch.equal(shown, plain(gray.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"do_resize": False}, "must resize and rescale"),
        ({"resample": 1}, r"resample = 1: known filters are 2 \(bilinear\) and 3"),
        ({"size": {"longest_edge": 9}}, "give shortest_edge, or height and width"),
        ({"size": 224, "crop_size": 256, "do_center_crop": True}, r"cannot be cropped to \(256, 256\)"),
    ],
)
def test_processors_that_cannot_be_followed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preparation.read(values)


def test_media_of_the_wrong_kind_are_named() -> None:
    with pytest.raises(UserError, match=r"clip scores images, .* given a video of shape \(2, 4, 3, 8, 8\): wrap it in"):
        images_in(torch.zeros(2, 4, 3, 8, 8), "clip")
    with pytest.raises(UserError, match="given tokens"):
        images_in(torch.zeros(2, 4, 8, 8, dtype=torch.int64), "clip")
    with pytest.raises(UserError, match="1 or 3 channels, and these have 4"):
        images_in(torch.zeros(2, 4, 8, 8), "clip")
    with pytest.raises(UserError, match=r"video scores a video, .* given images .*: use the image reward"):
        videos_in(torch.zeros(2, 3, 8, 8), "video")
    with pytest.raises(UserError, match=r"clap scores audio, \(batch, channel, time\), and was given vectors"):
        audio_in(torch.zeros(2, 3), "clap")


def test_bytes_of_a_file_are_the_tensor() -> None:
    # what the comparison above rests on: a PNG keeps every byte
    x, buffer = images(1), io.BytesIO()
    Image.fromarray((x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(buffer, "PNG")
    assert np.array_equal(np.asarray(Image.open(buffer)), (x[0].permute(1, 2, 0).numpy() * 255).round())
