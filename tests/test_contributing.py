"""The examples of CONTRIBUTING.md run as they stand."""

import re
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

import difftilt
from difftilt import leaves
from difftilt.models.denoiser import denoiser
from difftilt.recipes import load_recipe
from difftilt.recipes.building import build_task

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
NAMES = {
    "WeightedRegression": "example_method",
    "Shell": "example_reward",
    "Affine": "example_model",
    "Importance": "example_steerer",
}
TESTBED = {"name": "mixtures", "modes": 4, "steps": 4}


@pytest.fixture(autouse=True)
def examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        entry = re.search(r'entry="(\w+)"', block)
        assert entry is not None
        (tmp_path / f"{NAMES[entry[1]]}.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_there_is_one_example_of_each_kind_and_its_card_can_be_read(tmp_path: Path) -> None:
    cards = {entry: leaves.read_card(tmp_path / f"{module}.py") for entry, module in NAMES.items()}
    assert all(card is not None and card.entry == entry for entry, card in cards.items())


def test_the_method_learns_with_the_reward(tmp_path: Path) -> None:
    recipe = {
        "testbed": TESTBED,
        "reward": {"name": "example_reward:Shell", "radius": 1.0},
        "method": {"name": "example_method:WeightedRegression", "groups": 4, "group_size": 16, "sharpness": 2.0},
        "training": {"iterations": 10, "evaluate_every": 0, "evaluation_samples": 64, "optimizer": {"lr": 1e-2}},
    }
    result = difftilt.train(recipe, tmp_path / "run")
    # noise is common to both evaluations, so the gain is far above its standard error
    assert result.after["reward"] > result.before["reward"] + 0.05


def test_the_steerer_weighs() -> None:
    recipe = {"testbed": TESTBED, "steerer": {"name": "example_steerer:Importance", "temperature": 0.5}}
    steered = difftilt.steer(recipe).steered
    expected = (steered.rewards.double() / 0.5).softmax(0)
    torch.testing.assert_close(steered.weight, expected)


def test_the_model_is_a_network() -> None:
    task = build_task(load_recipe({"testbed": TESTBED, "steerer": {"name": "best-of-n"}}))
    network = cast(torch.nn.Module, leaves.load("models", "example_model:Affine")(2))
    denoise = denoiser(replace(task.model, network=network))
    assert denoise(torch.zeros(3, 2), torch.full((3,), 0.5), None).x0.shape == (3, 2)
