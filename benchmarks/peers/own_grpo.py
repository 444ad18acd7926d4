"""difftilt at the work of its peers: ``flow-grpo`` with the settings that make it DDPO."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.peers.work import PROMPT, Counter, Work, redness, serve
from difftilt.methods.policy_gradient.flow_grpo import Config, FlowGRPO
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.pipeline import TaskOptions, pipeline_task
from difftilt.training.config import OptimizerConfig, TrainingConfig
from difftilt.training.loop import assemble
from difftilt.training.world import World


def begin(work: Work, counter: Counter) -> Callable[[int], float]:
    """The loop of ``difftilt train``; its own ``iterate`` is one iteration, with all that it measures."""
    diffusers: Any = importlib.import_module("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(work.pipeline)
    options = TaskOptions(steps=work.steps, guidance=work.guidance, cache="off")
    task = pipeline_task(pipeline, FunctionReward("redness", _score), [PROMPT], None, options)
    method = FlowGRPO(config_of(work), task)
    training = TrainingConfig(
        iterations=10**6,
        seed=work.seed,
        forward_batch=2 * work.batch,
        optimizer=OptimizerConfig(lr=work.lr),
        evaluate_every=0,
    )
    loop = assemble(task, method, training, None, ("ratio_one",), (), World())
    counter.watch(pipeline.unet)

    def iterate(number: int) -> float:
        loop.iterate(number)
        return loop.rows[-1]["reward_mean"]

    return iterate


def config_of(work: Work) -> Config:
    """One group that is the whole batch, one update, no penalty, no averaged weights."""
    return Config(
        groups=1,
        group_size=work.batch,
        kernel="ddim",
        noise_level=1.0,
        clip_range=work.clip_range,
        kl_weight=0.0,
        std_eps=1e-8,
        updates=1,
        ema=0.0,
    )


def _score(samples: Samples) -> Tensor:
    return redness(samples.media)


if __name__ == "__main__":
    serve(begin)
