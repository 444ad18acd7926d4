"""How much memory does a tree of 20 000 nodes take? DTS on the ``shapes`` model, in half and in full precision.

The growth is that of the resident memory of the process between the start of the search and its highest point, the
network's own activations included; the stores are what the nodes keep: states, predictions, finished samples.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from benchmarks.paired import peak_of, resident_mb
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.steering.dts import DTSConfig
from difftilt.steering.rollout_tree import Search
from difftilt.steering.tree_rules import Boltzmann, soft_value
from difftilt.testbeds.shapes import Shapes

PROMPT = "two red circles left of a blue square"
NODES = {"full": 20_000, "tiny": 400}
Store = Literal["full", "half"]
Predictions = Literal["cached", "recomputed"]
SETTINGS: tuple[tuple[Store, Predictions], ...] = (("half", "cached"), ("half", "recomputed"), ("full", "cached"))


@dataclass(frozen=True)
class Row:
    """One tree.

    Attributes:
        store, predictions: settings.
        nodes, rollouts, nfe: of the tree.
        stores: bytes of states, finished samples and predictions.
        arrays: bytes of the forest's numbers.
        growth_mb: of resident memory, at most.
    """

    store: str
    predictions: str
    nodes: int
    rollouts: int
    nfe: int
    stores: int
    arrays: int
    growth_mb: float


@torch.no_grad()
def grown(store: Store, predictions: Predictions, nodes: int) -> Row:
    """A tree of at least so many nodes, and what it took."""
    task = Shapes().task()
    # far more rollouts than will be done: so the tree keeps what a tree that is still growing keeps
    config = DTSConfig(rollouts=nodes, batch=32, temperature=0.1, store=store, predictions=predictions)
    parts = Boltzmann(config.temperature), soft_value(config.temperature)
    network = denoiser(task.model)
    search = Search.begin(config, *parts, task, network, task.reward, [PROMPT], Noise(0))
    search.advance(32)  # what the first call of the network allocates is no node's
    before = resident_mb()

    def grow() -> None:
        while search.forest.size < nodes:
            search.advance(32)

    peak = peak_of(grow)
    forest, frontier = search.forest, search.frontier
    stores = frontier.states.bytes + frontier.samples.bytes + frontier.predictions.bytes
    arrays = sum(getattr(forest, name).nbytes for name in (*forest.NODE, *forest.BLOCK))
    spent = network.ledger.nfe
    return Row(store, predictions, forest.size, search.done, spent, stores, arrays, peak - before)


def run(size: str, path: Path) -> list[Row]:
    """Half precision with predictions and without, and full precision; ``path`` gets every row when it is there."""
    rows = list[Row]()
    path.parent.mkdir(parents=True, exist_ok=True)
    for store, predictions in SETTINGS:
        rows.append(grown(store, predictions, NODES[size]))
        path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return rows


def table(rows: Sequence[Row]) -> Table:
    """One line per tree."""
    names = ("store", "predictions", "nodes", "rollouts", "nfe", "stores MB", "numbers MB", "resident growth MB")
    shown = Table(*names, box=None, header_style="bold")
    for row in rows:
        words = (row.store, row.predictions, str(row.nodes), str(row.rollouts), str(row.nfe))
        shown.add_row(*words, f"{row.stores / 2**20:.0f}", f"{row.arrays / 2**20:.1f}", f"{row.growth_mb:.0f}")
    return shown
