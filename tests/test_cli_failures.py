"""What fails late leaves nothing behind, what cannot work is refused early: exit code, one message, no traceback."""

import json
from pathlib import Path

import pytest

from command_line import CommandLine

BROKEN = """
import torch
def raises(samples): raise ValueError("first line\\n" + "more\\n" * 30)
def nan(samples): return torch.full((len(samples.media),), float("nan"))
def short(samples): return torch.zeros(len(samples.media) - 1)
def square(samples): return torch.zeros(len(samples.media), 2)
def nothing(samples): return None
"""


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The present directory is the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("kind", ["raises", "nan", "short", "square", "nothing"])
def test_a_broken_reward_exits_3_and_leaves_no_directory(
    difftilt: CommandLine, at_home: None, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "broken_rewards.py").write_text(BROKEN)
    output = tmp_path / "run"
    done = difftilt(
        "train",
        "mixtures/flow-grpo",
        "--output",
        str(output),
        f"reward.name=broken_rewards:{kind}",
    )
    assert done.code == 3
    assert kind in done.err
    assert "Traceback" not in done.err
    assert len(done.err.strip().splitlines()) <= 4
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mixtures/flow-grpo", "--output", "run", "training.device=foo"], "foo"),
        (["train", "mixtures/flow-grpo", "--output", "run", "training.optimizer.betas=[2,3]"], "betas"),
        (["train", "mixtures/flow-grpo", "--output", "run", "training.forward_batch=5"], "multiple of 4"),
        (["train", "mixtures/flow-grpo", "--output", "/proc/run"], "/proc/run"),
        (["train", "mixtures/flow-grpo", "--output", "run", "reward.name=classifier"], "classifier"),
        (["steer", "mixtures/fk-steering", "--json", "steerer.value=x0_samples"], "rollout"),
        (["steer", "mixtures/fk-steering", "--json", "steering.prompts=[]"], "prompts"),
        (["check", "best-of-n", "--json", "/proc/result.json"], "/proc/result.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_what_cannot_work_exits_2_before_any_work(
    difftilt: CommandLine, at_home: None, arguments: list[str], message: str, tmp_path: Path
) -> None:
    done = difftilt(*arguments)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_blames_the_learning_rate_not_the_reward(
    difftilt: CommandLine, at_home: None, tmp_path: Path
) -> None:
    done = difftilt(
        *("train", "mixtures/flow-grpo", "--output", "run", "--iterations", "6"),
        *("training.optimizer.lr=1e30", "training.evaluation_samples=32"),
    )
    assert done.code == 4, done.err
    assert "training.optimizer.lr" in done.err


def test_an_extending_resume_updates_the_config(difftilt: CommandLine, at_home: None, tmp_path: Path) -> None:
    common = ("training.evaluation_samples=32", "training.evaluate_every=0")
    first = difftilt("train", "mixtures/flow-grpo", "--output", "run", "--iterations", "1", *common)
    assert first.code == 0, first.err
    again = difftilt(
        "train",
        "mixtures/flow-grpo",
        "--output",
        "run",
        "--iterations",
        "2",
        "--resume",
        *common,
    )
    assert again.code == 0, again.err
    assert "iterations: 2" in (tmp_path / "run" / "config.yaml").read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1]
