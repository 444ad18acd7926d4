"""Low-rank adapters as roles: one frozen backbone, and a small pair of matrices per role on each of some layers.

LoRA (Hu et al. 2021, arXiv 2106.09685): a linear layer W becomes W + (alpha/rank)·B·A, A (rank, in) random and B
(out, rank) 0, so that the adapted network begins as the network itself. ``current`` is one adapter, lagging roles are
further ones, and ``reference`` is the backbone with its adapters off. Layers are those of ``peft`` (extra
``[diffusers]``).
"""

import json
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from difftilt.config import Config
from difftilt.errors import UserError
from difftilt.leaves import import_module
from difftilt.models.fingerprint import fingerprint
from difftilt.models.protocol import GenerativeModel, Network, RoleSpec
from difftilt.models.roles import CopiedRoles, Held

BASE = "base/fingerprint"
"""Under this name the SHA-256 of the base model is saved beside the adapters."""

KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
"""Attributes of a layer of ``peft`` that hold one entry per adapter."""


class LoraSettings(Config):
    """Adapters in place of all weights."""

    rank: int = Field(default=32, ge=1)
    """Columns of B and rows of A."""
    alpha: float = Field(default=64.0, gt=0)
    """The product B·A counts alpha/rank times."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the layers that are adapted; null is what the family of the model says, and every linear
    layer where it says nothing."""


@dataclass
class Adapted(Held):
    """A role that is an adapter on a shared backbone.

    Attributes:
        adapter: its name.
        config: of ``peft``.
        off: its product is 0 and stays so: it need not be evaluated.
        base: what :meth:`constants` were while the backbone was whole, once it is in parts.
    """

    adapter: str
    config: Any
    off: bool = False
    base: dict[str, Tensor] | None = None

    @property
    def network(self) -> Network:
        """The backbone under this adapter."""
        return _Under(self)

    @property
    def inner(self) -> nn.Module:
        """The part of the network that has adapters, and that names of layers are counted from."""
        return _inner(self.module)

    def lora(self) -> dict[str, Any] | None:
        """Settings of the adapter."""
        values: dict[str, Any] = self.config.to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights of the adapter under the names of the layers, such as ``attn.to_q.lora_A.weight``."""
        return dict(_weights_of(self.inner, self.adapter))

    def weights(self) -> set[str]:
        """All of them are parameters."""
        return set(self.tensors())

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All weights of the adapter of a trained role."""
        return tuple(value for value in _weights_of(self.inner, self.adapter).values() if value.requires_grad)

    def copy(self, role: str, version: int, like: Held | None = None) -> Held:
        """A further adapter with the same weights."""
        _inject(self.inner, self.config, role, seed=0)
        copied = Adapted(self.module, version, like is not None, role, self.config)
        mine = copied.tensors()
        with torch.no_grad():
            for name, value in self.tensors().items():
                mine[name].copy_(value)
                mine[name].requires_grad_(like is not None)
        copied.changed()
        return copied

    def changed(self) -> None:
        """An adapter that no optimiser moves and whose product is 0 need not be evaluated: it is off."""
        self.off = not self.trained and not any(
            bool(value.any()) for name, value in self.tensors().items() if "_B." in name
        )

    def constants(self) -> dict[str, Tensor]:
        """Which base model the adapters belong to."""
        if self.base is not None:
            return self.base
        return {BASE: torch.tensor(list(bytes.fromhex(fingerprint(self.module))), dtype=torch.uint8)}


class _Under:
    """The backbone, evaluated with one adapter whatever was evaluated before; afterwards ``current`` is on again.

    With activation checkpointing a backward pass evaluates blocks once more; they find the adapter that the forward
    pass had by :func:`switched`.
    """

    def __init__(self, held: Adapted) -> None:
        self._held = held

    def __call__(self, *arguments: Any) -> Tensor:
        held = self._held
        with switched(held.module, None if held.off else held.adapter):
            return held.module(*arguments)

    def __getattr__(self, name: str) -> Any:
        # prepare and refine of the backbone, where it has them; and parameters, which tell its device
        return getattr(self._held.module, name)


