"""The report: self-contained, escaped, true to the files, and written for damaged and half-finished runs too."""

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.evaluation.report import page as module
from difftilt.evaluation.report.charts import line_chart, scatter_chart
from difftilt.evaluation.report.page import figure, signed, write_report
from difftilt.evaluation.report.pictures import pictures
from difftilt.evaluation.report.reading import RunRecord, read_runs
from difftilt.evaluation.report.sprites import sprite, token_lines
from difftilt.evaluation.report.views import categories, curves, headline, tilt_kl
from drawing import charts_drawn_once

RECIPE: dict[str, Any] = {
    "testbed": {"name": "mixtures", "modes": 4, "steps": 4},
    "method": {"name": "diffusion-nft", "groups": 2, "group_size": 4},
    "training": {"iterations": 3, "evaluation_samples": 8, "evaluate_every": 1, "forward_batch": 512},
}
NASTY = "<script>alert('x')</script> & \"two\" ${x} é🙂 ../a\\b"
VOID = {"meta", "img", "br"}


@dataclass
class Page(HTMLParser):
    """Elements, attributes and text of a page; every element must be closed by its own end."""

    html: str
    tags: list[str] = field(default_factory=list[str])
    attributes: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    words: list[str] = field(default_factory=list[str])
    stack: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture(autouse=True, scope="module")
def _charts() -> Generator[None]:
    with charts_drawn_once():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training; tests change copies of it."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    package.train(RECIPE, directory)
    return directory


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("steered") / "fk"
    package.steer("sequences/fk-steering", output=directory, overrides=["steerer.particles=8"])
    return directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def page(file: Path) -> Page:
    return Page(file.read_text(encoding="utf-8"))


def one(path: Path) -> RunRecord:
    return read_runs([path])[0]


def write_gallery(run: Path, stages: dict[int, Tensor], prompts: list[str], size: int) -> None:
    samples = run / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    flags = [place % 2 == 1 for place in range(len(prompts))]
    (samples / "prompts.json").write_text(json.dumps({"prompts": prompts, "heldout": flags, "size": size}))
    for step, media in stages.items():
        save_file({"media": media}, samples / f"step_{step}.safetensors")


def pixels(source: str) -> Tensor:
    """(height, width, 4) of a data URI."""
    image = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 4)


# what any page must be


