"""Encoded prompts, kept on disk under a hash of everything that they depend on."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models.fingerprint import fingerprint

Rows = dict[str, Tensor]
"""Name -> tensor with one row per prompt."""


class EncodedTexts:
    """Encodes each prompt once; what one file holds is one prompt. Tensors are on the CPU.

    Args:
        encode: prompts -> rows; called with prompts that are not known yet, all different.
        identity: everything besides the prompt that the rows depend on, see :func:`identity_of`.
        folder: of the files; None keeps the rows in memory.
        batch: prompts of one call of ``encode``, at most.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Rows], identity: Callable[[], str], folder: Path | None, batch: int
    ) -> None:
        self._encode, self._identity, self._folder, self._batch = encode, identity, folder, batch
        self._memory: dict[str, Rows] = {}

    def __call__(self, prompts: Sequence[str]) -> Rows:
        """Rows of these prompts, in order."""
        found = {prompt: self._known(prompt) for prompt in dict.fromkeys(prompts)}
        missing = [prompt for prompt, rows in found.items() if rows is None]
        for start in range(0, len(missing), self._batch):
            chunk = missing[start : start + self._batch]
            rows = {name: value.cpu() for name, value in self._encode(chunk).items()}
            for place, prompt in enumerate(chunk):
                own = {name: value[place : place + 1].contiguous().clone() for name, value in rows.items()}
                self._keep(prompt, own)
                found[prompt] = own
        ordered = [rows for rows in (found[prompt] for prompt in prompts) if rows is not None]
        return {name: torch.cat([rows[name] for rows in ordered]) for name in ordered[0]}

    def _known(self, prompt: str) -> Rows | None:
        if self._folder is None:
            return self._memory.get(prompt)
        try:
            return load_file(self._file(self._folder, prompt))
        except (OSError, SafetensorError):
            return None  # not there, or damaged: it is encoded again and replaced

    def _keep(self, prompt: str, rows: Rows) -> None:
        if self._folder is None:
            self._memory[prompt] = rows
            return
        file = self._file(self._folder, prompt)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(rows, draft)
            os.replace(draft, file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"encoded prompts cannot be written to {self._folder} ({error}): name another folder with cache=, or "
                "cache=off"
            ) from error

    def _file(self, folder: Path, prompt: str) -> Path:
        name = hashlib.sha256(json.dumps([self._identity(), prompt]).encode()).hexdigest()
        return folder / "texts" / name[:2] / f"{name}.safetensors"


def identity_of(settings: Mapping[str, Any], encoders: Iterable[nn.Module], tokenizers: Iterable[Any]) -> str:
    """Hash of the weights, adapters and configurations of text encoders, their tokenizers' rules, and settings."""
    parts: list[Any] = [dict(settings)]
    for encoder in encoders:
        config: Any = getattr(encoder, "config", None)
        parts += [type(encoder).__name__, config.to_dict() if hasattr(config, "to_dict") else None]
        parts.append(fingerprint(encoder, adapters=True))
        worn = [(name, *_worn(layer)) for name, layer in encoder.named_modules() if hasattr(layer, "_active_adapter")]
        parts += [worn] if worn else []
    for tokenizer in tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
        parts += [type(tokenizer).__name__, rules, str(getattr(tokenizer, "model_max_length", None))]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _worn(layer: Any) -> tuple[bool, list[str], dict[str, float]]:
    """Of a layer of ``peft``: whether its adapters are off, which are on, and how often each counts."""
    return layer._disable_adapters, list(layer._active_adapter), dict(layer.scaling)


def cache_folder(chosen: str | None) -> Path | None:
    """Where encoded prompts are kept: as ``PipelineOptions.cache`` says."""
    if chosen == "off":
        return None
    if chosen is not None:
        return Path(chosen).expanduser()
    if own := os.environ.get("DIFFTILT_CACHE"):
        return Path(own)
    general = os.environ.get("XDG_CACHE_HOME")
    return (Path(general) if general else Path.home() / ".cache") / "difftilt"
