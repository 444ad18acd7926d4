"""FLUX.1: a transformer on a rectified flow that sees the latent as a sequence of 2×2 patches, CLIP and T5.

The ``dev`` model is distilled: it is told the guidance scale, and has no unconditional branch. The ``schnell`` model is
told nothing.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from difftilt.card import Card
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="flux",
    entry="Flux",
    paper="Black Forest Labs 2024, FLUX.1; described in Labs et al. 2025, FLUX.1 Kontext, arXiv 2506.15742",
)


def pack(latents: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch patches values"]:
    """Squares of 2×2 as one token each, row by row; a token holds channel by channel."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(
    tokens: Float[Tensor, "batch patches values"], height: int, width: int
) -> Float[Tensor, "batch channel height width"]:
    """Inverse of :func:`pack` for a latent of this size."""
    batch, _, values = tokens.shape
    squares = tokens.reshape(batch, height // 2, width // 2, values // 4, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, values // 4, height, width)


def places(height: int, width: int, device: torch.device) -> Float[Tensor, "patches 3"]:
    """(0, row, column) of each token of a latent of this size."""
    rows = torch.arange(height // 2, device=device).repeat_interleave(width // 2)
    columns = torch.arange(width // 2, device=device).repeat(height // 2)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=1).float()


class FluxTransformer(Backbone):
    """The transformer between packing and unpacking."""

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        text = condition["text"].to(x.dtype)
        output = self.network(
            hidden_states=pack(x),
            timestep=timestep / 1000,  # it multiplies by 1000 again
            guidance=condition.get("guidance"),
            pooled_projections=condition["pooled"].to(x.dtype),
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places(height, width, x.device).to(x.dtype),
            return_dict=False,
        )[0]
        return unpack(output, height, width)


class Flux(Adapter):
    """``FluxPipeline``; latents are kept as images (channel, height, width) and packed where the network is called."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxFillPipeline")
    image_to_image = ("FluxImg2ImgPipeline",)
    inpainting = ("FluxFillPipeline",)
    backbone = FluxTransformer
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    @property
    def distilled(self) -> bool:
        return True

    def sigmas(self) -> Sequence[float]:
        return np.linspace(1.0, 1 / self.steps, self.steps).tolist()

    def skipped(self, strength: float) -> int:
        return int(self.steps - self.steps * strength)

    def multiple(self) -> int:
        return 2 * self.pipe.vae_scale_factor

    def tokens(self) -> int:
        height, width = self.size
        return (height // self.multiple()) * (width // self.multiple())

    def shape(self) -> tuple[int, ...]:
        channels, height, width = super().shape()
        return (channels // 4, height, width)

    def told(self, masks: Tensor, latents: Tensor) -> Tensor:
        """The mask keeps its pixels, as channels of each place of the latent."""
        return torch.cat([latents, functional.pixel_unshuffle(masks, self.pipe.vae_scale_factor)], dim=1)

    def packed(self, latents: Tensor) -> Tensor:
        return pack(latents)

    def unpacked(self, latents: Tensor) -> Tensor:
        _, height, width = self.shape()
        return unpack(latents, height, width)

    def encode(self, prompts: Sequence[str]) -> Rows:
        rows = super().encode(prompts)
        if self.pipe.transformer.config.guidance_embeds:
            rows["guidance"] = torch.full((len(prompts),), self.scale)
        return rows

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        length = self.chosen("max_sequence_length")
        text, pooled, _ = self.pipe.encode_prompt(list(prompts), None, device=device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}
