"""How much memory an iteration takes, and how that grows with the number of steps: PRDP, which learns from all steps.

Counted are the bytes of all tensors that are alive at once, from PyTorch's own dispatch: no allocator, no interpreter,
no noise. The states of the chains are stored, so they grow with the steps; activations must not.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.table import Table

from benchmarks.training import assembled, collected, once
from benchmarks.workload import SIZES, Size, make_task
from difftilt.methods.forward_process.prdp import PRDP, Config
from difftilt.training.memory import Live

STEPS = (10, 50)


@dataclass(frozen=True)
class Row:
    """Bytes of one iteration.

    Attributes:
        steps: of the rollout; all but the last are learned from.
        states: what is stored of the chains.
        collect: at most alive while chains are drawn, scored and measured against the reference.
        kept: alive between collecting and learning.
        update: at most alive in all updates, beyond what was kept.
    """

    steps: int
    states: int
    collect: int
    kept: int
    update: int


def measure(size: Size, steps: int) -> Row:
    """The second iteration, in which the reference is another network than the current one."""
    size = replace(size, steps=steps)
    task = make_task(size)
    config = Config(groups=size.batch // 4, group_size=4, epochs=2, temperature=1.0, clip_range=1e-3)
    loop = assembled(task, PRDP(config, task), size)
    once(loop, collected(loop, 0))
    with Live() as live:
        experience = collected(loop, 1)
        collect, kept = live.peak, live.now
        live.peak = kept
        once(loop, experience)
    pool = experience.edges.start
    assert pool is not None
    return Row(steps, pool.store.untyped_storage().nbytes(), collect, kept, live.peak - kept)


def run(size: str, path: Path) -> list[Row]:
    """Both numbers of steps, written to ``path``."""
    chosen = replace(SIZES["tiny"], batch=16) if size == "tiny" else replace(SIZES["full"], batch=32)
    rows = [measure(chosen, steps) for steps in STEPS]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"size": asdict(chosen), "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return rows


def table(rows: list[Row]) -> Table:
    """One line per number of steps, in MB."""
    names = ("steps", "stored states", "peak of collecting", "kept", "peak of learning beyond it")
    shown = Table(*names, box=None, header_style="bold")
    for row in rows:
        values = (row.states, row.collect, row.kept, row.update)
        shown.add_row(str(row.steps), *(f"{value / 2**20:.2f} MB" for value in values))
    return shown
