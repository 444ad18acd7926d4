"""The page about scale: its recipes are typed and fit their commands, its arithmetic is right."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from difftilt.recipes.schema import load_recipe
from difftilt.training.config import GroupSampling

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = sorted((DOCS / "scale").glob("*.yaml"))
ROWS = re.findall(r"^\| (.+?) \|$", (DOCS / "scale.md").read_text(), re.M)
MODELS = {"3.5 medium": (2243171520, 14548992), "FLUX.1": (11901408320, 37355520)}
"""Weights of the transformers in their published configurations, and of adapters of rank 32 on attention."""
Bytes = Callable[[float, float, int], float]
MEMORY: dict[str, Bytes] = {
    "all, `none`": lambda p, a, n: 24 * p,
    "all, `full`": lambda p, a, n: 24 * p / n,
    "LoRA, `none`": lambda p, a, n: 2 * p + 20 * a,
    "LoRA, `full`": lambda p, a, n: 2 * p / n + 20 * a,
}
MESSAGES: dict[str, Bytes] = {
    "all, `none`, an update": lambda p, a, n: 2 * others(n) * 4 * p,
    "LoRA, `none`, an update": lambda p, a, n: 2 * others(n) * 4 * a,
    "all, `full`, a call": lambda p, a, n: others(n) * 4 * p,
    "all, `full`, a call with gradient": lambda p, a, n: 3 * others(n) * 4 * p,
    "all, `hybrid`, a call with gradient, between machines": lambda p, a, n: 2 * others(n // 8) * 4 * p / 8,
    "LoRA, `full`, a call": lambda p, a, n: others(n) * 2 * p,
    "LoRA, `full`, a call with gradient": lambda p, a, n: 2 * others(n) * 2 * p,
}


def others(n: int) -> float:
    return (n - 1) / n


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_typed_and_divides_among_the_processes_of_its_command(file: Path) -> None:
    recipe = load_recipe(file, ["training.device=cpu"])  # typing asks for the device, which is not here
    assert recipe.method is not None
    found = re.search(r"^#   (torchrun .*|)(-m )?difftilt train (\S+) --output", file.read_text(), re.M)
    assert found is not None
    assert found[3] == file.name
    counts = [re.search(rf"--{name} (\d+)", found[1]) for name in ("nnodes", "nproc-per-node")]
    machines, each = (1 if count is None else int(count[1]) for count in counts)
    config = recipe.method.config
    assert isinstance(config, GroupSampling)
    assert config.groups % (machines * each) == 0
    layout = "hybrid" if machines > 1 else "full" if each > 1 else "none"
    assert recipe.training.sharding == layout
    assert recipe.training.lora is None or layout == "none"
    assert f"scale/{file.name}" in (DOCS / "scale.md").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_the_tables_of_the_page_are_what_the_formulas_say(model: str) -> None:
    weights, adapters = MODELS[model]
    for name, formula in (MEMORY | MESSAGES).items():
        start = re.compile(rf"{re.escape(f'{model}, {name}')}(:[^|]*)? \|")
        (row,) = (row for row in ROWS if start.match(row) and row.count(" | ") == 3)
        cells = [float(cell) for cell in row.split(" | ")[1:]]
        wanted = [formula(weights, adapters, n) / 1e9 for n in (8, 64, 1024)]
        assert cells == pytest.approx(wanted, rel=6e-3), row


@pytest.mark.parametrize(("model", "calls"), [("3.5 medium", (40 + 36, 36)), ("FLUX.1", (20 + 18, 18))])
def test_an_iteration_is_the_sum_of_its_calls(model: str, calls: tuple[int, int]) -> None:
    weights, adapters = MODELS[model]
    plain, learning = calls
    for name, formula in {
        "all, `full`": lambda n: (
            plain * MESSAGES["all, `full`, a call"](weights, adapters, n)
            + learning * MESSAGES["all, `full`, a call with gradient"](weights, adapters, n)
        ),
        "LoRA, `none`": lambda n: 2 * MESSAGES["LoRA, `none`, an update"](weights, adapters, n),
    }.items():
        row = next(row for row in ROWS if row.startswith(f"{model}, {name} |") and len(row.split(" | ")) == 7)
        cells = [float(cell) for cell in row.split(" | ")[1:]]
        wanted = [formula(n) / 1e9 for n in (8, 64, 1024)]
        assert cells[::2] == pytest.approx(wanted, rel=2e-2), row
        speeds = [450, 50, 50]
        assert cells[1::2] == pytest.approx([one / speed for one, speed in zip(wanted, speeds, strict=True)], abs=0.6)
