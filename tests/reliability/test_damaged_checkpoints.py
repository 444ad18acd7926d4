"""Checkpoints that were damaged, cut short or come from elsewhere: resuming and evaluating refuse them in words.

Every file of a checkpoint is changed at random places; ``make soak`` does so more often (DIFFTILT_DAMAGES=200).
"""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

import difftilt
from command_line import CommandLine
from difftilt.training.checkpoint import newest_checkpoint
from training_runs import without_pictures

DAMAGES = int(os.environ.get("DIFFTILT_DAMAGES", "8"))
SETTINGS = [
    *("testbed.steps=2", "method.groups=2", "method.group_size=2", "training.forward_batch=16"),
    *("training.evaluate_every=0", "training.evaluation_samples=8", "training.checkpoint_every=1"),
]


def trained(folder: Path, recipe: str = "mixtures/diffusion-nft", *more: str) -> Path:
    with without_pictures():
        difftilt.train(recipe, folder, overrides=[*SETTINGS, "training.iterations=2", "testbed.hidden=8", *more])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def difftilt_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def newest(run: Path) -> Path:
    found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    return found


def refused(cli: CommandLine, run: Path, *words: str) -> None:
    """Neither evaluating nor resuming takes it, and neither changes anything."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    resume = ("train", run / "config.yaml", "training.iterations=3", "--output", run, "--resume")
    with without_pictures():
        answers = [cli("evaluate", run), cli(*resume)]
    for ran in answers:
        assert ran.code == 2, ran.err
        assert "Traceback" not in ran.err
        assert all(word in ran.err for word in words), ran.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def damaged(content: bytes, draws: random.Random) -> bytes:
    """Cut short, one bit flipped, a piece lost, or something put in."""
    place = draws.randrange(len(content))
    kind = draws.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << draws.randrange(8))]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + content[place + draws.randrange(1, 9) :]
    return content[:place] + b"\x00\xff" + content[place:]


def test_no_damage_to_any_file_is_taken_for_a_checkpoint(
    whole: Path, difftilt_cli: CommandLine, tmp_path: Path
) -> None:
    draws = random.Random(DAMAGES)
    names = sorted(path.name for path in newest(whole).iterdir())
    assert len(names) >= 3
    for count in range(DAMAGES):
        run = tmp_path / f"{count}"
        shutil.copytree(whole, run, symlinks=True)
        file = newest(run) / names[count % len(names)]
        changed = damaged(file.read_bytes(), draws)
        if file.name == "manifest.json" and same_json(changed, file.read_bytes()):
            continue  # white space between the entries says nothing
        file.write_bytes(changed)
        refused(difftilt_cli, run, newest(run).name)
        shutil.rmtree(run)


def same_json(first: bytes, second: bytes) -> bool:
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


def test_a_file_that_is_missing_or_empty_is_named(whole: Path, difftilt_cli: CommandLine, tmp_path: Path) -> None:
    for place, path in enumerate(sorted(newest(whole).iterdir())):
        for empty in (False, True):
            run = tmp_path / f"{place}{empty}"
            shutil.copytree(whole, run, symlinks=True)
            file = newest(run) / path.name
            file.write_bytes(b"") if empty else file.unlink()
            refused(difftilt_cli, run, path.name)


@pytest.mark.parametrize(
    ("recipe", "more"),
    [("mixtures/diffusion-nft", ("testbed.hidden=16",)), ("mixtures/flow-grpo", ()), ("mixtures/gardo", ())],
)
def test_the_checkpoint_of_another_run_is_refused(
    recipe: str, more: tuple[str, ...], whole: Path, difftilt_cli: CommandLine, tmp_path: Path
) -> None:
    other = trained(tmp_path / "other", recipe, *more)
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    shutil.rmtree(newest(run))
    shutil.copytree(newest(other), run / "checkpoints" / newest(whole).name)
    resume = ("train", run / "config.yaml", "training.iterations=3", "--output", run, "--resume")
    with without_pictures():
        ran = difftilt_cli(*resume)
    assert ran.code == 2, ran.err
    assert "Traceback" not in ran.err