def adapted(network: nn.Module, settings: LoraSettings, targets: Sequence[str] = (), seed: int = 0) -> Adapted:
    """The network as role ``current``, frozen but for an adapter; the layers are changed in place.

    Args:
        network: the backbone.
        settings: rank, alpha and targets.
        targets: of the model's family, taken where the settings name none.
        seed: of the first weights of A.

    Raises:
        UserError: if ``peft`` is missing, no layer is named so, or the network has adapters already.
    """
    peft = import_module("peft", "training.lora")
    if any(_is_adapted(layer) for layer in network.modules()):
        raise UserError("training.lora: this network has adapters already: merge or unload them first")
    inner = _inner(network)
    chosen = _targets(inner, settings.targets if settings.targets is not None else targets)
    network.requires_grad_(False)
    config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=chosen)
    _inject(inner, config, "current", seed)
    return Adapted(network, 0, True, "current", config)


def roles_of(
    model: GenerativeModel,
    specs: Mapping[str, RoleSpec],
    settings: LoraSettings | None,
    seed: int = 0,
    first: Callable[[nn.Module], nn.Module | Held] = lambda network: network,
) -> CopiedRoles:
    """The roles of a run: copies of the model's network, or adapters on it where there are settings for them.

    Args:
        model: its network is an ``nn.Module``, where it is to be evaluated.
        specs: declared by the method.
        settings: None trains all weights.
        seed: of adapters.
        first: what role ``current`` holds, where all weights are trained.
    """
    # rollout and ratios see one function: dropout is off, and so is everything else that training mode turns on
    network = cast(nn.Module, model.network).eval()
    return CopiedRoles(
        first(network) if settings is None else adapted(network, settings, model.lora_targets, seed), specs
    )


def save_peft(tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None, folder: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors``, for ``PeftModel.from_pretrained(network, folder)``."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(written + "\n", encoding="utf-8")


def _inner(network: nn.Module) -> nn.Module:
    """A wrapper names what it wraps ``inner``, so that layers have the names that other libraries know."""
    return getattr(network, "inner", network)


def _targets(network: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Full names of the layers to adapt."""
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear) and name]
    if not wanted:
        return linear
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)]
    unmatched = [end for end in wanted if not any(_ends(name, end) for name in names)]
    if unmatched:
        known = sorted({name.rsplit(".", 1)[-1] for name in names})
        raise UserError(
            f"training.lora.targets: no layer's name ends in {', '.join(map(repr, unmatched))}; the layers end in "
            f"{', '.join(known[:20])}"
        )
    found = [name for name in names if any(_ends(name, end) for end in wanted)]
    parts = network if isinstance(network, nn.ModuleDict) else ()
    without = [part for part in parts if not any(name.startswith(f"{part}.") for name in found)]
    if without:
        raise UserError(
            f"training.lora.targets: no layer of {', '.join(without)} is adapted, which is to be trained too: name "
            "some of its layers as well, or do not train it (train_text_encoder)"
        )
    return found


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _inject(network: nn.Module, config: Any, adapter: str, seed: int) -> None:
    """Add an adapter in float32, with first weights that depend on the seed alone."""
    peft = import_module("peft", "training.lora")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, network, adapter)
    for value in _weights_of(network, adapter).values():
        value.data = value.data.float()
    _switch(network, "current")


def _weights_of(network: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter; its name, which follows ``lora_A`` in theirs, is left out."""
    found: dict[str, nn.Parameter] = {}
    for name, value in network.named_parameters():
        parts = name.split(".")
        place = next((place for place, part in enumerate(parts) if part in KINDS), len(parts))
        if parts[place + 1 : place + 2] == [adapter]:
            found[".".join((*parts[: place + 1], *parts[place + 2 :]))] = value
    return found


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "_active_adapter") and hasattr(layer, "_disable_adapters")


def switched_on(network: nn.Module) -> str | None:
    """Name of the adapter that is on; None where they are off, or the network has none."""
    layer: Any = next(filter(_is_adapted, network.modules()), None)
    return None if layer is None or layer._disable_adapters else layer._active_adapter[0]


@contextmanager
def switched(network: nn.Module, adapter: str | None) -> Generator[None, None, None]:
    """Evaluate under an adapter, or none, whatever is on; afterwards that is on again."""
    before = switched_on(network)
    if before == adapter:
        yield
        return
    try:
        _switch(network, adapter)
        yield
    finally:
        _switch(network, before)


def _switch(network: nn.Module, adapter: str | None) -> None:
    """Choose an adapter, or none.

    ``set_adapter`` of ``peft`` also switches gradients on and off, which a pass that is under way must not see; so the
    two fields that it sets are set here.
    """
    layers: list[Any] = [layer for layer in network.modules() if _is_adapted(layer)]
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]