def test_a_page_is_self_contained_valid_and_the_same_every_time(
    run: Path, steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("difftilt.evaluation.report.views.line_chart", line_chart)
    monkeypatch.setattr("difftilt.evaluation.report.pictures.scatter_chart", scatter_chart)
    file = write_report([run, steered], tmp_path / "out.html")
    first = file.read_bytes()
    read = page(file)
    assert {"script", "link", "iframe", "object"}.isdisjoint(read.tags)
    for name in ("src", "href", "xlink:href", "action", "data"):
        assert all(value.startswith(("data:image/png;base64,", "#")) for value in read.values(name))
    style = "".join(re.findall(r"<style>.*?</style>", read.html, re.DOTALL)) + "".join(read.values("style"))
    assert "@import" not in style
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", read.html))
    assert not re.search(r"https?://", read.html)
    assert "default-src 'none'" in "".join(read.values("content"))
    write_report([run, steered], tmp_path / "out.html")
    assert file.read_bytes() == first


def test_ids_are_unique_and_everything_that_is_referred_to_is_there(run: Path, tmp_path: Path) -> None:
    read = page(write_report([run], tmp_path / "out.html"))
    ids = read.values("id")
    targets = re.findall(r"url\(#([^)]*)\)", read.html) + [value[1:] for value in read.values("href")]
    assert len(ids) == len(set(ids))
    assert targets
    assert set(targets) <= set(ids)


def test_drawings_take_every_colour_from_the_page(run: Path, tmp_path: Path) -> None:
    html = write_report([run], tmp_path / "out.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) > 5
    for drawing in drawings:
        assert not re.search(r"[ :]#[0-9a-f]{3,8}\b", drawing)
        assert "font-family" not in drawing
        assert "var(--run0)" in drawing or "var(--muted)" in drawing


def luminance(colour: str) -> float:
    """Relative luminance of sRGB (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_and_lines_have_the_contrast_of_wcag_in_both_themes(theme: int) -> None:
    css = (Path(module.__file__).parent / "pages" / "report.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    assert len([name for name in colours if name.startswith("run")]) == 8
    for sheet in ("page", "sheet"):
        assert min(contrast(colours[name], colours[sheet]) for name in ("ink", "muted", "warn")) >= 4.5
        assert min(contrast(colours[f"run{i}"], colours[sheet]) for i in range(8)) >= 3
    assert contrast(colours["warn"], colours["warn-sheet"]) >= 4.5


def test_all_text_of_users_is_escaped(run: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(run, tmp_path / NASTY.replace("/", "∕")))
    tags = page(write_report([run], tmp_path / "plain.html")).tags
    rows = [
        json.loads(line) | {NASTY: 1.0, f"heldout/{NASTY}": 1.0}
        for line in (bad / "metrics.jsonl").read_text().splitlines()
    ]
    (bad / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((bad / "summary.json").read_text())
    summary["after"] |= {NASTY: 1.0, f"{NASTY}@{NASTY}": 0.5}
    summary["verdicts"] = [{"monitor": NASTY, "iteration": 0, "value": 1, "threshold": 2, "advice": NASTY}]
    (bad / "summary.json").write_text(json.dumps(summary))
    write_gallery(bad, {0: torch.rand(2, 1, 4, 4), 3: torch.rand(2, 1, 4, 4)}, [NASTY, ""], 1)
    config = (bad / "config.yaml").read_text().replace("name: mixtures", f"name: {json.dumps(NASTY).replace('$', '')}")
    (bad / "config.yaml").write_text(config)
    read = page(write_report([bad], tmp_path / "out.html"))
    assert set(read.tags) - set(tags) <= {"img", "strong"}
    assert read.text.count(NASTY) >= 5
    assert any(NASTY in value for value in read.values("alt"))


# what it says of training


def test_the_headline_is_that_of_the_files_with_drift_and_diversity_beside_the_reward(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    changes = headline(one(run))
    assert [change.name for change in changes[:3]] == ["reward", "drift, nats", "diversity"]
    by_name = {"reward": "reward", "drift, nats": "kl_reference", "diversity": "diversity", "on_mode": "on_mode"}
    shown = {by_name[change.name]: change for change in changes}
    for name, change in shown.items():
        before, after = summary["before"][name], summary["after"][name]
        assert (change.before, change.after, change.difference) == (before, after, after - before)
    text = page(write_report([run])).text
    reward = shown["reward"]
    assert f"reward {figure(reward.before)} {figure(reward.after)} {signed(reward.difference)}" in text
    assert "mixtures · diffusion-nft" in text
    assert "seed 0" in text


def test_totals_are_those_of_the_rows(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = one(run)
    for name in ("nfe", "reward_calls", "gradient_passes"):
        assert record.ledger[name] == sum(row[name] for row in rows) > 0
    text = page(write_report([run])).text
    assert f"{record.ledger['reward_calls']:.0f} reward calls" in text


def test_it_names_papers_and_commands_that_repeat_the_run(run: Path, tmp_path: Path) -> None:
    text = page(write_report([run])).text
    assert "2509.16117" in text
    assert package.__version__ in text
    (command,) = re.findall(r"difftilt train (\S+) --output NEW_DIRECTORY", text)
    again = package.train(Path(command), tmp_path / "again")
    assert again.after == json.loads((run / "summary.json").read_text())["after"]


def test_an_unfinished_run_is_judged_anew_and_says_how_far_it_came(run: Path, tmp_path: Path) -> None:
    low = [f"training.monitors.{name}=1e-9" for name in ("grad_norm", "kl_reference")]
    watched = tmp_path / "watched"
    package.train(RECIPE, watched, overrides=low)
    finished = one(watched)
    assert {finding.monitor for finding in finished.findings} >= {"grad_norm", "kl_reference"}
    (watched / "summary.json").unlink()
    half = one(watched)
    assert half.findings == finished.findings
    assert half.unfinished == "unfinished: 3 of 3 iterations, no summary.json"
    lines = (watched / "metrics.jsonl").read_text().splitlines(keepends=True)
    (watched / "metrics.jsonl").write_text("".join(lines[:2]))
    half = one(watched)
    assert half.unfinished == "unfinished: 2 of 3 iterations, no summary.json"
    assert half.after_iteration == 2
    assert half.after["reward"] == json.loads(lines[1])["heldout/reward"]
    text = page(write_report([watched])).text
    assert half.unfinished in text
    assert "--resume" in text
    assert "--resume" not in page(write_report([run])).text
    assert "No monitor spoke." in page(write_report([run])).text


def test_a_prolonged_run_that_was_killed_does_not_show_its_old_end(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    later = json.loads(lines[-1]) | {"iteration": 3, "heldout/reward": 123.0}
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(later)]) + "\n")
    record = one(run)
    assert record.unfinished is not None
    assert (record.after["reward"], record.after_iteration) == (123.0, 4)


def test_curves_put_evaluations_after_and_batches_before_the_updates_of_an_iteration(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from difftilt.evaluation.report import views

    drawn: list[list[views.Line]] = []
    monkeypatch.setattr(views, "line_chart", lambda lines, number: drawn.append(lines) or "")
    shown = curves([one(run)]).shown
    assert [chart.title for chart in shown[:3]] == ["reward", "drift, nats", "diversity"]
    batches, heldout = drawn[0]
    assert (batches.xs, heldout.xs) == ([0, 1, 2], [0, 1, 2, 3])
    before = json.loads((run / "before.json").read_text())
    assert heldout.ys[0] == before["reward"]


def test_categories_are_a_table_with_bars_and_no_curves(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["before"] |= {"strict@position": 0.25, "strict@count": 0.5}
    summary["after"] |= {"strict@position": 0.75, "strict@count": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "before.json").write_text(json.dumps(summary["before"]))
    record = one(run)
    (table,) = categories([record])
    assert table.name == "strict"
    (cell,) = table.rows["position"]
    assert cell is not None
    assert (cell.width_before, cell.width_after, cell.change.difference) == (25, 75, 0.5)
    assert not any("@" in change.name for change in headline(record))
    drawn = curves([record])
    assert not any("@" in chart.title for chart in (*drawn.shown, *drawn.folded))
    read = page(write_report([run]))
    assert "strict by category" in read.text
    assert "width: 75.0%" in read.values("style")


# pictures


def test_images_are_those_of_the_file_prompt_by_prompt(run: Path) -> None:
    size, prompts = 3, ["one", "two"]
    media = {step: torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8) for step in (0, 2, 10)}
    write_gallery(run, media, prompts, size)
    (group,) = pictures([one(run)], 0)
    assert [(prompt.text, prompt.heldout) for prompt in group.prompts] == [("one", False), ("two", True)]
    for place, prompt in enumerate(group.prompts):
        assert [strip.label for strip in prompt.strips] == ["before", "after 10"]
        for strip, step in zip(prompt.strips, (0, 10), strict=True):
            assert strip.image is not None
            canvas = pixels(strip.image.source)
            for i in range(size):
                shown = canvas[:, i * 8 : i * 8 + 7]
                assert torch.equal(shown[..., :3], media[step][place * size + i].permute(1, 2, 0))
                assert bool((shown[..., 3] == 255).all())
            assert strip.image.width % canvas.shape[1] == 0
    read = page(write_report([run]))
    assert read.tags.count("img") == 4
    assert "two held-out" in read.text


def test_images_of_any_kind_become_pictures() -> None:
    grey = torch.tensor([0.0, 0.5, 2.0, float("nan")]).reshape(1, 1, 2, 2)
    assert pixels(sprite(grey).source)[..., 0].flatten().tolist() == [0, 128, 255, 0]
    large = sprite(torch.full((2, 3, 500, 250), 0.5))
    assert pixels(large.source).shape == (192, 2 * 96 + 1, 4)
    many = sprite(torch.zeros(17, 3, 4, 4))
    assert pixels(many.source).shape[:2] == (3 * 5 - 1, 8 * 5 - 1)


def test_tokens_are_text_and_long_lists_say_what_is_left_out() -> None:
    assert token_lines(torch.tensor([[1, 0], [2, 3]])) == ["10", "23"]
    assert token_lines(torch.tensor([[1, 10], [2, 3]])) == ["1 10", "2 3"]
    assert token_lines(torch.zeros(30, 2, dtype=torch.int64))[-1] == "and 6 more"


def test_runs_with_the_same_prompts_stand_side_by_side_and_share_what_is_equal(run: Path, tmp_path: Path) -> None:
    start = torch.rand(2, 1, 4, 4)
    other = Path(shutil.copytree(run, tmp_path / "other"))
    for directory in (run, other):
        write_gallery(directory, {0: start, 3: torch.rand(2, 1, 4, 4)}, ["a", "b"], 1)
    (group,) = pictures(read_runs([run, other]), 0)
    assert group.runs == [0, 1]
    assert [(strip.label, strip.run) for strip in group.prompts[0].strips] == [
        ("before", None),
        ("after 3", 0),
        ("after 3", 1),
    ]
    write_gallery(other, {0: 1 - start, 3: start}, ["a", "b"], 1)
    (group,) = pictures(read_runs([run, other]), 0)
    assert [strip.run for strip in group.prompts[0].strips] == [0, 1, 0, 1]
    write_gallery(other, {0: start, 3: start}, ["a", "c"], 1)
    assert len(pictures(read_runs([run, other]), 0)) == 2


def test_a_run_shows_its_own_gallery_and_one_without_says_so(run: Path) -> None:
    assert "no samples at fixed prompts" not in page(write_report([run])).text
    shutil.rmtree(run / "samples")
    assert "run has no samples at fixed prompts and noise that can be shown." in page(write_report([run])).text


def test_a_steered_run_shows_rewards_particles_and_the_best(steered: Path, tmp_path: Path) -> None:
    record = one(steered)
    result = json.loads((steered / "result.json").read_text())
    assert record.steering
    assert record.steered[0].mean == result["prompts"][0]["reward_mean"]
    (group,) = pictures([record], 0)
    best, particles = group.prompts[0].strips
    assert len(best.lines) == 1
    assert len(particles.lines) == 8
    assert best.lines[0] in particles.lines
    text = page(write_report([steered], tmp_path / "out.html")).text
    heldout = {name: value for name, value in result["best"].items() if name != "reward"}
    assert heldout
    assert all(f"{name}, best particle {figure(value)}" in text for name, value in heldout.items())
    assert f"reward, best particle {figure(result['prompts'][0]['reward_best'])}" in text
    assert "8 particles for each prompt" in text
    assert "KL of the tilted law, nats, from 8 particles" in text


def test_the_drift_of_a_steered_run_is_the_kl_of_its_weights(steered: Path, tmp_path: Path) -> None:
    """Particles with weights softmax(r/beta) over a uniform law of K points: KL = sum of w log(K w)."""
    directory, beta = Path(shutil.copytree(steered, tmp_path / "fk")), 0.7
    rewards = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    weight = (rewards / beta).softmax(0)
    log_z = float((rewards / beta).logsumexp(0)) - float(torch.tensor(4.0).log())
    entry = {"prompt": "", "reward_mean": float((weight * rewards).sum()), "log_z": log_z}
    (directory / "result.json").write_text(json.dumps({"prompts": [entry], "ledger": {"nfe": 4}}))
    config = re.sub(r"\n  temperature: .*", f"\n  temperature: {beta}", (directory / "config.yaml").read_text())
    (directory / "config.yaml").write_text(config)
    assert tilt_kl(one(directory)) == pytest.approx(float((weight * (4 * weight).log()).sum()), rel=1e-6)


# bad input


def damage_nothing(run: Path) -> None:
    del run


def cut_metrics(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(text[0] + "{'garbage'\n" + text[2][:40])


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "metrics": (cut_metrics, ["metrics.jsonl: line 2 is damaged", "the last line is cut short"]),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), ["metrics.jsonl is missing: there are no curves"]),
    "binary": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n"), ["line 1 is damaged"]),
    "before": (lambda run: (run / "before.json").write_text('{"rew'), ["before.json is damaged"]),
    "summary": (
        lambda run: (run / "summary.json").write_text("[1]"),
        ["summary.json is damaged", "unfinished: 3 of 3"],
    ),
    "config": (lambda run: (run / "config.yaml").write_text("a: [b"), ["config.yaml is damaged", "unknown recipe"]),
    "no config": (lambda run: (run / "config.yaml").unlink(), ["config.yaml is missing"]),
    "gallery": (lambda run: (run / "samples" / "prompts.json").write_text("{}["), ["prompts.json is damaged"]),
    "stage": (
        lambda run: (run / "samples" / "step_0.safetensors").write_bytes(b"\x10" * 40),
        ["step_0.safetensors is damaged"],
    ),
    "rows": (
        lambda run: save_file({"media": torch.rand(3, 2)}, run / "samples" / "step_3.safetensors"),
        ["step_3.safetensors holds samples of shape (3, 2)"],
    ),
    "numbers": (
        lambda run: (run / "before.json").write_text('{"reward": NaN, "diversity": "x", "on_mode": 1e999}'),
        ["before.json has no finite number for reward, diversity, on_mode", "reward −"],
    ),
    "depth": (lambda run: (run / "summary.json").write_text("[" * 100_000), ["summary.json is damaged"]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_told_and_the_rest_is_shown(name: str, run: Path) -> None:
    spoil, told = DAMAGES[name]
    spoil(run)
    read = page(write_report([run]))
    for words in told:
        assert words in read.text
    assert "reward" in read.text
    assert "svg" in read.tags or name in ("no metrics", "binary")


@pytest.mark.parametrize(("group", "best"), [(0, 9), (7, 0), (-1, 0)])
def test_damaged_steering_is_told(group: int, best: int, steered: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(steered, tmp_path / "fk"))
    tensors = {"media": torch.zeros(4, 2), "group": torch.full((4,), group), "weight": torch.ones(4)}
    save_file({**tensors, "best": torch.tensor([best])}, directory / "samples.safetensors")
    (directory / "result.json").unlink()
    text = page(write_report([directory])).text
    assert "samples.safetensors is damaged (its tensors do not fit together)" in text
    assert "result.json is missing" in text
    assert "No rewards can be read." in text


def test_extreme_numbers_are_drawn(run: Path) -> None:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [row | {"iteration": i, "reward_mean": value} for i, value in enumerate((1e308, -1e308, 1e-320))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    huge = torch.tensor([[1e38, -1e38], [float("nan"), 0.0], [3e38, 1e38], [1.0, 1.0]])
    write_gallery(run, {0: huge, 3: huge}, ["a"], 4)
    assert "svg" in page(write_report([run])).tags


def test_a_run_named_twice_is_shown_once(run: Path, steered: Path) -> None:
    text = page(write_report([run, steered, run / ".." / "run"])).text
    assert "Report of 2 runs" in text
    assert "named twice" in text


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "b" / "run"))
    names = [record.name for record in read_runs([run, other])]
    assert names == [f"{tmp_path.name}/run", "b/run"]


def test_only_runs_are_reported_and_all_mistakes_are_told_at_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        write_report([run, tmp_path / "empty", tmp_path / "none", run / "config.yaml"])
    message = str(caught.value)
    assert "empty is no run directory" in message
    assert "none does not exist" in message
    assert "config.yaml is a file" in message
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("output", [".", "none/report.html", "run/metrics.jsonl", "run/config.yaml"])
def test_an_output_that_would_lose_something_is_refused(output: str, run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"name (a|another) file|make it"):
        write_report([run], tmp_path / output)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_failing_page_leaves_the_earlier_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_report([run])
    before = file.read_bytes()

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        write_report([run])
    assert file.read_bytes() == before


def test_the_command_prints_the_path_last_and_refuses_with_2(
    run: Path, steered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    difftilt = CommandLine(monkeypatch, capsys)
    ran = difftilt("report", run, steered, "--output", tmp_path / "out.html")
    assert (ran.code, ran.out.splitlines()[-1]) == (0, str(tmp_path / "out.html"))
    assert package.report(str(run)) == run / "report.html"
    ran = difftilt("report", tmp_path / "nothing")
    assert ran.code == 2
    assert ran.err.startswith("error: run ")


def test_a_report_does_not_hinder_a_resume(run: Path, tmp_path: Path) -> None:
    write_report([run])
    assert len(package.train(RECIPE, run, iterations=4, resume=True).rows) == 4


def test_a_run_of_200_iterations_takes_less_than_five_seconds(run: Path) -> None:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    rows = [row | {"iteration": place} for place in range(200)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").unlink()
    start = time.process_time()
    write_report([run])
    assert time.process_time() - start < 5
