"""How much memory a recipe needs, before it is run: by process, and what to change where it is too much.

Weights, gradients and optimiser state are counted; a pass and the decoding of an iteration's samples are evaluated. Of
a pipeline of ``diffusers`` all that is done with tensors that have shapes and no content, from its settings alone: no
weight is read, and it need not fit the machine that asks.
"""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from difftilt.environment import Environment, memory_of, readable
from difftilt.errors import UserError
from difftilt.models.denoiser import NetworkDenoiser
from difftilt.models.diffusers import Adapter
from difftilt.models.diffusers.blueprint import blueprint, filled
from difftilt.models.execution import enable_checkpointing
from difftilt.models.ledger import Ledger
from difftilt.models.lora import adapted
from difftilt.models.protocol import GenerativeModel, Network, RoleSpec, Trained
from difftilt.models.roles import Held
from difftilt.recipes.building import build_task
from difftilt.recipes.schema import Recipe
from difftilt.rewards.base import Unrewarded
from difftilt.testbeds.pipeline import Config as PipelineConfig
from difftilt.testbeds.pipeline import Pipeline, TaskOptions, task_of_adapter
from difftilt.training.memory import Live, adamw_bytes, bytes_of, kept_bytes, module_bytes
from difftilt.training.policy_gradient import PolicyGradient
from difftilt.training.protocol import Method, Task
from difftilt.trees import leaves

UNKNOWN = "not known: "


@dataclass(frozen=True)
class Line:
    """One thing that takes memory in each process.

    Attributes:
        name: of it.
        bytes: None where it is not known.
        note: how it was found, or why it is not known.
        passing: only there for a while; of all such things the largest counts.
        fix: what makes it smaller.
    """

    name: str
    bytes: int | None
    note: str
    passing: bool = False
    fix: str = ""


@dataclass(frozen=True)
class Estimate:
    """What one process needs.

    Attributes:
        lines: one by one.
        available: bytes of the device, None where it does not tell.
        device: its name.
    """

    lines: list[Line]
    available: int | None
    device: str

    @property
    def total(self) -> int:
        """What stays, and the largest of what passes."""
        held = [line for line in self.lines if line.bytes is not None]
        stays = sum(line.bytes or 0 for line in held if not line.passing)
        return stays + max((line.bytes or 0 for line in held if line.passing), default=0)

    @property
    def verdict(self) -> str:
        """One sentence."""
        missing = [line.name for line in self.lines if line.bytes is None]
        apart = f"; not counted: {', '.join(missing)}" if missing else ""
        need = f"needs about {readable(self.total)} in each process"
        if self.available is None:
            return f"{need}{apart}"
        has = f"{self.device} has {readable(self.available)}"
        if self.total <= self.available:
            return f"fits: {need}, {has}{apart}"
        largest = sorted(self.lines, key=lambda line: -(line.bytes or 0))
        fixes = list(dict.fromkeys(line.fix for line in largest if line.fix))
        return f"does not fit: {need}, {has}; try {', or '.join(fixes[:2])}{apart}"


