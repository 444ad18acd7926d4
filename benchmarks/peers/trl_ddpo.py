"""``DDPOTrainer`` of TRL 0.23.1. Runs in the environment of ``trl.txt``, where difftilt is not."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.work import PROMPT, Counter, Work, redness, serve


def begin(work: Work, counter: Counter) -> Callable[[int], float]:
    """The trainer as its documentation makes it; its own ``step`` is one iteration."""
    trl: Any = importlib.import_module("trl")
    importlib.import_module("accelerate").PartialState()  # the trainer logs before it has one
    torch.manual_seed(work.seed)
    means: list[float] = []

    def reward(images: Tensor, prompts: object, metadata: object) -> tuple[Tensor, dict[str, object]]:
        scores = redness(images)
        means.append(float(scores.mean()))
        return scores, {}

    pipeline = trl.DefaultDDPOStableDiffusionPipeline(work.pipeline, use_lora=False)
    trainer = trl.DDPOTrainer(config_of(trl, work), reward, lambda: (PROMPT, {}), pipeline)
    trainer.sd_pipeline.set_progress_bar_config(disable=True)
    counter.watch(trainer.sd_pipeline.unet)
    steps = [0]

    def iterate(number: int) -> float:
        steps[0] = trainer.step(number, steps[0])
        return means[-1]

    return iterate


def config_of(trl: Any, work: Work) -> Any:
    """Defaults but for sizes; the last step is left out, because its noise would stay in the sample."""
    return trl.DDPOConfig(
        seed=work.seed,
        mixed_precision="no",  # its default is fp16
        sample_num_steps=work.steps,
        sample_guidance_scale=work.guidance,
        sample_batch_size=work.batch,
        sample_num_batches_per_epoch=1,
        train_batch_size=work.batch,
        train_gradient_accumulation_steps=1,
        train_timestep_fraction=(work.steps - 0.5) / work.steps,
        train_learning_rate=work.lr,
        train_clip_range=work.clip_range,
        train_adv_clip_max=5,
        train_cfg=True,
        per_prompt_stat_tracking=False,
        save_freq=10**9,
        log_with=None,
    )


if __name__ == "__main__":
    serve(begin)
