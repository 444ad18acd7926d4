"""Transformers of the size of Stable Diffusion 3.5 Medium and of FLUX.1, with random weights: how fast they are used.

Sampling by difftilt stands beside a plain loop over the same transformer, which is the floor, and beside the stock
pipeline; all three without classifier-free guidance, on the same batch, grid and precision. One iteration of flow-grpo
with a LoRA and activation checkpointing gives the split into phases. FLOPs are those that PyTorch counts for the passes
that are made, recomputation included.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.paired import machine, peak_of
from difftilt.leaves import import_module
from difftilt.methods.policy_gradient.flow_grpo import Config, FlowGRPO
from difftilt.models.denoiser import denoiser
from difftilt.models.diffusers import Adapter, PipelineOptions, adapt
from difftilt.models.execution import PLAIN, Execution
from difftilt.models.lora import LoraSettings
from difftilt.rewards.image import ink
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample, start_state
from difftilt.testbeds.pipeline import task_of_adapter
from difftilt.training.config import TrainingConfig
from difftilt.training.loop import Loop, assemble
from difftilt.training.protocol import Task
from difftilt.training.world import World

Settings = Mapping[str, Any]
SD3: Settings = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
FLUX: Settings = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SMALL_SD3: Settings = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 16,
    "sample_size": 8,
    "dual_attention_layers": (0,),
}
SMALL_FLUX: Settings = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


@dataclass(frozen=True)
class Family:
    """A pipeline's classes, the configuration of its transformer, and the length of its prompts in tokens."""

    name: str
    pipeline: str
    transformer: str
    settings: Settings
    tokens: int
    scheduler: Settings
    encoders: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        families: of transformers.
        sides: of latents.
        batch: images that are drawn together.
        steps: of their grid.
        backends: of compilation; None is eager.
        updates: whether compiled iterations are timed as well; they compile a backward pass.
        repeats: of every timing, of which the median counts.
    """

    families: Sequence[Family]
    sides: Sequence[int] = (64, 128)
    batch: int = 4
    steps: int = 8
    backends: Sequence[str | None] = (None, "inductor")
    updates: bool = True
    repeats: int = 3


def _families(sd3: Settings, flux: Settings, tokens: tuple[int, int]) -> list[Family]:
    texts = tuple(f"{kind}{end}" for kind in ("text_encoder", "tokenizer") for end in ("", "_2"))
    third = (*texts, "text_encoder_3", "tokenizer_3")
    shift, dynamic = {"shift": 3.0}, {"use_dynamic_shifting": True, "shift": 3.0}
    return [
        Family("SD3.5 Medium", "StableDiffusion3Pipeline", "SD3Transformer2DModel", sd3, tokens[0], shift, third),
        Family("FLUX.1", "FluxPipeline", "FluxTransformer2DModel", flux, tokens[1], dynamic, texts),
    ]


REAL = _families(SD3, FLUX, (333, 512))
TINY = _families({**SD3, **SMALL_SD3}, {**FLUX, **SMALL_FLUX}, (6, 6))
SIZES = {
    "full": Size(REAL),
    "quick": Size(REAL, sides=(64,), steps=4, updates=False, repeats=2),
    "tiny": Size(TINY, sides=(8,), steps=2, backends=(None,), repeats=1),
}


@dataclass(frozen=True)
class Row:
    """One transformer at one size of latents, eager or compiled.

    Attributes:
        model, latent, backend: which.
        parameters: of the transformer.
        images_per_second: of the plain loop, of difftilt and of the stock pipeline.
        seconds: of the phases of one iteration; empty where none was timed.
        peak: bytes alive at most while sampling, and in an iteration.
        teraflops: per second, of difftilt's sampling, and of the update.
    """

    model: str
    latent: int
    backend: str | None
    parameters: int
    images_per_second: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    peak: dict[str, int] = field(default_factory=dict[str, int])
    teraflops: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Subject:
    """A pipeline with a transformer of random weights and a decoder of a few; what it is asked is random too."""

    family: Family
    size: Size
    side: int
    device: torch.device
    dtype: torch.dtype
    adapter: Adapter
    task: Task

    @property
    def index(self) -> Tensor:
        return torch.arange(self.size.batch, device=self.device)

    def condition(self) -> Any:
        rows = self.adapter.encode(["a cat"] * self.size.batch)
        return {name: value.to(self.device) for name, value in rows.items()}


def make(family: Family, size: Size, side: int, device: torch.device) -> Subject:
    """Built on the device, in bf16 where that is a GPU; no file is read or written."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    library = import_module("diffusers", "benchmark gpu")
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with device:
            transformer = getattr(library, family.transformer)(**family.settings).to(device, dtype).eval()
            vae = _decoder(library).to(device, dtype).eval()
    finally:
        torch.set_default_dtype(before)
    scheduler = library.FlowMatchEulerDiscreteScheduler(**family.scheduler)
    parts = {"transformer": transformer.requires_grad_(False), "vae": vae, "scheduler": scheduler}
    pipe = getattr(library, family.pipeline)(**parts, **dict.fromkeys(family.encoders))
    pipe.set_progress_bar_config(disable=True)
    options = PipelineOptions(cache="off", steps=size.steps, height=8 * side, width=8 * side)
    adapter = adapt(pipe, options if family.settings.get("guidance_embeds") else _unguided(options))
    adapter.texts = _texts(family, dtype)  # pyright: ignore[reportAttributeAccessIssue]
    task = task_of_adapter(adapter, ink(), ["a cat"])
    return Subject(family, size, side, device, dtype, adapter, task)


