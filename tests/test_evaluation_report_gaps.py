"""What a report does not know it does not claim: other quantities, lost rows, unshowable media, unread thresholds."""

import json
import re
import shutil
from collections.abc import Callable, Generator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

import difftilt as package
from difftilt.evaluation.report.page import write_report
from difftilt.evaluation.report.pictures import pictures
from difftilt.evaluation.report.reading import RunRecord, read_runs
from difftilt.evaluation.report.views import MORE_CHARTS, curves, overview, tilt_kl
from difftilt.testbeds.digits import HELDOUT
from difftilt.training.monitors import MonitorConfig
from drawing import charts_drawn_once

RECIPE: dict[str, Any] = {
    "testbed": {"name": "mixtures", "modes": 4, "steps": 4},
    "method": {"name": "diffusion-nft", "groups": 2, "group_size": 4},
    "training": {"iterations": 3, "evaluation_samples": 8, "evaluate_every": 1, "forward_batch": 512},
}


@pytest.fixture(autouse=True, scope="module")
def _charts() -> Generator[None]:
    with charts_drawn_once():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    package.train(RECIPE, directory)
    return directory


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steered on a testbed whose one prompt is trained on too."""
    directory = tmp_path_factory.mktemp("steered") / "fk"
    package.steer("sequences/fk-steering", output=directory, overrides=["steerer.particles=8"])
    return directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def one(path: Path) -> RunRecord:
    return read_runs([path])[0]


def text_of(file: Path) -> str:
    plain = re.sub(r"<(style|svg).*?</\1>", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", plain)).split())


def test_the_kl_of_a_steered_law_does_not_stand_under_drift(run: Path, tokens: Path, tmp_path: Path) -> None:
    records = read_runs([run, tokens])
    assert tilt_kl(records[1]) is not None
    trained, steered = (row[1] for row in overview(records))
    assert (trained.name, steered.name) == ("drift, nats", "drift, nats")
    assert trained.after == records[0].after["kl_reference"]
    assert (steered.before, steered.after) == (None, None)
    text = text_of(write_report([run, tokens], tmp_path / "out.html"))
    assert "KL of the tilted law, nats, from 8 particles" in text
    assert "drift of the tilted law" not in text


# held-out prompts


def test_a_steered_prompt_that_is_trained_on_is_not_called_held_out(tokens: Path, tmp_path: Path) -> None:
    (group,) = pictures([one(tokens)], 0)
    assert [prompt.heldout for prompt in group.prompts] == [False]
    assert "held-out" not in text_of(write_report([tokens], tmp_path / "out.html")).partition("Time and cost")[0]


def test_a_steered_prompt_is_held_out_by_what_it_is_not_by_who_chose_it(tmp_path: Path) -> None:
    prompts = ["thin one", "bold three", "bold two"]
    directory = tmp_path / "fk"
    settings: dict[str, Any] = {"steering.prompts": prompts, "steerer.particles": 2}
    package.steer("digits/best-of-n", output=directory, **settings)
    (group,) = pictures([one(directory)], 0)
    assert {prompt.text: prompt.heldout for prompt in group.prompts} == {text: text in HELDOUT for text in prompts}


def test_a_testbed_from_elsewhere_is_not_asked(tokens: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tokens, tmp_path / "fk"))
    marker = tmp_path / "executed"
    (tmp_path / "hostile.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = (directory / "config.yaml").read_text().replace("name: sequences", "name: hostile:Testbed")
    (directory / "config.yaml").write_text(config)
    (group,) = pictures([one(directory)], 0)
    assert not any(prompt.heldout for prompt in group.prompts)
    assert not marker.exists()


def test_evaluations_on_trained_prompts_are_not_headed_held_out(run: Path) -> None:
    assert "prompts (also trained on) before" in text_of(write_report([run]))
    described = json.loads((run / "samples" / "prompts.json").read_text())
    described["heldout"] = [True] * len(described["prompts"])
    (run / "samples" / "prompts.json").write_text(json.dumps(described))
    assert "held-out prompts before" in text_of(write_report([run]))


# thresholds


BAD_MONITORS: dict[str, Callable[[dict[str, Any]], object]] = {
    "training.monitors.grad_norm": lambda training: training["monitors"].update(grad_norm="high"),
    "training.monitors.grad_nrom": lambda training: training["monitors"].update(grad_nrom=1.0),
    "training.monitors: is no mapping": lambda training: training.update(monitors=3),
}


@pytest.mark.parametrize("said", BAD_MONITORS)
def test_thresholds_that_cannot_be_read_are_told(said: str, run: Path) -> None:
    (run / "summary.json").unlink()
    assert not any("monitors" in line for line in one(run).damage)
    config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(config, dict)
    BAD_MONITORS[said](config["training"])
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    text = text_of(write_report([run]))
    assert said in text
    assert "the run is judged by the default thresholds of the monitors" in text


def test_a_recipe_without_thresholds_has_the_default_ones_and_no_notice(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "config.yaml").write_text("testbed: {name: mixtures}\nmethod: {name: diffusion-nft}\n")
    assert not any("monitors" in line for line in one(run).damage)
    assert MonitorConfig().grad_norm == 100


# media


def store(run: Path, media: Tensor, score: Tensor | None = None, prompts: int = 2) -> None:
    size, samples = len(media) // prompts, run / "samples"
    described = {"prompts": [f"p{i}" for i in range(prompts)], "heldout": [True] * prompts, "size": size}
    (samples / "prompts.json").write_text(json.dumps({**described, "score": "right"}))
    for file in samples.glob("*.safetensors"):
        file.unlink()
    tensors = {"media": media} if score is None else {"media": media, "score": score}
    for step in (0, 3):
        save_file(tensors, samples / f"step_{step}.safetensors")


SHAPES = [(4, 2), (4, 1), (4, 1, 4, 4), (4, 3, 4, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_complex_media_are_a_notice(shape: tuple[int, ...], run: Path) -> None:
    store(run, torch.randn(shape, dtype=torch.complex64))
    text = text_of(write_report([run]))
    assert "step_0.safetensors holds complex numbers, which cannot be shown" in text
    assert "run has no samples at fixed prompts and noise that can be shown." in text


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_floats_of_every_width_are_shown(dtype: torch.dtype, shape: tuple[int, ...], run: Path) -> None:
    store(run, torch.rand(shape).to(dtype))
    html = write_report([run]).read_text()
    assert html.count("data:image/png") == 4 if len(shape) == 4 else 'aria-label="samples after 3"' in html


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e300])
@pytest.mark.parametrize("shape", SHAPES)
def test_doubles_that_no_float_holds_are_no_error(value: float, shape: tuple[int, ...], run: Path) -> None:
    media = torch.rand(shape, dtype=torch.float64)
    media[1] = value
    store(run, media)
    assert "after 3" in text_of(write_report([run]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_score_that_is_not_finite_is_a_dash_and_told_once(value: float, run: Path) -> None:
    store(run, torch.rand(4, 3, 4, 4), torch.tensor([value, 1.0, 0.25, 0.75]))
    text = text_of(write_report([run]))
    assert not re.search(r"\b(nan|inf)\b", text)
    assert text.count("before · right –") == text.count("after 3 · right –") == 1
    assert text.count("after 3 · right 0.5") == 1
    assert text.count("step_3.safetensors holds scores that are not finite") == 1


@pytest.mark.parametrize("name", ["media", "weight", "best", "group"])
def test_complex_particles_are_a_notice(name: str, tokens: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tokens, tmp_path / "fk"))
    tensors = {"media": torch.rand(4, 2), "group": torch.zeros(4).long(), "weight": torch.ones(4)}
    tensors["best"] = torch.tensor([1])
    tensors[name] = tensors[name].to(torch.complex64)
    save_file(tensors, directory / "samples.safetensors")
    text = text_of(write_report([directory]))
    assert "holds complex numbers" in text or "its tensors do not fit together" in text


# totals and curves


def rewrite(run: Path, change: Callable[[list[str]], list[str]]) -> None:
    file = run / "metrics.jsonl"
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


def without_reward_calls(lines: list[str]) -> list[str]:
    return [lines[0], json.dumps(json.loads(lines[1]) | {"reward_calls": None}), lines[2]]


LOSSES: dict[str, tuple[Callable[[list[str]], list[str]], str, str]] = {
    "middle": (lambda lines: [lines[0], "{'x", lines[2]], "from 2 of 3 rows", "from 2 of 3 rows"),
    "end": (lambda lines: [lines[0], lines[1], lines[2][:40]], "from 2 of 3 rows", "from 2 of 3 rows"),
    "cut": (lambda lines: lines[:1], "from 1 of 3 rows", "from 1 of 3 rows"),
    "one number": (without_reward_calls, "", "from 2 of 3 rows"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_totals_of_damaged_rows_say_how_many_they_are_of(name: str, run: Path, tmp_path: Path) -> None:
    assert " rows)" not in text_of(write_report([run]))
    change, evaluations, calls = LOSSES[name]
    rewrite(run, change)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    record = one(run)
    text = text_of(write_report([run, other]))
    for key, said, called in (("nfe", evaluations, "network evaluations"), ("reward_calls", calls, "reward calls")):
        total = f"{int(record.ledger[key])}"
        note = f" ({said})" if said else ""
        assert f"{total} {called}{note}," in text  # the card
        assert text.count(f" {total}{note} ") >= 2 + 2 * (key == "nfe")  # the overview and the ledger
    seconds = text.partition("Time and cost")[2].partition("ledger")[0]
    assert ("rows)" in seconds) == bool(evaluations)


def test_the_total_of_an_unfinished_run_is_of_the_rows_that_it_has(run: Path) -> None:
    (run / "summary.json").unlink()
    rewrite(run, lambda lines: lines[:2])
    assert " rows)" not in text_of(write_report([run]))


def test_numbers_that_are_not_drawn_are_named(run: Path) -> None:
    assert not curves([one(run)]).left_out
    extra = {f"extra/<{i}>": float(i) for i in range(MORE_CHARTS + 5)}
    rewrite(run, lambda lines: [json.dumps(json.loads(line) | extra) for line in lines])
    drawn = curves([one(run)])
    assert len(drawn.folded) == MORE_CHARTS
    titles = [chart.title for chart in drawn.folded]
    assert sorted({*titles, *drawn.left_out} & set(extra)) == sorted(extra)
    assert len(titles) + len(drawn.left_out) == len({*titles, *drawn.left_out})
    text = text_of(write_report([run]))
    assert f"{len(drawn.left_out)} numbers are not drawn" in text
    assert all(name in text for name in drawn.left_out)
