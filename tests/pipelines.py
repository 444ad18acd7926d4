"""Tiny pipelines of the real classes of diffusers and transformers, with random weights; nothing is downloaded."""

import importlib
import os
import string
from typing import Any

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits
PROMPTS = ["a red cat", "two dogs by the sea"]


def made(name: str, *arguments: Any, **settings: Any) -> Any:
    """An object of diffusers or transformers, imported when it is first needed: that takes seconds."""
    library = importlib.import_module("diffusers")
    owner = library if hasattr(library, name) else importlib.import_module("transformers")
    return getattr(owner, name)(*arguments, **settings)


def clip_tokenizer() -> Any:
    """Letters, alone and at the end of a word, and two merges: enough that prompts differ."""
    pieces = [START, END, *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
    merges = [("r", "e"), ("re", "d</w>")]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return made("CLIPTokenizer", vocab=vocabulary, merges=merges, model_max_length=16)


def t5_tokenizer() -> Any:
    """Unigrams with scores, as sentencepiece makes them."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [(letter, -3.0) for letter in LETTERS] + [("▁the", -1.0), ("cat", -1.5)]
    return made("T5Tokenizer", vocab=[*special, *pieces], extra_ids=0, model_max_length=32)


def clip_config(width: int = 16) -> Any:
    return made(
        "CLIPTextConfig",
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_encoder(width: int) -> Any:
    settings = made(
        "T5Config",
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_ff=32,
        d_kv=8,
        num_heads=2,
        num_layers=2,
        dropout_rate=0.0,
    )
    return made("T5EncoderModel", settings).eval()


def image_vae(channels: int, **settings: Any) -> Any:
    return made(
        "AutoencoderKL",
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    ).eval()


def quiet(pipe: Any) -> Any:
    """The pipeline without its progress bar and with spread outputs: a fresh network is nearly constant."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim(**settings: Any) -> Any:
    """The schedule of Stable Diffusion."""
    defaults = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return made("DDIMScheduler", **(defaults | settings))


def unet(**settings: Any) -> Any:
    return made(
        "UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        **({"cross_attention_dim": 16} | settings),
    ).eval()


def stable_diffusion(scheduler: Any = None) -> Any:
    torch.manual_seed(0)
    return quiet(
        made(
            "StableDiffusionPipeline",
            vae=image_vae(4, scaling_factor=0.18215),
            text_encoder=made("CLIPTextModel", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            unet=unet(),
            scheduler=ddim() if scheduler is None else scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def flow(**settings: Any) -> Any:
    return made("FlowMatchEulerDiscreteScheduler", **settings)


def stable_diffusion_3(scheduler: Any = None, t5: bool = True) -> Any:
    torch.manual_seed(0)
    transformer = made(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    ).eval()
    return quiet(
        made(
            "StableDiffusion3Pipeline",
            transformer=transformer,
            scheduler=flow(shift=3.0) if scheduler is None else scheduler,
            vae=image_vae(4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=made("CLIPTextModelWithProjection", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=made("CLIPTextModelWithProjection", clip_config()).eval(),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(32) if t5 else None,
            tokenizer_3=t5_tokenizer() if t5 else None,
        )
    )
