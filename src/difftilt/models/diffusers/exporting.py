"""Trained weights in the form that pipelines of ``diffusers`` load."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from difftilt.models.diffusers.backbone import DENOISER
from difftilt.models.lora import save_peft
from difftilt.models.protocol import Weights


def export_lora(pipe: Any, names: Sequence[str], weights: Weights, folder: Path) -> None:
    """A LoRA for ``pipe.load_lora_weights(folder)``, with a folder ``peft`` beside it.

    Args:
        pipe: of what class the pipeline is.
        names: of the components that have adapters, the denoising network first.
        weights: an adapter.
        folder: to write to.
    """
    parts = {names[0]: (weights.tensors(), weights.lora() or {})}
    if len(names) > 1:
        places = dict(zip(names, (DENOISER, *names[1:]), strict=True))
        parts = {name: _part(weights, f"{place}.") for name, place in places.items()}
    written: dict[str, Any] = {}
    for name, (tensors, settings) in parts.items():
        written[f"{name}_lora_layers"] = {key: value.detach().cpu() for key, value in tensors.items()}
        written[f"{name}_lora_adapter_metadata"] = settings
        save_peft(tensors, settings, folder / "peft" / (name if len(names) > 1 else ""))
    type(pipe).save_lora_weights(folder, **written)


def _part(weights: Weights, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of the layers of one component, under its own names."""
    own = {name.removeprefix(prefix): value for name, value in weights.tensors().items() if name.startswith(prefix)}
    # peft shortens names to ends that tell the layers of the whole apart; those of a part are told by what it has
    targets = sorted({name.rsplit(".lora_", 1)[0] for name in own})
    return own, {**(weights.lora() or {}), "target_modules": targets}


def export_pipeline(pipe: Any, names: Sequence[str], networks: Sequence[nn.Module], folder: Path) -> None:
    """The pipeline with other networks in the place of its own, which it keeps.

    Args:
        pipe: what is written beside them.
        names: of the components; those that the pipeline has no network for stand last and are left out.
        networks: one for each.
        folder: to write to.
    """
    own: Mapping[str, Any] = {name: getattr(pipe, name) for name, _ in zip(names, networks, strict=False)}
    try:
        for name, network in zip(own, networks, strict=True):
            setattr(pipe, name, network)
        pipe.save_pretrained(folder)
    finally:
        for name, network in own.items():
            setattr(pipe, name, network)
