"""Tensors that may be slices of larger ones: what a process holds of them, and how they become whole and are cut again.

A network that is not in parts has plain tensors, which every function here hands back as they are.
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

COMPUTES_ON = "_difftilt_computes_on"
"""Attribute of a network whose weights may rest elsewhere between its calls."""


def in_parts(tensor: Tensor) -> bool:
    """Whether this is one process's view of a tensor that several hold slices of."""
    # where nothing has imported the module, nothing is in parts; importing it takes a second
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The slice that this process holds, sharing its memory."""
    sliced: Any = tensor
    return sliced.to_local() if in_parts(tensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copies of the whole tensors; those in parts are gathered one after the other, by all processes together.

    Args:
        tensors: the same names in every process.
        keep: False takes part and keeps nothing; what is gathered is kept on the CPU.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = gathered(tensor.detach()).cpu() if in_parts(tensor) else tensor.detach()
        if keep:
            found[name] = value.clone()
    return found


def gathered(tensor: Tensor) -> Tensor:
    """The whole of one tensor, on the device of its mesh."""
    sliced: Any = tensor
    return sliced.to(sliced.device_mesh.device_type).full_tensor() if in_parts(tensor) else tensor


def cut(full: Tensor, like: Tensor) -> Tensor:
    """The whole tensor as ``like`` is held: in the same parts, or whole."""
    if not in_parts(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    sliced: Any = like
    # every process has the whole, so none needs to send it
    return distribute_tensor(full, sliced.device_mesh, sliced.placements, src_data_rank=None)


def put(target: Tensor, full: Tensor) -> None:
    """Overwrite a tensor with the whole of another one."""
    local(target).copy_(local(cut(full, target)))


def clip_gradients(parameters: list[nn.Parameter], largest: float) -> float:
    """Scale gradients in place so that their norm is at most ``largest``; returns the norm before, over all parts."""
    grads = [one.grad for one in parameters if one.grad is not None]
    if not any(in_parts(grad) for grad in grads):
        return float(nn.utils.clip_grad_norm_(parameters, largest))
    kinds = ([grad for grad in grads if in_parts(grad) == sliced] for sliced in (True, False))
    norms = [gathered(nn.utils.get_total_norm(kind)).double().cpu() for kind in kinds if kind]
    norm = float(torch.stack(norms).norm())
    for grad in grads:
        local(grad).mul_(min(1.0, largest / (norm + 1e-6)))
    return norm