@dataclass(frozen=True)
class Diagnosis:
    """What ``difftilt doctor`` finds.

    Attributes:
        environment: of the machine and the installation.
        estimate: of a recipe, where one was named.
    """

    environment: Environment
    estimate: Estimate | None = None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = asdict(self.environment)
        if self.estimate is not None:
            totals = {"total": self.estimate.total, "verdict": self.estimate.verdict}
            found["estimate"] = asdict(self.estimate) | totals
        return found


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Attributes:
        task: its tensors may be without content.
        shapes: the mode in which they are computed with; None where they are real.
        adapter: of a pipeline.
    """

    task: Task
    shapes: Any = None
    adapter: Adapter | None = None

    @property
    def mode(self) -> AbstractContextManager[object]:
        """To compute in."""
        return nullcontext() if self.shapes is None else self.shapes

    def fill(self, adapters: Sequence[Tensor] = ()) -> None:
        """Give the network of a pipeline its tensors, in the precision that is asked for but for its adapters."""
        if self.adapter is not None:
            filled(self.adapter.network, getattr(torch, self.adapter.options.dtype or "float32"), adapters)


def estimate(recipe: Recipe, processes: int = 1, *, sharded: bool = False) -> Estimate:
    """Memory of a recipe, by process.

    Args:
        recipe: to be run.
        processes: share the samples of an iteration.
        sharded: weights, gradients and optimiser state are cut among them.

    Raises:
        UserError: if the recipe cannot work, or a pipeline's settings cannot be had.
    """
    if processes < 1:
        raise UserError(f"processes must be at least 1, got {processes}")
    subject = _subject(recipe)
    settings = recipe.steering if recipe.method is None else recipe.training
    cut = processes if sharded or getattr(settings, "sharding", "none") != "none" else 1
    found = _steering_lines(recipe, subject) if recipe.method is None else []
    lines = found or _training_lines(recipe, subject, processes, cut)
    device = torch.device(settings.device)
    return Estimate([*lines, *_pipeline_lines(subject, device)], memory_of(device), str(device))


def _subject(recipe: Recipe) -> Subject:
    testbed = recipe.testbed.build()
    if not isinstance(testbed, Pipeline):
        return Subject(build_task(recipe))
    mode = importlib.import_module("torch._subclasses.fake_tensor").FakeTensorMode(allow_non_fake_inputs=True)
    config: PipelineConfig = testbed.config
    options = TaskOptions(**config.model_dump(include=set(TaskOptions.model_fields)))
    adapter = blueprint(config.source, options, mode)
    task = task_of_adapter(adapter, Unrewarded(), testbed.prompts, testbed.heldout_prompts, options.noise_level)
    return Subject(task, mode, adapter)


def _training_lines(recipe: Recipe, subject: Subject, processes: int, cut: int) -> list[Line]:
    assert recipe.method is not None
    config = recipe.training
    method = cast(Method, recipe.method.build(subject.task))
    model = method.adapt(subject.task.model)
    network = _module(model, subject.task)
    if config.activation_checkpointing:
        enable_checkpointing(network, "training.activation_checkpointing")
    held = Held(network, 0, True)
    if config.lora is not None:
        held = adapted(network, config.lora, model.lora_targets, config.seed)
    with subject.mode:
        subject.fill(held.parameters() if config.lora is not None else ())
        trained, own = list(held.parameters()), bytes_of(held.tensors().values())
        whole = module_bytes(network) - bytes_of(trained)
    task = replace(subject.task, model=model)
    base = [] if config.lora is None else [Line("weights: the frozen network", whole // cut, "counted")]
    roles = _role_lines(method.roles(), own // cut)
    moved = [trained, *_trained_elsewhere(method.roles(), trained)]
    gradients = sum(bytes_of(parameters) for parameters in moved) // cut
    moments = sum(adamw_bytes(parameters) for parameters in moved) // cut
    fewer = "" if config.lora is not None else "training.lora.rank=32 (adapters in place of all weights)"
    fewer = fewer or ("testbed.dtype=bfloat16" if subject.adapter is not None else "")
    learned = [
        Line("gradients", gradients, "counted", fix=fewer),
        Line("optimiser", moments, "counted: two moments of AdamW", fix=fewer),
    ]
    weights = [replace(line, fix="sharding over more processes") for line in [*base, *roles]]
    passed = _pass_line(subject, task, held.network, recipe)
    return [*weights, *learned, passed, *_iteration_lines(subject, task, method, processes)]


def _module(model: GenerativeModel, task: Task) -> nn.Module:
    if not isinstance(model.network, nn.Module):
        raise UserError(f"task {task.name} has no weights: its network is not an nn.Module")
    return model.network


def _role_lines(specs: Any, own: int) -> list[Line]:
    """Weights by role: copies of the network, or adapters."""
    lines = [Line("weights: current", own, "counted"), Line("weights: reference", own, "counted")]
    for name, spec in specs.items():
        brought: nn.Module | None = getattr(spec, "network", None)
        lines.append(Line(f"weights: {name}", own if brought is None else module_bytes(brought), "counted"))
    return lines


def _trained_elsewhere(specs: Any, trained: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that other roles train."""
    roles: Sequence[RoleSpec] = list(specs.values())
    return [
        trained if spec.network is None else [p for p in spec.network.parameters() if p.requires_grad]
        for spec in roles
        if isinstance(spec, Trained)
    ]


def _pass_line(subject: Subject, task: Task, network: Network, recipe: Recipe) -> Line:
    """What one pass of one microbatch keeps for its gradient."""
    config, name = recipe.training, "activations of one microbatch"
    known = [*_module(task.model, task).parameters(), *_module(task.model, task).buffers()]

    def evaluate() -> int:
        denoise, state, t, condition = _inputs(subject, task, network, config.forward_batch, config.execution)
        return kept_bytes(lambda: denoise(state, t, condition), known)[0]

    way = "by a pass without content" if subject.shapes is not None else "by a pass"
    smaller = f"training.forward_batch={max(4, config.forward_batch // 8 * 4)}"
    fix = smaller if config.activation_checkpointing else "training.activation_checkpointing=true"
    note = f"{way}: {config.forward_batch} rows of one network, kept for the gradient"
    return _measured(Line(name, None, note, passing=True, fix=fix), subject, evaluate)


