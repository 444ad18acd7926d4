"""Strings and drawings of samples, from the task to files and reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import difftilt
from difftilt.checks.trial import loop_of
from difftilt.evaluation.report.page import write_report
from difftilt.evaluation.report.pictures import pictures
from difftilt.evaluation.report.reading import read_runs
from difftilt.recipes.steered import PARTICLES
from difftilt.testbeds.sequences import Config, Sequences
from difftilt.training.gallery import DRAWINGS, gallery_of, save_gallery, show
from difftilt.training.looks import look_at, spelled
from difftilt.training.protocol import Task


def drawn(media: Tensor) -> Tensor:
    """A pixel for each token, grey by its number."""
    return media[:, None, None].float() / 3


def task_of() -> Task:
    return replace(Sequences().task(), draw=drawn)


def test_a_task_without_strings_and_pictures_has_no_look() -> None:
    media = torch.tensor([[0, 1, 2, 3]])
    look = look_at(replace(Sequences().task(), text=None), media)
    assert (look.text, look.drawn, look.tensors()) == (None, None, {})


def test_strings_are_of_all_samples_and_drawings_of_those_asked_for() -> None:
    media = torch.tensor([[0, 1, 2, 3], [3, 3, 3, 3], [1, 0, 0, 0]])
    look = look_at(task_of(), media, torch.tensor([2, 0]))
    assert look.text == ["ABCD", "DDDD", "BAAA"]
    assert look.drawn is not None
    assert look.drawn[:, 0, 0].tolist() == [[85, 0, 0, 0], [0, 85, 170, 255]]
    taken = look.take(torch.tensor([0, 2]))
    assert taken.text == ["ABCD", "BAAA"]
    assert taken.drawn is not None
    assert torch.equal(taken.drawn, look.drawn.flip(0))
    assert look.take(torch.tensor([0, 1])).drawn is None  # the second was never drawn


def test_long_alphabets_are_spelled_in_numbers() -> None:
    bed = Sequences(Config(length=2, letters=27))
    assert bed.text(torch.tensor([[0, 26]])) == ["0 26 "]
    assert spelled(torch.tensor([[1, 0]]), "xy") == ["yx"]


def test_a_gallery_keeps_strings_and_drawings(tmp_path: Path) -> None:
    task = task_of()
    loop, gallery = loop_of("flow-grpo", task, kernel="unmasking"), gallery_of(task)
    assert gallery.size == DRAWINGS
    shown = show(loop.run, "current", task.sampler, gallery, 0)
    save_gallery(tmp_path, 0, gallery, shown)
    stored = load_file(tmp_path / "step_0.safetensors")
    assert json.loads((tmp_path / "step_0.json").read_text()) == Sequences().text(stored["media"])
    assert torch.equal(stored["drawn"][:, 0, 0].float(), (stored["media"] * 85).float())
    assert (tmp_path / "step_0.png").exists()


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("steered") / "run"
    difftilt.steer("sequences/best-of-n", output=directory, overrides=["steerer.particles=24"])
    return directory


def test_a_result_names_the_best_sample(steered: Path) -> None:
    tensors = load_file(steered / "samples.safetensors")
    every = json.loads((steered / "samples.json").read_text())
    assert every == Sequences().text(tensors["media"])
    (row,) = json.loads((steered / "result.json").read_text())["prompts"]
    assert row["text"] == every[int(tensors["best"][0])]


def test_a_report_shows_strings_and_drawings_of_the_heaviest(steered: Path) -> None:
    path = steered / "samples.safetensors"
    tensors = load_file(path)
    every = json.loads((steered / "samples.json").read_text())
    order = tensors["weight"].argsort(descending=True, stable=True)[:PARTICLES]
    (group,) = pictures(read_runs([steered]), 0)
    best, particles = group.prompts[0].strips
    assert list(best.lines) == [every[int(tensors["best"][0])]]
    assert list(particles.lines) == [every[row] for row in order.tolist()]
    assert particles.image is None
    rows = torch.cat([tensors["best"], order]).unique()
    pixel = (tensors["media"][rows, None, None] * 85).byte()
    save_file(tensors | {"drawn": pixel, "drawn_rows": rows}, path)
    try:
        (group,) = pictures(read_runs([steered]), 0)
        assert all(strip.image is not None for strip in group.prompts[0].strips)
        text = write_report([steered]).read_text()
        assert all(every[row] in text for row in order.tolist())
        save_file(tensors | {"drawn": pixel, "drawn_rows": rows + 99}, path)
        record = read_runs([steered])[0]
        assert any("drawings do not fit" in line for line in record.damage)
        assert pictures([record], 0)[0].prompts[0].strips[0].image is None
    finally:
        save_file(tensors, path)


@pytest.mark.parametrize(("content", "said"), [('["A"]', "1 strings for 24"), ("[", "samples.json is damaged")])
def test_damaged_strings_are_left_out_and_told(steered: Path, tmp_path: Path, content: str, said: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "result.json", "samples.safetensors"):
        (run / name).write_bytes((steered / name).read_bytes())
    (run / "samples.json").write_text(content)
    record = read_runs([run])[0]
    assert any(said in line for line in record.damage)
    (group,) = pictures([record], 0)
    assert group.prompts[0].strips[0].lines[0].isdigit()
