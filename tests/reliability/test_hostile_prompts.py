"""Prompts that want to be something else: markup, paths, commands of terminals, templates, and very long texts.

A run with them writes the same files and a report of the same elements as a run with harmless ones. A task of the
library's own takes any text; ``make soak`` does the same with a real pipeline.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import difftilt
from command_line import CommandLine
from difftilt.errors import UserError, printable, quoted
from difftilt.recipes.schema import load_recipe
from difftilt.rewards import Samples
from difftilt.training.protocol import Task
from pipelines import stable_diffusion
from training_runs import make_task

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "\"'><svg/onload=alert(3)>&lt;b&gt;</title></style>--><!--",
    "{{ 7 * 7 }}{% for x in () %}{{ cycler.__init__ }}",
    "${oc.env:HOME} ${testbed.name} ???",
    "../../../tmp/escaped",
    "/etc/passwd\\..\\con:nul?*|",
    "a\x00b\x07\x1b[31mred\x1b]0;title\x07\r\nsecond line\x85\u2028third",
    "\u202egnp.exe\u2066\u200f",
    "a " * 50_000,
    "%s %n %(x)s {0} \\u0041 `id` $(id); rm -rf",
    "=1+1|' /C calc'!A0",
    "",
)
PLAIN = tuple(f"prompt {place}" for place in range(len(HOSTILE)))


class Elements(HTMLParser):
    """Counts the elements of a page with the names of their attributes; what a chart is made of depends on numbers."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.text: list[str] = []
        self.drawing = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self.drawing:
            self.found[tag, tuple(sorted(name for name, _ in attrs))] += 1
        self.drawing = self.drawing or tag == "svg"

    def handle_endtag(self, tag: str) -> None:
        self.drawing = self.drawing and tag != "svg"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        self.found["comment", ()] += 1


def any_text(prompts: Sequence[str]) -> Task:
    """Four classes, by the length of the prompt: every text is one."""
    task = make_task()
    model = replace(task.model, encode=lambda texts: torch.tensor([len(text) % 4 for text in texts]))
    return replace(task, model=model, prompts=list(prompts), heldout_prompts=list(prompts), reward=of_length)


def of_length(samples: Samples) -> list[float]:
    return [len(prompt) % 7 + float(media.sum()) for prompt, media in zip(samples.prompts, samples.media, strict=True)]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_all(source: Any, prompts: Sequence[str], folder: Path, **options: Any) -> Elements:
    """Train, steer, and report on both."""
    training = {"iterations": 1, "forward_batch": 16, "evaluation_samples": 24, "evaluate_every": 0}
    method = {"name": "diffusion-nft", "groups": 2, "group_size": 2}
    given: dict[str, Any] = {"reward": of_length, "prompts": prompts, "method": method, "training": training}
    difftilt.train(source(prompts), folder / "run", **given, **options)
    steering: dict[str, Any] = {"method": "best-of-n", "particles": 2, "output": folder / "steered", **options}
    difftilt.steer(source(prompts), of_length, prompts, **steering)
    page = difftilt.report([folder / "run", folder / "steered"], folder / "report.html").read_text(encoding="utf-8")
    kept = load_recipe(folder / "run" / "config.yaml").testbed.resolved()
    assert kept["prompts"] == list(prompts)
    told = json.loads((folder / "steered" / "result.json").read_text())
    assert [row["prompt"] for row in told["prompts"]] == list(prompts)
    return Elements(page)


def hold_against_plain(source: Any, tmp_path: Path, **options: Any) -> Elements:
    for name in ("hostile", "plain"):
        (tmp_path / name).mkdir()
    hostile = run_all(source, HOSTILE, tmp_path / "hostile", **options)
    plain = run_all(source, PLAIN, tmp_path / "plain", **options)
    assert hostile.found == plain.found  # no element, attribute or comment but those of the page itself
    assert files(tmp_path / "hostile") == files(tmp_path / "plain")
    assert {path.name for path in tmp_path.iterdir()} <= {"hostile", "plain", "cache"}
    return hostile


def test_markup_and_paths_in_prompts_change_neither_page_nor_files(tmp_path: Path) -> None:
    hold_against_plain(any_text, tmp_path)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_the_same_with_a_real_pipeline_whose_page_shows_the_prompts(tmp_path: Path) -> None:
    options = {"pipeline": {"steps": 2, "guidance": 3.0, "cache": str(tmp_path / "cache")}}
    page = hold_against_plain(lambda _: stable_diffusion(), tmp_path, **options)
    text = "".join(page.text)
    for prompt in HOSTILE:
        assert printable(prompt) in text or not prompt
    assert not any(letter in text for letter in "\x00\x07\x1b\u202e\u2066\u200f\x85")
    assert len(text) < 6 * len(max(HOSTILE, key=len))  # the recipes hold it in full, the captions do not


def test_half_characters_are_refused_in_words(tmp_path: Path) -> None:
    for prompts in (["fine", "half \ud83d"], [{"prompt": "\udc80"}]):
        with pytest.raises(UserError, match="half of a character"):
            difftilt.steer(any_text(["a"]), of_length, prompts, method="best-of-n", particles=2)
        with pytest.raises(UserError, match="half of a character"):
            difftilt.train(any_text(["a"]), tmp_path / "run", reward=of_length, prompts=prompts)
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_is_not_given_commands_by_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    cli = CommandLine(monkeypatch, capsys)
    for prompt in ("\x1b[31m", "a\x07b \u202e", "half \udcff", "x" * 100_000, "${oc.env:HOME}", "[bold]"):
        for recipe in ("shapes/best-of-n", "digits/best-of-n", "mixtures/best-of-n"):
            ran = cli("steer", recipe, "--json", "--prompts", prompt, "steerer.particles=2", "testbed.steps=1")
            assert ran.code == (0 if recipe == "mixtures/best-of-n" and "\udcff" not in prompt else 2), recipe
            assert len(ran.err) < 3000, (recipe, len(ran.err))
            assert not any(letter in ran.err + ran.out for letter in "\x1b\x07\u202e")
            assert "Traceback" not in ran.err
    ran = cli("steer", "mixtures/best-of-n", "steerer.particles=2", "--prompts", HOSTILE[6], "--output", "kept")
    assert ran.code == 0
    assert not any(letter in ran.out for letter in "\x1b\x07")
    assert "red" in ran.out


@pytest.mark.parametrize("text", [*HOSTILE, "'", '"', "\\", "é", "\U0001f468\u200d\U0001f469", "قط"])
def test_texts_are_shown_without_what_moves_a_terminal(text: str) -> None:
    for shown in (quoted(text), printable(text)):
        assert shown.isprintable()
        assert len(shown) < 130 + 4 * 400
    if text.isprintable() and len(text) < 50:
        assert printable(text) == text
        assert quoted(text) == repr(text)
