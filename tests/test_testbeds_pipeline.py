"""A stock pipeline, a few lines and a function as reward are enough to train and to steer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import difftilt
from difftilt.errors import UserError
from difftilt.models import denoiser
from difftilt.rewards import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.kernels import DDIM, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.steering.find import FIND, FINDConfig
from difftilt.steering.learned_noise import Learned
from difftilt.testbeds import Mixtures
from difftilt.testbeds.pipeline import TaskOptions, pipeline_task
from pipelines import PROMPTS, made, stable_diffusion, stable_diffusion_3
from training_runs import without_pictures

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning")

ROOT = Path(__file__).parent.parent
TRAINING = {"iterations": 1, "forward_batch": 4, "evaluation_samples": 4, "evaluate_every": 0}
SIZES = {"groups": 2, "group_size": 4}


def euler() -> Any:
    return stable_diffusion(made("EulerDiscreteScheduler", beta_schedule="scaled_linear", timestep_spacing="leading"))


def brightness(samples: Samples) -> Tensor:
    return samples.media.mean((1, 2, 3))


def options(tmp_path: Path) -> dict[str, Any]:
    return {"steps": 3, "guidance": 3.0, "cache": str(tmp_path / "cache")}


@pytest.mark.parametrize(("method", "family"), [("flow-grpo", stable_diffusion_3), ("diffusion-nft", stable_diffusion)])
def test_a_pipeline_is_trained_in_place(tmp_path: Path, method: str, family: Any) -> None:
    pipe = family()
    network = pipe.components.get("transformer") or pipe.unet
    before = {name: value.clone() for name, value in network.state_dict().items()}
    section: dict[str, Any] = {"name": method, **SIZES} | ({"ema": 0.0} if method == "flow-grpo" else {})
    given: dict[str, Any] = {"reward": brightness, "prompts": PROMPTS, "method": section}
    given |= {"pipeline": options(tmp_path), "training": TRAINING}
    with without_pictures():
        run = difftilt.train(pipe, tmp_path / "run", **given)
    assert run.before["reward"] != run.after["reward"]
    assert run.after["kl_reference"] > 0
    assert any(not torch.equal(before[name], value) for name, value in network.state_dict().items())
    texts = len(list((tmp_path / "cache" / "texts").rglob("*.safetensors")))
    assert (
        texts == {"flow-grpo": 3, "diffusion-nft": 2}[method]
    )  # the prompts, and the empty one where there is guidance
    pipe(PROMPTS, num_inference_steps=2, output_type="pt")  # still a pipeline
    # the weights of any role are those of a network that the pipeline takes
    lagging: Any = run.run.roles.network("behaviour" if method == "diffusion-nft" else "reference")
    assert type(lagging.network) is type(network)
    assert set(lagging.network.state_dict()) == set(before)
    # the run goes on with the same objects, and with no others
    again: dict[str, Any] = given | {"training": TRAINING | {"iterations": 2}, "resume": True}
    with without_pictures():
        assert len(difftilt.train(family(), tmp_path / "run", **again).rows) == 2
    with pytest.raises(UserError, match=r"begun with another recipe.*\n  testbed\.fingerprint"):
        difftilt.train(pipe, tmp_path / "run", **again)
    with pytest.raises(
        UserError, match=r"<StableDiffusion.*Pipeline> was given as a Python object, which no recipe can make again"
    ):
        difftilt.evaluate(tmp_path / "run")


def test_a_pipeline_is_steered_within_a_budget(tmp_path: Path) -> None:
    pipe = stable_diffusion_3()
    result = difftilt.steer(
        pipe,
        brightness,
        PROMPTS,
        method="best-of-n",
        budget={"nfe": 24},
        pipeline=options(tmp_path),
        forward_batch=4,
        output=tmp_path / "out",
    )
    steered = result.steered
    assert steered.media.shape == (8, 3, 16, 16)  # 24 evaluations: 4 samples of 3 steps, guided, per prompt
    assert steered.ledger.nfe == 2 * 24
    assert torch.equal(steered.rewards[steered.best], steered.rewards.view(2, 4).amax(1))
    torch.testing.assert_close(steered.rewards, steered.media.mean((1, 2, 3)))


def test_the_lines_of_the_readme_train_and_steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    text = next(block for block in blocks if "from_pretrained" in block)
    assert len([line for line in text.splitlines() if line.strip()]) <= 10
    # weights cannot be downloaded here: a tiny pipeline of the same class is loaded, and fewer samples are drawn
    monkeypatch.setattr(
        "diffusers.StableDiffusion3Pipeline.from_pretrained", lambda *_, **__: stable_diffusion_3(), raising=True
    )
    monkeypatch.setenv("DIFFTILT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    small: dict[str, object] = {"iterations": 1, "groups": '1, "group_size": 2', "steps": 2, "particles": 2}
    small |= {"height": 16, "width": 16, "forward_batch": '4, "evaluation_samples": 2'}
    for name, value in small.items():
        text = re.sub(rf'"{name}": \d+', f'"{name}": {value}', text)
    names: dict[str, Any] = {}
    with without_pictures():
        exec(text.replace('"cuda"', '"cpu"').replace("bfloat16", "float32"), names)
    assert len(names["run"].rows) == 1
    assert len(names["best"]) == 2


def test_a_folder_is_trained_by_a_recipe_and_evaluated_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stable_diffusion().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("# two\na red cat\n\na blue dog\n")
    (tmp_path / "pipeline_rewards.py").write_text("def bright(samples):\n    return samples.media.mean((1, 2, 3))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    testbed = {"name": "pipeline", "source": str(tmp_path / "pipe"), "prompts": str(tmp_path / "prompts.txt")}
    recipe: dict[str, Any] = {
        "testbed": testbed | options(tmp_path) | {"heldout_prompts": ["a dog"]},
        "reward": {"name": "pipeline_rewards:bright"},
        "method": {"name": "diffusion-nft", **SIZES},
        "training": TRAINING,
    }
    with without_pictures():
        run = difftilt.train(recipe, tmp_path / "run")
    assert run.run.task.prompts == ["a red cat", "a blue dog"]
    assert difftilt.evaluate(tmp_path / "run")["reward"] == run.after["reward"]
    del recipe["reward"]
    with pytest.raises(UserError, match="testbed 'pipeline' has no reward of its own: add a section"):
        difftilt.train(recipe, tmp_path / "other")


def test_what_is_missing_or_belongs_elsewhere_is_named(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    with pytest.raises(UserError, match="a pipeline alone has no reward"):
        difftilt.steer(pipe, None, PROMPTS)
    with pytest.raises(UserError, match="a pipeline alone has no prompts"):
        difftilt.train(pipe, tmp_path / "run", reward=brightness)
    with pytest.raises(UserError, match=r"pipeline\.guidence = 3: unknown key; did you mean guidance\?"):
        difftilt.steer(pipe, brightness, PROMPTS, pipeline={"guidence": 3})
    with pytest.raises(UserError, match="pipeline belongs to a model or a task; this recipe names its own"):
        difftilt.train("mixtures/flow-grpo", tmp_path / "run", pipeline={"steps": 3})
    with pytest.raises(UserError, match="pipeline: these options belong to a pipeline of diffusers"):
        difftilt.steer(Mixtures().task(), pipeline={"steps": 3})


def test_noise_of_the_steps_follows_the_process() -> None:
    def kernel(pipe: Any, level: float | None) -> object:
        chosen = TaskOptions(steps=2, cache="off", noise_level=level)
        return pipeline_task(pipe, as_reward(brightness), [""], options=chosen).sampler.kernel

    assert kernel(stable_diffusion(), None) == DDIM(1.0)
    assert kernel(stable_diffusion(), 0.3) == DDIM(0.3)
    assert kernel(stable_diffusion_3(), None) == FlowSDE(0.7)


@pytest.mark.parametrize("family", [stable_diffusion, euler, stable_diffusion_3])
def test_learned_noise_is_what_the_stock_pipeline_takes_as_latents(tmp_path: Path, family: Any) -> None:
    # fitted, kept in a file, and drawn from: FIND's fresh samples are the pipeline's own of the same latents
    pipe, prompt = family(), PROMPTS[0]
    task = pipeline_task(pipe, as_reward(brightness), [prompt], None, TaskOptions(**options(tmp_path)))
    steerer = FIND(FINDConfig(iterations=3, learning_rate=0.2, samples=2, value_hidden=4))
    model = denoiser(task.model, guidance=task.sampler.guidance)
    steerer.fit(task, model, task.reward, [prompt], Noise(0))
    save_file(dict(steerer.state_dict()), tmp_path / "noise.safetensors")
    learned = Learned.of_state(load_file(tmp_path / "noise.safetensors"))
    steerer.load_state_dict(load_file(tmp_path / "noise.safetensors"))
    steered = steerer.steer(task, model, task.reward, [prompt], Noise(1))
    law = learned.law([prompt], task.model.shape)
    assert law.mean.abs().max() > 0.1
    z = law.draws(torch.arange(1), 2, Noise(1), "fresh")[0]
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "pt"}
    stock = pipe([prompt] * 2, latents=z, **call).images
    torch.testing.assert_close(steered.media, stock, atol=1e-4, rtol=0)
    # the noise is learned unscaled: the pipeline scales what it is given
    assert (pipe([prompt] * 2, latents=2 * z, **call).images - stock).abs().max() > 1e-3
