"""Pytrees with a leading batch dimension: the one place that knows how to gather, join and move them.

A *tree* is a tensor, ``None``, rows of a shared store (:class:`Pooled`), a mapping, tuple or list of trees, or a
:class:`Batched` record. All its tensors share the leading dimension. Anything else (a process, a string, a number) is
carried along unchanged.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class Batched:
    """Marker for dataclasses whose tensor fields share a leading batch dimension, so that :func:`take` gathers them."""


@dataclasses.dataclass(frozen=True)
class Pooled:
    """Rows that share a store: row i is ``store[place[i]]``.

    :func:`take` gathers places and leaves the store alone, :func:`join` joins each store once; for every other function
    of trees it is the tensor of its rows.

    Attributes:
        store: (entries, ...), each kept once however many rows point to it; it may rest on another device.
        place: (rows,) int64, on the device where rows are wanted.
    """

    store: Tensor
    place: Tensor

    @staticmethod
    def of(rows: Tensor) -> "Pooled":
        """Rows that are a store of their own."""
        return Pooled(rows, torch.arange(len(rows), device=rows.device))

    @property
    def rows(self) -> Tensor:
        """The rows themselves, gathered now, where their places are."""
        resting = self.store.device != self.place.device
        return fetched(self.store, self.place) if resting else self.store[self.place]


def tree_map(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Apply ``function`` to every tensor of ``tree``; keep the structure and everything that is not a tensor."""
    return cast(T, _map(function, tree))


def _map(function: Callable[[Tensor], Any], tree: Any, pooled: Callable[[Pooled], Pooled] | None = None) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Pooled):
        return function(tree.rows) if pooled is None else pooled(tree)
    if isinstance(tree, Batched):
        fields = dataclasses.fields(cast(Any, tree))
        changes = {f.name: _map(function, getattr(tree, f.name), pooled) for f in fields if f.init}
        return dataclasses.replace(cast(Any, tree), **changes)
    if isinstance(tree, Mapping):
        # by name: two mappings of one structure need not hold their entries in one order
        named = cast(Mapping[Any, Any], tree)
        made = {key: _map(function, named[key], pooled) for key in sorted(named, key=str)}
        return {key: made[key] for key in named}
    if isinstance(tree, tuple | list):
        items = [_map(function, value, pooled) for value in cast(Sequence[Any], tree)]
        return tuple(items) if isinstance(tree, tuple) else items
    return tree


def take(tree: T, index: Tensor) -> T:
    """Rows ``index`` (an integer or boolean tensor of rank 1) of every tensor in ``tree``.

    The one gather of the library: resampled particles, minibatches and tree expansion all come through here.
    """

    def rows(leaf: Tensor) -> Tensor:
        return leaf[index.to(leaf.device)]

    return cast(T, _map(rows, tree, lambda leaf: Pooled(leaf.store, rows(leaf.place))))


def pooled(tree: T) -> T:
    """``tree`` with a pool of its own rows in place of every tensor that holds more than one number per row.

    What :func:`take` gathers of it are places: however many rows are taken, the tensors are kept once.
    """
    return cast(T, _map(lambda leaf: Pooled.of(leaf) if leaf.ndim > 1 else leaf, tree, lambda pool: pool))


def fetched(store: Tensor, place: Tensor) -> Tensor:
    """Rows of a store that rests on another device, on the device of ``place``; through pinned memory to a GPU."""
    rows = store.new_empty((len(place), *store.shape[1:]), pin_memory=store.device.type == "cpu" and place.is_cuda)
    torch.index_select(store, 0, place.to(store.device), out=rows)
    return rows.to(place.device, non_blocking=True)


def resting(tree: T, device: torch.device | str = "cpu") -> T:
    """``tree`` with what holds more than one number per row as pools whose stores rest on ``device``.

    A store that several pools share is moved once. Rows that are gathered come back to where they were.
    """
    moved: dict[int, Tensor] = {}

    def moving(pool: Pooled) -> Pooled:
        if id(pool.store) not in moved:
            moved[id(pool.store)] = _moved(pool.store, torch.device(device))
        return Pooled(moved[id(pool.store)], pool.place)

    return cast(T, _map(lambda leaf: leaf, pooled(tree), moving))


def _moved(store: Tensor, device: torch.device) -> Tensor:
    """A copy on another device: in pinned memory, if it comes from a GPU to the CPU."""
    if device.type == "cpu" and store.is_cuda:
        return torch.empty_like(store, device=device, pin_memory=True).copy_(store)
    return store.to(device)


def gathered(tree: T) -> T:
    """``tree`` with the tensor of its rows in place of every pool."""
    return tree_map(lambda leaf: leaf, tree)


def leaves(tree: Any) -> list[Tensor]:
    """All tensors of ``tree`` in a fixed order."""
    found: list[Tensor] = []

    def keep(leaf: Tensor) -> Tensor:
        found.append(leaf)
        return leaf

    _map(keep, tree)
    return found


def join(trees: Sequence[T]) -> T:
    """Concatenate trees of one structure along the batch dimension."""
    columns = [_parts(tree) for tree in trees]
    stores: dict[tuple[int, ...], Tensor] = {}
    rows = iter([_joined(parts, stores) for parts in zip(*columns, strict=True)])
    return cast(T, _map(lambda _: cast(Tensor, next(rows)), trees[0], lambda _: cast(Pooled, next(rows))))


def _parts(tree: Any) -> list[Tensor | Pooled]:
    found: list[Tensor | Pooled] = []

    def keep(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    _map(keep, tree, keep)
    return found


def _joined(parts: Sequence[Tensor | Pooled], stores: dict[tuple[int, ...], Tensor]) -> Tensor | Pooled:
    """One column of all trees; pools of the same stores share the joined one."""
    if all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    pools = [Pooled.of(part) if isinstance(part, Tensor) else part for part in parts]
    key = tuple(id(pool.store) for pool in pools)
    first = {store: place for place, store in reversed([*enumerate(key)])}
    kept = sorted(set(first.values()))
    if key not in stores:
        stores[key] = torch.cat([pools[place].store for place in kept])
    offset = dict(zip(kept, accumulate((len(pools[place].store) for place in kept), initial=0), strict=False))
    moved = [pool.place + offset[first[id(pool.store)]] for pool in pools]
    return Pooled(stores[key], torch.cat(moved))


def to_device(tree: T, device: torch.device | str) -> T:
    """``tree`` with every tensor on ``device``."""
    return tree_map(lambda leaf: leaf.to(device), tree)