def _unguided(options: PipelineOptions) -> PipelineOptions:
    return options.model_copy(update={"guidance": 1.0})


def _decoder(library: Any) -> Any:
    """Four levels, as the real one has, of eight channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scales = {"scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}
    sizes = {"block_out_channels": (8,) * 4, "latent_channels": 16, "norm_num_groups": 4, "layers_per_block": 1}
    return library.AutoencoderKL(**blocks, **scales, **sizes)


def _texts(family: Family, dtype: torch.dtype) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    """In place of text encoders."""
    width, pooled = family.settings["joint_attention_dim"], family.settings["pooled_projection_dim"]

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        generator, rows = torch.Generator().manual_seed(1), len(prompts)
        text = torch.randn(1, family.tokens, width, generator=generator).to(dtype)
        vector = torch.randn(1, pooled, generator=generator).to(dtype)
        return {"text": text.repeat(rows, 1, 1), "pooled": vector.repeat(rows, 1)}

    return encode


@torch.no_grad()
def plain(subject: Subject) -> Tensor:
    """Euler steps around bare calls of the transformer."""
    network, condition = subject.adapter.network, subject.condition()
    shape = (subject.size.batch, *subject.task.model.shape)
    x = torch.randn(shape, device=subject.device, dtype=subject.dtype)
    grid = subject.task.sampler.grid.tolist()
    for t, s in pairwise(grid):
        told = network.schedule.clock(torch.full((len(x),), t, device=subject.device))
        x = x + (s - t) * network.call(x, told, condition)
    return x


@torch.no_grad()
def ours(subject: Subject, execution: Execution) -> Tensor:
    """The sampling of every evaluation."""
    task, noise = subject.task, Noise(0)
    denoise = denoiser(
        task.model, guidance=task.sampler.guidance, forward_batch=subject.size.batch, execution=execution
    )
    x_t = start_state(denoise.process, noise, subject.index, task.model.shape)
    return sample(denoise, task.sampler, x_t, subject.condition(), noise=noise, index=subject.index)


@torch.no_grad()
def stock(subject: Subject) -> Tensor:
    """The pipeline, called as its users call it, with encoded prompts."""
    rows, adapter = subject.condition(), subject.adapter
    x = torch.randn(subject.size.batch, *subject.task.model.shape, device=subject.device, dtype=subject.dtype)
    call = {"prompt_embeds": rows["text"], "pooled_prompt_embeds": rows["pooled"], "latents": adapter.packed(x)}
    side = 8 * subject.side
    return adapter.pipe(
        **call,
        height=side,
        width=side,
        num_inference_steps=subject.size.steps,
        guidance_scale=adapter.scale,
        output_type="latent",
        return_dict=False,
    )[0]


def loop_of(subject: Subject, execution: Execution) -> Loop:
    """Flow-GRPO on one group, with a LoRA and checkpointing."""
    config = TrainingConfig(
        iterations=1000,
        forward_batch=subject.size.batch,
        evaluate_every=0,
        device=str(subject.device),
        lora=LoraSettings(rank=32),
        activation_checkpointing=True,
        **execution.model_dump(),
    )
    settings = Config(groups=1, group_size=subject.size.batch, updates=1)
    return assemble(subject.task, FlowGRPO(settings, subject.task), config, None, (), (), World())


def flops(work: Callable[[], Any]) -> int:
    """Of everything that PyTorch counts."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def one_pass(subject: Subject, loop: Loop | None) -> None:
    """One network call of the batch: without gradient, or of the trained role with a backward pass."""
    task = subject.task
    denoise = denoiser(task.model, guidance=task.sampler.guidance) if loop is None else loop.run.denoiser("current")
    x = torch.randn(subject.size.batch, *task.model.shape, device=subject.device)
    t = torch.full((len(x),), 0.5, device=subject.device)
    with torch.set_grad_enabled(loop is not None):
        prediction: Any = denoise(x, t, subject.condition())
        if loop is not None:
            prediction.velocity.float().sum().backward()


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median, after one call that does not count."""
    found: list[float] = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes: of the device, or on a CPU of the process."""
    if device.type != "cuda":
        return int(peak_of(work) * 2**20)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def measure(family: Family, size: Size, side: int, device: torch.device) -> list[Row]:
    """Eager and compiled, each with a transformer of its own."""
    rows: list[Row] = []
    counted: dict[str, int] = {}
    for backend in size.backends:
        execution = PLAIN if backend is None else Execution(compile=True, compile_backend=backend)
        subject = make(family, size, side, device)
        if backend is None:
            counted["rollout"] = flops(partial(one_pass, subject, None))
        row = _sampled(subject, execution, counted["rollout"])
        rows.append(row if backend is not None and not size.updates else _iterated(subject, execution, row, counted))
        del subject
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _sampled(subject: Subject, execution: Execution, each: int) -> Row:
    size, device = subject.size, subject.device
    works = {"difftilt": partial(ours, subject, execution), "plain": partial(plain, subject)}
    works["stock"] = partial(stock, subject)  # the first call compiles for all three
    found = {name: seconds_of(work, device, size.repeats) for name, work in works.items()}
    steps = len(subject.task.sampler.grid) - 1
    return Row(
        subject.family.name,
        subject.side,
        execution.compile_backend if execution.compile else None,
        sum(value.numel() for value in subject.adapter.network.parameters()),
        {name: size.batch / value for name, value in found.items()},
        peak={"rollout": peak(works["difftilt"], device)},
        teraflops={"rollout": each * steps / found["difftilt"] / 1e12},
    )


