"""Pipelines of diffusers: sampling equals the stock pipeline's, and everything around it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pipelines
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.models.diffusers import Clock, PipelineOptions, adapt, schedule_of
from difftilt.models.diffusers.texts import EncodedTexts, identity_of
from difftilt.models.lora import LoraSettings, adapted, switched
from difftilt.models.roles import CopiedRoles
from difftilt.sampling.kernels import DDIM
from difftilt.sampling.rollout import sample_by_kernel
from difftilt.testbeds.pipeline import sampler_of
from pipelines import (
    PROMPTS,
    Sampled,
    both,
    ddim,
    flow,
    flux,
    latent_consistency,
    made,
    stable_diffusion,
    stable_diffusion_3,
    stable_diffusion_xl,
    start_of,
    wan,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

TOLERANCE = 1e-4
"""In float32, over at most 7 steps whose outputs are of order 1 and whose guidance multiplies errors by up to 7.5."""
GUIDED = {"guidance_scale": 7.5}


def euler(spacing: str, **settings: Any) -> Any:
    defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return made("EulerDiscreteScheduler", timestep_spacing=spacing, **(defaults | settings))


def compare(pipe: Any, steps: int = 4, guidance: float = 7.5, output: str = "images", **call: Any) -> Sampled:
    options = {"steps": steps, "guidance": guidance}
    return both(pipe, options, {"num_inference_steps": steps, "guidance_scale": guidance, **call}, output)


STOCK: dict[str, Callable[[], Any]] = {
    "sd-ddim": stable_diffusion,
    "sd-ddim-clean-end": lambda: stable_diffusion(ddim(set_alpha_to_one=True, steps_offset=0)),
    "sd-ddim-trailing": lambda: stable_diffusion(ddim(timestep_spacing="trailing")),
    "sd-ddim-v": lambda: stable_diffusion(ddim(prediction_type="v_prediction")),
    "sd-ddim-v-zero-snr": lambda: stable_diffusion(
        ddim(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ),
    "sd-ddim-x0": lambda: stable_diffusion(ddim(prediction_type="sample")),
    "sd-euler-leading": lambda: stable_diffusion(euler("leading")),
    "sd-euler-linspace": lambda: stable_diffusion(euler("linspace")),
    "sd-euler-trailing-v": lambda: stable_diffusion(euler("trailing", prediction_type="v_prediction")),
    "sd3": stable_diffusion_3,
    "sd3-dynamic-shift": lambda: stable_diffusion_3(flow(use_dynamic_shifting=True)),
    "sd3-karras": lambda: stable_diffusion_3(flow(shift=3.0, use_karras_sigmas=True)),
    "sd3-without-t5": lambda: stable_diffusion_3(t5=False),
    "sdxl": stable_diffusion_xl,
    "sdxl-empty-is-not-zero": lambda: stable_diffusion_xl(zeros=False),
    "sdxl-euler-scaled-channels": lambda: stable_diffusion_xl(
        euler("leading"), latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0]
    ),
}


class Generated:
    """The noise that a pipeline draws from its generator, step by step."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        return torch.randn(len(index), *shape, generator=self.generator)

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        raise NotImplementedError


CASES = [(name, 7.5) for name in STOCK] + [("sd-ddim", 1.0), ("sd3", 1.0)]


@pytest.mark.parametrize(("name", "guidance"), CASES)
def test_sampling_equals_the_stock_pipeline(name: str, guidance: float) -> None:
    pipe = STOCK[name]()
    sampled = compare(pipe, guidance=guidance)
    assert sampled.error < TOLERANCE
    # the comparison is one of something: the network moves the noise, and the two prompts end apart
    assert float((sampled.stock_latents - start_of(sampled.latents.shape[1:])).abs().max()) > 0.1
    assert float((sampled.stock_media[0] - sampled.stock_media[1]).abs().max()) > 0.01


