"""A small Stable Diffusion pipeline with random weights, in a folder that several versions of diffusers can load."""

import importlib
import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Of the networks.

    Attributes:
        widths: channels of the U-Net at each of its resolutions.
        layers: blocks of each resolution.
        latent: side of a latent.
        context: width of the text encoder.
    """

    widths: tuple[int, ...]
    layers: int
    latent: int
    context: int


SIZES = {
    "tiny": Size((8, 16), 1, 8, 16),
    "small": Size((32, 64), 1, 16, 32),
    "medium": Size((64, 128, 128), 2, 16, 64),
}


def save_pipeline(size: Size, folder: Path) -> int:
    """Make the pipeline and write it; returns the number of weights of its U-Net."""
    diffusers: Any = importlib.import_module("diffusers")
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    words = folder / "tokenizer"
    vocabulary = _save_words(words)
    text = transformers.CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=size.context,
        intermediate_size=2 * size.context,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    depth = len(size.widths)
    unet = diffusers.UNet2DConditionModel(
        sample_size=size.latent,
        block_out_channels=size.widths,
        layers_per_block=size.layers,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (depth - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (depth - 1), "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        cross_attention_dim=size.context,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * size.latent,
        scaling_factor=0.18215,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(words),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    # transformers 5 writes other files than 4 reads, and other names of weights; it reads those of 4
    _save_words(words)
    weights = {f"text_model.{name}": value for name, value in pipeline.text_encoder.state_dict().items()}
    save_file(weights, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.numel() for weight in unet.parameters())


def _save_words(words: Path) -> int:
    """A tokenizer of letters, as the files that all versions of transformers read; returns its number of tokens."""
    pieces = [START, END, *string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words.mkdir(parents=True, exist_ok=True)
    (words / "vocab.json").write_text(json.dumps({piece: place for place, piece in enumerate(pieces)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": END, "unk_token": END}
    settings |= {"bos_token": START, "eos_token": END}
    (words / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(pieces)
