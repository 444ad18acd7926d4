"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow, two CLIP text encoders and T5."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftilt.card import Card
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="stable-diffusion-3",
    entry="StableDiffusion3",
    paper="Esser et al. 2024, Scaling Rectified Flow Transformers, arXiv 2403.03206",
)


class MMDiT(Backbone):
    """The transformer, with the vectors of all tokens of the text and one vector of all of it."""

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.network(
            hidden_states=x,
            timestep=timestep,
            encoder_hidden_states=condition["text"].to(x.dtype),
            pooled_projections=condition["pooled"].to(x.dtype),
            return_dict=False,
        )[0]


class StableDiffusion3(Adapter):
    """``StableDiffusion3Pipeline``, also without its T5."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    image_to_image = ("StableDiffusion3Img2ImgPipeline",)
    backbone = MMDiT
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def skipped(self, strength: float) -> int:
        return int(self.steps - self.steps * strength)

    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.pipe.patch_size

    def tokens(self) -> int:
        height, width = self.size
        return (height // self.multiple()) * (width // self.multiple())

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        text, _, pooled, _ = self.pipe.encode_prompt(
            list(prompts),
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.chosen("max_sequence_length"),
        )
        return {"text": text, "pooled": pooled}
