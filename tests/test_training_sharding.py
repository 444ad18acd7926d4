"""Two processes that hold the weights in parts do what one does that holds them all; a run goes on in any layout."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import two_shards
from difftilt.errors import UserError
from difftilt.training.checkpoint import load_checkpoint, newest_checkpoint
from difftilt.training.config import TrainingConfig
from difftilt.training.world import World
from two_shards import LONG, SHORT, lonely, trained, weights_of, where

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

Found = Mapping[str, Tensor]
Launch = Callable[[str], tuple[Path, Found, Found]]
LAUNCHES = MappingProxyType({"short": SHORT, "long": LONG})


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """Directory of all runs of a set of cases, and what was found alone and together; each set is run once."""
    done: dict[str, tuple[Path, Found, Found]] = {}
    begun: set[str] = set()

    def launch(name: str) -> tuple[Path, Found, Found]:
        if name not in done:
            assert name not in begun, "the launch has failed, see above"
            begun.add(name)
            directory, cases = tmp_path_factory.mktemp(name), LAUNCHES[name]
            two_shards.main(directory, 1, cases)
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*torchrun, two_shards.__file__, str(directory), "2", *cases]
            result = subprocess.run(command, capture_output=True, text=True, timeout=1500)
            assert result.returncode == 0, result.stderr[-4000:]
            alone, together = (load_file(directory / one / "found.safetensors") for one in ("alone", "together"))
            done[name] = directory, alone, together
        return done[name]

    return launch


def every_case() -> list[object]:
    """The short ones, and the long ones marked as such, each with the name of its set."""
    long = [pytest.param("long", case, marks=[pytest.mark.long, pytest.mark.timeout(2400)]) for case in LONG]
    return [*(("short", case) for case in SHORT), *long]


def parts(found: Found, case: str, prefix: str = "") -> dict[str, Tensor]:
    start = f"{case}/{prefix}"
    return {key.removeprefix(start): value for key, value in found.items() if key.startswith(start)}


def apart(one: Found, other: Found) -> float:
    """Relative distance of two sets of floating-point tensors."""
    assert one.keys() == other.keys()
    names = [name for name, value in one.items() if value.is_floating_point()]
    assert names
    mine, theirs = (torch.cat([found[name].double().flatten() for name in names]) for found in (one, other))
    return float((mine - theirs).norm() / mine.norm())


def by_role(found: Found) -> dict[str, dict[str, Tensor]]:
    roles = dict.fromkeys(key.split("/")[0] for key in found if not key.startswith("base/"))
    return {role: {key: value for key, value in found.items() if key.startswith(f"{role}/")} for role in roles}


@pytest.mark.parametrize(("name", "case"), every_case())
def test_two_processes_do_what_one_does(name: str, case: str, launched: Launch) -> None:
    _, alone, together = launched(name)
    one, two = parts(alone, lonely(case)), parts(together, case)
    for key in ("x_0", "rewards", "group", "prompt"):
        assert torch.equal(one[key], two[key]), key
    credit, other = (found["credit"][found["owner"].argsort(stable=True)] for found in (one, two))
    assert torch.equal(credit, other)
    assert credit.std() > 0
    assert apart({"": one["gradient0"]}, {"": two["gradient0"]}) < 1e-5
    assert one["gradient0"].norm() > 0
    assert torch.allclose(one["grad_norms"], two["grad_norms"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "case"), every_case())
def test_the_weights_of_every_role_agree(name: str, case: str, launched: Launch) -> None:
    _, alone, together = launched(name)
    one, two = (by_role(parts(found, key, "weights/")) for found, key in ((alone, lonely(case)), (together, case)))
    assert one.keys() == two.keys() >= {"current", "ema"}
    for role in one:
        assert apart(one[role], two[role]) < 1e-5, role
    renamed = {key.replace("ema/", "current/"): value for key, value in two["ema"].items()}
    assert apart(two["current"], renamed) > 1e-4  # the averaged weights lag behind


@pytest.mark.parametrize(("name", "case"), every_case())
def test_a_run_of_one_process_goes_on_in_two(name: str, case: str, launched: Launch) -> None:
    _, alone, together = launched(name)
    one, two = (
        by_role(parts(found, key, "after/weights/")) for found, key in ((alone, lonely(case)), (together, case))
    )
    before = by_role(parts(alone, lonely(case), "weights/"))
    for role in one:
        assert apart(one[role], two[role]) < 1e-5, role
    assert apart(before["current"], one["current"]) > 1e-4


@pytest.mark.parametrize(("name", "case"), every_case())
def test_a_run_of_two_processes_goes_on_in_one(name: str, case: str, launched: Launch, tmp_path: Path) -> None:
    directory, alone, _ = launched(name)
    shutil.copytree(where(directory / "together", case), tmp_path / "run", symlinks=True)
    result = trained(lonely(case), 3, tmp_path / "run", World(), resume=True)
    one = by_role(parts(alone, lonely(case), "after/weights/"))
    two = by_role({key.removeprefix("weights/"): value for key, value in weights_of(result).items()})
    for role in one:
        assert apart(one[role], two[role]) < 1e-5, role


@pytest.mark.parametrize(("name", "case"), every_case())
def test_a_checkpoint_does_not_show_how_weights_were_held(name: str, case: str, launched: Launch) -> None:
    directory, _, _ = launched(name)
    kinds: list[dict[str, dict[str, tuple[object, object]]]] = []
    for run in (where(directory / "alone", lonely(case)), where(directory / "together", case)):
        newest = newest_checkpoint(run / "checkpoints")
        assert newest is not None
        tensors, _ = load_checkpoint(newest)
        kinds.append({stem: {key: (v.shape, v.dtype) for key, v in one.items()} for stem, one in tensors.items()})
    assert kinds[0] == kinds[1]
    assert kinds[0].keys() == {"weights", "method", "reward", "random", "optimizer_current"}


def test_a_process_without_rows_calls_the_network_all_the_same(launched: Launch) -> None:
    _, _, together = launched("short")
    idle = together["dit/lopsided/full/all/idle"].tolist()
    assert idle[0] == 0  # the rows of all updates are its own
    assert idle[1] >= 4  # two updates in each of two iterations


def test_only_weights_in_parts_can_rest_elsewhere() -> None:
    with pytest.raises(ValueError, match="set sharding to full or hybrid"):
        TrainingConfig(offload_weights=True)


def test_a_machine_has_as_many_processes_as_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from difftilt.models.sharding import Sharding

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="6 processes do not make whole machines of 4"):
        Sharding.among(6, "cpu", hybrid=True)
