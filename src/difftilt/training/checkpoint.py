"""Checkpoints that a kill at any moment cannot damage, and that nothing but safetensors and JSON can be read from.

A checkpoint is written into a temporary directory, given a manifest of SHA-256 hashes, flushed to the disk and renamed;
``latest`` is a symbolic link that is replaced in one step. On reading, every file must match its hash.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from difftilt.errors import UserError
from difftilt.models.shards import cut

MANIFEST = "manifest.json"
STATE = "state.json"


def save_checkpoint(
    directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``directory/step_<step>`` and point ``directory/latest`` at it.

    Args:
        directory: of all checkpoints of the run.
        step: iterations finished.
        tensors: file stem -> tensors.
        state: plain JSON.
        keep: number of newest checkpoints that stay.

    Returns:
        The directory of the checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step_{step}"
    temporary = directory / f".writing_{step}_{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, tensors, state)
        if final.exists():
            _remove(final)
        temporary.rename(final)
    finally:
        # what is half-written must not keep a full disk full
        shutil.rmtree(temporary, ignore_errors=True)
    link = directory / f".latest_{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(directory / "latest")
    _flush(directory)
    _tidy(directory, keep, final)
    return final


def _write(directory: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """All files of a checkpoint, on the disk."""
    directory.mkdir()
    for stem, group in tensors.items():
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in group.items()},
            directory / f"{stem}.safetensors",
        )
    (directory / STATE).write_text(json.dumps(state, sort_keys=True))
    hashes = {path.name: _digest(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps(hashes, indent=1))
    for path in directory.iterdir():
        _flush(path)
    _flush(directory)


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the most iterations, or None; ``latest`` may be one behind after a kill, or point nowhere.

    Args:
        directory: of all checkpoints of the run.
    """
    return max(_checkpoints(directory), default=(0, None))[1]


def load_checkpoint(directory: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint back after checking every file against the manifest.

    Args:
        directory: of one checkpoint, e.g. ``run/checkpoints/latest``.

    Raises:
        UserError: if a file is missing, changed, or neither safetensors nor JSON; an earlier checkpoint may be whole.
    """
    remedy = f"remove {directory.resolve()} and resume from an earlier checkpoint, or start again in a new directory"
    hashes = _read_json(directory / MANIFEST, remedy)
    for name in sorted({STATE, *hashes}):
        path = directory / name
        if Path(name).name != name or name not in hashes or not path.is_file():
            raise UserError(f"checkpoint {directory} lacks {name}: {remedy}")
        if _digest(path) != hashes[name]:
            raise UserError(f"checkpoint file {path} is damaged (its hash differs from the manifest): {remedy}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in hashes:
        if name.endswith(".safetensors"):
            try:
                tensors[Path(name).stem] = load_file(directory / name)
            except SafetensorError as error:
                raise UserError(f"{directory / name} is no safetensors file ({error}): {remedy}") from error
    return tensors, _read_json(directory / STATE, remedy)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal bit for bit: a NaN equals itself, and 0 is not -0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The per-parameter state of an optimiser as flat tensors ``index/name``."""
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": torch.as_tensor(value) for index, slots in state.items() for name, value in slots.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put flat tensors back; the settings (learning rate, betas) stay those of the present configuration."""
    parameters: list[Tensor] = [one for group in optimizer.param_groups for one in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split("/", 1)
        like = parameters[int(index)]
        # moments are held as their weight is; the number of steps is a number
        slots.setdefault(int(index), {})[name] = cut(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object of a checkpoint."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object: {remedy}")
    return cast(dict[str, Any], values)


def _digest(path: Path) -> str:
    with path.open("rb") as file:  # in pieces: a checkpoint of a large model is larger than what memory has to spare
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Fsync of a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(iterations, path) of every checkpoint; other names are left alone."""
    found = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in directory.glob("step_*"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _tidy(directory: Path, keep: int, written: Path) -> None:
    """Remove all but the newest checkpoints, and what a killed process left half-written."""
    for _, path in _checkpoints(directory)[:-keep]:
        if path != written:
            _remove(path)
    for path in directory.glob(".writing_*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in directory.glob(".latest_*"):
        path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint under another name, so that a kill leaves no half of it under its own."""
    doomed = path.with_name(f".writing_{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