@pytest.mark.parametrize("told", [True, False])
def test_flux_packs_is_told_its_guidance_and_shifts_its_times(told: bool) -> None:
    size = {"height": 16, "width": 24}
    options = {"steps": 4, "guidance": 3.5, **size}
    call = {"num_inference_steps": 4, "guidance_scale": 3.5, "max_sequence_length": 24, **size}
    sampled = both(flux(told), options | {"max_sequence_length": 24}, call)
    assert sampled.error < TOLERANCE
    assert sampled.latents.shape == (2, 4, 8, 12)
    if told:  # the number matters: another one is seen
        assert both(flux(told), options | {"max_sequence_length": 24, "guidance": 5.0}, call).error > TOLERANCE
    other = both(flux(told, use_dynamic_shifting=False, shift=3.0), options | {"max_sequence_length": 24}, call)
    assert other.error < TOLERANCE
    assert float((other.latents - sampled.latents).abs().max()) > 0.01


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("by_token", [True, False])
def test_wan_samples_videos_with_one_network_or_two(two: bool, by_token: bool) -> None:
    size = {"height": 16, "width": 32, "max_sequence_length": 12}
    options: dict[str, Any] = {"steps": 4, "guidance": 5.0, "frames": 5, **size}
    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "num_frames": 5, **size}
    pipe = wan(two, by_token)
    sampled = both(pipe, options, call, output="frames")
    assert sampled.error < TOLERANCE
    assert sampled.media.shape == (2, 5, 3, 16, 32)
    adapter = adapt(pipe, PipelineOptions(**options, cache="off"))
    latents = sampled.latents
    torch.testing.assert_close(adapter.scaled(adapter.unscaled(latents)), latents)
    assert adapter.latents(sampled.media).shape == latents.shape
    if two:  # rows of both sides of the boundary in one batch take the network that is theirs
        t = torch.tensor([0.9, 0.1])
        rows = adapter.encode(PROMPTS)
        one = [adapter.network(latents[[i]], t[[i]], {"text": rows["text"][[i]]}) for i in (0, 1)]
        torch.testing.assert_close(adapter.network(latents, t, rows), torch.cat(one))
        assert len(list(adapter.network.parameters())) == 2 * len(list(pipe.transformer.parameters()))
    with pytest.raises(UserError, match="frames = 6: this pipeline needs one more than a multiple of 4"):
        adapt(pipe, PipelineOptions(frames=6)).model  # noqa: B018


@torch.no_grad()
def stochastic(pipe: Any, kernel: Any, **call: Any) -> float:
    """Largest difference of a sampling with noise in its steps, relative to the latents."""
    adapter = adapt(pipe, PipelineOptions(steps=4, guidance=call["guidance_scale"], cache="off"))
    model, noise = adapter.model, start_of(adapter.model.shape)
    sampler = replace(sampler_of(adapter), kernel=kernel) if kernel is not None else sampler_of(adapter)
    denoise, x = denoiser(model, guidance=adapter.guidance), model.process.prior(noise)
    condition, index = model.encode(PROMPTS), torch.arange(2)
    ours = sample_by_kernel(denoise, sampler, x, condition, noise=Generated(3), index=index).x_0
    generator = torch.Generator().manual_seed(3)
    given = {"latents": noise.clone(), "generator": generator, "num_inference_steps": 4, "output_type": "latent"}
    theirs = pipe(PROMPTS, **given, **call).images
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_stochastic_steps_equal_the_stock_pipeline_with_the_same_noise() -> None:
    ended = ddim(set_alpha_to_one=True, steps_offset=0)  # its last step has no noise
    assert stochastic(stable_diffusion(ended), DDIM(0.6), eta=0.6, **GUIDED) < TOLERANCE
    assert stochastic(stable_diffusion(ended), DDIM(0.6), eta=0.7, **GUIDED) > 10 * TOLERANCE
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    turbo = made("EulerAncestralDiscreteScheduler", timestep_spacing="trailing", **settings)
    assert stochastic(stable_diffusion_xl(turbo), None, guidance_scale=1.0) < TOLERANCE


def test_consistency_models_are_told_their_guidance_and_renoise() -> None:
    assert stochastic(latent_consistency(), None, guidance_scale=8.5) < TOLERANCE
    # with so slow a clock the state has a share in every prediction, not only at the clean end
    assert stochastic(latent_consistency(timestep_scaling=0.001), None, guidance_scale=8.5) < TOLERANCE
    pipe = latent_consistency()
    adapter = adapt(pipe, PipelineOptions(steps=4, guidance=8.5, cache="off"))
    assert (adapter.guidance, adapter.model.null_condition, adapter.model.output) == (1.0, None, "x0")
    # at the clean end the network is not asked: the state is the sample
    x = start_of(adapter.model.shape)
    with torch.no_grad():
        torch.testing.assert_close(adapter.network(x, torch.zeros(2), adapter.encode(PROMPTS)), x)
    assert stochastic(stable_diffusion(made("LCMScheduler", clip_sample=False)), None, guidance_scale=1.0) < TOLERANCE


