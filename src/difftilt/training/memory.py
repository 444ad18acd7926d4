"""Bytes of tensors: what modules hold, what a pass keeps for its gradient, what is alive at most.

Counted is PyTorch's own bookkeeping: no allocator, no workspace of a library. It holds for tensors without content too
(``FakeTensorMode``), so a network need not fit the machine that asks.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of tensors, each once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def module_bytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return bytes_of([*module.parameters(), *module.buffers()])


def adamw_bytes(parameters: Iterable[Tensor]) -> int:
    """Of what AdamW remembers: two moments of every parameter in its precision, and its count of steps in float32."""
    parameters = list(parameters)
    return 2 * bytes_of(parameters) + 4 * len(parameters)


def kept_bytes(evaluate: Callable[[], T], known: Iterable[Tensor] = ()) -> tuple[int, T]:
    """What a pass keeps for its backward pass, each storage once, and its result.

    Args:
        evaluate: with gradients on.
        known: tensors that are there anyway, such as weights.
    """
    sizes: dict[int, int] = {}
    skip = {_storage(tensor)._cdata for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in skip:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = evaluate()
    return sum(sizes.values()), result


def _storage(tensor: Tensor) -> Any:
    """Its address tells storages with content apart, this handle also those without."""
    return tensor.untyped_storage()


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made while it was on and are still alive: now, and at most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = dict[int, weakref.ref[torch.UntypedStorage]]()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, result)
        return result

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
