"""Images in: the network is told of image and mask, or sampling begins from an image, as in the stock pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import difftilt
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.diffusers import PipelineOptions, adapt
from difftilt.models.protocol import START, START_TIME, Stateful
from difftilt.rewards.prompts import Prompt
from difftilt.rewards.protocol import Samples
from difftilt.sampling.rollout import begun
from difftilt.sampling.solvers import EulerSolver
from difftilt.testbeds.pipeline import TaskOptions, sampler_of
from pipelines import (
    PROMPTS,
    flux,
    made,
    quiet,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_inpaint,
    stable_diffusion_xl,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

FAMILIES: dict[str, tuple[Callable[[], Any], int, float]] = {
    "sd": (stable_diffusion_inpaint, 16, 7.5),
    "sdxl": (lambda: stable_diffusion_xl(inpaint=True), 16, 7.5),
    "flux-fill": (lambda: flux(fill=True), 16, 30.0),
}
"""Name -> pipeline, side of a sample in pixels, guidance."""


def pictured(folder: Path, side: int = 24) -> list[Prompt]:
    """Prompts with images of noise and with masks of their lower halves, larger than a sample."""
    draw, found = np.random.default_rng(0), list[Prompt]()
    for number, text in enumerate(PROMPTS):
        image, mask = folder / f"{number}.png", folder / f"{number}-mask.png"
        Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(image)
        half = np.zeros((side, side), dtype=np.uint8)
        half[side // 2 + number :] = 255
        Image.fromarray(half).save(mask)
        found.append(Prompt(text, {"image": str(image), "mask_image": str(mask)}))
    return found


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sampling_equals_the_stock_pipelines_and_depends_on_image_and_mask(
    family: str, strength: float, tmp_path: Path
) -> None:
    """Below strength 1 the image with noise on is where sampling begins, as in image to image."""
    make, side, guidance = FAMILIES[family]
    pipe, prompts = make(), pictured(tmp_path)
    options = TaskOptions(steps=4, guidance=guidance, height=side, width=side, strength=strength, cache="off")
    adapter = adapt(pipe, options)
    model, condition, grid = adapter.model, adapter.model.encode(prompts), sampler_of(adapter).grid
    assert isinstance(condition, Stateful)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    denoise = denoiser(model, guidance=adapter.guidance)
    ours = model.decode(EulerSolver()(denoise, begun(model.process, noise, condition), condition, grid))
    images, masks = ([Image.open(one.metadata[name]) for one in prompts] for name in ("image", "mask_image"))
    # the pipeline would draw the latents of the images from the encoder's law
    law = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    with patch(f"{law}.sample", lambda self, generator=None: self.mode()):
        stock = pipe(
            list(map(str, prompts)),
            image=images,
            mask_image=masks,
            generator=torch.Generator().manual_seed(3),
            height=side,
            width=side,
            num_inference_steps=4,
            guidance_scale=guidance,
            strength=strength,
            output_type="pt",
        ).images
    assert float((ours - stock).abs().max()) < 1e-4
    for name, value in condition.state.items():
        swapped = Stateful(condition.condition, {**condition.state, name: value.flip(0)})
        other = model.decode(EulerSolver()(denoise, begun(model.process, noise, swapped), swapped, grid))
        assert name == START_TIME or float((ours - other).abs().max()) > 1e-3


def test_the_strength_that_is_left_out_is_the_pipelines_own() -> None:
    """That of XL's inpainting is 0.9999, which leaves out a step and begins from the image."""
    adapters = [adapt(make(), PipelineOptions(steps=4, cache="off")) for make, _, _ in FAMILIES.values()]
    assert [(len(one.grid), one.begins) for one in adapters] == [(5, False), (4, True), (5, False)]


