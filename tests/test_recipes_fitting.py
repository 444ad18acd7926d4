"""What a steerer learns is fitted by one command, kept whole or not at all, and used by another."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.recipes import load_recipe
from difftilt.recipes.fitting import FITTED

TINY = [
    *("steerer.images=12", "steerer.validation_images=4", "steerer.epochs=1", "steerer.warm_up_epochs=1"),
    *("testbed.steps=8", "steerer.particles=8", "steerer.hidden=4", "steering.forward_batch=16"),
]


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_a_fit_is_kept_and_steering_reads_it_in_place_of_a_new_one(difftilt: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "fit"
    ran = difftilt("train", "mixtures/ttsnap", "--output", output, "--seed", 3, *TINY)
    assert ran.code == 0, ran.err
    assert "tau_plain/step_4" in ran.out
    assert f"steering.fitted={output}" in ran.out
    assert sorted(path.name for path in output.iterdir()) == ["config.yaml", FITTED, "result.json"]
    assert load_recipe(output / "config.yaml").steering.seed == 3
    result = json.loads((output / "result.json").read_text())
    assert set(result) == {"metrics", "ledger", "seconds"}
    assert result["ledger"]["nfe"] == 8 * (12 + 4)

    search = ["steer", "mixtures/ttsnap", "--json", *TINY]
    ran = difftilt(*search, f"steering.fitted={output}")
    assert ran.code == 0, ran.err
    known = json.loads(ran.out)["ledger"]["nfe"]
    ran = difftilt(*search)
    assert json.loads(ran.out)["ledger"]["nfe"] == known + 8 * (12 + 4)


def test_the_python_call_returns_what_it_writes(tmp_path: Path) -> None:
    result = package.fit("mixtures/ttsnap", tmp_path / "fit", overrides=TINY)
    stored = load_file(tmp_path / "fit" / FITTED)
    assert stored.keys() == result.state.keys()
    assert all(torch.equal(stored[name], value) for name, value in result.state.items())
    assert json.loads((tmp_path / "fit" / "result.json").read_text())["metrics"] == dict(result.metrics)
    again = package.fit("mixtures/ttsnap", overrides=TINY)
    assert all(torch.equal(again.state[name], value) for name, value in result.state.items())


def test_a_learned_value_of_another_steerer_is_kept_in_the_same_way(tmp_path: Path) -> None:
    learned = ["steerer.value=learned", "steerer.fit_samples=8", "steerer.fit_updates=2", "steerer.fit_batch=4"]
    learned += ["testbed.steps=4", "steerer.particles=2", "steerer.children=2"]
    result = package.fit("mixtures/svdd", tmp_path / "fit", overrides=learned)
    assert result.ledger.nfe == 8 * 4
    steered = package.steer("mixtures/svdd", overrides=[*learned, f"steering.fitted={tmp_path / 'fit'}"]).steered
    again = package.steer("mixtures/svdd", overrides=learned).steered
    assert again.ledger.nfe == steered.ledger.nfe + 8 * 4
    with pytest.raises(UserError, match="fitted"):
        package.steer("mixtures/ttsnap", overrides=[*TINY, f"steering.fitted={tmp_path / 'fit'}"])


def test_what_a_user_can_get_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="best-of-n learns nothing before it steers: use `difftilt steer`"):
        package.fit("mixtures/best-of-n", tmp_path / "fit")
    with pytest.raises(UserError, match="use `difftilt train`"):
        package.fit("mixtures/flow-grpo", tmp_path / "fit")
    with pytest.raises(UserError, match=r"or difftilt\.fit"):
        package.train("mixtures/ttsnap", tmp_path / "fit")
    with pytest.raises(UserError, match="BestOfN learns nothing"):
        package.steer("mixtures/best-of-n", overrides=[f"steering.fitted={tmp_path}"])
    with pytest.raises(UserError, match=rf"there is no {FITTED} in it; `difftilt train` makes it"):
        package.steer("mixtures/ttsnap", overrides=[f"steering.fitted={tmp_path}"])
    (tmp_path / FITTED).write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        package.steer("mixtures/ttsnap", overrides=[f"steering.fitted={tmp_path}"])
    with pytest.raises(UserError, match="exists and is not empty"):
        package.fit("mixtures/ttsnap", tmp_path, overrides=TINY)
    with pytest.raises(UserError, match="what a steerer has learned, and no samples"):
        package.report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FITTED]


def test_a_fit_has_no_checkpoints(difftilt: CommandLine, tmp_path: Path) -> None:
    ran = difftilt("train", "mixtures/ttsnap", "--output", tmp_path / "fit", "--resume")
    assert ran.code == 2
    assert "leave out --resume" in ran.err
