"""Two processes do what one does: the same samples, advantages, gradients, weights and metrics."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from difftilt.errors import UserError
from difftilt.training.logs import read_rows
from difftilt.training.world import World
from training_runs import CASES, relative, steady
from two_processes import main

Found = dict[str, Tensor]
LONG = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module", params=["none", pytest.param("full", marks=LONG)])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of the run alone and of the run in two processes, whose weights are whole or in parts."""
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    script = Path(__file__).with_name("two_processes.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(together), "2", request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280 if request.param == "none" else 1400)
    assert done.returncode == 0, done.stderr[-4000:]
    main(alone, 1, "none")
    return alone, together


@pytest.fixture(scope="module")
def found(both: tuple[Path, Path]) -> tuple[Found, Found]:
    alone, together = both
    return load_file(alone / "found.safetensors"), load_file(together / "found.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_samples_rewards_and_credit_are_equal_bit_for_bit(name: str, found: tuple[Found, Found]) -> None:
    alone, together = found
    for key in ("x_0", "rewards", "group", "prompt"):
        assert torch.equal(alone[f"{name}/{key}"], together[f"{name}/{key}"]), key
    credits: list[Tensor] = []
    for one in found:
        order = one[f"{name}/owner"].argsort(stable=True)  # the edges of one sample keep their order
        credits.append(one[f"{name}/credit"][order])
    assert torch.equal(*credits)
    assert credits[0].std() > 0


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_weights_agree(name: str, found: tuple[Found, Found]) -> None:
    alone, together = found
    assert relative(alone[f"{name}/gradient0"], together[f"{name}/gradient0"]) < 1e-5
    keys = [key for key in alone if key.startswith(f"{name}/weights/")]
    assert {key.split("/")[2] for key in keys} >= {"current", "reference", "ema"}
    for key in keys:
        if alone[key].is_floating_point():
            assert relative(alone[key].double(), together[key].double()) < 1e-5, key
    moved = [
        key
        for key in keys
        if "/current/" in key and not torch.equal(alone[key], alone[key.replace("current", "reference")])
    ]
    assert moved


@pytest.mark.parametrize("name", CASES)
def test_what_a_method_remembers_agrees(name: str, found: tuple[Found, Found]) -> None:
    alone, together = ({key: one[key].double() for key in one if key.startswith(f"{name}/state/")} for one in found)
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert torch.allclose(value, together[key], rtol=1e-4, atol=1e-6, equal_nan=True), key


@pytest.mark.parametrize("name", CASES)
def test_metrics_agree_and_one_process_writes(name: str, both: tuple[Path, Path]) -> None:
    rows = [steady(read_rows(one / name / "rank0" / "metrics.jsonl")) for one in both]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    for mine, theirs in zip(*rows, strict=True):
        first = mine["iteration"] == 0
        for key, value in mine.items():
            if key == "auxiliary_calls":
                continue  # a fit that every process repeats is counted by each
            # later iterations sample with weights that differ in the last bits
            assert theirs[key] == pytest.approx(value, rel=1e-6 if first else 1e-4, abs=1e-6), key
    assert sorted(path.name for path in (both[1] / name).iterdir()) == ["rank0"]


def test_updates_without_rows_on_one_process(found: tuple[Found, Found]) -> None:
    alone, together = found
    keys = [key for key in alone if key.startswith("uneven/")]
    for key in keys:
        one, other = alone[key].double(), together[key].double()
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7), key
    # AdamW decays every weight that it is given a gradient for: the critic's others had none in either run
    still = [key for key in keys if key.startswith("uneven/critic/")]
    same = [torch.equal(together[key], together[key.replace("critic", "reference")]) for key in still]
    assert 0 < sum(same) == len(same) - 1


def test_gather_takes_unequal_shares_of_any_dtype(found: tuple[Found, Found]) -> None:
    wanted = torch.tensor([0, 1, 2, 10, 11, 12, 13, 14])
    columns = [found[1][f"gathered/{n}"] for n in range(5)]
    expected = [wanted, wanted > 3, wanted.double(), wanted[:, None].float(), torch.arange(8)]
    assert all(torch.equal(column, want) for column, want in zip(columns, expected, strict=True))


def test_shares_are_equal_or_refused() -> None:
    shares = [World(rank, 3).share(6, "groups") for rank in range(3)]
    assert [list(share) for share in shares] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(UserError, match="groups = 4 does not divide among 3 processes: use a multiple of 3"):
        World(0, 3).share(4, "groups")