@torch.no_grad()
def test_a_clock_that_is_one_timestep_off_is_seen() -> None:
    pipe = stable_diffusion()
    adapter = adapt(pipe, PipelineOptions(steps=4, cache="off"))
    network, x, condition = adapter.network, start_of(adapter.model.shape), adapter.encode(PROMPTS)
    t = adapter.schedule.grid[:1].float().expand(2)
    right = network(x, t, condition)
    told: Tensor = pipe.scheduler.timesteps[0] if pipe.scheduler.set_timesteps(4) is None else t
    assert torch.equal(right, pipe.unet(x, told, condition["text"], return_dict=False)[0])
    assert float((network(x, t + 1e-3, condition) - right).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("t", [1.0, 0.982, 0.5, 0.001])
def test_the_clock_meets_whole_timesteps_in_float32(t: float) -> None:
    assert float(Clock(1000, offset=-1)(torch.tensor([t]))) == round(1000 * t) - 1


def test_defaults_are_those_of_the_call_of_the_pipeline() -> None:
    adapter = adapt(stable_diffusion_3(), PipelineOptions(cache="off"))
    assert (adapter.steps, adapter.guidance) == (28, 7.0)
    assert len(adapter.schedule.grid) == 29
    assert adapter.size == (16, 16)
    assert adapter.null_condition(3)["text"].shape == (3, 16 + 256, 32)


def test_what_the_unconditional_branch_is_given_can_be_said() -> None:
    pipe = stable_diffusion()
    options = {"steps": 3, "guidance": 5.0, "negative_prompt": "a dog"}
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "negative_prompt": ["a dog"] * 2}
    assert both(pipe, options, call).error < TOLERANCE
    assert both(pipe, options | {"negative_prompt": "a cat"}, call).error > 10 * TOLERANCE


