"""Pytrees with a leading batch dimension: the one place that knows how to gather, join and move them.

A *tree* is a tensor, ``None``, a mapping, tuple or list of trees, or a :class:`Batched` record. All its
tensors share the leading dimension. Anything else (a process, a string, a number) is carried along unchanged.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

T = TypeVar("T")


class Batched:
    """Marker for dataclasses whose tensor fields share a leading batch dimension, so that :func:`take` gathers them."""


def tree_map(function: Callable[[Tensor], Tensor], tree: T) -> T:
    """Apply ``function`` to every tensor of ``tree``; keep the structure and everything that is not a tensor."""
    return cast(T, _map(function, tree))


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Batched):
        fields = dataclasses.fields(cast(Any, tree))
        changes = {f.name: _map(function, getattr(tree, f.name)) for f in fields if f.init}
        return dataclasses.replace(cast(Any, tree), **changes)
    if isinstance(tree, Mapping):
        return {key: _map(function, value) for key, value in cast(Mapping[Any, Any], tree).items()}
    if isinstance(tree, tuple | list):
        items = [_map(function, value) for value in cast(Sequence[Any], tree)]
        return tuple(items) if isinstance(tree, tuple) else items
    return tree


def take(tree: T, index: Tensor) -> T:
    """Rows ``index`` (an integer or boolean tensor of rank 1) of every tensor in ``tree``.

    The one gather of the library: resampled particles, minibatches and tree expansion all come through here.
    """
    return tree_map(lambda leaf: leaf[index.to(leaf.device)], tree)


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
    columns = [leaves(tree) for tree in trees]
    rows = iter([torch.cat(list(parts)) for parts in zip(*columns, strict=True)])
    return tree_map(lambda _: next(rows), trees[0])


def batch_size(tree: Any) -> int | None:
    """The leading dimension of ``tree``; ``None`` for a tree without tensors (an unconditional model's condition).

    Raises:
        ValueError: if two tensors disagree.
    """
    sizes = {len(leaf) for leaf in leaves(tree)}
    if len(sizes) > 1:
        raise ValueError(f"the tensors of one batch have different leading dimensions: {sorted(sizes)}")
    return sizes.pop() if sizes else None


def to_device(tree: T, device: torch.device | str) -> T:
    """``tree`` with every tensor on ``device``."""
    return tree_map(lambda leaf: leaf.to(device), tree)
