"""Weights of a CLIP in the names of ``open_clip`` as those of a ``CLIPModel`` of ``transformers``.

The two compute the same. ``open_clip`` keeps the maps to queries, keys and values as one matrix, and multiplies by
its projections from the right.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

_NAMES = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("text_projection", "visual.proj")
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of ``transformers``; what has no name there keeps its own."""
    return dict(pair for name, value in tensors.items() for pair in _renamed(name, value) if name != "attn_mask")


def _renamed(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    block = _BLOCK.fullmatch(name)
    if block is None:
        stem, _, leaf = name.rpartition(".")
        known = _NAMES.get(name) or (f"{_NAMES[stem]}.{leaf}" if stem in _NAMES else name)
        yield known, value.T.contiguous() if name in _TRANSPOSED else value
        return
    home = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}"
    stem, _, leaf = block[3].rpartition(".")
    if leaf.startswith("in_proj_"):
        for part, rows in zip("qkv", value.chunk(3), strict=True):
            yield f"{home}.self_attn.{part}_proj.{leaf.removeprefix('in_proj_')}", rows.contiguous()
    else:
        yield f"{home}.{_IN_BLOCK.get(stem, stem)}.{leaf}", value