def test_another_size_is_sampled_and_a_wrong_one_refused() -> None:
    pipe = stable_diffusion_3(flow(use_dynamic_shifting=True))  # the shift depends on the size
    size = {"height": 8, "width": 24}
    options = {"steps": 3, "guidance": 1.0, "max_sequence_length": 8, **size}
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "max_sequence_length": 8, **size}
    assert both(pipe, options, call).error < TOLERANCE
    with pytest.raises(UserError, match="height = 10: this pipeline needs a multiple of 4"):
        adapt(pipe, PipelineOptions(height=10)).size  # noqa: B018


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "memory": (lambda: made("PNDMScheduler"), r"PNDMScheduler cannot be reproduced.*Set scheduler=DDIMScheduler"),
    "flow with memory": (
        lambda: made("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction"),
        "Set scheduler=FlowMatchEulerDiscreteScheduler",
    ),
    "clipping": (lambda: ddim(clip_sample=True), "clip_sample=True cannot be reproduced: set clip_sample=False"),
    "thresholding": (lambda: ddim(thresholding=True), "thresholding=True"),
    "steps that do not meet": (lambda: ddim(timestep_spacing="linspace"), "timestep_spacing='linspace' and 4 steps"),
    "sigmas": (lambda: euler("leading", use_karras_sigmas=True), "use_karras_sigmas=True cannot be reproduced"),
    "inverted": (lambda: flow(invert_sigmas=True), "invert_sigmas=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_scheduler_that_no_kernel_reproduces_is_named(case: str) -> None:
    scheduler, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        schedule_of(scheduler(), 4)


def test_another_scheduler_takes_over_the_settings_of_the_pipelines_own() -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    pipe = stable_diffusion(made("PNDMScheduler", set_alpha_to_one=False, **settings))
    chosen = adapt(pipe, PipelineOptions(steps=4, scheduler="DDIMScheduler", cache="off")).schedule
    expected = adapt(stable_diffusion(ddim()), PipelineOptions(steps=4, cache="off")).schedule
    assert torch.equal(chosen.grid, expected.grid)
    assert type(pipe.scheduler).__name__ == "PNDMScheduler"  # the pipeline keeps its own
    wan = made("UniPCMultistepScheduler", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    options = PipelineOptions(steps=4, scheduler="FlowMatchEulerDiscreteScheduler", cache="off")
    grid = adapt(stable_diffusion_3(wan), options).schedule.grid
    assert torch.equal(grid, adapt(stable_diffusion_3(flow(shift=5.0)), PipelineOptions(steps=4)).schedule.grid)
    with pytest.raises(UserError, match="scheduler = 'Dim': diffusers has no such scheduler; DDIMScheduler"):
        adapt(pipe, PipelineOptions(scheduler="Dim")).schedule  # noqa: B018


def test_the_decoder_keeps_gradients_and_is_inverted_by_its_scales() -> None:
    for pipe in (stable_diffusion(), stable_diffusion_3()):
        adapter = adapt(pipe, PipelineOptions(steps=2, cache="off", vae_slicing=True, vae_tiling=True))
        latents = start_of(adapter.model.shape).requires_grad_()
        media = adapter.model.decode(latents)
        media.sum().backward()
        media = media.detach()
        assert media.shape == (2, 3, 16, 16)
        assert 0 <= float(media.min()) <= float(media.max()) <= 1
        assert latents.grad is not None
        assert float(latents.grad.abs().max()) > 0
        torch.testing.assert_close(adapter.scaled(adapter.unscaled(latents)), latents)
        law = pipe.vae.encode(2 * media - 1).latent_dist
        torch.testing.assert_close(adapter.unscaled(adapter.latents(media)), law.mode())
        assert pipe.vae.use_slicing
        assert pipe.vae.use_tiling


def test_roles_copy_the_network_and_nothing_else() -> None:
    pipe = stable_diffusion()
    network = adapt(pipe, PipelineOptions(steps=2, cache="off")).network
    roles = CopiedRoles(network)
    wanted = {f"{role}/network.{key}" for role in ("current", "reference") for key in pipe.unet.state_dict()}
    assert set(roles.state_dict()) == wanted
    assert roles.network("current") is network
    assert network.network is pipe.unet  # what is trained is the pipeline's own
    frozen = [p for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()]
    assert not any(p.requires_grad for p in frozen)


class Encoder:
    """Counts prompts; its rows tell them apart."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        self.seen.append(list(prompts))
        length = torch.tensor([[float(len(prompt))] for prompt in prompts])
        return {"text": length.expand(-1, 3).bfloat16(), "mask": length > 3}


@pytest.mark.parametrize("folder", [True, False])
def test_every_prompt_is_encoded_once(tmp_path: Path, folder: bool) -> None:
    encoder = Encoder()
    texts = EncodedTexts(encoder, lambda: "one", tmp_path if folder else None, batch=2)
    rows = texts(["a", "bbbb", "a", "ccccc"])
    assert encoder.seen == [["a", "bbbb"], ["ccccc"]]
    assert rows["text"][:, 0].tolist() == [1, 4, 1, 5]
    assert rows["text"].dtype == torch.bfloat16
    assert rows["mask"].flatten().tolist() == [False, True, False, True]
    assert torch.equal(texts(["bbbb"])["text"], rows["text"][1:2])
    assert len(encoder.seen) == 2


def test_the_cache_on_disk_outlives_the_process_and_mends_damage(tmp_path: Path) -> None:
    first, second, other = Encoder(), Encoder(), Encoder()
    EncodedTexts(first, lambda: "one", tmp_path, 8)(["a", "b"])
    EncodedTexts(second, lambda: "one", tmp_path, 8)(["a", "b"])
    assert second.seen == []
    EncodedTexts(other, lambda: "two", tmp_path, 8)(["a"])  # another encoder, another file
    assert other.seen == [["a"]]
    files = sorted((tmp_path / "texts").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(b"damaged")
    assert EncodedTexts(second, lambda: "one", tmp_path, 8)(["a"])["text"][0, 0] == 1
    assert second.seen == [["a"]]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to .*file.*cache=off"):
        EncodedTexts(first, lambda: "one", tmp_path / "file", 8)(["a"])


def test_identity_depends_on_weights_tokenizer_and_settings() -> None:
    def identity(pipe: Any, **settings: Any) -> str:
        return identity_of(settings, [pipe.text_encoder], [pipe.tokenizer])

    pipe, same, moved = stable_diffusion(), stable_diffusion(), stable_diffusion()
    with torch.no_grad():
        next(moved.text_encoder.parameters()).add_(1e-3)
    assert identity(pipe) == identity(same) != identity(moved)
    assert identity(pipe) != identity(pipe, max_sequence_length=8)
    same.tokenizer = pipelines.clip_tokenizer(merges=())
    assert identity(pipe) != identity(same)


def test_encoders_with_adapters_do_not_share_the_rows_of_those_without() -> None:
    """A cache on disk would hand the prompts of a trained encoder to every later use of the one that it came from."""
    pipe = stable_diffusion()
    settings = LoraSettings(rank=2, targets=("q_proj",))
    before, held = identity_of({}, [pipe.text_encoder], []), adapted(pipe.text_encoder, settings)
    fresh = identity_of({}, [pipe.text_encoder], [])
    with torch.no_grad():
        for weight in held.parameters():
            weight.add_(0.1)
    moved = identity_of({}, [pipe.text_encoder], [])
    with switched(pipe.text_encoder, None):
        off = identity_of({}, [pipe.text_encoder], [])
    assert len({before, fresh, moved, off}) == 4


def test_encoders_are_asked_once_on_the_device_of_the_network_and_leave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, moves, passes = stable_diffusion(), list[str](), list[int]()
    original = type(pipe.text_encoder).to
    monkeypatch.setattr(type(pipe.text_encoder), "to", lambda self, to: (moves.append(str(to)), original(self, to))[1])
    pipe.text_encoder.register_forward_hook(lambda *_: passes.append(1))
    options = PipelineOptions(steps=2, cache=str(tmp_path))
    rows = adapt(pipe, options).model.encode(PROMPTS)
    assert (moves, len(passes)) == (["cpu", "cpu"], 1)
    again = adapt(stable_diffusion(), options).model.encode(PROMPTS)  # read from disk: equal weights, equal name
    assert torch.equal(again["text"], rows["text"])
    pipe.text_encoder = None  # what is not needed any more need not be there
    assert len(list((tmp_path / "texts").rglob("*.safetensors"))) == 2


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from difftilt.models.diffusers.texts import cache_folder

    monkeypatch.delenv("DIFFTILT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("off") is None
    assert cache_folder(None) == tmp_path / "difftilt"
    monkeypatch.setenv("DIFFTILT_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder("here") == Path("here")


@pytest.mark.parametrize("family", [stable_diffusion, stable_diffusion_3])
def test_a_folder_loads_as_what_was_saved(tmp_path: Path, family: Callable[[], Any]) -> None:
    pipe = family()
    pipe.save_pretrained(tmp_path)
    options = PipelineOptions(steps=2, guidance=3.0, cache="off")
    here, there = adapt(pipe, options), adapt(str(tmp_path), options)
    x, t = start_of(here.model.shape), torch.full((2,), 0.5)
    condition = here.encode(PROMPTS)
    assert torch.equal(condition["text"], there.encode(PROMPTS)["text"])
    assert torch.equal(here.network(x, t, condition), there.network(x, t, condition))
    half = adapt(str(tmp_path), options.model_copy(update={"dtype": "bfloat16"}))
    assert half.network.network.dtype == torch.bfloat16
    assert half.encode(PROMPTS)["text"].dtype == torch.bfloat16
    assert denoiser(half.model)(x, t, half.encode(PROMPTS)).x0.dtype == torch.float32


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"no model_index\.json in it$"):
        adapt(str(tmp_path))
    with pytest.raises(UserError, match=r"'nothing' is neither a folder nor an id on the hub"):
        adapt("nothing")
    with pytest.raises(UserError, match=r"pipeline 'nobody/nothing' cannot be loaded: .*no network\?.*folder") as error:
        adapt("nobody/nothing")
    assert "\n" not in str(error.value)
    stable_diffusion().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be loaded.*fp16.*is the file complete"):
        adapt(str(tmp_path), PipelineOptions(variant="fp16"))
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be loaded"):
        adapt(str(tmp_path))


def test_an_unknown_family_says_which_are_known_and_how_to_write_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = made("StableDiffusionPAGPipeline", **stable_diffusion().components, requires_safety_checker=False)
    with pytest.raises(UserError, match="no adapter serves StableDiffusionPAGPipeline") as error:
        adapt(pipe)
    assert "StableDiffusion3Pipeline, StableDiffusionImg2ImgPipeline" in str(error.value)
    assert "class MyFamily(Adapter):" in str(error.value)
    named = PipelineOptions(adapter="difftilt.models.diffusers.stable_diffusion:StableDiffusion", steps=2)
    assert adapt(pipe, named).network.network is pipe.unet


def test_hooks_that_move_components_are_refused() -> None:
    pipe = stable_diffusion()
    pipe.unet._hf_hook = nn.Identity()
    with pytest.raises(UserError, match=r"moves unet by itself.*pipe\.remove_all_hooks"):
        adapt(pipe)


def test_options_are_plain_values() -> None:
    assert PipelineOptions(**json.loads(PipelineOptions(steps=3).model_dump_json())) == PipelineOptions(steps=3)
