"""Wan 2.1 and 2.2 text-to-video: a transformer on a rectified flow over latents of a video, T5.

The larger 2.2 has two networks, one for the noisy times and one for the others; both are trained.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from difftilt.card import Card
from difftilt.errors import UserError
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.schedules import Schedule
from difftilt.models.diffusers.texts import Rows

CARD = Card(
    name="wan",
    entry="Wan",
    paper="Wan Team 2025, Wan: Open and Advanced Large-Scale Video Generative Models, arXiv 2503.20314",
)


class WanTransformer(Backbone):
    """One transformer, or two of which each row takes the one of its time.

    Args:
        network: of all times, or of those from ``boundary`` on.
        schedule: gives the network's clock.
        cleaner: of the times below ``boundary``.
        boundary: on the network's clock.
        by_token: the network is told a time for every token.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, cleaner: nn.Module | None, boundary: float, by_token: bool
    ) -> None:
        super().__init__(network, schedule)
        self.cleaner, self.boundary, self.by_token = cleaner, boundary, by_token

    @property
    def inner(self) -> nn.Module:
        """The network that gets adapters, where there is one."""
        if self.cleaner is not None:
            raise UserError(
                "training.lora: this Wan pipeline has two networks, which one LoRA cannot hold: train all weights "
                "(leave training.lora out), or a pipeline with one network"
            )
        return self.network

    def networks(self) -> tuple[nn.Module, ...]:
        """One or two."""
        return (self.network,) if self.cleaner is None else (self.network, self.cleaner)

    def call(self, x: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        text = condition["text"].to(x.dtype)
        noisy = timestep >= self.boundary
        if self.cleaner is None or bool(noisy.all()):
            return self._one(self.network, x, timestep, text)
        if not bool(noisy.any()):
            return self._one(self.cleaner, x, timestep, text)
        output = torch.empty_like(x)
        for rows, network in ((noisy, self.network), (~noisy, self.cleaner)):
            output[rows] = self._one(network, x[rows], timestep[rows], text[rows])
        return output

    def _one(self, network: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if self.by_token:
            _, _, frames, height, width = x.shape
            timestep = timestep[:, None].expand(-1, frames * (height // 2) * (width // 2))
        return network(hidden_states=x, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


class Wan(Adapter):
    """``WanPipeline``; both networks of the larger 2.2 have one guidance scale."""

    pipelines = ("WanPipeline",)
    backbone = WanTransformer
    denoisers = ("transformer", "transformer_2")

    @cached_property
    def network(self) -> Backbone:
        config, pipe = self.pipe.config, self.pipe
        by_token = bool(config.expand_timesteps)
        if config.boundary_ratio is None:
            return WanTransformer(pipe.transformer, self.schedule, None, 0.0, by_token)
        boundary = config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        return WanTransformer(pipe.transformer, self.schedule, pipe.transformer_2, boundary, by_token)

    def default_size(self) -> tuple[int, int]:
        return self.chosen("height"), self.chosen("width")

    def multiple(self) -> int:
        patch = self.pipe.transformer.config.patch_size
        return max(16, self.pipe.vae_scale_factor_spatial * max(patch[1:]))

    def shape(self) -> tuple[int, ...]:
        """(channel, frame, height, width)."""
        (height, width), factor = self.size, self.pipe.vae_scale_factor_spatial
        channels: int = self.pipe.transformer.config.in_channels
        return (channels, self.frames, height // factor, width // factor)

    @property
    def frames(self) -> int:
        """Of a latent.

        Raises:
            UserError: if the decoder has no videos of this length.
        """
        frames, factor = int(self.chosen("frames", "num_frames")), self.pipe.vae_scale_factor_temporal
        if frames % factor != 1:
            raise UserError(f"frames = {frames}: this pipeline needs one more than a multiple of {factor}")
        return frames // factor + 1

    def embed(self, prompts: Sequence[str], device: torch.device) -> Rows:
        length = self.chosen("max_sequence_length")
        text, _ = self.pipe.encode_prompt(
            list(prompts), None, do_classifier_free_guidance=False, max_sequence_length=length, device=device
        )
        return {"text": text}

    def decode(self, latents: Tensor) -> Tensor:
        """Videos (batch, frame, channel, height, width)."""
        return super().decode(latents).transpose(1, 2)

    def latents(self, media: Tensor) -> Tensor:
        """Of videos (batch, frame, channel, height, width)."""
        return super().latents(media.transpose(1, 2))
