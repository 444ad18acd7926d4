"""Kill -9 at random moments and resume: the weights end bit for bit as if nothing had happened.

Three kills per method; ``make soak`` sets DIFFTILT_KILLS=50. The runs go through the command line, in processes forked
from a server that has already imported it, so that a kill falls into the run and not into the imports.
"""

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from difftilt.training.checkpoint import load_checkpoint
from difftilt.training.logs import read_rows
from training_runs import METHODS, steady

KILLS = int(os.environ.get("DIFFTILT_KILLS", "3"))
ITERATIONS = 12
SETTINGS = [
    *("testbed.steps=4", "testbed.hidden=8", "method.groups=2", "method.group_size=8", "training.forward_batch=16"),
    *(f"training.iterations={ITERATIONS}", "training.checkpoint_every=1", "training.evaluate_every=5"),
    *("training.evaluation_samples=8", "training.optimizer.lr=0.01"),
]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("difftilt.api", "difftilt.cli", "difftilt.tables", "difftilt.testbeds.mixtures", "pytest"),
        *("difftilt.methods.policy_gradient.flow_grpo", "difftilt.methods.forward_process.diffusion_nft"),
        *("torch._dynamo", "matplotlib.backends.backend_agg"),  # what the first optimiser and the first picture import
    ]
)


def command(arguments: list[str], log: Path) -> None:
    """``difftilt`` with these arguments, in this process."""
    import torch

    from difftilt.cli import main

    torch.set_num_threads(1)
    sys.argv = ["difftilt", *arguments]
    with log.open("a") as sys.stderr, log.open("a") as sys.stdout:
        main()


def start(name: str, directory: Path, *, resume: bool) -> BaseProcess:
    more = ["--resume"] if resume else []
    arguments = ["train", f"mixtures/{name}", *SETTINGS, "--output", str(directory), *more]
    process = SERVER.Process(target=command, args=(arguments, directory.with_suffix(".log")))
    process.start()
    return process


def finish(process: BaseProcess, directory: Path) -> None:
    process.join()
    assert process.exitcode == 0, directory.with_suffix(".log").read_text()[-2000:]


def run_killed(name: str, directory: Path, delays: random.Random, longest: float, left: int) -> int:
    """One run, killed at most ``left`` times on its way to the end; returns how often it was."""
    kills = 0
    while True:
        begun = (directory / "checkpoints" / "latest").exists()
        if not begun:
            # nothing was saved yet, so there is nothing to resume
            shutil.rmtree(directory, ignore_errors=True)
        process = start(name, directory, resume=begun)
        if kills == left:
            finish(process, directory)
            return kills
        process.join(delays.uniform(0, longest))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            finish(process, directory)
            return kills


def result(directory: Path) -> tuple[bytes, list[dict[str, float]], str]:
    """Weights of all roles as written, rows without times, and the evaluation before."""
    checkpoint = directory / "checkpoints" / f"step_{ITERATIONS}"
    load_checkpoint(checkpoint)
    assert (directory / "checkpoints" / "latest").resolve() == checkpoint
    left = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert left == ["latest", f"step_{ITERATIONS - 1}", f"step_{ITERATIONS}"]
    assert json.loads((directory / "summary.json").read_text())["after"]
    rows = steady(read_rows(directory / "metrics.jsonl"))
    return (checkpoint / "weights.safetensors").read_bytes(), rows, (directory / "before.json").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_kill_and_resume_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    server = SERVER.Process(target=time.sleep, args=(0,))
    server.start()
    server.join()
    began = time.perf_counter()
    finish(start(name, tmp_path / "whole", resume=False), tmp_path / "whole")
    longest = time.perf_counter() - began
    expected = result(tmp_path / "whole")
    delays = random.Random(f"{name} {KILLS}")
    kills, runs = 0, 0
    while kills < KILLS:
        directory = tmp_path / f"killed{runs}"
        kills += run_killed(name, directory, delays, longest, KILLS - kills)
        assert result(directory) == expected
        shutil.rmtree(directory)
        runs += 1
