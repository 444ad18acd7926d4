"""Run the benchmarks and write their results: ``python -m benchmarks [NAME ...] [--repeats N]``.

Studies, which time nothing, run only when they are named: ``signal``, ``attribution``, ``memory``, ``nodes``,
``ttsnap_replay``, ``pareto`` and ``gpu``; the first two take half an hour each, the last wants a GPU.

Always exits with 0: a machine that is slow, or busy, is no error. Whether a bound holds is printed and stored.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import attribution, gpu, memory, nodes, overlap, pareto, signal, ttsnap
from benchmarks.noise_laws import find_overhead
from benchmarks.paired import Report, Subject, measure
from benchmarks.sampling import (
    branch_saving,
    completion_overhead,
    fk_overhead,
    noise_cost,
    rollout_overhead,
    tree_overhead,
)
from benchmarks.sets import leave_one_out, swaps
from benchmarks.steering import dlbs_overhead, svdd_overhead, ttsnap_overhead
from benchmarks.training import (
    crd_overhead,
    dragon_overhead,
    gdro_overhead,
    grpo_overhead,
    nft_overhead,
    prdp_overhead,
)
from benchmarks.trees import dts_frontier, dts_overhead, peptune_overhead
from benchmarks.workload import SIZES, Size

BENCHMARKS: dict[str, Callable[[Size], Subject]] = {
    "rollout": rollout_overhead,
    "tree": tree_overhead,
    "branch_saving": branch_saving,
    "completion": completion_overhead,
    "update_flow_grpo": grpo_overhead,
    "update_diffusion_nft": nft_overhead,
    "update_crd": crd_overhead,
    "update_gdro": gdro_overhead,
    "update_prdp": prdp_overhead,
    "update_dragon": dragon_overhead,
    "fk_steering": fk_overhead,
    "find": find_overhead,
    "svdd": svdd_overhead,
    "dlbs": dlbs_overhead,
    "ttsnap": ttsnap_overhead,
    "dts": dts_overhead,
    "dts_frontier": dts_frontier,
    "peptune": peptune_overhead,
    "noise": noise_cost,
    "sets_leave_one_out": leave_one_out,
    "sets_swaps": swaps,
}
OVERLAP = "overlap"
"""Needs a server while it runs."""
TIMED = (*BENCHMARKS, OVERLAP)
GROUPS = {
    "sets": ("sets_leave_one_out", "sets_swaps"),
    "updates": tuple(name for name in BENCHMARKS if name.startswith("update_")),
}
"""One name for several benchmarks."""
STUDIES = ("signal", "attribution", "memory", "nodes", "ttsnap_replay", "pareto", "gpu")
"""No timing: how much of a policy gradient is signal, how much of an advantage the doing of its own step, what an
iteration keeps and what a tree, pruned search over recorded rewards, and how good the trade-offs of searches are; and
transformers of real size."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was named, or everything."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    reports: list[Report] = []
    for name in [name for name in options.names if name in STUDIES]:
        size = "quick" if name == "gpu" and options.quick else options.size
        study(name, size, options.repeats, options.output / f"{name}.json")
    named = [one for name in options.names for one in GROUPS.get(name, (name,))]
    for name in [name for name in named if name in TIMED] or ([] if options.names else TIMED):
        size = SIZES[options.size]
        report = (
            overlap.run(size, options.repeats) if name == OVERLAP else measure(BENCHMARKS[name](size), options.repeats)
        )
        report.write(options.output)
        reports.append(report)
    if reports:
        Console(width=120).print(table(reports))
    return 0


def study(name: str, size: str, repeats: int, path: Path) -> None:
    """Run one study, write its rows and show them."""
    console = Console(width=180)
    if name == "signal":
        console.print(signal.table(signal.run(signal.chosen(size), repeats, path)))
    elif name == "memory":
        console.print(memory.table(memory.run(size, path)))
    elif name == "nodes":
        console.print(nodes.table(nodes.run(size, path)))
    elif name == "pareto":
        console.print(pareto.table(pareto.run(size, repeats, path)))
    elif name == "gpu":
        console.print(gpu.table(gpu.run(gpu.SIZES[size], path)))
    elif name == "attribution":
        console.print(attribution.table(attribution.run(attribution.chosen(size), repeats, path)))
    else:
        console.print(*ttsnap.tables(ttsnap.run(ttsnap.SIZES[size], path)))


def table(reports: Sequence[Report]) -> Table:
    """One row per benchmark."""
    columns = ("name", "ratio", "quartiles", "cpu ratio", "bound", "within", "program s", "floor s", "peak MB", "pairs")
    rows = Table(*columns, box=None, header_style="bold")
    for report in reports:
        low, high = report.ratio_quartiles
        rows.add_row(
            report.name,
            f"{report.ratio_median:.3f}",
            f"{low:.3f} – {high:.3f}",
            f"{report.cpu_ratio_median:.3f}",
            "" if report.bound is None else f"{report.bound:.2f}",
            {None: "", True: "yes", False: "NO"}[report.within],
            f"{report.seconds['program']:.3f}",
            f"{report.seconds['floor']:.3f}",
            f"{report.peak_memory_mb:.0f}",
            str(report.repeats),
        )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Overhead over the network's own cost.")
    parser.add_argument(
        "names",
        nargs="*",
        type=_known,
        metavar="NAME",
        help=f"some of {', '.join(TIMED)}, all by default; or {', '.join(STUDIES)}",
    )
    parser.add_argument(
        "--repeats", type=_positive, default=15, help="pairs of floor and program, or gradients (default 15)"
    )
    parser.add_argument("--threads", type=_positive, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--size", choices=list(SIZES), default="full", help="tiny only shows that everything runs")
    parser.add_argument("--quick", action="store_true", help="of gpu: small latents and few steps, some ten minutes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="directory of results")
    return parser


def _known(text: str) -> str:
    known = (*TIMED, *GROUPS, *STUDIES)
    if text not in known:
        raise argparse.ArgumentTypeError(f"there is no benchmark {text!r}; there are {', '.join(known)}")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
