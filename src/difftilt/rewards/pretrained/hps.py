"""Human preference, learned from people's rankings of images: HPSv2 and HPSv2.1."""

from dataclasses import replace
from typing import Any

from difftilt.card import Card
from difftilt.leaves import import_module
from difftilt.rewards.pretrained.clip import Clip, ClipSimilarity
from difftilt.rewards.pretrained.loading import (
    PretrainedOptions,
    Text,
    fill,
    frozen,
    load_part,
    load_weights,
    needs_both,
)
from difftilt.rewards.pretrained.open_clip import from_open_clip
from difftilt.rewards.pretrained.pixels import Preparation

CARD = Card(
    name="hps",
    entry="hps",
    paper="Wu et al. 2023, Human Preference Score v2 (arXiv 2306.09341)",
    needs=("images", "the extra [rewards]"),
)


class Config(PretrainedOptions):
    """Settings of HPSv2."""

    weights: Text = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    """A file in the names of ``open_clip``, as published, or OWNER/NAME/FILE on the hub; ``HPS_v2_compressed.pt`` is
    version 2.0."""
    architecture: Text = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id whose configuration and tokenizer are taken; none of its weights."""


def hps(config: Config | None = None, *, model: Any = None, tokenizer: Any = None) -> ClipSimilarity:
    """cos(image, prompt), in [-1, 1]; the published code shows the whole image, with black at its sides.

    Args:
        config: where to load from, and how.
        model: a ``CLIPModel`` in place of that, with its ``tokenizer``.
        tokenizer: of the model.
    """
    config, user = Config() if config is None else config, "hps"
    needs_both(user, model=model, tokenizer=tokenizer)
    if model is None:
        tokenizer = load_part("AutoTokenizer", config.architecture, user)
        model = import_module("transformers", user).CLIPModel(load_part("CLIPConfig", config.architecture, user))
        fill(model, from_open_clip(load_weights(config.weights, user)), user)
    square = Preparation.square(int(model.config.vision_config.image_size))
    whole = replace(square, fit="longest", crop=None)
    return ClipSimilarity(user, Clip(frozen(model, config), tokenizer, whole), config)
