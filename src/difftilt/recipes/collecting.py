"""``difftilt collect``: groups of the untrained model, scored once, into a directory that offline methods read.

The samples are drawn in parts. A part that is written is never drawn again, and what is drawn does not depend on the
parts: noise is keyed by the global index of a sample.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from difftilt.config import dump
from difftilt.errors import UserError
from difftilt.models.fingerprint import fingerprint
from difftilt.models.ledger import Ledger
from difftilt.models.roles import CopiedRoles
from difftilt.recipes.building import build_task
from difftilt.recipes.directory import differences
from difftilt.recipes.schema import Recipe, SteeringConfig
from difftilt.rewards import WeightedSum
from difftilt.rewards.prompts import plain
from difftilt.sampling.noise import Noise
from difftilt.training.config import TrainingConfig
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.logs import write_text
from difftilt.training.offline import equal_groups, from_tensors, scored, to_tensors
from difftilt.training.plain import draw
from difftilt.training.protocol import Task
from difftilt.training.provenance import drawn_by
from difftilt.training.run import LoopRun
from difftilt.training.stored import DATA, MANIFEST, VERSION, Manifest, read_manifest, scores_again
from difftilt.training.world import World, join_world
from difftilt.trees import take

PLAN, PARTS, COST = "plan.json", "parts", "ledger"
PART = 256
"""Samples between two writes, at least one group."""
Tell = Callable[[str], None]


def collect_groups(recipe: Recipe, output: Path, groups: int, size: int, *, resume: bool, tell: Tell) -> Manifest:
    """Draw, score and write ``groups`` groups of ``size`` samples, prompts in shuffled passes.

    Args:
        recipe: gives testbed, reward, seed, network batch and device.
        output: new or empty directory, or with ``resume`` the one of the same collection.
        groups: number of groups.
        size: samples of each.
        resume: go on where an interrupted collection ended.
        tell: called with a sentence after every part.

    Raises:
        UserError: for an output that would lose work, or settings that nothing can be learned from.
    """
    task = _task(recipe, size)
    plan = _plan(recipe, task, groups, size)
    _check_output(output, plan, resume=resume)
    if (output / MANIFEST).exists():
        _tidy(output)
        return read_manifest(output)
    run = _run(recipe, task)
    batch = run.prompts(groups, size)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # the plan first: without it nothing that lies here can be gone on with
        write_text(output / PLAN, json.dumps(plan, indent=1))
        (output / PARTS).mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror}): name another directory") from error
    per_part = max(1, PART // size) * size
    parts: list[dict[str, Tensor]] = []
    for number, rows in enumerate(torch.arange(groups * size).split(per_part)):
        parts.append(_part(run, output / PARTS / f"{number:05d}.safetensors", take(batch, rows)))
        tell(f"{(int(rows[-1]) + 1) // size} of {groups} groups")
    return _finish(output, plan, parts, task, tell)


def _task(recipe: Recipe, size: int) -> Task:
    if join_world().size > 1:
        raise UserError("difftilt collect runs in one process: call it without torchrun")
    if size < 2:
        raise UserError(f"group size {size}: a group of one cannot be ranked; ask for at least 2")
    task = build_task(replace(recipe, method=None, steerer=None, data=None))
    if task.reward.capabilities.of_sets:
        raise UserError(f"reward {task.reward.name!r} scores sets: offline groups need a score for each sample")
    if not isinstance(task.model.network, nn.Module):
        raise UserError(f"task {task.name} has no weights to train: there is nothing that data could be used for")
    return task


def _plan(recipe: Recipe, task: Task, groups: int, size: int) -> dict[str, Any]:
    """All of the manifest that is known before the first sample."""
    return {
        "version": VERSION,
        "testbed": recipe.testbed.resolved(),
        "reward": task.reward.name,
        "reward_section": recipe.resolved().get("reward"),
        "prompts": [plain(prompt) for prompt in task.prompts],
        "shape": list(task.model.shape),
        "groups": groups,
        "group_size": size,
        "weights": fingerprint(task.model.network),
        "drawn": json.loads(drawn_by(task, task.prompts).model_dump_json()),
        "grid": task.sampler.grid.tolist(),
        "guidance": task.sampler.guidance,
        "seed": _settings(recipe).seed,
    }


def _settings(recipe: Recipe) -> SteeringConfig | TrainingConfig:
    """Seed, network batch and device, which both kinds of recipe have."""
    return recipe.steering if recipe.method is None else recipe.training


def _run(recipe: Recipe, task: Task) -> LoopRun:
    settings = _settings(recipe)
    device = torch.device(settings.device)
    roles = CopiedRoles(cast(nn.Module, task.model.network).to(device).eval(), {})
    noise, execution = Noise(settings.seed), settings.execution
    return LoopRun(task, roles, World(), noise, settings.forward_batch, device, execution)


def _check_output(output: Path, plan: dict[str, Any], *, resume: bool) -> None:
    """Refuse a directory that would lose work; touches nothing."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a directory")
    if not resume:
        if output.is_dir() and set(output.iterdir()) - set(_leftovers(output)):
            raise UserError(f"output {output} exists and is not empty: add --resume to go on with it, or name another")
        return
    found = output / (MANIFEST if (output / MANIFEST).exists() else PLAN)
    try:
        begun = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"output {output} holds no collection to go on with: leave out --resume") from error
    changed = differences({key: begun.get(key) for key in plan}, plan)
    if changed:
        lines = [f"  {key}: {_short(was)} there, {_short(now)} asked for" for key, (was, now) in changed.items()]
        raise UserError("\n".join([f"{output} was begun with another recipe: resume with the same values", *lines]))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _part(run: LoopRun, path: Path, batch: PromptBatch) -> dict[str, Tensor]:
    """The part at a path, or newly drawn and written there."""
    held = _read(path, len(batch.index))
    if held is not None:
        return held
    before = run.ledger.copy()
    with torch.no_grad():
        part = to_tensors(scored(run, batch, lambda rows: draw(run, "reference", run.task.sampler, rows, run.noise)))
    part[COST] = torch.tensor(astuple(run.ledger - before))
    _write(path, save(part))
    return part


