"""Networks, tokenizers and weights of published rewards: from objects, local folders, or ids on the hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.leaves import import_module
from difftilt.models.hub import from_hub
from difftilt.rewards.pretrained.pixels import Preparation

Text = Annotated[str, Field(min_length=1)]


class PretrainedOptions(Config):
    """How the network of a reward is run."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of its weights; null loads float32, or leaves a network that is given as it is."""
    device: Text | None = None
    """Where it runs, e.g. ``cuda:1``; null is where the samples are."""
    batch: int = Field(default=16, ge=1)
    """Samples of one forward pass, at most."""


def load_network(kind: str, source: str, options: PretrainedOptions, user: str) -> Any:
    """A network of ``transformers`` with its weights.

    Args:
        kind: class, e.g. ``CLIPModel``.
        source: folder, or id on the hub.
        options: for the precision.
        user: named in messages.
    """
    reader = getattr(import_module("transformers", user), kind)
    dtype = getattr(torch, options.dtype or "float32")
    return from_hub(f"{user}: network", source, lambda found: reader.from_pretrained(found, dtype=dtype))


def load_part(kind: str, source: str, user: str) -> Any:
    """A tokenizer, a configuration or a processor of ``transformers``; ``kind`` is its class."""
    reader = getattr(import_module("transformers", user), kind)
    return from_hub(f"{user}: {kind}", source, reader.from_pretrained)


def load_preparation(source: str, user: str) -> Preparation:
    """What the ``preprocessor_config.json`` of a source says."""
    reader = import_module("transformers.image_processing_base", user).ImageProcessingMixin
    values = from_hub(f"{user}: image processor", source, reader.get_image_processor_dict)[0]
    return Preparation.read(values)


def load_weights(file: str, user: str) -> dict[str, Tensor]:
    """The tensors of a file, or of OWNER/NAME/FILE on the hub.

    A ``.safetensors`` file is read as it is; any other one by torch, tensors and plain values only, so that nothing in
    it is executed; of ``{"state_dict": ...}`` the inner part.
    """
    return from_hub(f"{user}: weights", file, lambda found: _tensors(_local(found, user)), parts=3)


def _local(file: str, user: str) -> Path:
    if Path(file).exists():
        return Path(file)
    owner, name, inner = file.split("/")
    return Path(import_module("huggingface_hub", user).hf_hub_download(f"{owner}/{name}", inner))


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    values: Any = torch.load(file, map_location="cpu", weights_only=True)
    found = values.get("state_dict", values) if isinstance(values, Mapping) else None
    if found is None or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("it holds no named tensors")
    return dict(found)


def fill(network: nn.Module, tensors: Mapping[str, Tensor], user: str) -> None:
    """Load named tensors into a network, all of them and nothing else.

    Raises:
        UserError: names the first tensor that is missing, left over, or of another shape.
    """
    own = network.state_dict()
    wrong = [f"no {name}" for name in own if name not in tensors]
    wrong += [f"{name}, which the network lacks" for name in tensors if name not in own]
    wrong += [
        f"{name} of shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in tensors.items()
        if name in own and own[name].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{user}: these weights are of another network: they hold {wrong[0]}{more}")
    network.load_state_dict(dict(tensors))


def frozen(network: Any, options: PretrainedOptions) -> Any:
    """The network in evaluation mode and in the precision asked for; its parameters take no gradient."""
    network.eval().requires_grad_(False)
    return network if options.dtype is None else network.to(dtype=getattr(torch, options.dtype))


def needs_both(user: str, **parts: Any) -> None:
    """Refuse objects of which only some were given.

    Raises:
        UserError: names those that are missing.
    """
    missing = [name for name, value in parts.items() if value is None]
    if missing and len(missing) < len(parts):
        given = ", ".join(name for name in parts if name not in missing)
        raise UserError(f"{user}: give {' and '.join(missing)} with {given}, or a source to load all of them from")