def _inputs(
    subject: Subject, task: Task, network: Network, rows: int, execution: Any
) -> tuple[NetworkDenoiser, Tensor, Tensor, Any]:
    """A denoiser and a batch for it; compiled or not changes little of what is kept."""
    model = task.model
    settings = execution.model_copy(update={"compile": False})
    guidance = task.sampler.guidance
    denoise = NetworkDenoiser(
        network, model.process, model.output, Ledger(), guidance, model.null_condition, rows, settings
    )
    condition = model.encode([task.prompts[0]] * rows)
    state = torch.zeros(rows, *model.shape, dtype=torch.int64 if model.dtype_tokens else torch.float32)
    return denoise, state, torch.full((rows,), 0.5), condition


def _measured(line: Line, subject: Subject, evaluate: Callable[[], int]) -> Line:
    """The line with its bytes, or with the reason why they are not known."""
    lost = importlib.import_module("torch._subclasses.fake_tensor")
    refusals = (lost.DataDependentOutputException, lost.DynamicOutputShapeException, lost.UnsupportedOperatorException)
    try:
        with subject.mode:
            return replace(line, bytes=evaluate())
    except refusals as why:
        return replace(line, note=f"{UNKNOWN}this network's pass depends on values ({type(why).__name__})")


def _iteration_lines(subject: Subject, task: Task, method: Method, processes: int) -> list[Line]:
    """States, conditions and media of the samples of one iteration, and the decoding of all of them."""
    config = getattr(method, "config", None)
    groups, size = getattr(config, "groups", None), getattr(config, "group_size", None)
    if not isinstance(groups, int) or not isinstance(size, int):
        return [Line("samples of an iteration", None, f"{UNKNOWN}the method does not say how many it draws")]
    samples = max(1, groups * size // processes)
    steps = len(method.sampler(task).grid) if not isinstance(method, PolicyGradient) else len(method.grid)
    states = steps if isinstance(method, PolicyGradient) else 1
    fewer = f"method.groups={max(1, groups // 2)}, or more processes"

    def held() -> int:
        row = bytes_of(leaves(task.model.encode([task.prompts[0]])))
        latent = torch.empty(task.model.shape, dtype=torch.int64 if task.model.dtype_tokens else torch.float32)
        return samples * (states * bytes_of([latent]) + row)

    def decoded() -> int:
        kind = torch.int64 if task.model.dtype_tokens else torch.float32
        with torch.no_grad():
            x_0 = torch.zeros(samples, *task.model.shape, dtype=kind)
            with Live() as live:
                task.model.decode(x_0)
        return live.peak

    note = f"counted: {samples} samples with their conditions, at most {states} states of each"
    slices = "testbed.vae_slicing=true" if subject.adapter is not None else fewer
    way = "by decoding without content" if subject.shapes is not None else "by decoding"
    lines = [Line("samples of an iteration", None, note, fix=fewer)]
    lines.append(Line("decoding", None, f"{way}: {samples} samples at once", passing=True, fix=slices))
    return [_measured(line, subject, find) for line, find in zip(lines, (held, decoded), strict=True)]


def _steering_lines(recipe: Recipe, subject: Subject) -> list[Line]:
    """Weights and a pass without gradient; what a steerer keeps of its particles is not known before it runs."""
    settings, task = recipe.steering, subject.task
    with subject.mode:
        subject.fill()
        network = task.model.network
        weights = module_bytes(network) if isinstance(network, nn.Module) else 0

    def evaluate() -> int:
        with torch.no_grad(), Live() as live:
            denoise, state, t, condition = _inputs(subject, task, network, settings.forward_batch, settings.execution)
            denoise(state, t, condition)
        return live.peak

    fix = f"steering.forward_batch={max(4, settings.forward_batch // 8 * 4)}"
    note = f"{settings.forward_batch} rows, alive at most"
    passed = _measured(Line("one pass", None, note, passing=True, fix=fix), subject, evaluate)
    return [Line("weights", weights, "counted"), passed]


def _pipeline_lines(subject: Subject, device: torch.device) -> list[Line]:
    """Image decoder and text encoders; the latter are on a device only while prompts are encoded."""
    if subject.adapter is None:
        return []
    pipe, lines = subject.adapter.pipe, list[Line]()
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        lines.append(Line("VAE", module_bytes(vae), "counted"))
    encoders = [part for name in subject.adapter.encoders if (part := getattr(pipe, name, None)) is not None]
    away = device.type != "cpu"
    note = "counted; on the CPU once prompts are encoded" if away else "counted"
    found = sum(module_bytes(encoder) for encoder in encoders)
    lines.append(Line("text encoders", found, note, passing=away, fix="testbed.dtype=bfloat16"))
    return lines
