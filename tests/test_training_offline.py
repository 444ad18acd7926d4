"""Data sets on disk: what is read is what was drawn, an interruption loses nothing, and strangers are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

import difftilt
from command_line import CommandLine
from difftilt.errors import RewardError, UserError
from difftilt.models.fingerprint import fingerprint
from difftilt.process.grid import uniform_grid
from difftilt.recipes import load_recipe
from difftilt.recipes.building import build_task
from difftilt.rewards import Corrected, as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.solvers import Heun
from difftilt.training.protocol import Task
from difftilt.training.stored import load_data
from training_runs import without_pictures

RECIPE: dict[str, Any] = {
    "testbed": {"name": "mixtures", "classes": 4, "steps": 3, "hidden": 8},
    "method": {"name": "gdro", "groups": 2, "group_size": 3},
    "training": {"iterations": 1, "evaluation_samples": 8, "evaluate_every": 0, "forward_batch": 16},
}
SIZE: dict[str, Any] = {"groups": 9, "group_size": 3}


def recipe(**testbed: Any) -> dict[str, Any]:
    return {**RECIPE, "testbed": {**RECIPE["testbed"], **testbed}}


def task(**testbed: Any) -> Task:
    values = recipe(**testbed)
    return build_task(load_recipe({**values, "method": {**values["method"], "collect": 1}}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offline") / "data"
    difftilt.collect(RECIPE, directory, **SIZE)
    return directory


def test_what_is_read_has_the_latents_rewards_and_conditions_of_its_prompts(made: Path) -> None:
    on = task()
    data = load_data(made, on)
    assert data.x_0 is not None
    assert data.rewards is not None
    assert data.group.tolist() == torch.arange(9).repeat_interleave(3).tolist()
    # every training prompt has three groups, and never the held-out one
    assert torch.bincount(data.prompt).tolist() == [9, 9, 9]
    assert torch.equal(data.condition, on.model.encode([on.prompts[int(place)] for place in data.prompt]))
    texts = [on.prompts[int(place)] for place in data.prompt]
    again = on.reward.score(Samples(on.model.decode(data.x_0), texts, texts, data.group))
    assert torch.allclose(again, data.rewards)
    assert torch.equal(data.components["distance"], data.rewards)
    assert sorted(path.name for path in made.iterdir()) == ["data.safetensors", "manifest.json"]


def test_the_manifest_says_what_was_done(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["ledger"] == {"nfe": 81, "reward_calls": 27, "gradient_passes": 0, "auxiliary_calls": 0}
    assert manifest["prompts"] == ["class 0", "class 1", "class 2"]
    assert (manifest["reward"], manifest["shape"], manifest["seed"]) == ("distance", [2], 0)
    assert (manifest["groups"], manifest["group_size"], manifest["equal_groups"]) == (9, 3, 0)
    assert manifest["repeatable"]


def test_data_on_disk_train_as_data_drawn_by_the_method(made: Path, tmp_path: Path) -> None:
    def weights(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
        values = {**RECIPE, **changes}
        difftilt.train(values, directory)
        return load_file(directory / "checkpoints" / "latest" / "weights.safetensors")

    with without_pictures():
        named = weights(tmp_path / "named", data=str(made))
        drawn = weights(tmp_path / "drawn", method={**RECIPE["method"], "collect": 9})
    assert named.keys() == drawn.keys()
    assert all(torch.equal(named[key], drawn[key]) for key in named)
    assert any(not torch.equal(named[k], named[k.replace("current/", "reference/")]) for k in named)


class StoppedError(Exception):
    """A kill between two parts."""


def test_an_interrupted_collection_goes_on_and_ends_in_the_same_bits(made: Path, tmp_path: Path) -> None:
    directory, told = tmp_path / "data", list[str]()

    def stop(text: str) -> None:
        told.append(text)
        raise StoppedError

    with patch("difftilt.recipes.collecting.PART", 6):
        with pytest.raises(StoppedError):
            difftilt.collect(RECIPE, directory, progress=stop, **SIZE)
        assert told == ["2 of 9 groups"]
        (part,) = (directory / "parts").iterdir()
        with pytest.raises(UserError, match="add --resume"):
            difftilt.collect(RECIPE, directory, **SIZE)
        with pytest.raises(UserError, match="seed: 0 there, 1 asked for"):
            difftilt.collect(RECIPE, directory, resume=True, seed=1, **SIZE)
        with pytest.raises(UserError, match="finish one that was interrupted with --resume"):
            load_data(directory, task())
        written = part.stat().st_mtime_ns
        with patch("difftilt.recipes.collecting._tidy"):
            difftilt.collect(RECIPE, directory, resume=True, **SIZE)
        assert part.stat().st_mtime_ns == written
        difftilt.collect(RECIPE, directory, resume=True, **SIZE)  # removes what a kill at the very end has left
    for name in ("data.safetensors", "manifest.json"):
        assert (directory / name).read_bytes() == (made / name).read_bytes()
    assert len(list(directory.iterdir())) == 2


def test_a_damaged_part_is_drawn_again(made: Path, tmp_path: Path) -> None:
    directory = tmp_path / "data"
    with patch("difftilt.recipes.collecting.PART", 6), patch("difftilt.recipes.collecting._finish"):
        difftilt.collect(RECIPE, directory, **SIZE)
    part = directory / "parts" / "00001.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with patch("difftilt.recipes.collecting.PART", 6):
        difftilt.collect(RECIPE, directory, resume=True, **SIZE)
    assert (directory / "data.safetensors").read_bytes() == (made / "data.safetensors").read_bytes()


def test_a_reward_that_fails_loses_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = list[int]()

    def failing(samples: Samples) -> torch.Tensor:
        calls.append(len(samples.media))
        if len(calls) == 2:
            raise RuntimeError("out of order")
        return samples.media[:, 0]

    monkeypatch.setattr("training_runs.failing", failing, raising=False)
    values = {**RECIPE, "reward": {"name": "training_runs:failing"}}
    with patch("difftilt.recipes.collecting.PART", 6):
        with pytest.raises(RewardError, match="out of order"):
            difftilt.collect(values, tmp_path / "data", **SIZE)
        assert len(list((tmp_path / "data" / "parts").iterdir())) == 1
        manifest = difftilt.collect(values, tmp_path / "data", resume=True, **SIZE)
    assert manifest.ledger["reward_calls"] == 27


@pytest.mark.parametrize(
    ("testbed", "message"),
    [
        ({"seed": 1}, "other weights"),
        ({"dimension": 3}, "shape"),
        ({"steps": 4}, "drawn in 3 steps, the task's sampler has 4"),
        ({"shift": 2.0}, "at other times"),
        ({"process": "vp"}, "drawn under RectifiedFlow .*, the task's is VariancePreserving"),
        ({"reward": "linear"}, "'distance', the task's reward is 'linear'"),
        ({"centre": [0.0, 0.0]}, "configured differently"),
        ({"classes": 3}, "'class 2'"),
    ],
)
def test_data_of_another_task_are_refused(testbed: dict[str, Any], message: str, made: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_data(made, task(**testbed))


@pytest.mark.filterwarnings("ignore:data .* are of version [12]")
def test_data_sets_of_versions_before_are_read_and_refused_as_they_were(made: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "data.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    changed(
        tmp_path, lambda values: values.update(version=1, drawn=None, weights=fingerprint(task().model.network, None))
    )
    with pytest.warns(UserWarning, match=r"version 1, which does not say by which process.*was not checked"):
        load_data(tmp_path, task())
    with pytest.raises(UserError, match="other weights"):
        load_data(tmp_path, task(seed=1))
    # no tensor of this model is large: only where fewer values are read do the two kinds of hash differ
    with patch("difftilt.training.stored.READ", 3):
        load_data(tmp_path, task())
        changed(tmp_path, lambda values: values.update(version=2))
        with pytest.raises(UserError, match="other weights"):
            load_data(tmp_path, task())
        changed(tmp_path, lambda values: values.update(weights=fingerprint(task().model.network, 3)))
        load_data(tmp_path, task())


def test_data_of_another_guidance_are_refused_and_the_seed_does_not_matter(made: Path, tmp_path: Path) -> None:
    on = task()
    for name in ("manifest.json", "data.safetensors"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    changed(tmp_path, lambda values: values.update(seed=9, testbed={}))
    load_data(tmp_path, on)
    guided = replace(on, sampler=replace(on.sampler, guidance=2.0, grid=uniform_grid(4)))
    with pytest.raises(UserError, match=r"in 3 steps.*has 4\n.*with guidance 1, the task has 2"):
        load_data(tmp_path, guided)


def test_data_that_were_drawn_otherwise_are_refused(made: Path) -> None:
    on = task()

    def other(**changes: Any) -> Task:
        return replace(on, model=replace(on.model, **changes))

    with pytest.raises(UserError, match="prompts were encoded otherwise"):
        load_data(made, other(encode=lambda texts: on.model.encode([on.prompts[1] for _ in texts])))
    with pytest.raises(UserError, match="was read as velocity, the task's as epsilon"):
        load_data(made, other(output="epsilon"))
    heun = replace(on, sampler=replace(on.sampler, solver=Heun()))
    with pytest.raises(UserError, match=r"drawn by EulerSolver\(\), the task's sampler is Heun\(\)"):
        load_data(made, heun)
    with pytest.raises(UserError, match="the task's sampler is FlowSDE"):
        load_data(made, replace(on, sampler=replace(on.sampler, solver=None)))


@pytest.mark.parametrize("name", ["crd", "dragon", "prdp", "flow-grpo"])
def test_methods_that_read_no_data_refuse_them(name: str, made: Path, tmp_path: Path) -> None:
    values = {**RECIPE, "method": {"name": name}, "data": str(made)}
    with pytest.raises(UserError, match=f"data: {name} draws its own samples"):
        difftilt.train(values, tmp_path / "run")


def test_steps_of_groups_that_are_drawn_already_are_refused(made: Path, tmp_path: Path) -> None:
    values = {**RECIPE, "method": {**RECIPE["method"], "steps": 5}, "data": str(made)}
    with pytest.raises(UserError, match=r"method\.steps = 5 says how groups are drawn"):
        difftilt.train(values, tmp_path / "run")


@pytest.mark.parametrize("killed_at", ["plan.json", "parts"])
def test_a_kill_at_the_very_start_can_be_gone_on_with(killed_at: str, made: Path, tmp_path: Path) -> None:
    directory, replaced, make = tmp_path / "data", Path.replace, Path.mkdir

    def kill_replace(path: Path, target: Path) -> Path:
        if Path(target).name == killed_at:
            raise StoppedError
        return replaced(path, target)

    def kill_mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.name == killed_at:
            raise StoppedError
        make(path, *args, **kwargs)

    with (
        patch.object(Path, "replace", kill_replace),
        patch.object(Path, "mkdir", kill_mkdir),
        pytest.raises(StoppedError),
    ):
        difftilt.collect(RECIPE, directory, **SIZE)
    (left,) = directory.iterdir()
    if killed_at == "parts":
        with pytest.raises(UserError, match="add --resume"):
            difftilt.collect(RECIPE, directory, **SIZE)
    else:
        assert left.name.startswith(".plan.json.")
        with pytest.raises(UserError, match="leave out --resume"):
            difftilt.collect(RECIPE, directory, resume=True, **SIZE)
    difftilt.collect(RECIPE, directory, resume=killed_at == "parts", **SIZE)
    assert sorted(path.name for path in directory.iterdir()) == ["data.safetensors", "manifest.json"]
    assert (directory / "data.safetensors").read_bytes() == (made / "data.safetensors").read_bytes()


def test_a_reward_that_never_repeats_itself_is_not_scored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        "training_runs.noisy", lambda samples: torch.rand(len(samples.media), generator=generator), raising=False
    )
    values = {**RECIPE, "reward": {"name": "training_runs:noisy"}}
    assert not difftilt.collect(values, tmp_path / "data", **SIZE).repeatable
    assert build_task(load_recipe({**values, "data": str(tmp_path / "data")})).data is not None


def changed(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((directory / "manifest.json").read_text())
    change(values)
    (directory / "manifest.json").write_text(json.dumps(values))


def test_damage_is_told_with_the_file_and_the_remedy(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    copy.mkdir()
    with pytest.raises(UserError, match="is no data set"):
        load_data(copy, task())
    for name in ("manifest.json", "data.safetensors"):
        (copy / name).write_bytes((made / name).read_bytes())
    content = bytearray((copy / "data.safetensors").read_bytes())
    content[-3] ^= 1
    (copy / "data.safetensors").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"data\.safetensors is damaged.*collect the data again"):
        load_data(copy, task())
    (copy / "data.safetensors").unlink()
    with pytest.raises(UserError, match="is missing"):
        load_data(copy, task())
    changed(copy, lambda values: values.pop("shape"))
    with pytest.raises(UserError, match="shape"):
        load_data(copy, task())
    changed(copy, lambda values: values.update(version=7))
    with pytest.raises(UserError, match="version"):
        load_data(copy, task())
    (copy / "manifest.json").write_text("[")
    with pytest.raises(UserError, match="JSON"):
        load_data(copy, task())


def test_a_method_without_data_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gdro needs offline data.*method\.collect"):
        difftilt.train(RECIPE, tmp_path / "run")
    with pytest.raises(UserError, match="is no data set"):
        difftilt.train({**RECIPE, "data": str(tmp_path / "nothing")}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_key_data_is_typed_and_survives_a_dump(tmp_path: Path) -> None:
    named = load_recipe({**RECIPE, "data": "somewhere"})
    (tmp_path / "recipe.yaml").write_text(named.to_yaml())
    assert load_recipe(tmp_path / "recipe.yaml").data == "somewhere"
    with pytest.raises(UserError, match="directory of a data set"):
        load_recipe({**RECIPE, "data": 3})
    steered = {"testbed": {"name": "mixtures"}, "steerer": {"name": "best-of-n"}, "data": "somewhere"}
    with pytest.raises(UserError, match="without a section 'method'"):
        load_recipe(steered)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = CommandLine(monkeypatch, capsys)
    output = tmp_path / "data"
    words = ["collect", "mixtures/best-of-n", "--output", output, "--groups", 4, "--seed", 3, "testbed.steps=2"]
    ran = run(*words, "--group-size", 2)
    assert ran.code == 0, ran.err
    assert "4 groups of 2" in ran.out
    assert "16 network evaluations, 8 reward calls" in ran.out
    assert "4 of 4 groups" in ran.err
    assert run(*words).code == 2
    assert run("collect", "mixtures/gdro", "--output", tmp_path / "ones", "--group-size", 1).code == 2
    assert not (tmp_path / "ones").exists()


def test_groups_of_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be ranked"):
        difftilt.collect(RECIPE, tmp_path / "data", groups=4, group_size=1)


def test_equal_groups_are_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training_runs.sign", lambda samples: (samples.media[:, 0] > 0).float(), raising=False)
    told = list[str]()
    values = {**RECIPE, "reward": {"name": "training_runs:sign"}}
    made = difftilt.collect(values, tmp_path / "data", groups=12, group_size=2, progress=told.append)
    assert 0 < made.equal_groups < 12
    assert [text for text in told if "equal rewards" in text] == [
        f"{made.equal_groups} of 12 groups have equal rewards: training leaves them out"
    ]


def test_the_corrected_score_discounts_what_costs_quality() -> None:
    reward = as_reward(lambda samples: samples.media[:, 0], "one")
    quality = as_reward(lambda samples: samples.media[:, 1], "two")
    samples = Samples(torch.tensor([[0.5, 4.0], [1.0, 2.0], [1.0, 3.0]]), [""] * 3, [""] * 3, torch.zeros(3).long())
    assert Corrected(reward, quality).score(samples).tolist() == pytest.approx([0.7, -0.8, 0.2])
