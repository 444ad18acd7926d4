"""Human preference, learned from the choices of the Pick-a-Pic site."""

from typing import Any

from difftilt.card import Card
from difftilt.rewards.pretrained.clip import ClipSimilarity, load_clip
from difftilt.rewards.pretrained.loading import PretrainedOptions, Text

CARD = Card(
    name="pick-score",
    entry="pick_score",
    paper="Kirstain et al. 2023, Pick-a-Pic (arXiv 2305.01569)",
    needs=("images", "the extra [rewards]"),
)


class Config(PretrainedOptions):
    """Settings of PickScore."""

    source: Text = "yuvalkirstain/PickScore_v1"
    """Folder or hub id of the ``CLIPModel``."""
    processor: Text = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or hub id of its tokenizer and image processor."""


def pick_score(config: Config | None = None, *, model: Any = None, tokenizer: Any = None) -> ClipSimilarity:
    """s·cos(image, prompt) with the network's own learned scale s, which is about 100.

    Args:
        config: where to load from, and how.
        model: a ``CLIPModel`` in place of that, with its ``tokenizer``.
        tokenizer: of the model.
    """
    config = Config() if config is None else config
    clip = load_clip(config.source, config, "pick_score", model, tokenizer, config.processor)
    return ClipSimilarity(
        "pick_score", clip, config, lambda cosine: clip.model.logit_scale.float().exp().to(cosine.device) * cosine
    )
