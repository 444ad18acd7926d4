"""Any reward of images as one of videos: frames are picked, scored one by one, and averaged."""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from difftilt.card import Card
from difftilt.config import Config as BaseConfig
from difftilt.errors import UserError
from difftilt.rewards.media import videos_in
from difftilt.rewards.protocol import Capabilities, Reward, Samples

CARD = Card(
    name="video",
    entry="VideoReward",
    paper="Yuan et al. 2023, InstructVideo (arXiv 2312.12490): frames of segments, attenuated over time",
    needs=("videos",),
)


class Config(BaseConfig):
    """Which frames count, and how much."""

    segments: int | None = Field(default=None, ge=1)
    """Equal parts of the video, of which one frame each is scored; null scores every frame."""
    pick: Literal["first", "middle"] = "middle"
    """Frame of each segment."""
    decay: float = Field(default=0.0, ge=0)
    """λ of the attenuation exp(-λ·|frame - middle frame|), per frame; 0 is the mean over frames."""


class VideoReward:
    """1/S·Σ_i exp(-λ·|g_i - ⌊F/2⌋|)·r(frame g_i) over the S frames g_i picked of F.

    As published, the sum is divided by S, not by the sum of the weights: with λ > 0 its scale is smaller.

    Args:
        config: see :class:`Config`.
        reward: of single images.
    """

    def __init__(self, config: Config, reward: Reward) -> None:
        if reward.capabilities.set_valued:
            raise UserError(
                f"video: {reward.name!r} scores sets; frames are scored one by one: wrap a reward of samples"
            )
        self.config, self.reward = config, reward
        self.name = f"video_{reward.name}"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the image reward, which costs as many calls as there are segments."""
        own = self.reward.capabilities
        cost = own.cost * (self.config.segments or 1)
        return replace(own, features=False, trained=False, cost=cost)

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        frames = videos_in(samples.media, self.name).shape[1]
        count = frames if self.config.segments is None else self.config.segments
        place = 0.5 if self.config.pick == "middle" else 0.0
        rows = torch.full((len(samples.group), count), place, device=samples.media.device)
        return self.score_frames(samples, pick_frames(frames, rows))

    def score_frames(self, samples: Samples, chosen: Int[Tensor, "batch segments"]) -> Float[Tensor, " batch"]:
        """The score of frames that a caller has picked, e.g. at random with :func:`pick_frames`."""
        video = videos_in(samples.media, self.name)
        each = torch.arange(len(video), device=video.device)[:, None]
        scores = self.reward.score(_as_images(samples, video[each, chosen])).unflatten(0, chosen.shape)
        return (attenuation(chosen, video.shape[1], self.config.decay).to(scores) * scores).mean(1)


def pick_frames(frames: int, place: Float[Tensor, "batch segments"]) -> Int[Tensor, "batch segments"]:
    """A frame of each of S equal segments, [(i - 1)·F/S, i·F/S): the one at a share of it, in [0, 1).

    With uniform shares it is the published random choice; 0 is the first frame of each segment.

    Raises:
        UserError: for more segments than frames.
    """
    segments = place.shape[1]
    if segments > frames:
        raise UserError(f"video: segments = {segments}, and the video has {frames} frames: ask for fewer")
    first = torch.arange(segments + 1, device=place.device) * frames // segments
    return first[:-1] + (place * (first[1:] - first[:-1])).long()


def attenuation(chosen: Int[Tensor, "batch segments"], frames: int, decay: float) -> Float[Tensor, "batch segments"]:
    """exp(-λ·|frame - ⌊F/2⌋|)."""
    return (-decay * (chosen - frames // 2).abs()).exp()


def _as_images(samples: Samples, frames: Tensor) -> Samples:
    """One row per frame, with what belongs to its video."""
    rows = torch.arange(len(frames), device=samples.group.device).repeat_interleave(frames.shape[1])
    empty = replace(samples, media=samples.media[:, :0])  # the videos themselves are not multiplied
    return replace(empty.take(rows), media=frames.flatten(0, 1))