def _iterated(subject: Subject, execution: Execution, row: Row, counted: dict[str, int]) -> Row:
    loop = loop_of(subject, execution)
    if not execution.compile:
        counted["update"] = flops(partial(one_pass, subject, loop))
    loop.iterate(0)
    row.peak["iteration"] = peak(lambda: loop.iterate(1), subject.device)
    told = loop.rows[-1]
    row.seconds.update({name: told[f"time/{name}"] for name in ("rollout", "reward", "update")})
    passes = told["gradient_passes"] / subject.size.batch
    row.teraflops["update"] = counted["update"] * passes / told["time/update"] / 1e12
    return row


def run(size: Size, path: Path, device: str | None = None) -> list[Row]:
    """Every transformer at every size, written to ``path`` after each of them."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    named = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu"
    rows: list[Row] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for side in size.sides:
        for family in size.families:
            rows += measure(family, size, side, chosen)
            shapes = {"batch": size.batch, "steps": size.steps, "repeats": size.repeats, "device": named}
            found = {"shapes": shapes, "machine": machine(), "rows": [asdict(row) for row in rows]}
            path.write_text(json.dumps(found, indent=2) + "\n")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """One line per transformer, size of latents and way to evaluate it."""
    names = ("model", "latent", "way", "images/s: plain", "difftilt", "stock", "rollout s", "reward s", "update s")
    shown = Table(*names, "peak GB: rollout", "iteration", "TFLOP/s: rollout", "update", box=None, header_style="bold")
    for row in rows:
        numbers = [row.images_per_second[name] for name in ("plain", "difftilt", "stock")]
        numbers += [row.seconds.get(name) for name in ("rollout", "reward", "update")]
        numbers += [None if (one := row.peak.get(name)) is None else one / 2**30 for name in ("rollout", "iteration")]
        numbers += [row.teraflops.get(name) for name in ("rollout", "update")]
        cells = ["–" if number is None else f"{number:.3g}" for number in numbers]
        shown.add_row(row.model, f"{row.latent} × {row.latent}", row.backend or "eager", *cells)
    return shown
