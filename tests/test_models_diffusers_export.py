"""What training leaves is taken by stock pipelines: a LoRA with its alpha, a peft folder, a whole pipeline."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import difftilt
import pipelines
from difftilt.errors import UserError
from difftilt.models.diffusers import PipelineOptions, adapt
from difftilt.models.lora import LoraSettings, roles_of
from difftilt.recipes.exporting import ModelCard
from difftilt.rewards.protocol import Samples
from difftilt.training.loop import TrainResult

MAKERS = {"unet": pipelines.stable_diffusion, "transformer": pipelines.stable_diffusion_3}


def brightness(samples: Samples) -> Tensor:
    return samples.media.mean((1, 2, 3))


def trained(pipe: Any, output: Path, pipeline: Mapping[str, Any] | None = None, **settings: Any) -> TrainResult:
    settings = {"method.groups": 1, "method.group_size": 4, "training.forward_batch": 4, **settings}
    settings |= {"training.evaluation_samples": 4, "training.optimizer.lr": 0.03}
    return difftilt.train(
        pipe,
        output,
        reward=brightness,
        prompts=pipelines.PROMPTS,
        method="flow-grpo",
        pipeline=pipeline or {"steps": 2},
        iterations=2,
        **settings,
    )


def sampled(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    images = pipe(pipelines.PROMPTS[0], num_inference_steps=2, generator=generator, output_type="pt").images
    return torch.as_tensor(images)


@pytest.mark.parametrize("name", MAKERS)
def test_a_lora_is_taken_by_a_stock_pipeline_with_its_alpha(name: str, tmp_path: Path) -> None:
    pipe = MAKERS[name]()
    before = sampled(pipe)
    result = trained(pipe, tmp_path / "run", **{"training.lora": {"rank": 2, "alpha": 10.0}})
    after = sampled(pipe)  # the adapter named current is on
    assert (after - before).abs().max() > 1e-3
    folder = difftilt.export(result, tmp_path / "lora", role="current")
    stock = MAKERS[name]()
    assert torch.equal(sampled(stock), before)
    stock.load_lora_weights(folder)
    assert torch.allclose(sampled(stock), after, atol=1e-5)
    (config,) = getattr(stock, name).peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 10.0)

    peft = importlib.import_module("peft")
    other = MAKERS[name]()
    setattr(other, name, peft.PeftModel.from_pretrained(getattr(other, name), str(folder / "peft")).base_model.model)
    assert torch.allclose(sampled(other), after, atol=1e-5)

    card = (folder / "README.md").read_text()
    for words in ("flow-grpo", "LoRA of rank 2 and alpha 10", "brightness", "| kl_reference |", "base_model:"):
        assert words in card
    assert "flow-grpo" in (folder / "config.yaml").read_text()
    assert all("lora" in key for key in load_file(folder / "pytorch_lora_weights.safetensors"))


def test_all_weights_become_a_pipeline(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion_3()
    result = trained(pipe, tmp_path / "run")
    folder = difftilt.export(result, tmp_path / "whole", role="current")
    diffusers = importlib.import_module("diffusers")
    loaded = pipelines.quiet(diffusers.DiffusionPipeline.from_pretrained(str(folder)))
    assert torch.allclose(sampled(loaded), sampled(pipe), atol=1e-6)
    assert torch.equal(sampled(pipe), sampled(pipe))


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_directory_is_enough_where_the_recipe_names_the_model(lora: bool, tmp_path: Path) -> None:
    overrides = ["training.lora={rank: 2}"] if lora else []
    small = ["iterations=1", "evaluation_samples=8", "forward_batch=8"]
    overrides += [f"training.{one}" for one in small]
    run = difftilt.train("mixtures/diffusion-nft", tmp_path / "run", overrides=overrides)
    folder = difftilt.export(tmp_path / "run", tmp_path / "out")
    held = run.run.roles.held(run.role)
    if lora:
        found = load_file(folder / "adapter_model.safetensors")
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 2
        found = {name.removeprefix("base_model.model."): value for name, value in found.items()}
    else:
        found = load_file(folder / "model.safetensors")
    assert found.keys() == held.tensors().keys()
    assert all(torch.equal(value, found[name]) for name, value in held.tensors().items())
    assert f"| role | {run.role}, after 1 iterations |" in (folder / "README.md").read_text()


def test_one_lora_cannot_hold_two_networks() -> None:
    model = adapt(pipelines.wan(two=True), PipelineOptions(height=16, width=32, frames=5, cache="off")).model
    with pytest.raises(UserError, match="has two networks"):
        roles_of(model, {}, LoraSettings())


def test_a_card_is_text_whatever_names_are_in_it() -> None:
    nasty = "<script>alert(1)</script> | `x`\n# title"
    recipe = {"testbed": {"name": nasty}, "method": {"name": "m"}, "reward": {"name": nasty}}
    lines = ModelCard(recipe, nasty, 3, {}, {nasty: 1.0}).text(None).splitlines()
    assert not any(line.startswith("# title") for line in lines)
    assert "<script>" not in "\n".join(lines[4:])
    assert all(line.replace("\\|", "").count("|") in (3, 4) for line in lines if line.startswith("|"))


def _nothing(path: Path) -> Path:
    return path / "none"


def _full(path: Path) -> Path:
    (path / "run").mkdir()
    return path / "run"


@pytest.mark.parametrize(("what", "words"), [(_nothing, "no run directory"), (_full, "no run directory")])
def test_mistakes_are_named(what: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        difftilt.export(what(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_taken_folder_and_an_unknown_role_are_refused(tmp_path: Path) -> None:
    overrides = ["training.iterations=1", "training.evaluation_samples=8", "training.forward_batch=8"]
    difftilt.train("mixtures/diffusion-nft", tmp_path / "run", overrides=overrides)
    with pytest.raises(UserError, match="not empty"):
        difftilt.export(tmp_path / "run", tmp_path / "run")
    with pytest.raises(UserError, match=r"'curent'.*current"):
        difftilt.export(tmp_path / "run", tmp_path / "out", role="curent")
