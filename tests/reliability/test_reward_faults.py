"""Twelve faults of rewards, in training and in steering: each is named with the reward, and none passes in silence.

A reward that hangs or dies can only be told from outside, so these are served ones; in the process of the run it is the
run that hangs or dies, which ``test_kill`` is about. What a server can do wrong besides is in ``test_rewards_served``.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import difftilt
from command_line import CommandLine
from difftilt import api
from difftilt.errors import RewardError
from difftilt.rewards import Samples, as_reward
from difftilt.training.logs import read_rows
from test_rewards_served import child, stranger
from training_runs import without_pictures

MODULE = """
import torch
from difftilt.rewards import Samples

def good(samples: Samples): return samples.media[:, 0]
def raises(samples: Samples): raise ValueError("the judge is out")
def nan(samples: Samples): return torch.where(torch.arange(len(samples.media)) == 1, torch.nan, good(samples))
def inf(samples: Samples): return good(samples) - torch.where(torch.arange(len(samples.media)) == 1, torch.inf, 0.0)
def shape(samples: Samples): return good(samples)[:, None]
def length(samples: Samples): return good(samples)[1:]
def dtype(samples: Samples): return ["good"] * len(samples.media)
def constant(samples: Samples): return torch.ones(len(samples.media))
"""
TESTBED = {"name": "mixtures", "steps": 4, "hidden": 8}
FAULTS = {
    "raises": "raised ValueError on samples 0 to",
    "nan": "is not finite for 1 of",
    "inf": "is not finite for 1 of",
    "shape": "returned shape",
    "length": "return one number per sample",
    "dtype": "scores must be real numbers",
}
HANG = 0.6
"""Seconds; the client waits for a third of it."""


def training(reward: Mapping[str, Any], iterations: int = 1) -> dict[str, Any]:
    small = {"iterations": iterations, "forward_batch": 16, "evaluation_samples": 8, "evaluate_every": 0}
    method = {"name": "diffusion-nft", "groups": 2, "group_size": 4, "kl_weight": 0.1}
    return {"testbed": TESTBED, "reward": reward, "method": method, "training": small}


def steering(reward: Mapping[str, Any]) -> dict[str, Any]:
    steerer = {"name": "fk-steering", "particles": 4, "resample_at": 1, "temperature": 1.0}
    return {"testbed": TESTBED, "reward": reward, "steerer": steerer}


def served(url: str, **changes: Any) -> dict[str, Any]:
    return {"name": "remote", "url": url, "retries": 1, "backoff": 0.01, **changes}


def train(recipe: dict[str, Any], output: Path, **more: Any) -> Any:
    with without_pictures():
        return difftilt.train(recipe, output, **more)


RUNS: dict[str, Callable[[Mapping[str, Any], Path], Any]] = {
    "train": lambda reward, output: train(training(reward), output),
    "steer": lambda reward, output: difftilt.steer(steering(reward), output=output),
}


def closeness(samples: Samples) -> Tensor:
    return samples.media[:, 0]


def hangs(samples: Samples) -> Tensor:
    time.sleep(HANG)
    return closeness(samples)


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_reward_does_wrong_is_named(
    fault: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = (training if command == "train" else steering)({"name": f"wrong_rewards:{fault}"})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ran = CommandLine(monkeypatch, capsys)(command, tmp_path / "recipe.yaml", "--output", tmp_path / "out")
    assert ran.code == 3, ran.err
    assert f"reward '{fault}'" in ran.err
    assert FAULTS[fault] in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_server_that_hangs_is_named(run: Callable[[Mapping[str, Any], Path], Any], tmp_path: Path) -> None:
    with api.reward_server(as_reward(hangs)) as server:
        with pytest.raises(RewardError, match=r"'hangs'.* in 2 attempts, the last: no answer within 0\.2 s") as caught:
            run(served(server.url, timeout=HANG / 3), tmp_path / "out")
        assert server.url in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_server_that_answers_garbage_is_named(run: Callable[[Mapping[str, Any], Path], Any], tmp_path: Path) -> None:
    said = pytest.raises(RewardError, match=r"'strange'.*no archive of scores")
    with stranger(lambda request: (200, b"<html>welcome</html>")) as url, said:
        run(served(url), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        server.stop()

    with api.reward_server(as_reward(closeness)) as server, pytest.raises(RewardError, match=r"gave no answer"):
        train(training(served(server.url), iterations=3), tmp_path / "run", hooks=[stop])
    with api.reward_server(as_reward(closeness)) as server, pytest.raises(RewardError, match=r"gave no answer"):
        difftilt.steer(steering(served(server.url)), output=tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_server_that_dies_is_named(run: Callable[[Mapping[str, Any], Path], Any], tmp_path: Path) -> None:
    # one request evaluates before training, and a steerer makes one in each step: the second one kills it
    with child("lives=1") as ready:
        running = ready()
        with pytest.raises(RewardError, match=r"'faulty'.* gave no answer .*--resume"):
            run(served(running.url), tmp_path / "out")
        assert running.process.wait(10) == 9


def test_a_slow_reward_is_seen_in_the_times(tmp_path: Path) -> None:
    def slow(samples: Samples) -> Tensor:
        time.sleep(0.05)
        return closeness(samples)

    with api.reward_server(as_reward(slow)) as server:
        train(training(served(server.url)), tmp_path / "run")
        row = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
        assert row["time/reward"] + row.get("hidden_reward_seconds", 0.0) >= 0.05
        result = difftilt.steer(steering(served(server.url)))
    assert result.seconds >= 0.05 * 2


def test_a_constant_reward_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    told: dict[str, str] = {}
    for command, recipe in (("train", training), ("steer", steering)):
        for reward in ("constant", "good"):
            file = tmp_path / f"{command}.yaml"
            file.write_text(json.dumps(recipe({"name": f"wrong_rewards:{reward}"})))
            with without_pictures():
                ran = CommandLine(monkeypatch, capsys)(command, file, "--output", tmp_path / f"{command}-{reward}")
            assert ran.code == 0, ran.err
            told[f"{command} {reward}"] = ran.out
    assert "zero_std_fraction" in told["train constant"]
    assert "zero_std_fraction" not in told["train good"]
    said = "all samples of 1 prompts have the same reward: nothing was chosen there"
    assert said in told["steer constant"]
    assert said not in told["steer good"]
    assert json.loads((tmp_path / "steer-constant" / "result.json").read_text())["equal"] == 1
