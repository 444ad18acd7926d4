"""Tiny pipelines of the real classes of diffusers and transformers, with random weights; nothing is downloaded."""

import importlib
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from difftilt.models.denoiser import denoiser
from difftilt.models.diffusers import PipelineOptions, adapt
from difftilt.sampling.solvers import EulerSolver

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_lowercase + string.digits
PROMPTS = ["a red cat", "two dogs by the sea"]


def made(name: str, *arguments: Any, **settings: Any) -> Any:
    """An object of diffusers or transformers, imported when it is first needed: that takes seconds."""
    library = importlib.import_module("transformers")
    owner = library if hasattr(library, name) else importlib.import_module("diffusers")
    return getattr(owner, name)(*arguments, **settings)


def clip_tokenizer(merges: Sequence[tuple[str, str]] = (("r", "e"), ("re", "d</w>"))) -> Any:
    """Letters, alone and at the end of a word, and two merges: enough that prompts differ."""
    pieces = [START, END, *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return made("CLIPTokenizer", vocab=vocabulary, merges=list(merges), model_max_length=16)


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
    """The pipeline without its progress bar."""
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


def stable_diffusion_inpaint(channels: int = 9) -> Any:
    torch.manual_seed(0)
    return quiet(
        made(
            "StableDiffusionInpaintPipeline",
            vae=image_vae(4, scaling_factor=0.18215),
            text_encoder=made("CLIPTextModel", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            unet=unet(in_channels=channels),
            scheduler=ddim(),
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


def latent_consistency(**scheduler: Any) -> Any:
    torch.manual_seed(0)
    return quiet(
        made(
            "LatentConsistencyModelPipeline",
            vae=image_vae(4, scaling_factor=0.18215),
            text_encoder=made("CLIPTextModel", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            unet=unet(time_cond_proj_dim=8),
            scheduler=made("LCMScheduler", clip_sample=False, **scheduler),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def stable_diffusion_xl(scheduler: Any = None, zeros: bool = True, inpaint: bool = False, **vae: Any) -> Any:
    torch.manual_seed(0)
    sized = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "cross_attention_dim": 32}
    return quiet(
        made(
            "StableDiffusionXLInpaintPipeline" if inpaint else "StableDiffusionXLPipeline",
            vae=image_vae(4, scaling_factor=0.13025, **vae),
            text_encoder=made("CLIPTextModel", clip_config()).eval(),
            text_encoder_2=made("CLIPTextModelWithProjection", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet(projection_class_embeddings_input_dim=6 * 4 + 16, in_channels=9 if inpaint else 4, **sized),
            scheduler=ddim() if scheduler is None else scheduler,
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
    )


def flux(told: bool = True, fill: bool = False, **scheduler: Any) -> Any:
    torch.manual_seed(0)
    transformer = made(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=16 * 2 + 4 * 4 if fill else 16,  # the decoder's 2×2 pixels of the mask at every place of a latent
        out_channels=16 if fill else None,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=told,
    ).eval()
    return quiet(
        made(
            "FluxFillPipeline" if fill else "FluxPipeline",
            transformer=transformer,
            scheduler=flow(**({"use_dynamic_shifting": True} | scheduler)),
            vae=image_vae(4, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=made("CLIPTextModel", clip_config()).eval(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(32),
            tokenizer_2=t5_tokenizer(),
        )
    )


def wan(two: bool = False, by_token: bool = False) -> Any:
    torch.manual_seed(0)

    def transformer() -> Any:
        return made(
            "WanTransformer3DModel",
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()

    vae = made(
        "AutoencoderKLWan",
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    ).eval()
    return quiet(
        made(
            "WanPipeline",
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(32),
            vae=vae,
            scheduler=flow(shift=3.0),
            transformer=transformer(),
            transformer_2=transformer() if two else None,
            boundary_ratio=0.8 if two else None,
            expand_timesteps=by_token,
        )
    )


@dataclass(frozen=True)
class Sampled:
    """What a pipeline and difftilt make of the same noise.

    Attributes:
        latents, stock_latents: at the data end.
        media, stock_media: decoded.
    """

    latents: Tensor
    stock_latents: Tensor
    media: Tensor
    stock_media: Tensor

    @property
    def error(self) -> float:
        """The larger of the two largest differences, that of latents in units of their largest value (at least 1)."""
        size = max(float(self.stock_latents.abs().max()), 1.0)
        latents = float((self.latents - self.stock_latents).abs().max()) / size
        return max(latents, float((self.media - self.stock_media).abs().max()))


def start_of(shape: tuple[int, ...], rows: int = len(PROMPTS)) -> Tensor:
    """Standard normal noise, what a pipeline calls its latents."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def both(pipe: Any, options: Mapping[str, Any], call: Mapping[str, Any], output: str = "images") -> Sampled:
    """The prompts sampled by the solver of the task and by the pipeline itself.

    Args:
        pipe: of any family.
        options: of difftilt.
        call: of the pipeline, to the same effect.
        output: name of the result of the pipeline.
    """
    adapter = adapt(pipe, PipelineOptions(cache="off", **options))
    model, noise = adapter.model, start_of(adapter.model.shape)
    denoise = denoiser(model, guidance=adapter.guidance)
    x = EulerSolver()(denoise, model.process.prior(noise), model.encode(PROMPTS), adapter.schedule.grid)
    states: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, known: dict[str, Any]) -> dict[str, Any]:
        states.append(known["latents"])
        return known

    given = {"latents": adapter.packed(noise.clone()), "output_type": "pt", "callback_on_step_end": keep}
    media = getattr(pipe(PROMPTS, **given, **call), output)
    return Sampled(x, adapter.unpacked(states[-1]), model.decode(x), media)
