"""What TensorBoard and Weights & Biases are told, read back by their own readers."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from difftilt.errors import UserError
from difftilt.training.logs import read_rows
from difftilt.training.loop import train_task
from difftilt.training.trackers import tracking
from training_runs import make_config, make_method, make_task, steady, train, without_pictures

Row = Mapping[str, float]


def interrupted(directory: Path, **settings: Any) -> list[dict[str, float]]:
    """A run that dies in its fourth iteration, goes on from the checkpoint after two and ends after five."""

    def die(row: Row, verdicts: object) -> None:
        if row["iteration"] == 3:
            raise InterruptedError

    task, config = make_task(), make_config(iterations=5, **settings)
    with pytest.raises(InterruptedError):
        train_task(task, make_method("flow-grpo", task), config, directory, hooks=[die])
    task = make_task()
    train_task(task, make_method("flow-grpo", task), config, directory, resume=True)
    return read_rows(directory / "metrics.jsonl")


def expected(directory: Path, rows: list[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Step -> numbers, of a whole run."""
    before = json.loads((directory / "before.json").read_text())
    return {0: {f"heldout/{name}": value for name, value in before.items()}} | dict(enumerate(rows, start=1))


def events(directory: Path) -> Any:
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def scalars(directory: Path) -> dict[int, dict[str, float]]:
    """Step -> numbers that TensorBoard shows; a step that it shows twice is an error."""
    shown: dict[int, dict[str, float]] = {}
    found = events(directory)
    for tag in found.Tags()["scalars"]:
        for event in found.Scalars(tag):
            assert tag not in shown.setdefault(event.step, {})
            shown[event.step][tag] = event.value
    return shown


def history(directory: Path) -> list[dict[str, Any]]:
    """Rows that the files of offline runs hold, in the order in which they were written."""
    datastore = importlib.import_module("wandb.sdk.internal.datastore")
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    rows: list[dict[str, Any]] = []
    for file in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        store = datastore.DataStore()
        store.open_for_scan(str(file))
        while (data := store.scan_data()) is not None:
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        store.close()
    return rows


def same(found: Row, row: Row, equal: Callable[[float, float], bool]) -> bool:
    """Every number of the row, and nothing else but what begins with an underscore."""
    own = {name: value for name, value in found.items() if not name.startswith("_") and name != "samples"}
    return own.keys() == row.keys() and all(equal(own[name], row[name]) for name in row)


def test_tensorboard_shows_every_row_once_after_a_run_that_died_and_went_on(tmp_path: Path) -> None:
    with without_pictures():
        rows = interrupted(tmp_path / "run", track=["tensorboard"])
    shown, wanted = scalars(tmp_path / "run"), expected(tmp_path / "run", rows)
    assert sorted(shown) == sorted(wanted) == list(range(6))
    # event files hold float32
    assert all(same(shown[step], wanted[step], lambda one, other: one == np.float32(other)) for step in wanted)
    assert len([*(tmp_path / "run" / "tensorboard").iterdir()]) == 2


def test_tensorboard_shows_the_pictures(tmp_path: Path) -> None:
    train("flow-grpo", tmp_path / "run", iterations=1, track=["tensorboard"])
    found = events(tmp_path / "run").Images("samples")
    assert [image.step for image in found] == [0, 1]
    assert found[0].encoded_image_string.startswith(b"\x89PNG")


def test_wandb_is_told_every_row_once_after_a_run_that_died_and_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    with without_pictures():
        rows = interrupted(tmp_path / "run", track=["wandb"])
    found, wanted = history(tmp_path / "run"), expected(tmp_path / "run", rows)
    assert [row["_step"] for row in found] == list(range(6))
    # a row that was told before the run died is as it was then: only the clock has gone on
    told, meant = map(steady, (found, [wanted[step] for step in range(6)]))
    assert all(same(one, other, lambda one, other: one == other) for one, other in zip(told, meant, strict=True))
    files = [*(tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]
    assert len(files) == 2
    assert {file.stem for file in files} == {f"run-{json.loads((tmp_path / 'run' / 'wandb.json').read_text())['id']}"}


def test_a_tracker_that_is_new_to_a_run_is_told_of_what_was(tmp_path: Path) -> None:
    with without_pictures():
        train("flow-grpo", tmp_path / "run", iterations=2)
        train("flow-grpo", tmp_path / "run", iterations=3, resume=True, track=["tensorboard"])
    shown = scalars(tmp_path / "run")
    assert sorted(shown) == [1, 2, 3]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    with tracking(["tensorboard"], tmp_path, ()) as trackers:
        trackers.row(1, {"one": 1.0, "none": float("nan"), "much": float("inf")})
    assert scalars(tmp_path) == {1: {"one": 1.0}}


def test_a_run_without_a_directory_has_nothing_to_track() -> None:
    with pytest.raises(UserError, match=r"training\.track follows a run directory"):
        train("flow-grpo", None, track=["tensorboard"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_named_with_its_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    line = f"training.track needs '{name}', which is not installed: pip install 'difftilt[track]'"
    with pytest.raises(UserError) as raised, tracking([name], tmp_path, ()):
        pass
    assert str(raised.value) == line
    assert not any(tmp_path.iterdir())


@pytest.mark.long
def test_wandb_without_a_login_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: wandb reads its environment once."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from difftilt.errors import UserError\n"
        "from difftilt.training.trackers import tracking\n"
        "try:\n"
        "    with tracking(['wandb'], Path(sys.argv[1]), ()):\n"
        "        pass\n"
        "except UserError as error:\n"
        "    sys.stdout.write(str(error))\n"
    )
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    # a login is kept in the home directory
    env = hidden | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.startswith("training.track: Weights & Biases cannot begin")
    assert "WANDB_MODE=offline" in done.stdout
