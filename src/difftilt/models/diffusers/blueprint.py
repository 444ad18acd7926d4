"""A pipeline without its weights: what its configuration files say of every shape, for estimates of memory."""

import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.leaves import import_module
from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.loading import adapt
from difftilt.models.diffusers.options import PipelineOptions
from difftilt.models.diffusers.texts import Rows
from difftilt.models.hub import from_hub

FILES = ["*.json", "*.txt", "*.model"]
"""Of a pipeline on the hub, a few MB: settings and tokenizers."""


def blueprint(source: str, options: PipelineOptions, shapes: Any) -> Adapter:
    """The adapter of a pipeline whose tensors have shapes and no content; no weight file is read.

    The networks that are trained are on the device ``meta``: adapters are put on them before :func:`filled`.

    Args:
        source: local folder, or id on the hub, of which only settings are fetched.
        options: of loading and sampling.
        shapes: a ``FakeTensorMode``, in which everything that is computed with the pipeline must stand.

    Raises:
        UserError: in one line, for what is not there or cannot be reached.
    """
    pipelines = import_module("diffusers", f"pipeline {source!r}")
    folder = from_hub("pipeline", source, _folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{source} is no pipeline of diffusers: there is no model_index.json in it")
    index: dict[str, Any] = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    made = getattr(pipelines, index["_class_name"])
    dtype = getattr(torch, options.dtype or "float32")

    def build() -> Any:
        parts = {
            name: _component(folder / name, named)
            for name, named in index.items()
            if isinstance(named, list) and not name.startswith("_")
        }
        settings = {key: index[key] for key in inspect.signature(made.__init__).parameters if key in index}
        return made(**(settings | parts))

    adapter = adapt(from_hub("pipeline", source, lambda _: build()), options.model_copy(update={"dtype": None}))

    def encode(prompts: Sequence[str]) -> Rows:
        return adapter.embed(prompts, torch.device("cpu"))

    adapter.options = options
    with shapes:
        for name, part in adapter.pipe.components.items():
            if isinstance(part, nn.Module) and name not in adapter.denoisers:
                filled(part, dtype)
    adapter.texts = cast(Any, encode)  # neither a cache of prompts, nor encoders that leave their device
    return adapter


def _folder(source: str) -> Path:
    if Path(source).exists():
        return Path(source)
    return Path(import_module("huggingface_hub", "pipeline").snapshot_download(source, allow_patterns=FILES))


def _component(folder: Path, named: Sequence[str | None]) -> Any:
    """A network without weights, or a scheduler or tokenizer as it is; ``named`` is its library and its class."""
    library, name = named
    if library is None or name is None:
        return None
    found: Any = getattr(import_module(library, f"component {folder.name!r}"), name)
    if nn.Module not in found.__mro__:
        return found.from_pretrained(folder)
    with torch.device("meta"):
        if library == "diffusers":
            network: Any = found.from_config(found.load_config(folder))
        else:
            network = found(found.config_class.from_pretrained(folder))
        return network.eval()


def filled(network: nn.Module, dtype: torch.dtype, keep: Iterable[Tensor] = ()) -> None:
    """Give a network that was built on the device ``meta`` tensors of the mode that is on, in place.

    Args:
        network: its floating-point tensors get the precision.
        dtype: of weights.
        keep: parameters that keep their own precision.
    """
    own = {id(value) for value in keep}
    made: dict[int, Tensor] = {}

    def make(value: Tensor) -> Tensor:
        if id(value) not in made:  # tied weights stay tied
            wanted = dtype if value.is_floating_point() and id(value) not in own else value.dtype
            made[id(value)] = torch.empty(value.shape, dtype=wanted, device="cpu")
            if isinstance(value, nn.Parameter):
                made[id(value)] = nn.Parameter(made[id(value)], value.requires_grad)
        return made[id(value)]

    for module in network.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, make(value))
