"""What difftilt needs to know of a family of pipelines, and all that the families share.

A family is one file: it names its pipelines and its text encoders, says how its network is called, and what of
:class:`Adapter` differs. The network sees difftilt's time, t = 0 at the data; ``Backbone`` tells it its own.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from difftilt.errors import UserError
from difftilt.models.denoiser import device_of
from difftilt.models.diffusers.backbone import KNOWN, Backbone
from difftilt.models.diffusers.exporting import export_lora, export_pipeline
from difftilt.models.diffusers.known import first_images, known_pixels
from difftilt.models.diffusers.options import PipelineOptions
from difftilt.models.diffusers.schedules import Schedule, dynamic_shift, replaced, schedule_of
from difftilt.models.diffusers.texts import EncodedTexts, Rows, cache_folder, identity_of
from difftilt.models.protocol import START, START_TIME, GenerativeModel, Stateful, Weights
from difftilt.process.protocol import Condition

READER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Attention layers of the text encoders of ``transformers``."""


class Adapter:
    """A pipeline as a :class:`~difftilt.models.protocol.GenerativeModel`, with the sampling that it does when called.

    Args:
        options: of the call.
        pipe: the pipeline; its VAE and text encoders are frozen, everything else is left as it is.

    Raises:
        UserError: for options or a scheduler that this pipeline cannot be sampled with.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Classes of ``diffusers`` that the family serves."""
    image_to_image: ClassVar[tuple[str, ...]] = ()
    """Those of them that begin from an image with noise on."""
    inpainting: ClassVar[tuple[str, ...]] = ()
    """Those of them whose network is told of known pixels beside the prompt; below strength 1 they begin from them."""
    backbone: ClassVar[type[Backbone]]
    """How the network is called."""
    denoisers: ClassVar[tuple[str, ...]] = ("transformer",)
    """Components of the pipeline that are trained."""
    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Components that read the prompt."""
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    """Ends of the names of the layers that adapters go on by default: those of attention."""
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """Components that cut the prompt into tokens."""

    def __init__(self, options: PipelineOptions, pipe: Any) -> None:
        self.options, self.pipe = options, pipe
        for name in {"vae", *self.encoders} - {*self.trained_encoders}:
            component = self._component(name)
            if component is not None:
                component.requires_grad_(False).eval()
        for name in self.trained_encoders:
            self._component(name).requires_grad_(True)  # an earlier use of the pipeline has frozen them
        self._prepare_vae()
        self.check()
        self.texts = EncodedTexts(
            self._encode_on, cache(self._identity), cache_folder(options.cache), options.text_batch
        )

    def check(self) -> None:
        """Refuse what this pipeline cannot be sampled with before anything is made of it."""
        _ = self.inpaints, self.grid

    @cached_property
    def trained_encoders(self) -> tuple[str, ...]:
        """Text encoders that are trained with the network.

        Raises:
            UserError: if the family has no way to, or the pipeline lacks one.
        """
        if not self.options.train_text_encoder:
            return ()
        if self.backbone.read is Backbone.read:
            raise UserError(
                f"train_text_encoder: the text encoders of {type(self.pipe).__name__} are not trained; leave it out"
            )
        for name in self.encoders:
            if self._component(name) is None:
                raise UserError(
                    f"train_text_encoder: this {type(self.pipe).__name__} has no {name}: load it with one, or leave "
                    "train_text_encoder out"
                )
        return self.encoders

    def chosen(self, option: str, parameter: str | None = None) -> Any:
        """An option, or the default of the pipeline's own call."""
        value = getattr(self.options, option)
        if value is not None:
            return value
        signature = inspect.signature(type(self.pipe).__call__)
        found = signature.parameters.get(parameter or option)
        return None if found is None or found.default is inspect.Parameter.empty else found.default

    @cached_property
    def steps(self) -> int:
        """Network evaluations of one sample."""
        return int(self.chosen("steps", "num_inference_steps"))

    @cached_property
    def scale(self) -> float:
        """``guidance_scale`` of the call."""
        return float(self.chosen("guidance", "guidance_scale"))

    @property
    def distilled(self) -> bool:
        """The network is told the guidance scale; there is no unconditional branch."""
        return False

    @property
    def guidance(self) -> float:
        """Of classifier-free guidance, 1 where the pipeline does without."""
        return 1.0 if self.distilled else max(self.scale, 1.0)

    @cached_property
    def schedule(self) -> Schedule:
        """What the scheduler with this number of steps comes to."""
        scheduler, other = self.pipe.scheduler, self.options.scheduler
        scheduler = scheduler if other is None else replaced(scheduler, other)
        try:
            return schedule_of(scheduler, self.steps, sigmas=self.sigmas(), mu=dynamic_shift(scheduler, self.tokens()))
        except (ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.steps} steps of {type(scheduler).__name__}: {error}") from error

    def sigmas(self) -> Sequence[float] | None:
        """What the pipeline hands to its scheduler in place of a number of steps."""
        return None

    def tokens(self) -> int:
        """Length of a sample as the network sees it, which a dynamic time shift depends on."""
        return 0

    @cached_property
    def network(self) -> Backbone:
        """The network behind difftilt's signature."""
        readers = {name: self._component(name) for name in self.trained_encoders}
        return self.backbone(self._component(self.denoisers[0]), self.schedule, readers)

    @cached_property
    def model(self) -> GenerativeModel:
        """The pipeline as every method sees it."""
        return GenerativeModel(
            network=self.network,
            process=self.schedule.process,
            output=self.schedule.output,
            shape=self.shape(),
            encode=self.conditions,
            decode=self.decode,
            null_condition=None if self.distilled else self.null_condition,
            export=self.export,
            lora_targets=self.lora_targets + (READER_TARGETS if self.trained_encoders else ()),
            latents=self.latents,
        )

    def export(self, weights: Weights, folder: Path) -> None:
        """A LoRA for ``pipe.load_lora_weights(folder)``, with a ``peft`` folder beside it; or the whole pipeline.

        Args:
            weights: of the network, or of an adapter on it.
            folder: to write to.
        """
        names = (*self.denoisers, *self.trained_encoders)
        if weights.lora() is None:
            export_pipeline(self.pipe, names, cast(Backbone, weights.module).networks(), folder)
        else:
            export_lora(self.pipe, names if self.trained_encoders else names[:1], weights, folder)

    def shape(self) -> tuple[int, ...]:
        """Of one latent: (channel, height, width)."""
        height, width = self.size
        factor, config = self.pipe.vae_scale_factor, self._component(self.denoisers[0]).config
        return (config.out_channels or config.in_channels, height // factor, width // factor)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels.

        Raises:
            UserError: if the pipeline has no samples of this size.
        """
        default = self.default_size()
        size = (self.options.height or default[0], self.options.width or default[1])
        for name, value in zip(("height", "width"), size, strict=True):
            if value % self.multiple():
                raise UserError(f"{name} = {value}: this pipeline needs a multiple of {self.multiple()}")
        return size

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the pipeline samples by itself."""
        side = self._component(self.denoisers[0]).config.get("sample_size") or self.pipe.default_sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def multiple(self) -> int:
        """What height and width must be multiples of."""
        return self.pipe.vae_scale_factor

    def packed(self, latents: Float[Tensor, "batch *shape"]) -> Tensor:
        """Latents as the pipeline's own call takes them."""
        return latents

    def unpacked(self, latents: Tensor) -> Float[Tensor, "batch *shape"]:
        """Inverse of :meth:`packed`."""
        return latents

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """Condition of each prompt, on the CPU: the text, and what the pipeline is told of its image."""
        rows, state = self.encode(prompts), dict[str, Tensor]()
        if self.inpaints:
            state[KNOWN] = self._in_batches(prompts, lambda *given: self.told(*known_pixels(*given)))
        if self.begins:
            state[START] = self._in_batches(prompts, first_images)
            state[START_TIME] = self.grid[:1].expand(len(prompts))
        return Stateful(rows, state) if state else rows

    def _in_batches(self, prompts: Sequence[str], make: Callable[..., Tensor]) -> Tensor:
        """What is made of the images of all prompts, a few at a time."""
        size = self.options.text_batch
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return torch.cat([make(self.pipe, self._latents_on, part, self.size) for part in parts])

    @cached_property
    def begins(self) -> bool:
        """Whether samples begin from the images of their prompts: at strength 1 inpainting begins from noise."""
        return type(self.pipe).__name__ in self.image_to_image or (self.inpaints and self.strength < 1)

    @cached_property
    def strength(self) -> float:
        """Share of the steps that is taken, of pipelines that may begin from an image."""
        return float(self.chosen("strength"))

    @cached_property
    def grid(self) -> Float[Tensor, " times"]:
        """Times of sampling: the scheduler's, or of image to image those that are left of them.

        Raises:
            UserError: if none is left, or there is no image to begin from.
        """
        if not self.begins:
            if self.options.strength is not None and not self.inpaints:
                raise UserError(f"strength: {type(self.pipe).__name__} begins from noise: leave it out")
            return self.schedule.grid
        skipped, strength = self.skipped(self.strength), self.strength
        if skipped >= self.steps:
            raise UserError(f"strength = {strength:g}: none of {self.steps} steps is left: raise strength, or steps")
        return self.schedule.grid[skipped:]

    def skipped(self, strength: float) -> int:
        """Steps that are not taken at a strength, rounded as the pipeline rounds."""
        return self.steps - int(self.steps * strength)

    @cached_property
    def inpaints(self) -> bool:
        """Whether the network is told of known pixels.

        Raises:
            UserError: for an inpainting pipeline whose network cannot see them.
        """
        name = type(self.pipe).__name__
        if name not in self.inpainting:
            return False
        config = self._component(self.denoisers[0]).config
        if config.in_channels == (config.out_channels or config.in_channels):
            raise UserError(
                f"{name} with a network of {config.in_channels} input channels, which does not see the mask: load a "
                "model that was trained for inpainting, or use its text-to-image pipeline"
            )
        return True

    def _latents_on(self, media: Tensor) -> Tensor:
        """:meth:`latents`, computed on the device of the network."""
        return self.latents(media.to(device_of(self.network))).cpu()

    def told(self, masks: Float[Tensor, "batch 1 height width"], latents: Float[Tensor, "batch *shape"]) -> Tensor:
        """Masks in pixels, and the latents of what is known, as channels beside those of the state."""
        return torch.cat([functional.interpolate(masks, size=latents.shape[-2:]), latents], dim=1)

    def encode(self, prompts: Sequence[str]) -> Rows:
        """Condition of each prompt without its image, on the CPU: its text, or tokens where encoders are trained."""
        return self._tokens(prompts) if self.trained_encoders else self.texts(prompts)

    def _tokens(self, prompts: Sequence[str]) -> Rows:
        """What each of the trained encoders reads, under its name."""
        rows: Rows = {}
        for name, tokenizer in zip(self.encoders, map(self._component, self.tokenizers), strict=True):
            length = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            rows[name] = tokenizer(list(map(str, prompts)), return_tensors="pt", **length).input_ids
        return rows

    def null_condition(self, rows: int) -> Rows:
        """Condition of the unconditional branch, on the device of the network."""
        device = device_of(self.network)
        if not hasattr(self, "_null") or self._null_device != device:
            self._null_device = device
            self._null = {name: value.to(device) for name, value in self.negative().items()}
        return {name: value.expand(rows, *value.shape[1:]) for name, value in self._null.items()}

    def negative(self) -> Rows:
        """One row: the condition of the negative prompt, empty where none is given."""
        return self.encode([self.options.negative_prompt or ""])

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        """Condition of each prompt by the pipeline's own ``encode_prompt``."""
        raise NotImplementedError

    def _encode_on(self, prompts: Sequence[str]) -> Rows:
        """:meth:`embed` on the device of the network, which the encoders leave afterwards."""
        device = device_of(self.network)
        encoders = [module for module in map(self._component, self.encoders) if module is not None]
        try:
            for encoder in encoders:
                encoder.to(device)
            with torch.no_grad():
                return self.embed(list(prompts), device)
        finally:
            for encoder in encoders:
                encoder.to("cpu")

    def _identity(self) -> str:
        modules = [module for module in map(self._component, self.encoders) if module is not None]
        tokenizers = [one for one in map(self._component, self.tokenizers) if one is not None]
        return identity_of(self.text_settings(), modules, tokenizers)

    def text_settings(self) -> dict[str, Any]:
        """What the condition of a prompt depends on besides encoders and tokenizers."""
        settings = (type(self.pipe).__name__, self.chosen("max_sequence_length"))
        return dict(zip(("pipeline", "max_sequence_length"), settings, strict=True))

    def decode(self, latents: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *media"]:
        """Latents to media in [0, 1]; gradients are kept, a clipped value passes none."""
        vae = self._vae_on(latents.device)
        media = vae.decode(self.unscaled(latents).to(vae.dtype), return_dict=False)[0]
        return (media.float() / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Float[Tensor, "batch *media"]) -> Float[Tensor, "batch *shape"]:
        """Media in [0, 1] to latents, at the mode of the encoder's law."""
        vae = self._vae_on(media.device)
        law = vae.encode((2 * media - 1).to(vae.dtype), return_dict=False)[0]
        return self.scaled(law.mode().float())

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents of the network to those of the VAE: z·std/scaling_factor + mean + shift_factor, by its settings."""
        scale, shift = self._scales(latents)
        return latents * scale + shift

    def scaled(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`unscaled`."""
        scale, shift = self._scales(latents)
        return (latents - shift) / scale

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel."""
        config = self._component("vae").config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = [0.0], [1.0]
        shape = (1, -1, *[1] * (like.dim() - 2))
        scale = torch.tensor(std).to(like).reshape(shape) / (config.get("scaling_factor") or 1.0)
        return scale, torch.tensor(mean).to(like).reshape(shape) + (config.get("shift_factor") or 0.0)

    def _prepare_vae(self) -> None:
        vae = self._component("vae")
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.to(torch.float32)  # overflows in half precision, as its settings say
        if self.options.vae_slicing:
            vae.enable_slicing()
        if self.options.vae_tiling:
            vae.enable_tiling()

    def _vae_on(self, device: torch.device) -> Any:
        vae = self._component("vae")
        return vae if vae.device == device else vae.to(device)

    def _component(self, name: str) -> Any:
        return getattr(self.pipe, name, None)


AdapterClass = Callable[[PipelineOptions, Any], Adapter]


def serves(adapter: object) -> tuple[str, ...]:
    """Classes of pipelines that an adapter serves."""
    return cast(tuple[str, ...], getattr(adapter, "pipelines", ()))
