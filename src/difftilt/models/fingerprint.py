"""Telling one set of weights from another without reading all of it."""

import hashlib
import math

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from difftilt.models.protocol import Network

READ = 4096
"""Values of every tensor that are read, at most."""


def fingerprint(network: Network, read: int | None = READ, *, adapters: bool = False) -> str:
    """SHA-256 of name, type, shape and some values of every tensor of a network: one model, one fingerprint.

    Tensors of up to ``read`` values are read whole, larger ones at ``read`` fixed places, so what it costs grows with
    the number of tensors and not with their size. Another architecture, initialisation or checkpoint, and a merged
    adapter, differ nearly everywhere. A change of a share f of one large tensor's values at random is overlooked with
    probability (1 - f)^read: 1e-18 for one value in a hundred, 0.02 for one in a thousand, and the k-th power of it
    where k tensors are changed alike. Weights that were changed by hand at a few places are not told from the original.
    Adapters that lie beside the weights (LoRA of ``peft``) do not count: the fingerprint is that of the base model.

    Args:
        network: one without weights (a closed form) has the fingerprint of nothing.
        read: None reads every value.
        adapters: count them as well.
    """
    digest = hashlib.sha256()
    for name, value in _tensors(network, adapters) if isinstance(network, nn.Module) else ():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(_some(value.detach(), read).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(network: nn.Module, adapters: bool) -> list[tuple[str, Tensor]]:
    """Names and tensors as they are without adapters: ``peft`` calls an adapted layer's own weights ``base_layer``."""
    found = [one for one in network.state_dict().items() if adapters or ".lora_" not in one[0]]
    return sorted(((name.replace(".base_layer.", "."), value) for name, value in found), key=lambda one: one[0])


def _some(value: Tensor, read: int | None) -> Shaped[Tensor, " values"]:
    """All values, or those at multiples of the golden ratio: evenly spread, and in step with no row or column."""
    flat = value.reshape(-1)
    if read is None or len(flat) <= read:
        return flat
    turn = (torch.arange(read, dtype=torch.float64) * ((math.sqrt(5) - 1) / 2)).frac()
    return flat[(turn * len(flat)).long().to(flat.device)]
