"""The commands from end to end on tiny runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import difftilt as package
from command_line import CommandLine
from difftilt import leaves
from difftilt.recipes import load_recipe, packaged

RECIPE = """
testbed: {name: mixtures, modes: 4, steps: 4}
method: {name: diffusion-nft, groups: 2, group_size: 4}
training: {iterations: 2, evaluation_samples: 8, checkpoint_every: 1, forward_batch: 16}
"""


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.mark.parametrize("name", [name for name in packaged() if not name.startswith("arena/")])
def test_every_packaged_recipe_is_typed_and_survives_its_own_dump(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "resolved.yaml"
    file.write_text(recipe.to_yaml())
    again = load_recipe(file)
    assert again.resolved() == recipe.resolved()
    assert (again.testbed, again.method, again.steerer) == (recipe.testbed, recipe.method, recipe.steerer)


def test_a_testbed_and_a_method_need_no_file() -> None:
    for algorithm in ("diffusion-nft", "best-of-n"):
        assert "digits/" + algorithm in packaged() or load_recipe(f"mixtures/{algorithm}").testbed.name == "mixtures"
    values = load_recipe("mixtures/flow-grpo", ["seed=5", "iterations=7", "method.clip_range=0.5"]).resolved()
    assert values["training"]["seed"] == 5
    assert values["training"]["iterations"] == 7
    assert values["method"]["clip_range"] == 0.5
    assert load_recipe("mixtures/best-of-n", ["seed=5"]).steering.seed == 5


def test_train_resume_and_evaluate(difftilt: CommandLine, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    ran = difftilt("train", recipe, "--output", output, "--seed", 3, "--iterations", 1, "method.nft_beta=0.5")
    assert ran.code == 0, ran.err
    assert "reward" in ran.out
    stored = load_recipe(output / "config.yaml").resolved()
    assert (stored["training"]["seed"], stored["method"]["nft_beta"]) == (3, 0.5)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    other = difftilt("train", recipe, "--output", output, "--resume", "--seed", 4, "method.nft_beta=0.5")
    assert other.code == 2
    assert "training.seed: 3 there, 4 asked for" in other.err
    ran = difftilt("train", recipe, "--output", output, "--resume", "--seed", 3, "method.nft_beta=0.5")
    assert ran.code == 0, ran.err
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    ran = difftilt("evaluate", output, "--json")
    assert ran.code == 0, ran.err
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    measured = json.loads(ran.out)
    assert measured == {name[8:]: value for name, value in last.items() if name.startswith("heldout/")}


def test_evaluating_a_recipe_measures_the_pretrained_model(difftilt: CommandLine, recipe: Path) -> None:
    ran = difftilt("evaluate", recipe, "--json", "training.evaluation_samples=4")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["kl_reference"] == 0


def test_steer_writes_what_it_prints(difftilt: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "steered"
    ran = difftilt("steer", "sequences/best-of-n", "--output", output, "--json", "steerer.particles=3", "--seed", 2)
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == json.loads((output / "result.json").read_text())
    assert load_recipe(output / "config.yaml").steering.seed == 2
    tensors = load_file(output / "samples.safetensors")
    assert len(tensors["x_0"]) == 3
    (row,) = json.loads(ran.out)["prompts"]
    assert row["reward_best"] == pytest.approx(float(tensors["rewards"].max()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steered"]


def test_the_python_interface_does_the_same(tmp_path: Path) -> None:
    name, three = "sequences/best-of-n", ["steerer.particles=3"]
    first = package.steer(name, overrides=three, seed=2)
    second = package.steer(load_recipe(name), output=tmp_path / "out", seed=2, overrides=three)
    assert {**first.summary(), "seconds": 0} == {**second.summary(), "seconds": 0}
    assert package.steer(name, overrides=three, seed=3).summary() != first.summary()


@pytest.mark.parametrize("kind", [*leaves.ROOMS, "recipes"])
def test_list_prints_objects(difftilt: CommandLine, kind: str) -> None:
    rows = json.loads(difftilt("list", kind, "--json").out)
    assert rows
    for row in rows:
        assert {"name", "file", "paper", "needs", "laws"} <= row.keys()
        assert Path(row["file"]).is_file()
    assert rows[0]["name"] in difftilt("list", kind).out


def test_describe_shows_fields_and_defaults(difftilt: CommandLine) -> None:
    out = difftilt("describe", "diffusion-nft").out
    assert "2509.16117" in out
    assert "nft_beta" in out
    assert "optimizer.lr" in difftilt("describe", "training").out


def test_check_writes_its_table(difftilt: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "checks.json"
    ran = difftilt("check", "credit", "--quick", "--json", file)
    rows = json.loads(file.read_text())
    assert ran.code == 0
    assert rows
    assert set(rows[0]) == {"name", "claim", "measured", "bound", "passed", "seconds"}
    assert {row["name"] for row in rows} == {"credit"}
    assert f"{len(rows)} claims, 0 failed" in ran.out


def test_a_failed_claim_exits_with_1(difftilt: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    from difftilt.checks import credit
    from difftilt.checks.proof import Proof

    monkeypatch.setattr(credit, "PROOFS", (Proof("one is at most nothing", lambda: 1.0, at_most=0.0),))
    ran = difftilt("check", "credit")
    assert ran.code == 1
    assert "1 claims, 1 failed" in ran.out


def test_version_and_help(difftilt: CommandLine) -> None:
    assert difftilt("--version").out.strip() == f"difftilt {package.__version__}"
    out = difftilt("train", "--help").out
    assert "difftilt describe" in out
    assert "difftilt list methods" in out


def test_the_module_runs_and_the_import_is_light() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "difftilt", "list", "nothing"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ")
    code = "import time; a = time.process_time(); import difftilt; assert time.process_time() - a < 0.2"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rewards_of_a_testbed_can_be_weighed(difftilt: CommandLine) -> None:
    small = ["training.evaluation_samples=12", "reward={weights: {ink: 1.0, symmetry: 0.5}}"]
    ran = difftilt("evaluate", "digits/best-of-n", "--json", *small)
    assert ran.code == 2  # a steerer's recipe has no section training
    ran = difftilt("evaluate", "digits/diffusion-nft", "--json", *small)
    assert ran.code == 0, ran.err
    numbers = json.loads(ran.out)
    assert numbers["reward"] == pytest.approx(numbers["reward/ink"] + 0.5 * numbers["reward/symmetry"], abs=1e-5)
    ran = difftilt("evaluate", "digits/diffusion-nft", "reward={weights: {inc: 1.0}}")
    assert ran.code == 2
    assert "did you mean ink" in ran.err
