"""Sampling beside the stock pipeline, in one process: same prompt, steps, guidance and starting noise."""

import importlib
from typing import Any

import torch

from benchmarks.paired import Subject
from benchmarks.peers.work import PROMPT, Work
from difftilt.models.denoiser import denoiser
from difftilt.rewards.base import Unrewarded
from difftilt.sampling.noise import Noise
from difftilt.testbeds.pipeline import TaskOptions, pipeline_task


def sampling(work: Work, name: str) -> Subject:
    """A batch of images, decoded; both are given the encoded prompt and its starting noise.

    Args:
        work: what is sampled.
        name: of the report.
    """
    diffusers: Any = importlib.import_module("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(work.pipeline)
    pipe.set_progress_bar_config(disable=True)
    options = TaskOptions(steps=work.steps, guidance=work.guidance, cache="off")
    task = pipeline_task(pipe, Unrewarded(), [PROMPT], None, options)
    model, sampler = task.model, task.sampler
    assert sampler.solver is not None
    solver = sampler.solver
    denoise = denoiser(model, guidance=sampler.guidance, forward_batch=2 * work.batch)
    condition = model.encode([PROMPT] * work.batch)
    start = Noise(work.seed).normal(torch.arange(work.batch), model.shape, purpose="start")
    embedded, null = (rows.expand(work.batch, -1, -1) for rows in _embedded(pipe))

    def ours() -> torch.Tensor:
        with torch.no_grad():
            return model.decode(solver(denoise, model.process.prior(start), condition, sampler.grid))

    def theirs() -> torch.Tensor:
        return pipe(
            prompt_embeds=embedded,
            negative_prompt_embeds=null,
            num_inference_steps=work.steps,
            guidance_scale=work.guidance,
            latents=start.clone(),
            output_type="pt",
        ).images

    difference = float((ours() - theirs()).abs().max())
    weights = sum(weight.numel() for weight in pipe.unet.parameters())
    return Subject(
        name=name,
        bound=1.0,
        program=f"{work.batch} images, {work.steps} steps of DDIM with guidance, decoded",
        floor="the stock pipeline at the same, from the same noise",
        run_program=ours,
        run_floor=theirs,
        shapes={"parameters": weights, "batch": work.batch, "steps": work.steps, "latent": list(model.shape)},
        extra={"largest difference of a pixel": difference},
        phases={},
    )


def _embedded(pipe: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt and the empty one as the pipeline's own encoder has them."""
    with torch.no_grad():
        return pipe.encode_prompt(PROMPT, torch.device("cpu"), 1, True)
