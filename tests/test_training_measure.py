"""Measuring: fixed prompts and noise, held-out only, and the drift is zero at the start."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from difftilt.models.ledger import Ledger
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.sampling.drift import path_kl
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample, start_state
from difftilt.training.gallery import Shown, gallery_of, save_gallery, show
from difftilt.training.loop import Loop
from difftilt.training.measure import DRIFT_SAMPLES, drift_of, measure, quick_drift
from difftilt.training.pictures import save_picture
from difftilt.training.protocol import Task
from training_runs import make_loop, make_method, make_task


def loop_of(task: Task) -> Loop:
    return make_loop(make_method("flow-grpo", task, ema=0), task)


def move(loop: Loop, amount: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in loop.run.roles.parameters("current"):
            parameter.add_(amount)
    loop.run.roles.stepped("current")


def test_drift_is_zero_at_the_start_and_positive_after_a_move() -> None:
    task = make_task()
    loop = loop_of(task)
    assert measure(loop.run, "current", task.sampler, 8, 0).numbers["kl_reference"] == 0
    move(loop, 0.0)
    # the roles no longer count as the same, so this zero is computed
    assert measure(loop.run, "current", task.sampler, 8, 0).numbers["kl_reference"] == 0
    move(loop)
    assert measure(loop.run, "current", task.sampler, 8, 0).numbers["kl_reference"] > 0.01
    assert measure(loop.run, "reference", task.sampler, 8, 0).numbers["kl_reference"] == 0


def test_the_same_seed_gives_the_same_numbers_whatever_the_iteration() -> None:
    task = make_task()
    loop = loop_of(task)
    move(loop)
    first = measure(loop.run, "current", task.sampler, 8, 3)
    loop.run.begin(5)
    again = measure(loop.run, "current", task.sampler, 8, 3)
    other = measure(loop.run, "current", task.sampler, 8, 4)
    assert again.numbers == first.numbers
    assert torch.equal(again.samples.media, first.samples.media)
    assert other.numbers != first.numbers


def test_only_heldout_prompts_are_used_and_each_as_often() -> None:
    seen: list[str] = []

    def note(samples: Samples) -> torch.Tensor:
        seen.extend(samples.prompts)
        return samples.media[:, 0]

    task = replace(make_task(), reward=as_reward(note, name="note"), heldout_prompts=["class 1", "class 3"])
    loop = loop_of(task)
    measured = measure(loop.run, "current", task.sampler, 10, 0)
    assert seen == ["class 1"] * 5 + ["class 3"] * 5
    assert measured.samples.group.tolist() == [0] * 5 + [1] * 5
    assert measured.samples.condition.tolist() == [1] * 5 + [3] * 5
    numbers = {"reward", "reward_std", "reward/note", "on_mode", "on_mode_std", "kl_reference", "diversity"}
    assert measured.numbers.keys() == numbers
    seen.clear()
    measure(loop.run, "current", task.sampler, 2, 0)
    assert seen == ["class 1"] * 2


def test_an_evaluation_costs_the_run_nothing() -> None:
    task = make_task()
    loop = loop_of(task)
    move(loop)
    measure(loop.run, "current", task.sampler, 8, 0)
    batch = loop.run.prompts(2, 4)
    quick_drift(loop.run, "current", torch.randn(8, 2), batch.condition, batch.index)
    assert loop.run.ledger == Ledger()
    assert loop.run.reward_seconds == 0


def test_the_quick_drift_is_an_unbiased_estimate_of_the_whole() -> None:
    task = make_task()
    loop = loop_of(task)
    move(loop)
    loop.run.forward_batch = 64
    batch = loop.run.prompts(2, 32)
    x_0 = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    quick: list[float] = []
    whole: list[float] = []
    for iteration in range(60):
        loop.run.begin(iteration)
        quick.append(quick_drift(loop.run, "current", x_0, batch.condition, batch.index))
    for iteration in range(6):
        with torch.no_grad():
            whole.append(float(drift_of(loop.run, "current", x_0, batch, Noise(9).at(iteration)).mean()))
    one, all_ = torch.tensor(quick).double(), torch.tensor(whole).double()
    error = (one.var() / len(one) + all_.var() / len(all_)).sqrt()
    assert abs(one.mean() - all_.mean()) < 3.5 * error
    assert error < 0.3 * all_.mean()


def test_drift_is_measured_without_guidance_on_a_grid_of_its_own() -> None:
    task = make_task()
    guided = replace(task, sampler=replace(task.sampler, guidance=3.0, grid=task.sampler.grid[[0, -1]]))
    loop, other = loop_of(task), loop_of(replace(guided, model=make_task().model))
    batch = loop.run.prompts(2, 4)
    x_0 = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for one in (loop, other):
        move(one)
    drifts = [drift_of(one.run, "current", x_0, batch, Noise(0)) for one in (loop, other)]
    assert torch.equal(*drifts)
    grid = torch.linspace(1, 0, 21, dtype=torch.float64)
    with torch.no_grad():
        current, reference = loop.run.denoiser("current", 1.0), loop.run.denoiser("reference", 1.0)
        direct = path_kl(current, reference, x_0, batch.condition, grid, Noise(0), batch.index)
    assert torch.allclose(drifts[0], direct, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 2), (5, 1), (5, 1, 8, 8), (5, 3, 8, 6), (5, 4, 8, 8), (3, 2, 3, 4, 4)])
def test_pictures_of_every_kind_of_medium(shape: tuple[int, ...], tmp_path: Path) -> None:
    media = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    path = save_picture(tmp_path / "samples", "step_0", media)
    with Image.open(path) as image:
        assert image.width > 32


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (4, 3, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float64])
def test_media_of_unusual_types_are_kept_and_drawn(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    media = torch.rand(shape).to(dtype)
    if dtype == torch.float64:
        media[0], media[1], media[2] = torch.inf, torch.nan, 1e300
    task = make_task()
    gallery = replace(gallery_of(task), size=1)
    save_gallery(tmp_path, 0, gallery, Shown(media, torch.zeros(4)))
    stored = load_file(tmp_path / "step_0.safetensors")["media"]
    assert stored.is_complex() == media.is_complex()
    if dtype == torch.float64 and len(shape) == 4:
        assert stored[:2].eq(0).all()
    with Image.open(tmp_path / "step_0.png") as image:
        assert image.width > 32


def test_only_heldout_rewards_write_their_tolerance() -> None:
    @dataclass(frozen=True)
    class Tolerant:
        name: str

        @property
        def capabilities(self) -> Capabilities:
            return Capabilities(tolerance=0.3)

        def score(self, samples: Samples) -> torch.Tensor:
            return samples.media[:, 0]

    task = replace(make_task(), reward=Tolerant("first"), heldout={"second": Tolerant("second")})
    numbers = measure(loop_of(task).run, "current", task.sampler, 8, 0).numbers
    assert {key for key in numbers if key.endswith("_tolerance")} == {"second_tolerance"}
    assert numbers["second_tolerance"] == 0.3
    assert {"reward_std", "second_std"} <= numbers.keys()


def test_tokens_are_listed(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert save_picture(tmp_path, "step_0", tokens).read_text() == "[[1, 2], [3, 4]]"


def test_numbers_by_category_are_means_over_the_prompts_of_that_category() -> None:
    def note(samples: Samples) -> torch.Tensor:
        return torch.tensor([float(prompt[-1]) + row % 2 for row, prompt in enumerate(samples.prompts)])

    kinds = {"class 0": "low", "class 1": "low", "class 3": "high"}
    task = replace(make_task(), reward=as_reward(note, name="note"), heldout_prompts=list(kinds), categories=kinds.get)
    loop = loop_of(task)
    numbers = measure(loop.run, "current", task.sampler, 12, 0).numbers
    assert numbers["reward@low"] == 1.0  # classes 0 and 1, each with 0 and 1 added in turn
    assert numbers["reward@high"] == 3.5
    assert numbers["reward"] == pytest.approx((4 * 0.5 + 4 * 1.5 + 4 * 3.5) / 12)
    assert numbers["reward_std"] == pytest.approx(
        torch.tensor([0.0, 1, 0, 1, 1, 2, 1, 2, 3, 4, 3, 4]).std(correction=0)
    )
    # two samples see one prompt: the other categories are missing, not zero
    assert "reward@high" not in measure(loop.run, "current", task.sampler, 2, 0).numbers


def test_the_gallery_has_the_same_noise_at_every_step_and_marks_what_is_held_out(tmp_path: Path) -> None:
    task = replace(make_task(), heldout_prompts=["class 3", "class 1"])
    loop = loop_of(task)
    gallery = gallery_of(task)
    seen = set(task.prompts)
    assert list(gallery.prompts[:2]) == ["class 3", "class 1"]
    assert list(gallery.heldout) == [prompt not in seen for prompt in gallery.prompts]
    first = show(loop.run, "current", task.sampler, gallery, 0)
    loop.run.begin(7)
    again = show(loop.run, "current", task.sampler, gallery, 0)
    assert torch.equal(again.media, first.media)
    assert torch.equal(again.score, first.score)
    assert loop.run.ledger == Ledger()
    assert loop.run.reward_seconds == 0
    move(loop)
    moved = show(loop.run, "current", task.sampler, gallery, 0)
    assert len(moved.media) == len(moved.score) == len(gallery.prompts) * gallery.size
    assert not torch.equal(moved.media, first.media)
    prompts = [prompt for prompt in gallery.prompts for _ in range(gallery.size)]
    own = task.reward.score(Samples(moved.media, prompts, prompts, torch.zeros(len(prompts), dtype=torch.int64)))
    assert torch.equal(moved.score, own)
    save_gallery(tmp_path, 3, gallery, moved)
    stored = load_file(tmp_path / "step_3.safetensors")
    assert torch.equal(stored["media"], moved.media)
    assert torch.equal(stored["score"], moved.score)
    assert json.loads((tmp_path / "prompts.json").read_text())["heldout"] == list(gallery.heldout)


def test_drift_of_a_large_evaluation_is_that_of_an_even_share_of_its_samples() -> None:
    task = replace(make_task(), heldout_prompts=["class 1", "class 3"])
    loop = loop_of(task)
    move(loop)
    many = measure(loop.run, "current", task.sampler, 4 * DRIFT_SAMPLES, 0)
    noise = Noise(0).named("evaluation")
    every = 4 * DRIFT_SAMPLES
    group = torch.arange(2).repeat_interleave(every // 2)
    batch = loop.run.batch(group, group, heldout=True)
    denoise = loop.run.denoiser("current")
    with torch.no_grad():
        x_t = start_state(denoise.process, noise, batch.index, task.model.shape)
        x_0 = sample(denoise, task.sampler, x_t, batch.condition, noise=noise, index=batch.index)
        drift = drift_of(loop.run, "current", x_0, batch, noise)
    assert many.numbers["kl_reference"] == pytest.approx(float(drift[::4].mean()), rel=1e-5)
    assert many.numbers["kl_reference"] != pytest.approx(float(drift.mean()), rel=1e-5)
