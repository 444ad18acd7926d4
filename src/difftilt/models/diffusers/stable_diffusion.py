"""Stable Diffusion 1.x and 2.x: a UNet on the latents of an image, one CLIP text encoder."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftilt.card import Card
from difftilt.models.diffusers.adapter import Adapter, Backbone
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="stable-diffusion",
    entry="StableDiffusion",
    paper="Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752",
)


class UNet(Backbone):
    """The UNet, with the text as the keys of its cross-attention."""

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["text"].to(x.dtype)
        return self.network(x, timestep, encoder_hidden_states=text, return_dict=False)[0]


class StableDiffusion(Adapter):
    """``StableDiffusionPipeline``; the safety checker of the pipeline is not asked."""

    pipelines = ("StableDiffusionPipeline",)
    backbone = UNet
    denoisers = ("unet",)

    def default_size(self) -> tuple[int, int]:
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        return {"text": self.pipe.encode_prompt(list(prompts), device, 1, False)[0]}
