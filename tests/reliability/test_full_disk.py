"""A disk that takes no more: one sentence, nothing lost, and the run goes on once there is room."""

import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.training.checkpoint import load_checkpoint
from difftilt.training.logs import read_rows, told_if_full
from training_runs import steady

SMALL = [
    *("testbed.hidden=32", "method.groups=2", "method.group_size=4", "training.forward_batch=8"),
    *("training.checkpoint_every=1", "training.evaluate_every=0", "training.evaluation_samples=8"),
]


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@contextmanager
def room(size: int) -> Generator[None, None, None]:
    """The system itself refuses files above so many bytes in this process, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def train(difftilt: CommandLine, output: Path, iterations: int, *more: str) -> tuple[int, str]:
    ran = difftilt(
        *("train", "mixtures/diffusion-nft", *SMALL, f"training.iterations={iterations}", "--output", output, *more)
    )
    return ran.code, ran.err


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(difftilt: CommandLine, tmp_path: Path) -> None:
    output, whole = tmp_path / "run", tmp_path / "whole"
    assert train(difftilt, output, 2)[0] == 0
    weights = (output / "checkpoints" / "step_2" / "weights.safetensors").stat().st_size
    with room(weights - 1):
        code, told = train(difftilt, output, 4, "--resume")
    assert code == 2
    assert "File too large" in told
    assert "make room, then go on with --resume" in told
    assert "Traceback" not in told
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["latest", "step_1", "step_2"]
    load_checkpoint(output / "checkpoints" / "latest")
    assert train(difftilt, output, 4, "--resume")[0] == 0
    assert train(difftilt, whole, 4)[0] == 0
    ends = [load_checkpoint(path / "checkpoints" / "step_4")[0]["weights"] for path in (output, whole)]
    assert all(ends[0][name].equal(ends[1][name]) for name in ends[1])
    rows = [steady(read_rows(path / "metrics.jsonl")) for path in (output, whole)]
    assert [row["iteration"] for row in rows[0]] == [row["iteration"] for row in rows[1]]


def test_samples_that_find_no_room_leave_no_half_of_them(difftilt: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "steered"
    with room(2000):
        ran = difftilt("steer", "mixtures/best-of-n", "steerer.particles=64", "--output", output)
    assert ran.code == 2
    assert "make room, or name another directory" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_files_of_every_kind_that_find_no_room_are_told_and_other_errors_pass(tmp_path: Path) -> None:
    said = r"takes no more \(File too large\): make room, or wait"
    with room(100), pytest.raises(UserError, match=said), told_if_full(tmp_path, "or wait"):
        (tmp_path / "metrics.jsonl").write_bytes(bytes(101))
    with pytest.raises(FileNotFoundError), told_if_full(tmp_path, "or wait"):
        (tmp_path / "none").read_bytes()
