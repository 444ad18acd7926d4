"""What a steerer learns is fitted by one command, kept whole or not at all, and used by another."""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.recipes import load_recipe
from difftilt.recipes.fitting import FITTED
from difftilt.recipes.origin import PREFIX, SAMPLES, check_origin, origin_of
from difftilt.rewards import FunctionReward, WeightedSum
from difftilt.sampling.noise import Noise
from difftilt.steering.svdd import SVDD, SVDDConfig
from difftilt.steering.ttsnap import TTSnap, TTSnapConfig
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.protocol import Task

TINY = [
    *("steerer.images=12", "steerer.validation_images=4", "steerer.epochs=1", "steerer.warm_up_epochs=1"),
    *("testbed.steps=8", "steerer.particles=8", "steerer.hidden=4", "steering.forward_batch=16"),
]

LEARNED = [
    *("steerer.value=learned", "steerer.fit_samples=8", "steerer.fit_updates=2", "steerer.fit_batch=4"),
    *("testbed.steps=4", "steerer.particles=2", "steerer.children=2"),
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
    assert result["ledger"]["nfe"] == 8 * (12 + 4 + SAMPLES)

    search = ["steer", "mixtures/ttsnap", "--json", *TINY]
    ran = difftilt(*search, f"steering.fitted={output}")
    assert ran.code == 0, ran.err
    known = json.loads(ran.out)["ledger"]["nfe"]
    ran = difftilt(*search)
    assert json.loads(ran.out)["ledger"]["nfe"] == known + 8 * (12 + 4)


def test_the_python_call_returns_what_it_writes(tmp_path: Path) -> None:
    result = package.fit("mixtures/ttsnap", tmp_path / "fit", overrides=TINY)
    stored = load_file(tmp_path / "fit" / FITTED)
    assert {name for name in stored if not name.startswith(PREFIX)} == result.state.keys()
    assert all(torch.equal(stored[name], value) for name, value in result.state.items())
    assert json.loads((tmp_path / "fit" / "result.json").read_text())["metrics"] == dict(result.metrics)
    again = package.fit("mixtures/ttsnap", overrides=TINY)
    assert all(torch.equal(again.state[name], value) for name, value in result.state.items())


def test_a_learned_value_of_another_steerer_is_kept_in_the_same_way(tmp_path: Path) -> None:
    result = package.fit("mixtures/svdd", tmp_path / "fit", overrides=LEARNED)
    assert result.ledger.nfe == (8 + SAMPLES) * 4
    steered = package.steer("mixtures/svdd", overrides=[*LEARNED, f"steering.fitted={tmp_path / 'fit'}"]).steered
    again = package.steer("mixtures/svdd", overrides=LEARNED).steered
    assert again.ledger.nfe == steered.ledger.nfe + 8 * 4
    with pytest.raises(UserError, match="fitted"):
        package.steer("mixtures/ttsnap", overrides=[*TINY, f"steering.fitted={tmp_path / 'fit'}"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steerer.temperature=0.3", r"temperature 0\.1 \(here 0\.3\)"),
        ("steerer.regression=mean", r"regression stationary \(here mean\)"),
        ("testbed.centre=[0.0,1.0]", "a reward 'distance' that scores the same samples otherwise"),
        ("testbed.reward=linear", r"the reward 'distance' \(here 'linear'\)"),
        ("testbed.std=0.2", "another model"),
    ],
)
def test_a_fit_for_another_model_reward_or_temperature_is_refused(tmp_path: Path, change: str, said: str) -> None:
    before = [*LEARNED, "steerer.temperature=0.1", "testbed.reward=distance", "testbed.centre=[2.0,0.0]"]
    package.fit("mixtures/svdd", tmp_path / "fit", overrides=before)
    kept = f"steering.fitted={tmp_path / 'fit'}"
    package.steer("mixtures/svdd", overrides=[*before, "steerer.children=3", kept])
    with pytest.raises(UserError, match=rf"^steering.fitted = .*fit was learned for {said}: fit the steerer again"):
        package.steer("mixtures/svdd", overrides=[*before, change, kept])


def test_pruning_weights_belong_to_the_parts_of_a_sum(tmp_path: Path) -> None:
    """By ranks only the sign of a weight counts, and the parts are learned one by one; by the total it is another."""
    task = Mixtures(Config(steps=8)).task()
    parts = {"x": FunctionReward("x", lambda s: s.media[:, 0]), "y": FunctionReward("y", lambda s: s.media[:, 1])}
    settings = {"particles": 4, "images": 12, "validation_images": 4, "warm_up_epochs": 1, "hidden": 4}

    def origin(fusion: str, weights: dict[str, float]) -> tuple[TTSnap, Task]:
        steerer = TTSnap(TTSnapConfig.model_validate({**settings, "fusion": fusion}))
        return steerer, replace(task, reward=WeightedSum(parts, weights))

    for fusion, refused in (("ranks", False), ("total", True)):
        steerer, one = origin(fusion, {"x": 1.0, "y": 1.0})
        found = origin_of(steerer, one, denoiser(one.model), one.reward, ["", ""], Noise(0))
        check_origin("x", found, steerer, one, one.reward)
        other = origin(fusion, {"x": 1.0, "y": 3.0})[1]
        with pytest.raises(UserError, match="scores the same samples otherwise") if refused else nullcontext():
            check_origin("x", found, steerer, other, other.reward)


def test_a_reward_that_does_not_repeat_itself_is_known_by_name_alone() -> None:
    task, calls = Mixtures(Config(steps=4)).task(), count()
    steerer = SVDD(SVDDConfig(value="learned", temperature=1.0))
    task = replace(task, reward=FunctionReward("moody", lambda s: s.media[:, 0] + next(calls)))
    found = origin_of(steerer, task, denoiser(task.model), task.reward, [""], Noise(0))
    assert found.rewards == {}
    check_origin("x", found, steerer, task, task.reward)


def test_a_file_without_an_origin_is_refused(tmp_path: Path) -> None:
    package.fit("mixtures/svdd", tmp_path / "fit", overrides=LEARNED)
    save_file({"grid": torch.zeros(5)}, tmp_path / "fit" / FITTED)
    with pytest.raises(UserError, match=r"does not say what it was learned from: fit .* `difftilt train`"):
        package.steer("mixtures/svdd", overrides=[*LEARNED, f"steering.fitted={tmp_path / 'fit'}"])


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
