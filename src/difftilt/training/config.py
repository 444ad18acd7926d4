"""Configuration that every training method shares."""

from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from difftilt.config import Config
from difftilt.models.execution import Execution
from difftilt.models.lora import LoraSettings
from difftilt.training.monitors import MonitorConfig


def _usable(device: str) -> str:
    """The name, if torch knows such a device and has it."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{device!r} is no device of this machine: use cpu, or cuda with a CUDA build") from error
    return device


Device = Annotated[str, AfterValidator(_usable)]
"""Name of a torch device that is there."""

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW and the gradient clip."""

    lr: float = Field(default=3e-4, gt=0)
    """Learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The gradient of an update is scaled down to this norm."""


class TrainingConfig(Execution):
    """One run of the loop."""

    iterations: int = Field(default=100, ge=1)
    """Rounds of collect and update."""
    seed: int = Field(default=0, ge=0)
    """Fixes every draw of the run."""
    forward_batch: int = Field(default=64, ge=4, multiple_of=4)
    """Rows of every network call: shorter batches are padded, longer ones are split. A multiple of 4, best
    of 32: at other sizes a row was seen to depend on where it stands, in the last bit."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Of the role ``current``, and of other trained roles where they do not say otherwise."""
    lora: LoraSettings | None = None
    """Train low-rank adapters in place of all weights; every role is then an adapter, the reference none."""
    sharding: Literal["none", "full", "hybrid"] = "none"
    """With several processes: ``none`` keeps all weights in each (data parallel); ``full`` cuts weights, gradients and
    optimiser state among all (FSDP); ``hybrid`` among the processes of one machine, and every machine has a copy."""
    offload_weights: bool = False
    """Weights that are cut rest on the CPU between calls, with gradients and optimiser state."""
    offload_experience: bool = False
    """What an iteration has recorded - states, latents, conditions, media - rests on the CPU while it is learned from,
    and comes back one microbatch at a time."""
    evaluate_every: int = Field(default=10, ge=0)
    """Iterations between evaluations on held-out prompts; 0 evaluates only before the first and after the last."""
    evaluation_samples: int = Field(default=256, ge=2)
    """Samples of an evaluation, at fixed prompts and fixed noise."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Iterations between checkpoints; the last iteration always has one."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Older checkpoints are removed."""
    device: Device = "cpu"
    """Torch device of the network."""
    activation_checkpointing: bool = False
    """Keep only what goes into the network's blocks, and evaluate each block again in the backward pass: less memory,
    one more forward pass."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the rows of ``metrics.jsonl`` and the pictures go as well: TensorBoard, Weights & Biases, or both."""
    monitors: MonitorConfig = MonitorConfig()
    """Thresholds at which the monitors speak."""

    def sharded(self, processes: int) -> bool:
        """Whether each of so many processes holds a part of the weights: one alone holds all."""
        return self.sharding != "none" and processes > 1

    @model_validator(mode="after")
    def _compiles_whole(self) -> Self:
        if self.compile and self.sharding != "none":
            raise ValueError("compile is not made for weights that are cut: leave out compile, or sharding")
        return self

    @model_validator(mode="after")
    def _offloads_parts(self) -> Self:
        if self.offload_weights and self.sharding == "none":
            raise ValueError(
                "offload_weights moves weights that are cut: set sharding to full or hybrid, or leave it out"
            )
        return self


class GroupSampling(Config):
    """For methods that draw groups of samples of one prompt."""

    groups: int = Field(default=16, ge=1)
    """Prompts per iteration."""
    group_size: int = Field(default=16, ge=2)
    """Samples per prompt."""
