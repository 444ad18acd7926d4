"""Measuring: fixed prompts and noise, held-out only, and the drift is zero at the start."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from difftilt.models.ledger import Ledger
from difftilt.rewards.base import as_reward
from difftilt.rewards.protocol import Samples
from difftilt.sampling.drift import path_kl
from difftilt.sampling.noise import Noise
from difftilt.training.loop import Loop
from difftilt.training.measure import drift_of, measure, quick_drift
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
    assert measured.numbers.keys() == {"reward", "reward/note", "on_mode", "kl_reference", "diversity"}
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


def test_tokens_are_listed(tmp_path: Path) -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert save_picture(tmp_path, "step_0", tokens).read_text() == "[[1, 2], [3, 4]]"