@torch.no_grad()
def test_a_picture_is_turned_as_its_camera_was_held(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.save(tmp_path / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    model = adapt(from_images("sd"), PipelineOptions(cache="off")).model
    files = [str(tmp_path / f"{name}.png") for name in ("upright", "turned")]
    one, other = model.encode([Prompt("a", {"image": file}) for file in files]).state[START]
    assert torch.equal(one, other)


FROM_IMAGES: dict[str, tuple[Callable[[], Any], str, float]] = {
    "sd": (stable_diffusion, "StableDiffusionImg2ImgPipeline", 7.5),
    "sdxl": (stable_diffusion_xl, "StableDiffusionXLImg2ImgPipeline", 5.0),
    "sd3": (stable_diffusion_3, "StableDiffusion3Img2ImgPipeline", 7.0),
    "flux": (flux, "FluxImg2ImgPipeline", 7.0),
}
"""Name -> text-to-image pipeline, class of the one that begins from images, guidance."""


def from_images(family: str) -> Any:
    make, name, _ = FROM_IMAGES[family]
    parts = make().components
    if family == "sd":
        parts = {**parts, "requires_safety_checker": False}
    return quiet(made(name, **parts))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("family", FROM_IMAGES)
@torch.no_grad()
def test_sampling_from_an_image_equals_the_stock_pipelines(family: str, strength: float, tmp_path: Path) -> None:
    """At 0.6 of 4 steps U-Nets take 2 and transformers 3: they round down what they take, and what they leave."""
    pipe, prompts, guidance = from_images(family), pictured(tmp_path, 16), FROM_IMAGES[family][2]
    options = TaskOptions(steps=4, guidance=guidance, height=16, width=16, strength=strength, cache="off")
    adapter = adapt(pipe, options)
    sampler, model, condition = sampler_of(adapter), adapter.model, adapter.model.encode(prompts)
    assert len(sampler.grid) == {1.0: 5, 0.6: 4 if family in ("sd3", "flux") else 3}[strength]
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(3))
    x = begun(model.process, noise, condition)
    ours = model.decode(EulerSolver()(denoiser(model, guidance=adapter.guidance), x, condition, sampler.grid))
    law = "diffusers.models.autoencoders.vae.DiagonalGaussianDistribution"
    call = {"num_inference_steps": 4, "guidance_scale": guidance, "strength": strength, "output_type": "pt"}
    images = [Image.open(one.metadata["image"]) for one in prompts]
    generator = torch.Generator().manual_seed(3)
    with patch(f"{law}.sample", lambda self, generator=None: self.mode()):
        sized = {} if family.startswith("sd") and family != "sd3" else {"height": 16, "width": 16}
        stock = pipe(list(map(str, prompts)), image=images, generator=generator, **sized, **call).images
    assert float((ours - stock).abs().max()) < 1e-4
    assert float((ours - ours.flip(0)).abs().max()) > 1e-3


def test_training_from_images_begins_there(tmp_path: Path) -> None:
    """A policy gradient and a steerer, whose own numbers of steps are refused: the grid begins where the image is."""
    prompts = [{"prompt": str(one), **one.metadata} for one in pictured(tmp_path, 16)]
    options = {"steps": 4, "strength": 0.6, "height": 16, "width": 16, "cache": "off"}
    settings: dict[str, Any] = {"method.groups": 2, "method.group_size": 2, "training.forward_batch": 4}
    settings |= {"training.evaluation_samples": 2, "training.optimizer.lr": 1e-3}
    given: dict[str, Any] = {"reward": redness, "prompts": prompts, "iterations": 1, "pipeline": options, **settings}
    result = difftilt.train(from_images("sd3"), tmp_path / "run", **given)
    assert len(result.run.task.sampler.grid) == 4
    steered = difftilt.steer(
        from_images("sd3"), redness, prompts, method="fk-steering", particles=2, pipeline=options, forward_batch=4
    )
    assert steered.steered.ledger.nfe == 2 * 2 * 2 * 3  # prompts, particles, branches of guidance, steps
    with pytest.raises(UserError, match=r"leave out method\.steps"):
        difftilt.train(from_images("sd3"), tmp_path / "other", **given, overrides=["method.steps=5"])


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda: from_images("sd"), {"steps": 4, "strength": 0.1}, "none of 4 steps is left"),
        (stable_diffusion, {"strength": 0.5}, "begins from noise"),
    ],
)
def test_a_strength_that_means_nothing_is_refused(make: Callable[[], Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapt(make(), PipelineOptions(**options))


def redness(samples: Samples) -> torch.Tensor:
    return samples.media[:, 0].flatten(1).mean(1)


def test_training_and_steering_see_the_image_of_each_prompt(tmp_path: Path) -> None:
    """Texts alike with other images are other prompts."""
    images = [one.metadata for one in pictured(tmp_path)]
    prompts = [{"prompt": "a red cat", **metadata} for metadata in images]
    options = {"steps": 3, "height": 16, "width": 16, "cache": "off"}
    steered = difftilt.steer(
        stable_diffusion_inpaint(), redness, prompts, method="best-of-n", particles=2, pipeline=options, forward_batch=4
    )
    assert len(steered.steered.media) == 4
    settings: dict[str, Any] = {"method.groups": 2, "method.group_size": 2, "training.forward_batch": 4}
    settings |= {"training.evaluation_samples": 2, "training.optimizer.lr": 1e-3}
    result = difftilt.train(
        stable_diffusion_inpaint(),
        tmp_path / "run",
        reward=redness,
        prompts=prompts,
        iterations=1,
        pipeline=options,
        **settings,
    )
    one, other = (result.run.encode([prompt]).state["known"] for prompt in result.run.task.prompts)
    assert not torch.equal(one, other)


def test_a_network_that_does_not_see_the_mask_is_refused() -> None:
    with pytest.raises(UserError, match="does not see the mask"):
        adapt(stable_diffusion_inpaint(channels=4))


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "'image' is missing"),
        ({"image": "bomb.png"}, "'bomb.png' cannot be read as a picture .*exceeds limit"),
        ({"image": "here.png"}, "'here.png' cannot be read as a picture"),
        ({"image": 3}, "'image' is 3"),
    ],
)
def test_a_prompt_without_a_readable_image_is_named(
    metadata: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((40, 40, 3), dtype=np.uint8)).save("bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    model = adapt(stable_diffusion_inpaint(), PipelineOptions(cache="off")).model
    with pytest.raises(UserError, match=said):
        model.encode([Prompt("a vase", metadata)])
