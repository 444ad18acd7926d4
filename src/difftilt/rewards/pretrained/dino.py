"""How much an image looks like reference images, in the features of DINO."""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.rewards.pictures import read_images
from difftilt.rewards.pretrained.base import PretrainedReward
from difftilt.rewards.pretrained.loading import PretrainedOptions, Text, frozen, load_network, load_preparation
from difftilt.rewards.pretrained.pixels import IMAGENET_MEAN, IMAGENET_STD, Preparation
from difftilt.rewards.protocol import Capabilities, Samples

CARD = Card(
    name="dino",
    entry="dino",
    paper="Oquab et al. 2023, DINOv2 (arXiv 2304.07193); the similarity of DreamBooth (arXiv 2208.12242)",
    needs=("images", "the extra [rewards]", "reference images"),
)


class Config(PretrainedOptions):
    """Settings of the similarity."""

    source: Text = "facebook/dinov2-base"
    """Folder or hub id of a vision transformer whose first token stands for the image, with its image processor."""
    references: Text | None = None
    """Folder of reference images; needed where none are given as tensors."""
    nearest: int | None = Field(default=None, ge=1)
    """Mean over so many of the most similar references; null is all of them, as in DreamBooth."""


class Dino(PretrainedReward):
    """Mean cosine between the first token of an image and those of references, in [-1, 1].

    Args:
        model: of ``transformers``, pixels -> ``last_hidden_state``.
        preparation: of images.
        references: images in [0, 1]; they may differ in size.
        options: device, batch and number of nearest references.
    """

    capabilities = Capabilities(differentiable=True, features=True, cost=1.0)

    def __init__(self, model: Any, preparation: Preparation, references: list[Tensor], options: Config) -> None:
        super().__init__("dino", model, options)
        if not references:
            raise UserError("dino: there are no reference images: give some, or name a folder of them")
        if options.nearest is not None and options.nearest > len(references):
            raise UserError(f"dino: nearest = {options.nearest}, and there are only {len(references)} references")
        self.model, self.preparation = model, preparation
        self.nearest = options.nearest or len(references)
        with torch.no_grad():
            self.references = torch.cat([self.embed(image[None].to(model.device)) for image in references])

    def embed(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch dim"]:
        """Unit embeddings, float32."""
        pixels = self.preparation(images).to(self.model.dtype)
        return normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=-1)

    def features(self, samples: Samples) -> Float[Tensor, "batch dim"]:
        """Unit embeddings of the samples, without gradient, for statistics of sets."""
        with torch.no_grad():
            return self.embed(samples.media.to(self.model.device))

    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        self.references = self.references.to(samples.media.device)
        alike = self.embed(samples.media) @ self.references.T
        return alike.topk(self.nearest, dim=1).values.mean(1)


def dino(config: Config | None = None, *, model: Any = None, references: list[Tensor] | None = None) -> Dino:
    """The reward.

    Args:
        config: where to load from, and how.
        model: a ``Dinov2Model``, ``ViTModel`` or the like in place of that; images are prepared for its size.
        references: images (channel, height, width) in [0, 1], in place of the folder.
    """
    config = Config() if config is None else config
    if references is None:
        if config.references is None:
            raise UserError("dino: there are no reference images: give some, or name a folder with references=")
        references = read_images(config.references)
    if model is None:
        preparation = load_preparation(config.source, "dino")
        model = load_network("AutoModel", config.source, config, "dino")
    else:
        preparation = Preparation.square(int(model.config.image_size), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return Dino(frozen(model, config), preparation, references, config)
