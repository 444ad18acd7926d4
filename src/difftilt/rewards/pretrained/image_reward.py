"""Human preference, learned from comparisons on DiffusionDB: BLIP reads the prompt while it looks at the image."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.leaves import import_module
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.heads import head_of
from difftilt.rewards.pretrained.loading import (
    PretrainedOptions,
    Text,
    fill,
    frozen,
    load_part,
    load_weights,
    needs_both,
)
from difftilt.rewards.pretrained.pixels import Preparation
from difftilt.rewards.protocol import Samples

CARD = Card(
    name="image-reward",
    entry="image_reward",
    paper="Xu et al. 2023, ImageReward (arXiv 2304.05977)",
    needs=("images", "the extra [rewards]"),
)

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the published head's output, which the score is standardised by."""
LENGTH = 35
"""Tokens that a prompt is cut to."""


class Config(PretrainedOptions):
    """Settings of ImageReward."""

    weights: Text = "THUDM/ImageReward/ImageReward.pt"
    """The published file, or OWNER/NAME/FILE on the hub."""
    tokenizer: Text = "google-bert/bert-base-uncased"
    """Folder or hub id of the tokenizer."""


class ImageRewardScore(PretrainedReward):
    """(head(first token of BLIP's text encoder, which looks at the image) - mean) / std; about -2 to 2, unbounded.

    Args:
        blip: with ``vision_model`` and ``text_encoder``, as ``BlipForImageTextRetrieval`` has them.
        tokenizer: of prompts.
        head: embedding -> number; float32.
        options: device and batch.
    """

    def __init__(self, blip: Any, tokenizer: Any, head: nn.Module, options: Config) -> None:
        parts = {"eye": blip.vision_model, "reader": blip.text_encoder, "head": head}
        super().__init__("image_reward", nn.ModuleDict(parts), options)
        self.blip, self.tokenizer, self.head = blip, tokenizer, head
        self.preparation = Preparation.square(int(blip.vision_model.config.image_size))

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        pixels = self.preparation(samples.media).to(self.blip.vision_model.dtype)
        seen = self.blip.vision_model(pixel_values=pixels).last_hidden_state
        tokens = self.tokenizer(
            list(samples.prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(seen.device)
        read = self.blip.text_encoder(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones_like(seen[..., 0], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state
        return (self.head(read[:, 0].float()) - MEAN) / STD


def image_reward(
    config: Config | None = None, *, model: Any = None, tokenizer: Any = None, head: Any = None
) -> ImageRewardScore:
    """The reward.

    Args:
        config: where to load from, and how.
        model: a ``BlipForImageTextRetrieval`` in place of that, with ``tokenizer`` and ``head``.
        tokenizer: of prompts.
        head: tensors by name, as the published file holds them.
    """
    config, user = Config() if config is None else config, "image_reward"
    needs_both(user, model=model, tokenizer=tokenizer, head=head)
    if model is None:
        head, tokenizer = load_weights(config.weights, user), load_part("AutoTokenizer", config.tokenizer, user)
        model = published_blip(user)
        fill(model, from_blip(head), user)
    return ImageRewardScore(frozen(model, config), tokenizer, head_of(head, user).eval().requires_grad_(False), config)


def published_blip(user: str) -> nn.Module:
    """The network of the published weights, without them: a large vision transformer and BERT with cross-attention."""
    library = import_module("transformers", user)
    eye = library.BlipVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=224,
                                   num_attention_heads=16, patch_size=16, layer_norm_eps=1e-6)  # fmt: skip
    reader = library.BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, bos_token_id=30522
    )
    return blip_of(library, eye, reader)


def blip_of(library: Any, eye: Any, reader: Any) -> nn.Module:
    """The two parts of BLIP that are used."""
    return nn.ModuleDict(
        {"vision_model": library.BlipVisionModel(eye), "text_encoder": library.BlipTextModel(reader, False)}
    )


_VISION = (
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
)
_VISION_WHOLE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


def from_blip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of BLIP in the published names, as ``vision_model`` and ``text_encoder`` of ``transformers``.

    Only these two are kept; the text encoder has the same names in both. Numbers of positions are no weights.
    """
    found = dict[str, Tensor]()
    for name, value in tensors.items():
        inner = name.removeprefix("blip.")
        if inner.endswith("position_ids"):
            continue
        if inner.startswith("text_encoder."):
            found[inner] = value
        elif inner.startswith("visual_encoder."):
            found[f"vision_model.{_seen(inner.removeprefix('visual_encoder.'))}"] = value
    return found


def _seen(name: str) -> str:
    for old, new in _VISION:
        name = name.replace(old, new)
    return _VISION_WHOLE.get(name, name)
