"""Other libraries beside difftilt in one run: ``make bench-peers``, or ``python -m benchmarks.peers``.

Iterations of the libraries take turns, in processes of their own that stay alive; every ratio is of two neighbours. The
same pipeline, batch, steps, guidance, reward, optimiser and precision; nothing is downloaded.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.paired import machine, measure, quartiles
from benchmarks.peers.pipeline import SIZES, save_pipeline
from benchmarks.peers.stock import sampling
from benchmarks.peers.work import Turn, Work

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".bench" / "trl" / "bin" / "python"
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}
OWN, THEIRS = "benchmarks.peers.own_grpo", "benchmarks.peers.trl_ddpo"
GOAL = 1.5
"""Seconds of TRL over those of difftilt, per iteration."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``peers.json`` and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Other libraries beside difftilt.")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["tiny", "small"])
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "peers.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            weights = save_pipeline(SIZES[name], Path(folder) / name)
            work = Work(str(Path(folder) / name))
            training = beside(work, options.iterations) if PEER.exists() else None
            stock = measure(sampling(work, f"stock_{name}"), options.iterations)
        results.append({"size": name, "weights": weights, "training": training, "sampling": asdict(stock)})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    show(results)
    if not PEER.exists():
        sys.stderr.write(f"{PEER} is missing: `make bench-peers` makes the environment of TRL\n")
    return 0


@dataclass
class Worker:
    """A process that does one iteration whenever it is asked."""

    process: subprocess.Popen[str]

    def turn(self) -> Turn:
        """One iteration."""
        orders, answers = self._pipes()
        orders.write("go\n")
        orders.flush()
        return Turn(**json.loads(_line(answers)))

    def ready(self) -> None:
        """Wait until everything is loaded."""
        _line(self._pipes()[1])

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        return cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)


def _line(answers: IO[str]) -> str:
    line = answers.readline()
    if not line:
        raise SystemExit("a library ended before it answered: its message stands above")
    return line


@contextlib.contextmanager
def started(python: Path, module: str, work: Work) -> Generator[Worker]:
    """A worker in the environment of ``python``, which ends with the block."""
    environment = dict(os.environ) | QUIET | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [str(python), "-m", module, work.to_json()]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        worker = Worker(process)
        try:
            worker.ready()
            yield worker
        finally:
            process.terminate()


def beside(work: Work, iterations: int) -> dict[str, Any]:
    """Iterations of both in turns; the first of each warms up."""
    with started(Path(sys.executable), OWN, work) as own, started(PEER, THEIRS, work) as peer:
        turns = [_pair(own, peer, number) for number in range(iterations + 1)]
    mine, theirs = ([pair[which] for pair in turns[1:]] for which in (0, 1))
    low, middle, high = quartiles([other.wall / one.wall for one, other in zip(mine, theirs, strict=True)])
    return {
        "ratio_median": middle,
        "ratio_quartiles": (low, high),
        "cpu_ratio_median": statistics.median(b.cpu / a.cpu for a, b in zip(mine, theirs, strict=True)),
        "goal": GOAL,
        "difftilt": _numbers(mine),
        "trl": _numbers(theirs),
        "curves": {"difftilt": [one.reward for one in mine], "trl": [one.reward for one in theirs]},
    }


def _pair(own: Worker, peer: Worker, number: int) -> tuple[Turn, Turn]:
    """One iteration of each; who goes first alternates."""
    if number % 2:
        theirs = peer.turn()
        return own.turn(), theirs
    return own.turn(), peer.turn()


def _numbers(turns: Sequence[Turn]) -> dict[str, Any]:
    """Medians, and what the last iteration had come to."""
    outside = [one.wall - one.network for one in turns]
    return {
        "seconds": statistics.median(one.wall for one in turns),
        "seconds_forward": statistics.median(one.network for one in turns),
        "seconds_else": statistics.median(outside),
        "rows_without_gradient": turns[-1].passes[0],
        "rows_with_gradient": turns[-1].passes[1],
        "grown_mb": turns[-1].grown_mb,
        "reward_first": statistics.mean(one.reward for one in turns[:5]),
        "reward_last": statistics.mean(one.reward for one in turns[-5:]),
    }


def show(results: Sequence[dict[str, Any]]) -> None:
    """Two tables."""
    heads = ("weights", "library", "s per iteration", "of it forward", "rows", "MB grown", "reward")
    trained = Table(*heads, title="Training")
    heads = ("weights", "difftilt over stock pipeline", "quartiles", "largest difference of a pixel")
    sampled = Table(*heads, title="Sampling")
    for result in results:
        weights, stock = f"{result['weights']:,}", result["sampling"]
        difference = f"{stock['extra']['largest difference of a pixel']:.1e}"
        sampled.add_row(weights, f"{stock['ratio_median']:.3f}", _spread(stock), difference)
        training = result["training"]
        if training is not None:
            for library in ("trl", "difftilt"):
                trained.add_row(weights, library, *_cells(training[library]))
            trained.add_row("", f"TRL takes {training['ratio_median']:.3f} times as long ({_spread(training)})")
    console = Console(width=140)
    for table in (trained, sampled):
        console.print(table)


def _spread(result: dict[str, Any]) -> str:
    low, high = result["ratio_quartiles"]
    return f"{low:.3f} - {high:.3f}"


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    rows = f"{numbers['rows_without_gradient']} + {numbers['rows_with_gradient']}"
    reward = f"{numbers['reward_first']:.3f} -> {numbers['reward_last']:.3f}"
    seconds = (f"{numbers[name]:.3f}" for name in ("seconds", "seconds_forward"))
    return (*seconds, rows, f"{numbers['grown_mb']:.0f}", reward)


if __name__ == "__main__":
    sys.exit(main())
