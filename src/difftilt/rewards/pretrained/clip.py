"""Images and texts in the space of CLIP (Radford et al. 2021, arXiv 2103.00020), and their similarity as a reward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.loading import (
    PretrainedOptions,
    Text,
    frozen,
    load_network,
    load_part,
    load_preparation,
    needs_both,
)
from difftilt.rewards.pretrained.pixels import Preparation
from difftilt.rewards.protocol import Capabilities, Samples


class Clip:
    """The two towers of a ``CLIPModel``.

    Args:
        model: of ``transformers``, frozen.
        tokenizer: of the same, or None where only images are embedded.
        preparation: of images.
    """

    def __init__(self, model: Any, tokenizer: Any, preparation: Preparation) -> None:
        self.model, self.tokenizer, self.preparation = model, tokenizer, preparation

    def images(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """Unit embeddings of images in [0, 1], float32."""
        pixels = self.preparation(images).to(self.model.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """Unit embeddings, float32; equal texts are encoded once, long ones cut."""
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(places), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            embedded = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
        return normalize(embedded.float(), dim=-1)[[places[text] for text in texts]]


class ClipOptions(PretrainedOptions):
    """A CLIP model."""

    source: Text = "openai/clip-vit-large-patch14"
    """Folder or hub id of a ``CLIPModel`` with its tokenizer and image processor."""


def load_clip(
    source: str,
    options: PretrainedOptions,
    user: str,
    model: Any = None,
    tokenizer: Any = None,
    processor: str | None = None,
) -> Clip:
    """A CLIP model from its source, or the given one, prepared as its configuration says.

    Args:
        source: of what is not given.
        options: for the precision.
        user: named in messages.
        model: ``CLIPModel``, to be given with ``tokenizer``; its images are prepared as the published CLIP's are.
        tokenizer: of the same.
        processor: source of tokenizer and image processor, where it is another one.
    """
    needs_both(user, model=model, tokenizer=tokenizer)
    if model is not None:
        edge = int(model.config.vision_config.image_size)
        return Clip(frozen(model, options), tokenizer, Preparation.square(edge))
    beside = processor or source
    tokenizer = load_part("AutoTokenizer", beside, user)
    preparation = load_preparation(beside, user)
    return Clip(frozen(load_network("CLIPModel", source, options, user), options), tokenizer, preparation)


class ClipSimilarity(PretrainedReward):
    """A function of the cosine between image and prompt; the user's prompt counts, not a rewritten one.

    Args:
        name: in reports.
        clip: the towers.
        options: device and batch.
        finish: cosine -> score.
        prefix: before every prompt.
    """

    capabilities = Capabilities(differentiable=True, cost=1.0)

    def __init__(
        self,
        name: str,
        clip: Clip,
        options: PretrainedOptions,
        finish: Callable[[Tensor], Tensor] = lambda cosine: cosine,
        prefix: str = "",
    ) -> None:
        super().__init__(name, clip.model, options)
        self.clip, self.finish, self.prefix = clip, finish, prefix

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        texts = self.clip.texts([self.prefix + prompt for prompt in samples.prompts])
        return self.finish((self.clip.images(samples.media) * texts).sum(-1))