def _read(path: Path, rows: int) -> dict[str, Tensor] | None:
    """A part that is whole; None for one that is missing or damaged, which is drawn again."""
    try:
        part = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    return part if COST in part and len(part["index"]) == rows else None


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _finish(output: Path, plan: dict[str, Any], parts: list[dict[str, Tensor]], task: Task, tell: Tell) -> Manifest:
    """Join the parts; the manifest appears last, and the parts go when it is there."""
    names = [name for name in parts[0] if name != COST]
    data = from_tensors({name: torch.cat([part[name] for part in parts]) for name in names})
    data = _combined(data, task)
    content = save(to_tensors(data))
    spent = Ledger(*torch.stack([part[COST] for part in parts]).sum(0).tolist())
    equal = equal_groups(data)
    results = {
        "repeatable": scores_again(data, task, task.reward),
        "equal_groups": equal,
        "ledger": asdict(spent),
        "data": hashlib.sha256(content).hexdigest(),
    }
    manifest = Manifest.model_validate_json(json.dumps(plan | results), strict=True)
    _write(output / DATA, content)
    write_text(output / MANIFEST, json.dumps(dump(manifest), indent=1) + "\n")
    _tidy(output)
    if equal:
        tell(f"{equal} of {manifest.groups} groups have equal rewards: training leaves them out")
    return manifest


def _tidy(output: Path) -> None:
    """Remove what is not needed beside a finished data set."""
    shutil.rmtree(output / PARTS, ignore_errors=True)
    for path in (output / PLAN, *_leftovers(output)):
        path.unlink(missing_ok=True)


def _leftovers(output: Path) -> list[Path]:
    """Half-written files of a collection that was killed."""
    return [path for name in (PLAN, DATA, MANIFEST) for path in output.glob(f".{name}.*")]


def _combined(data: Experience, task: Task) -> Experience:
    """A sum that standardises its parts by the batch does so over all groups, whatever the parts were."""
    reward = task.reward
    if not isinstance(reward, WeightedSum):
        return data
    return replace(data, rewards=reward.combine({name: data.components[name] for name in reward.rewards}, data.group))
