"""Evaluating any checkpoint of a run: the numbers of that step, and clear words about a folder that is none."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.recipes.schema import load_recipe
from pipelines import stable_diffusion
from training_runs import without_pictures

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


def test_steps_are_compared_at_the_same_prompts_and_noise(
    difftilt: CommandLine, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "kept"
    for step in (0, 2):
        ran = difftilt("evaluate", finished / "checkpoints" / f"step_{step}", "--output", output, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out) == logged(finished, step)
        # the very gallery that training kept at that step, from the same noise
        mine, theirs = (load_file(folder / "samples" / f"step_{step}.safetensors") for folder in (output, finished))
        assert all(torch.equal(mine[name], theirs[name]) for name in ("media", "score"))
        assert (output / "samples" / f"step_{step}.png").is_file()
    held = json.loads((output / "evaluation.json").read_text())["steps"]
    assert held == {"0": logged(finished, 0), "2": logged(finished, 2)}
    page = package.report(output).read_text()
    assert "not all of this run could be read" not in page
    assert page.count("<figure") >= 2  # the clouds of both steps
    assert f"{logged(finished, 2)['reward']:.4g}".replace("-", "\u2212") in page
    one = tmp_path / "one"
    package.evaluate(finished / "checkpoints" / "step_1", one)
    assert "not all of this run could be read" not in package.report(one).read_text()
    ran = difftilt("evaluate", finished, "--output", output, "seed=7")
    assert ran.code == 2
    assert "holds evaluations of another recipe: name another directory\n  training.seed: 0 there, 7" in ran.err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "exists and is not empty" in difftilt("evaluate", finished, "--output", tmp_path / "full").err


def test_another_reward_leaves_nothing_of_the_old_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE | {"reward": {"name": "image", "kind": "ink"}}
    settings = {"reward.name": "sets", "reward.kind": "vendi"}
    found = load_recipe(recipe, [f"{key}={value}" for key, value in settings.items()]).resolved()["reward"]
    assert (found["name"], found["kind"]) == ("sets", "vendi")
    assert load_recipe(recipe, ["reward.kind=symmetry"]).resolved()["reward"]["kind"] == "symmetry"
    assert load_recipe(recipe, ["reward.name=image"]).resolved()["reward"]["kind"] == "ink"
    (tmp_path / "other_rewards.py").write_text("def second(samples):\n    return samples.media[:, 1]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    other = package.evaluate(finished, overrides=["reward.name=other_rewards:second"])
    assert other["reward"] != logged(finished, 2)["reward"]
    assert other["kl_reference"] == logged(finished, 2)["kl_reference"]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_pipeline_with_a_lora_is_evaluated_on_other_prompts_and_by_another_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "lora_rewards.py").write_text(
        "def bright(samples):\n    return samples.media.mean((1, 2, 3))\n\n"
        "def numbered(samples):\n    return samples.media.new_tensor(samples.metadata['number'])\n"
    )
    lines = [{"prompt": text, "number": place} for place, text in enumerate(["a dog", "two cats"], start=5)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.syspath_prepend(str(tmp_path))
    cache = str(tmp_path / "cache")
    testbed = {"name": "pipeline", "source": str(tmp_path / "pipe"), "prompts": ["a red cat"], "steps": 2}
    recipe = {
        "testbed": testbed | {"cache": cache, "guidance": 3.0},
        "reward": {"name": "lora_rewards:bright"},
        "method": {"name": "diffusion-nft", "groups": 2, "group_size": 2},
        "training": RECIPE["training"] | {"iterations": 1, "lora": {"rank": 2}, "forward_batch": 4},
    }
    with without_pictures():
        run = package.train(recipe, tmp_path / "run")
    assert package.evaluate(tmp_path / "run")["reward"] == run.after["reward"]
    new = [f"testbed.heldout_prompts={tmp_path}/new.jsonl", "reward.name=lora_rewards:numbered"]
    assert package.evaluate(tmp_path / "run", tmp_path / "kept", overrides=new)["reward"] == 5.5
    kept = json.loads((tmp_path / "kept" / "samples" / "prompts.json").read_text())
    assert (kept["prompts"], kept["heldout"]) == (["a dog", "two cats"], [True, True])
    scores = load_file(tmp_path / "kept" / "samples" / "step_1.safetensors")["score"]
    assert scores.tolist() == [5.0] * kept["size"] + [6.0] * kept["size"]
