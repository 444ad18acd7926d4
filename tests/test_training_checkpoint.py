"""Checkpoints: what is read is what was written, bit for bit, or an error that names the file and the remedy."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.training.checkpoint import (
    load_checkpoint,
    load_optimizer,
    newest_checkpoint,
    optimizer_tensors,
    same_bits,
    save_checkpoint,
)
from difftilt.training.logs import append_row, read_rows, truncate_rows
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.protocol import Method
from training_runs import CASES, METHODS, make_case, make_config, make_task, steady, without_pictures

STATE = {"iteration": 3, "steps": {"current": 6}}


def tensors() -> dict[str, dict[str, Tensor]]:
    """Every awkward kind: NaN, negative zero, subnormal, scalar, empty, strided, integers, half precision."""
    odd = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")])
    grid = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    return {
        "weights": {"current/a.b": odd, "current/half": odd.to(torch.bfloat16), "t": grid.T},
        "method": {},
        "optimizer_current": {"0/step": torch.tensor(4.0), "0/exp_avg": torch.zeros(0, 3)},
        "random": {"torch": torch.get_rng_state()},
    }


def save(directory: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(directory, step, tensors(), {**STATE, "iteration": step}, keep)


def test_a_round_trip_is_bit_exact(tmp_path: Path) -> None:
    read, state = load_checkpoint(save(tmp_path, 3))
    assert state == STATE
    assert read.keys() == tensors().keys()
    for stem, group in tensors().items():
        assert read[stem].keys() == group.keys()
        assert all(same_bits(read[stem][name], tensor) for name, tensor in group.items())


def test_same_bits_tells_what_equality_does_not() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.tensor(0.0))


def optimised(steps: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for _ in range(steps):
        step(network, optimizer)
    return network, optimizer


def step(network: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    network(torch.ones(5, 3)).square().sum().backward()
    optimizer.step()


def test_an_optimiser_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    network, optimizer = optimised(4)
    path = save_checkpoint(tmp_path, 1, {"optimizer": optimizer_tensors(optimizer)}, {}, 1)
    fresh, other = optimised(0)
    fresh.load_state_dict(network.state_dict())
    load_optimizer(other, load_checkpoint(path)[0]["optimizer"])
    for _ in range(3):
        step(network, optimizer)
        step(fresh, other)
    assert all(same_bits(mine, theirs) for mine, theirs in zip(network.parameters(), fresh.parameters(), strict=True))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FILES = ["weights.safetensors", "method.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_damage_is_told_with_file_and_remedy(name: str, damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    damage(path / name)
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message
    assert name in message or "manifest" in message  # a changed manifest may blame the file that it now misnames
    assert f"remove {path.resolve()}" in message


def rewrite_manifest(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    manifest = path / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))


def test_a_foreign_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return exec, ("raise SystemExit('the pickle was opened')",)

    path = save(tmp_path, 3)
    (path / "extra.pt").write_bytes(pickle.dumps(Trap()))
    load_checkpoint(path)
    import hashlib

    for name in ("weights.safetensors", "state.json"):
        (path / name).write_bytes(pickle.dumps(Trap()))
        digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
        rewrite_manifest(path, lambda hashes, name=name, digest=digest: {**hashes, name: digest})
        with pytest.raises(UserError, match=name):
            load_checkpoint(path)
        save(tmp_path, 3)


@pytest.mark.parametrize(
    "change", [lambda hashes: [], lambda hashes: {}, lambda hashes: {**hashes, "../other.safetensors": "00"}]
)
def test_a_manifest_of_another_form_is_refused(change: Callable[[dict[str, str]], object], tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (tmp_path / "other.safetensors").write_bytes(b"")
    rewrite_manifest(path, change)
    with pytest.raises(UserError, match="remove"):
        load_checkpoint(path)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_old_checkpoints_and_half_written_ones_go(tmp_path: Path) -> None:
    (tmp_path / "step_mine").mkdir()
    for count in (8, 9, 10, 11):
        (tmp_path / f".writing_{count}_77").mkdir()
        (tmp_path / ".latest_77").symlink_to("nowhere")
        save(tmp_path, count)
    assert names(tmp_path) == ["latest", "step_10", "step_11", "step_mine"]
    assert (tmp_path / "latest").resolve() == tmp_path / "step_11"
    assert newest_checkpoint(tmp_path) == tmp_path / "step_11"


def test_writing_a_checkpoint_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save_checkpoint(tmp_path, 3, {"weights": {"a": torch.ones(2)}}, {"iteration": 3}, 2)
    assert load_checkpoint(path)[0]["weights"]["a"].tolist() == [1.0, 1.0]
    assert names(tmp_path) == ["latest", "step_3"]


def test_the_newest_checkpoint_is_found_without_the_link(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    save(tmp_path, 9)
    save(tmp_path, 10)
    (tmp_path / "latest").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "step_10"


def rows(path: Path, count: int) -> None:
    for i in range(count):
        append_row(path, {"iteration": i, "reward_mean": 0.1 * i, "diversity": float("nan")})


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows(path, 5)
    whole = path.read_text().splitlines(keepends=True)
    path.write_text(path.read_text() + whole[0][:9])
    assert [row["iteration"] for row in read_rows(path)] == list(range(5))
    truncate_rows(path, 3)
    assert path.read_text() == "".join(whole[:3])
    assert names(tmp_path) == ["metrics.jsonl"]


def test_a_line_cut_short_in_the_first_iteration_does_not_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 0, "rew')
    truncate_rows(path, 0)
    rows(path, 1)
    assert [row["iteration"] for row in read_rows(path)] == [0]


def test_numbers_that_are_not_finite_are_missing_not_zero(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows(path, 1)
    assert json.loads(path.read_text()) == {"iteration": 0, "reward_mean": 0.0, "diversity": None}
    assert read_rows(path) == [{"iteration": 0, "reward_mean": 0.0}]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"reward": 1}'])
def test_metrics_that_were_changed_are_told(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows(path, 2)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match="line 3"):
        truncate_rows(path, 2)


def test_metrics_with_rows_missing_are_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows(path, 2)
    for wanted in (path, tmp_path / "gone.jsonl"):
        with pytest.raises(UserError, match="one row for each of the 3"):
            truncate_rows(wanted, 3)


@pytest.mark.parametrize("name", [name for name in CASES if name not in METHODS])
def test_a_resumed_run_of_every_method_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    def run(directory: Path, resume: bool = False) -> tuple[TrainResult, Method]:
        task = make_task()
        method, config = make_case(name, task), make_config(iterations=3, checkpoint_every=1)
        return train_task(task, method, config, directory, laws=("ratio_one",), resume=resume), method

    with without_pictures():
        whole, uninterrupted = run(tmp_path / "whole")
        # as a run is left that was ended in its third iteration
        shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_3")
        (tmp_path / "parts" / "checkpoints" / "latest").unlink()
        parts, resumed = run(tmp_path / "parts", resume=True)
    for one, other in ((whole.run.roles, parts.run.roles), (uninterrupted, resumed)):
        mine, theirs = one.state_dict(), other.state_dict()
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not same_bits(mine[key], theirs[key])] == []
    assert steady(parts.rows) == steady(whole.rows)
    moved = whole.run.roles.state_dict()
    assert any(not torch.equal(moved[key], moved[key.replace("current/", "reference/")]) for key in moved)
