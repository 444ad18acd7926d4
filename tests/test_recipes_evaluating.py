"""Evaluating any checkpoint of a run: the numbers of that step, and clear words about a folder that is none."""

import json
import shutil
from pathlib import Path

import pytest

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError

RECIPE = {
    "testbed": {"name": "mixtures", "modes": 4, "steps": 4, "hidden": 8},
    "method": {"name": "diffusion-nft", "groups": 2, "group_size": 4},
    "training": {
        "iterations": 2,
        "evaluation_samples": 8,
        "evaluate_every": 1,
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "forward_batch": 16,
        "optimizer": {"lr": 0.01},
    },
}


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    package.train(RECIPE, output)
    return output


def logged(run: Path, step: int) -> dict[str, float]:
    """The evaluation that training itself made after ``step`` iterations."""
    if step == 0:
        return json.loads((run / "before.json").read_text())
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[step - 1])
    return {name[8:]: value for name, value in row.items() if name.startswith("heldout/")}


def test_every_checkpoint_has_the_numbers_that_training_saw_there(difftilt: CommandLine, finished: Path) -> None:
    for name, step in (("step_0", 0), ("step_1", 1), ("step_2", 2), ("latest", 2)):
        ran = difftilt("evaluate", finished / "checkpoints" / name, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out) == logged(finished, step), name
        assert f"step {step} of {finished}" in ran.err
    assert logged(finished, 1) != logged(finished, 2)
    ran = difftilt("evaluate", finished, "--json")
    assert json.loads(ran.out) == logged(finished, 2)
    assert f"step 2 of {finished}" in ran.err


def test_a_name_relative_to_the_checkpoints(
    difftilt: CommandLine, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished / "checkpoints")
    assert json.loads(difftilt("evaluate", "step_1", "--json").out) == logged(finished, 1)


def test_folders_that_are_none_are_one_clear_error(difftilt: CommandLine, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    (run / "checkpoints" / "mine").mkdir()
    shutil.copytree(finished / "checkpoints" / "step_1", tmp_path / "step_1")
    (run / "checkpoints" / "step_2" / "weights.safetensors").write_bytes(b"damaged")
    cases = {
        run / "checkpoints" / "step_7": "has no checkpoint 'step_7'; there are: step_0, step_1, step_2",
        run / "checkpoints" / "mine": "has no checkpoint 'mine'; there are: step_0, step_1, step_2",
        run / "checkpoints" / "step_2": "weights.safetensors is damaged",
        run / "checkpoints": "RUN/checkpoints/step_N",
        run / "samples": "is no run directory (config.yaml is missing) and no checkpoint in one",
        tmp_path / "step_1": "is no run directory",
    }
    for path, words in cases.items():
        ran = difftilt("evaluate", path)
        assert ran.code == 2, path
        assert words in ran.err, ran.err
        assert len(ran.err.strip().splitlines()) <= 2, ran.err
        assert "Traceback" not in ran.err
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint to evaluate"):
        package.evaluate(run)
