"""The network, the task and the bare passes that every benchmark shares."""

import time
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from difftilt.models.dit import DiT
from difftilt.models.protocol import GenerativeModel
from difftilt.process.gaussian import RectifiedFlow
from difftilt.process.grid import uniform_grid
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.training.protocol import Task

CLASSES = 10


@dataclass(frozen=True)
class Size:
    """Sizes of a benchmark.

    Attributes:
        latent: channels, height and width of a latent.
        patch: side of a patch: 16 × 16 with patch 2 is 64 tokens.
        width, depth: of the network.
        batch: samples, and rows of every network call.
        steps: of a rollout.
    """

    latent: tuple[int, int, int] = (4, 16, 16)
    patch: int = 2
    width: int = 128
    depth: int = 4
    batch: int = 64
    steps: int = 4


SIZES: dict[Literal["full", "tiny"], Size] = {"full": Size(), "tiny": Size((4, 4, 4), 2, 16, 1, 8, 3)}


def make_network(size: Size) -> DiT:
    """A class-conditional DiT in which no weight is zero, so that no product is special."""
    channels, side, _ = size.latent
    network = DiT(channels, side, size.patch, width=size.width, depth=size.depth, heads=4, ratio=4, classes=CLASSES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def make_task(size: Size, network: nn.Module | None = None) -> Task:
    """Rectified flow on the network, with a reward that costs next to nothing."""
    model = GenerativeModel(
        network=make_network(size) if network is None else network,
        process=RectifiedFlow(),
        output="velocity",
        shape=size.latent,
        encode=lambda prompts: torch.tensor([int(prompt) for prompt in prompts]),
        decode=lambda latents: latents[:, :3].sigmoid(),
        null_condition=lambda rows: torch.full((rows,), CLASSES),
    )
    prompts = [str(label) for label in range(CLASSES)]
    sampler = Sampler(uniform_grid(size.steps, shift=3.0), FlowSDE())
    return Task("benchmark", model, FunctionReward("brightness", _brightness), prompts, prompts, sampler)


def _brightness(samples: Samples) -> Tensor:
    return samples.media.flatten(1).mean(1)


@dataclass(frozen=True)
class Inputs:
    """What one call of the bare network takes."""

    x_t: Float[Tensor, "batch channel height width"]
    t: Float[Tensor, " batch"]
    label: Int[Tensor, " batch"]


def make_inputs(size: Size) -> Inputs:
    """One batch: normal latents at t = 1/2, labels in turn."""
    index = torch.arange(size.batch)
    x_t = Noise(0).normal(index, size.latent, purpose="start")
    return Inputs(x_t, torch.full((size.batch,), 0.5), index % CLASSES)


def forwards(network: nn.Module, inputs: Inputs, count: int) -> None:
    """``count`` evaluations without gradient."""
    with torch.no_grad():
        for _ in range(count):
            network(inputs.x_t, inputs.t, inputs.label)


def gradient_passes(network: nn.Module, inputs: Inputs, count: int) -> None:
    """``count`` evaluations with their backward passes; no loss, the output itself is differentiated."""
    for _ in range(count):
        output = network(inputs.x_t, inputs.t, inputs.label)
        output.backward(torch.ones_like(output))


class NetworkClock:
    """Seconds spent inside a network since the last reading."""

    def __init__(self, network: nn.Module) -> None:
        self._began = self._spent = 0.0
        network.register_forward_pre_hook(self._enter)
        network.register_forward_hook(self._leave)

    def _enter(self, module: nn.Module, given: object) -> None:
        self._began = time.perf_counter()

    def _leave(self, module: nn.Module, given: object, output: object) -> None:
        self._spent += time.perf_counter() - self._began

    def read(self) -> float:
        """The seconds, and start again from 0."""
        spent, self._spent = self._spent, 0.0
        return spent


def shapes_of(size: Size, network: nn.Module) -> dict[str, object]:
    """For the report."""
    channels, height, width = size.latent
    return {
        "latent": [channels, height, width],
        "tokens": (height // size.patch) * (width // size.patch),
        "width": size.width,
        "depth": size.depth,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch": size.batch,
        "forward_batch": size.batch,
        "steps": size.steps,
    }
