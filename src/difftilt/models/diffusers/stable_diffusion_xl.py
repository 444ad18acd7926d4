"""Stable Diffusion XL and its turbo: a UNet that is told the size of the image, two CLIP text encoders."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="stable-diffusion-xl",
    entry="StableDiffusionXL",
    paper="Podell et al. 2023, SDXL: Improving Latent Diffusion Models, arXiv 2307.01952",
)


class SizedUNet(Backbone):
    """The UNet, with the pooled text and six numbers: original size, crop and target size."""

    def read(self, condition: Mapping[str, Tensor]) -> Rows:
        """The states before the last layer, side by side; the second encoder also makes one vector of the text."""
        read = [self.readers[name](condition[name], output_hidden_states=True) for name in self.readers]
        text = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
        kept = condition["kept"]
        return {"text": kept[:, None, None] * text, "pooled": kept[:, None] * read[-1][0]}

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.network(
            x,
            timestep,
            encoder_hidden_states=condition["text"].to(x.dtype),
            added_cond_kwargs={"text_embeds": condition["pooled"].to(x.dtype), "time_ids": condition["sizes"]},
            return_dict=False,
        )[0]


class StableDiffusionXL(Adapter):
    """``StableDiffusionXLPipeline``, uncropped and at its target size; no watermark is drawn."""

    pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
    image_to_image = ("StableDiffusionXLImg2ImgPipeline",)
    inpainting = ("StableDiffusionXLInpaintPipeline",)
    backbone = SizedUNet
    denoisers = ("unet",)
    encoders = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def check(self) -> None:
        super().check()
        if self.pipe.config.get("requires_aesthetics_score"):
            raise UserError(f"{type(self.pipe).__name__} is told an aesthetic score (a refiner): that is not served")

    def encode(self, prompts: Sequence[str]) -> Rows:
        height, width = self.size
        sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
        rows = super().encode(prompts) | {"sizes": sizes.expand(len(prompts), 6)}
        return rows | {"kept": torch.ones(len(prompts))} if self.trained_encoders else rows

    def negative(self) -> Rows:
        """The empty prompt is zero in this family, where its settings say so."""
        rows = super().negative()
        if self.options.negative_prompt is None and self.pipe.config.force_zeros_for_empty_prompt:
            # of tokens, what is read of them is
            rows |= {name: torch.zeros_like(rows[name]) for name in ("text", "pooled", "kept") if name in rows}
        return rows

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts), None, device=device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}
