"""What rewards with a frozen network share: media checked, brought to the network in batches, scores brought back."""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftilt.rewards.media import images_in
from difftilt.rewards.pretrained.loading import PretrainedOptions
from difftilt.rewards.protocol import Capabilities, Samples


class PretrainedReward(ABC):
    """A reward with a frozen network; a subclass scores one batch of samples on the network's device.

    Gradients flow to the media where the reward is differentiable, and nothing is recorded where it is not.

    Args:
        name: in reports.
        network: in evaluation mode; it is moved to the device of the samples, or to that of the options.
        options: device and batch.
    """

    capabilities: Capabilities = Capabilities(differentiable=True, cost=1.0)

    def __init__(self, name: str, network: nn.Module, options: PretrainedOptions) -> None:
        self.name = name
        self.network = network
        self.options = options

    def score(self, samples: Samples) -> Float[Tensor, " batch"]:
        """float32, on the device of the samples."""
        self.accept(samples.media)
        device = torch.device(self.options.device or samples.media.device)
        self.network.to(device)
        rows = torch.arange(len(samples.group), device=samples.group.device).split(self.options.batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.capabilities.differentiable):
            parts = [self.score_batch(_moved(samples.take(part), device)) for part in rows]
        return torch.cat(parts).float().to(samples.media.device)

    def accept(self, media: Tensor) -> None:
        """Refuse media of another kind than images."""
        images_in(media, self.name)

    @abstractmethod
    def score_batch(self, samples: Samples) -> Float[Tensor, " batch"]:
        """Scores of samples whose media are on the device of the network."""


def _moved(samples: Samples, device: torch.device) -> Samples:
    return replace(samples, media=samples.media.to(device))
