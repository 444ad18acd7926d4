"""Stable Diffusion 1.x and 2.x: a UNet on the latents of an image, one CLIP text encoder.

Its few-step relatives are the same network: turbo models differ by their scheduler alone, latent consistency models
(Luo et al. 2023, arXiv 2310.04378) are told the guidance scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftilt.card import Card
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="stable-diffusion",
    entry="StableDiffusion",
    paper="Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752",
)


class UNet(Backbone):
    """The UNet, with the text as the keys of its cross-attention."""

    def read(self, condition: Mapping[str, Tensor]) -> Rows:
        return {"text": self.readers["text_encoder"](condition["text_encoder"])[0]}

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        told = condition.get("guidance")
        return self.network(
            x,
            timestep,
            encoder_hidden_states=condition["text"].to(x.dtype),
            timestep_cond=None if told is None else told.to(x.dtype),
            return_dict=False,
        )[0]


class StableDiffusion(Adapter):
    """``StableDiffusionPipeline``, distilled to few steps or trained for inpainting too; no safety checker is asked."""

    pipelines = (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelPipeline",
    )
    image_to_image = ("StableDiffusionImg2ImgPipeline",)
    inpainting = ("StableDiffusionInpaintPipeline",)
    backbone = UNet
    denoisers = ("unet",)

    @property
    def distilled(self) -> bool:
        return self.pipe.unet.config.time_cond_proj_dim is not None

    def encode(self, prompts: Sequence[str]) -> Rows:
        rows = super().encode(prompts)
        if self.distilled:  # the scale comes as a vector, like the time
            told = torch.full((len(prompts),), self.scale - 1)
            size = self.pipe.unet.config.time_cond_proj_dim
            rows["guidance"] = self.pipe.get_guidance_scale_embedding(told, embedding_dim=size)
        return rows

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        return {"text": self.pipe.encode_prompt(list(prompts), device, 1, False)[0]}
