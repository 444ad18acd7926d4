"""What nodes of a tree carry besides numbers: states and predictions, on the CPU, in half precision where asked."""

from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from difftilt.trees import leaves, take, tree_map

T = TypeVar("T")
Ids = NDArray[np.int64]
Places = Tensor | slice

BLOCK = 1024
"""Rows that are allocated at a time: a store that grew by doubling would need thrice its size while it is copied."""


class NodeStore(Generic[T]):
    """Rows of a tree of tensors (``difftilt.trees``) by the number of a node; all rows have one structure.

    Half precision is float16 for floating point numbers and int32 for whole ones. A float that came from it differs by
    up to 1 part in 2048 from what was stored.

    Attributes:
        half: in which precision rows are kept; they come back in their own.
    """

    def __init__(self, half: bool = False) -> None:
        self.half = half
        self._structure: T | None = None
        self._columns: list[_Column] = []
        self._row = np.full(0, -1)
        self._free: list[int] = []
        self._rows = 0

    def put(self, nodes: Ids, tree: T) -> None:
        """Keep the rows of ``tree`` for these nodes, which have none yet."""
        parts = leaves(tree)
        if self._structure is None:
            self._structure = take(tree, torch.zeros(0, dtype=torch.int64))
            self._columns = [_Column(part, self.half) for part in parts]
        if not len(nodes):
            return
        rows = self._allocated(len(nodes))
        if int(nodes.max()) >= len(self._row):
            longer = np.full(max(int(nodes.max()) + 1, 2 * len(self._row)), -1)
            longer[: len(self._row)] = self._row
            self._row = longer
        self._row[nodes] = rows
        for column, part in zip(self._columns, parts, strict=True):
            column.write(rows, part)

    def get(self, nodes: Ids, device: torch.device | str = "cpu") -> T:
        """The rows of these nodes, each of which must be there."""
        rows = self._row[nodes]
        assert self._structure is not None
        found = iter([column.read(rows, device) for column in self._columns])
        return tree_map(lambda leaf: next(found), self._structure)

    def has(self, nodes: Ids) -> NDArray[np.bool_]:
        """Which of these nodes are there."""
        found = np.zeros(len(nodes), np.bool_)
        inside = nodes < len(self._row)
        found[inside] = self._row[nodes[inside]] >= 0
        return found

    def drop(self, nodes: Ids) -> None:
        """Forget these nodes; those that are not there are passed over."""
        nodes = nodes[nodes < len(self._row)]
        rows = self._row[nodes]
        self._free.extend(rows[rows >= 0].tolist())
        self._row[nodes] = -1

    @property
    def bytes(self) -> int:
        """Allocated for tensors."""
        return sum(block.nbytes for column in self._columns for block in column.blocks)

    @property
    def rows(self) -> int:
        """Nodes that are there."""
        return self._rows - len(self._free)

    def _allocated(self, count: int) -> Ids:
        """Rows that were dropped, then new ones."""
        again = [self._free.pop() for _ in range(min(count, len(self._free)))]
        begin, self._rows = self._rows, self._rows + count - len(again)
        return np.concatenate([np.array(again, dtype=np.int64), np.arange(begin, self._rows)])


class _Column:
    """Rows of one tensor, in blocks."""

    def __init__(self, like: Tensor, half: bool) -> None:
        self.dtype, self.shape = like.dtype, tuple(like.shape[1:])
        self.kept = _half(like.dtype) if half else like.dtype
        self.blocks: list[Tensor] = []

    def write(self, rows: Ids, data: Tensor) -> None:
        data = data.detach().to("cpu", self.kept)
        for block, inside, chosen in self._parts(rows):
            while block >= len(self.blocks):
                self.blocks.append(torch.zeros((BLOCK, *self.shape), dtype=self.kept))
            self.blocks[block][inside] = data[chosen]

    def read(self, rows: Ids, device: torch.device | str) -> Tensor:
        data = torch.empty((len(rows), *self.shape), dtype=self.kept)
        for block, inside, chosen in self._parts(rows):
            data[chosen] = self.blocks[block][inside]
        return data.to(device, self.dtype)

    def _parts(self, rows: Ids) -> list[tuple[int, Places, Places]]:
        """Block, rows inside it, and which of the given rows they are."""
        if not len(rows):
            return []
        first, last = divmod(int(rows[0]), BLOCK), divmod(int(rows[-1]), BLOCK)
        if first[0] == last[0] and bool((np.diff(rows) == 1).all()):  # as rows are that are new: a slice copies faster
            return [(first[0], slice(first[1], last[1] + 1), slice(None))]
        block, inside = rows // BLOCK, torch.from_numpy(rows % BLOCK)
        return [(int(one), inside[block == one], torch.from_numpy((block == one).nonzero()[0])) for one in set(block)]


def _half(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float16
    # vocabularies may have more than 32 768 tokens
    return dtype if dtype == torch.bool else torch.int32
