"""What ``difftilt doctor`` says: the estimate of memory against what a run really holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines
from command_line import CommandLine
from difftilt import environment as machine
from difftilt.errors import UserError
from difftilt.recipes.building import build_task
from difftilt.recipes.estimating import Estimate, Line, estimate
from difftilt.recipes.schema import Recipe, load_recipe
from difftilt.training.loop import Loop, assemble
from difftilt.training.memory import bytes_of, kept_bytes, module_bytes
from difftilt.training.world import World
from difftilt.trees import leaves

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")
SMALL = ["method.groups=4", "method.group_size=8", "training.forward_batch=32"]


def shapes(*overrides: str) -> Recipe:
    return load_recipe("shapes/flow-grpo", [*SMALL, *overrides])


def loop_of(recipe: Recipe) -> Loop:
    task = build_task(recipe)
    assert recipe.method is not None
    loop = assemble(task, recipe.method.build(task), recipe.training, None, (), (), World())
    loop.run.begin(0)
    return loop


def sizes(found: Estimate) -> dict[str, int | None]:
    return {line.name: line.bytes for line in found.lines}


@pytest.mark.parametrize("overrides", [[], ["training.lora.rank=4"]])
def test_weights_gradients_and_optimiser_are_those_of_a_run(overrides: Sequence[str]) -> None:
    recipe = shapes(*overrides)
    found, loop = sizes(estimate(recipe)), loop_of(recipe)
    parameters = list(loop.run.roles.parameters("current"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    loop.updater.optimizers["current"].step()
    state = loop.updater.optimizers["current"].state
    assert found["gradients"] == bytes_of([p.grad for p in parameters if p.grad is not None])
    assert found["optimiser"] == bytes_of([value for one in state.values() for value in one.values()])
    modules = {id(module): module for role in loop.run.roles.names if (module := loop.run.roles.module(role))}
    weights = sum(size or 0 for name, size in found.items() if name.startswith("weights"))
    assert weights == sum(map(module_bytes, modules.values()))


FLAGS = [[], ["training.activation_checkpointing=true"], ["training.lora.rank=4"], ["training.precision=bf16"]]


@pytest.mark.parametrize("overrides", FLAGS)
def test_activations_and_samples_are_those_of_a_microbatch_within_a_tenth(overrides: Sequence[str]) -> None:
    recipe = shapes(*overrides)
    found, loop = sizes(estimate(recipe)), loop_of(recipe)
    with torch.no_grad():
        experience = loop.method.collect(loop.run)
    rows, (phase,) = experience.rows(torch.arange(32)), loop.method.phases(loop.run)
    module, denoise = loop.run.roles.module("current"), loop.run.denoiser("current")
    known = [*module.parameters(), *module.buffers()]
    assert rows.edges.x_t is not None
    given = (rows.edges.x_t, rows.edges.t, rows.condition)
    assert found["activations of one microbatch"] == pytest.approx(kept_bytes(lambda: denoise(*given), known)[0], 0.1)
    if not overrides:  # where little is kept of a network as small as this one, the terms of the loss are as much
        kept, _ = kept_bytes(lambda: phase.loss(rows, loop.run.noise), known)
        assert found["activations of one microbatch"] == pytest.approx(kept, rel=0.1)
    assert experience.edges.start is not None
    assert experience.x_0 is not None
    held = [experience.edges.start.store, experience.x_0, *leaves(experience.condition)]
    assert found["samples of an iteration"] == bytes_of(held)


def test_processes_share_samples_and_what_is_cut() -> None:
    one, two = sizes(estimate(shapes())), sizes(estimate(shapes(), 2))
    cut = sizes(estimate(shapes(), 2, sharded=True))
    assert one["weights: current"] == two["weights: current"] == 2 * (cut["weights: current"] or 0)
    assert one["optimiser"] == 2 * (cut["optimiser"] or 0)
    assert one["samples of an iteration"] == 2 * (two["samples of an iteration"] or 0)
    with pytest.raises(UserError, match="processes must be at least 1"):
        estimate(shapes(), 0)


def pipeline_recipe(folder: Path, *overrides: str) -> Recipe:
    values: dict[str, Any] = {
        "testbed": {"name": "pipeline", "source": str(folder), "prompts": ["a cat"], "steps": 4, "cache": "off"},
        "reward": {"name": "image"},
        "method": {"name": "flow-grpo", "groups": 2, "group_size": 4},
        "training": {"forward_batch": 8},
    }
    return load_recipe(values, overrides)


@pytest.mark.parametrize("family", ["stable_diffusion_3", pytest.param("stable_diffusion", marks=pytest.mark.long)])
def test_a_pipeline_is_estimated_from_its_settings_without_its_weights(family: str, tmp_path: Path) -> None:
    pipe = getattr(pipelines, family)()
    pipe.save_pretrained(tmp_path)
    recipe = pipeline_recipe(tmp_path)
    task = build_task(recipe)
    assert recipe.method is not None
    loop = assemble(task, recipe.method.build(task), recipe.training, None, (), (), World())
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    found = sizes(estimate(recipe))
    network = loop.run.roles.module("current")
    assert found["weights: current"] == module_bytes(network)
    assert found["VAE"] == module_bytes(pipe.vae)
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    assert found["text encoders"] == sum(module_bytes(encoder) for encoder in encoders if encoder is not None)
    denoise, condition = loop.run.denoiser("current"), loop.run.encode(["a cat"] * 8)
    x_t = torch.zeros(8, *task.model.shape)
    kept, _ = kept_bytes(
        lambda: denoise(x_t, torch.full((8,), 0.5), condition), [*network.parameters(), *network.buffers()]
    )
    assert found["activations of one microbatch"] == pytest.approx(kept, rel=0.1)
    lora = sizes(estimate(pipeline_recipe(tmp_path, "training.lora.rank=2", "testbed.dtype=bfloat16")))
    assert lora["weights: the frozen network"] == pytest.approx(module_bytes(network) / 2, rel=0.01)
    assert (lora["optimiser"] or 0) < (found["optimiser"] or 0)


def test_a_pipeline_that_is_not_here_is_said_in_one_line() -> None:
    recipe = pipeline_recipe(Path("nobody/nothing"))
    with pytest.raises(
        UserError, match=r"pipeline 'nobody/nothing' cannot be loaded: .*no network\? name a local folder"
    ):
        estimate(recipe)


def test_what_stays_adds_up_and_of_what_passes_the_largest_counts() -> None:
    lines = [
        Line("weights", 600, "", fix="more processes"),
        Line("pass", 500, "", passing=True, fix="fewer rows"),
        Line("decoding", 300, "", passing=True, fix="slices"),
        Line("reward", None, "not known"),
    ]
    fits = Estimate(lines, 1100, "cpu")
    assert fits.total == 1100
    assert fits.verdict == "fits: needs about 1.07 kB in each process, cpu has 1.07 kB; not counted: reward"
    assert Estimate(lines, 1099, "cpu").verdict == (
        "does not fit: needs about 1.07 kB in each process, cpu has 1.07 kB; try more processes, or fewer rows; "
        "not counted: reward"
    )


def test_steering_is_a_pass_without_gradient() -> None:
    found = sizes(estimate(load_recipe("shapes/fk-steering")))
    trained = sizes(estimate(shapes()))
    assert found["weights"] == trained["weights: current"]
    assert found["one pass"]


def test_an_extra_that_is_not_complete_has_its_line() -> None:
    found = machine._extra("some", ["torch", "no-such-package"])  # pyright: ignore[reportPrivateUsage]
    assert found.packages == {"torch": torch.__version__, "no-such-package": None}
    assert found.install == "pip install 'difftilt[some]'"
    assert machine._extra("some", ["torch"]).install is None  # pyright: ignore[reportPrivateUsage]


def test_the_command_says_what_the_machine_has_and_what_a_recipe_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = CommandLine(monkeypatch, capsys)
    values = json.loads(cli("doctor", "--json").out)
    assert values["versions"]["torch"] == torch.__version__
    assert {extra["name"] for extra in values["extras"]} >= {"diffusers", "track", "ocr"}
    assert "dev" not in {extra["name"] for extra in values["extras"]}
    shown = cli("doctor", "--recipe", "shapes/flow-grpo", *SMALL).out
    assert "fits: needs about" in shown
    assert "activations of one microbatch (for a while)" in shown
    found = json.loads(cli("doctor", "--json", "--recipe", "shapes/flow-grpo", *SMALL, "--processes", "2").out)
    assert found["estimate"]["verdict"].startswith("fits: needs about")
    assert cli("doctor", "training.seed=1").err == "error: overrides change a recipe: name one with --recipe\n"
