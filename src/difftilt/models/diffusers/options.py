"""How a pipeline of ``diffusers`` is loaded and sampled: what the user of the pipeline would say when calling it."""

from typing import Annotated, Literal

from pydantic import Field

from difftilt.config import Config

Text = Annotated[str, Field(min_length=1)]
Pixels = Annotated[int, Field(ge=8)]


class PipelineOptions(Config):
    """Sampling, text, image decoder and loading. What is null is what the pipeline itself does when it is called."""

    steps: int | None = Field(default=None, ge=1)
    """Network evaluations of one sample."""
    guidance: float | None = Field(default=None, ge=0)
    """``guidance_scale`` of the pipeline: of classifier-free guidance (1 and less is off), or the number that a
    guidance-distilled network is told."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Of pipelines that begin from an image: the share of the steps that are taken, from the image with noise on."""
    height: Pixels | None = None
    """Of a sample, in pixels."""
    width: Pixels | None = None
    """Of a sample, in pixels."""
    frames: int | None = Field(default=None, ge=1)
    """Of a video; one more than a multiple of the decoder's compression in time."""
    negative_prompt: str | None = None
    """What the unconditional branch of guidance is given."""
    max_sequence_length: int | None = Field(default=None, ge=1)
    """Tokens that a prompt is cut or padded to, for text encoders without a length of their own."""
    scheduler: Text | None = None
    """Class of ``diffusers.schedulers`` that takes the place of the pipeline's own, made from its settings."""
    vae_slicing: bool = False
    """Decode one sample at a time."""
    vae_tiling: bool = False
    """Decode a sample in overlapping tiles."""
    train_text_encoder: bool = False
    """Train the text encoders with the network (Stable Diffusion and SDXL): every call of it then reads the prompts
    anew."""
    text_batch: int = Field(default=16, ge=1)
    """Prompts that are encoded together."""
    cache: Text | None = None
    """Folder for encoded prompts; null is ``$DIFFTILT_CACHE``, else ``$XDG_CACHE_HOME/difftilt``, else
    ``~/.cache/difftilt``; ``off`` keeps them in memory only."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of all weights; null loads float32, or leaves a pipeline that is given as it is."""
    variant: Text | None = None
    """Of the weight files, e.g. ``fp16``."""
    adapter: Text | None = None
    """``module:Class`` of an adapter of your own; null finds one by the class of the pipeline."""
