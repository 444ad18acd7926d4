"""Samples that are looked at: a few prompts, trained and held out, with the same noise at every evaluation."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from safetensors.torch import save_file
from torch import Tensor

from difftilt.models.ledger import Ledger
from difftilt.rewards.prompts import metadata_of
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.sampling.rollout import sample, start_state
from difftilt.training.logs import write_text
from difftilt.training.looks import Look, as_bytes, look_at
from difftilt.training.pictures import save_look
from difftilt.training.protocol import Task
from difftilt.training.run import LoopRun

PROMPTS = "prompts.json"
WIDEST = 8
"""Drawings of one prompt that stand in one row; more of them make a square."""
HELDOUT, TRAINED = 10, 5
"""How many held-out and how many training prompts are shown, at most."""
IMAGES, DRAWINGS, OTHERS = 6, 24, 512
"""Images per prompt; samples over all prompts of what the task draws, and of what is a cloud or a list."""


@dataclass(frozen=True)
class Gallery:
    """What is shown.

    Attributes:
        prompts: in order.
        heldout: of each prompt, whether training never sees it.
        size: samples per prompt.
        score: what the samples are scored by: the task's headline.
        rate: samples per second of audio; None for other media.
    """

    prompts: Sequence[str]
    heldout: Sequence[bool]
    size: int
    score: str
    rate: int | None = None


def gallery_of(task: Task) -> Gallery:
    """The first different prompts of a task, held-out ones before training ones.

    Training prompts that lack metadata of the held-out ones are left out: the reward may want it.
    """
    heldout = list(dict.fromkeys(task.heldout_prompts))[:HELDOUT]
    unseen = set(task.heldout_prompts) - set(task.prompts)
    told = metadata_of(heldout).keys()
    trained = [prompt for prompt in dict.fromkeys(task.prompts) if prompt not in heldout]
    trained = [prompt for prompt in trained if told <= metadata_of([prompt]).keys()][:TRAINED]
    prompts = [*heldout, *trained]
    images = len(task.model.shape) >= 3 and not task.model.dtype_tokens
    size = IMAGES if images else max(1, (OTHERS if task.draw is None else DRAWINGS) // len(prompts))
    return Gallery(prompts, [prompt in unseen for prompt in prompts], size, task.headline, task.rate)


@dataclass(frozen=True)
class Shown:
    """Samples of a gallery.

    Attributes:
        media: decoded, those of one prompt together.
        score: the task's headline of each.
        look: strings and drawings, where the task offers them.
    """

    media: Shaped[Tensor, "samples ..."]
    score: Float[Tensor, " samples"]
    look: Look = field(default_factory=Look)


def show(run: LoopRun, role: str, sampler: Sampler, gallery: Gallery, seed: int) -> Shown:
    """Sample and score the gallery; costs the run's ledger nothing."""
    noise, run = Noise(seed).named("gallery"), replace(run, ledger=Ledger())
    denoise = run.denoiser(role, sampler.guidance)
    index = torch.arange(len(gallery.prompts) * gallery.size, device=run.device)
    prompts = [prompt for prompt in gallery.prompts for _ in range(gallery.size)]
    with torch.no_grad():
        condition = run.encode(prompts)
        x_t = start_state(denoise.process, noise, index, run.task.model.shape, condition)
        media = run.task.model.decode(sample(denoise, sampler, x_t, condition, noise=noise, index=index))
        samples = Samples.of(media, prompts, index // gallery.size, condition)
        reward = run.task.heldout.get(run.task.headline, run.task.reward)
        return Shown(media, run.score_with(reward, samples).total, look_at(run.task, media))


def save_gallery(directory: Path, step: int, gallery: Gallery, shown: Shown) -> None:
    """Write ``prompts.json``, ``step_<N>.safetensors``, a picture to look at, and strings as ``step_<N>.json``.

    Args:
        directory: ``samples`` of a run.
        step: iterations trained.
        gallery: whose samples these are.
        shown: images are stored as bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / PROMPTS, json.dumps(asdict(gallery), indent=1))
    media = shown.media.detach().cpu()
    stored = media
    if media.dim() == 4 and media.is_floating_point():
        stored = as_bytes(media)
    if media.is_complex():
        stored = media.to(torch.complex64)  # safetensors knows no wider type
    tensors = {"media": stored.contiguous().clone(), "score": shown.score.float().cpu().contiguous().clone()}
    save_file(tensors | shown.look.tensors(), directory / f"step_{step}.safetensors")
    save_look(
        directory,
        f"step_{step}",
        media,
        shown.look,
        gallery.size if gallery.size <= WIDEST or media.dim() in (3, 4) else None,
    )
