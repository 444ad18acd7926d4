"""How well an image fits its prompt in the eyes of CLIP."""

from typing import Any, Literal

from difftilt.card import Card
from difftilt.rewards.pretrained.clip import ClipOptions, ClipSimilarity, load_clip

CARD = Card(
    name="clip-score",
    entry="clip_score",
    paper="Hessel et al. 2021, CLIPScore (arXiv 2104.08718)",
    needs=("images", "the extra [rewards]"),
)


class Config(ClipOptions):
    """Settings of the CLIP score."""

    form: Literal["cosine", "hessel"] = "cosine"
    """``cosine`` in [-1, 1]; ``hessel`` is 2.5·max(cosine, 0) with "A photo depicts" before the prompt, as in the
    paper."""


def clip_score(config: Config | None = None, *, model: Any = None, tokenizer: Any = None) -> ClipSimilarity:
    """The reward, of a ``CLIPModel`` that is given with its tokenizer, or loaded."""
    config = Config() if config is None else config
    clip = load_clip(config.source, config, "clip_score", model, tokenizer)
    if config.form == "cosine":
        return ClipSimilarity("clip_score", clip, config)
    return ClipSimilarity(
        "clip_score", clip, config, lambda cosine: 2.5 * cosine.clamp(min=0), prefix="A photo depicts "
    )
