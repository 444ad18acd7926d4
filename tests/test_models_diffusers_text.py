"""Text encoders that are trained with the network: they read the prompts at every call, and are exported with it."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import difftilt
import pipelines
from difftilt.errors import UserError
from difftilt.models.diffusers import PipelineOptions, adapt
from difftilt.models.lora import LoraSettings, roles_of
from test_models_diffusers_export import sampled, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd": pipelines.stable_diffusion,
    "sdxl": pipelines.stable_diffusion_xl,
    "sdxl-empty-is-not-zero": lambda: pipelines.stable_diffusion_xl(zeros=False),
}
OPTIONS = {"steps": 3, "train_text_encoder": True}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reading_the_prompts_at_every_call_changes_no_sample(family: str) -> None:
    call = {"num_inference_steps": 3, "guidance_scale": 7.5}
    assert pipelines.both(FAMILIES[family](), {**OPTIONS, "guidance": 7.5}, call).error < 1e-4


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_lora_of_network_and_text_encoders_is_taken_by_a_stock_pipeline(family: str, tmp_path: Path) -> None:
    pipe = FAMILIES[family]()
    before = sampled(pipe)
    result = trained(pipe, tmp_path / "run", pipeline=OPTIONS, **{"training.lora": {"rank": 2, "alpha": 10.0}})
    after = sampled(pipe)  # the adapter named current is on
    assert (after - before).abs().max() > 1e-3
    folder = difftilt.export(result, tmp_path / "lora", role="current")
    stock = FAMILIES[family]()
    stock.load_lora_weights(folder)
    assert torch.allclose(sampled(stock), after, atol=1e-5)
    encoders = ["text_encoder"] if family == "sd" else ["text_encoder", "text_encoder_2"]
    names = load_file(folder / "pytorch_lora_weights.safetensors")
    for component in ("unet", *encoders):
        (config,) = getattr(stock, component).peft_config.values()
        assert (config.r, config.lora_alpha) == (2, 10.0)
        ours = [value for name, value in names.items() if name.startswith(f"{component}.") and "lora_B" in name]
        assert ours
        assert any(bool(value.any()) for value in ours)  # SDXL skips the last layer of an encoder
    peft = importlib.import_module("peft")
    other = FAMILIES[family]()
    for component in ("unet", *encoders):
        loaded = peft.PeftModel.from_pretrained(getattr(other, component), str(folder / "peft" / component))
        setattr(other, component, loaded.base_model.model)
    assert torch.allclose(sampled(other), after, atol=1e-5)


def test_all_weights_of_both_become_a_pipeline(tmp_path: Path) -> None:
    pipe = pipelines.stable_diffusion()
    result = trained(pipe, tmp_path / "run", pipeline=OPTIONS)
    folder = difftilt.export(result, tmp_path / "whole", role="current")
    loaded = pipelines.quiet(importlib.import_module("diffusers").DiffusionPipeline.from_pretrained(str(folder)))
    assert torch.allclose(sampled(loaded), sampled(pipe), atol=1e-6)
    fresh = pipelines.stable_diffusion().text_encoder.state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in loaded.text_encoder.state_dict().items())


def test_encoders_that_an_earlier_use_of_the_pipeline_froze_are_trained() -> None:
    pipe = pipelines.stable_diffusion()
    adapt(pipe, PipelineOptions(cache="off"))
    assert not any(weight.requires_grad for weight in pipe.text_encoder.parameters())
    adapt(pipe, PipelineOptions(cache="off", train_text_encoder=True))
    assert all(weight.requires_grad for weight in pipe.text_encoder.parameters())


def test_targets_of_a_lora_that_reach_no_text_encoder_are_refused() -> None:
    model = adapt(pipelines.stable_diffusion(), PipelineOptions(cache="off", train_text_encoder=True)).model
    with pytest.raises(UserError, match=r"training\.lora\.targets: no layer of text_encoder is adapted"):
        roles_of(model, {}, LoraSettings(rank=2, targets=("to_q",)))


def test_families_whose_encoders_are_not_trained_say_so() -> None:
    with pytest.raises(UserError, match="text encoders of FluxPipeline are not trained"):
        adapt(pipelines.flux(), PipelineOptions(train_text_encoder=True))
    pipe = pipelines.stable_diffusion_xl()
    pipe.text_encoder = None
    with pytest.raises(UserError, match="this StableDiffusionXLPipeline has no text_encoder"):
        adapt(pipe, PipelineOptions(train_text_encoder=True))
