"""The pages are true: recipes run, commands parse, tables name every field, metrics are described, links lead on."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf

import difftilt
from difftilt import leaves
from difftilt.config import Config, configs_in
from difftilt.recipes import config_of, load_recipe
from training_runs import without_pictures

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
TINY = ["training.evaluation_samples=8", "training.evaluate_every=0", "method.groups=2", "method.group_size=8"]


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def recipes() -> Iterable[Any]:
    """Every YAML block of the pages of methods, named by page and place."""
    for page in METHOD_PAGES:
        for place, text in enumerate(blocks(page, "yaml")):
            yield pytest.param(text, id=f"{page.stem}-{place}")


def commands(page: Path) -> list[list[str]]:
    """Lines that call ``difftilt``, in words; inline code included."""
    lines = re.findall(
        r"(?:^ *|`)(difftilt (?:train|steer|evaluate|check|list|describe) [^`\n#]*)", page.read_text(), re.M
    )
    return [shlex.split(line) for line in lines]


def defaults(config_class: type[Config], prefix: str = "") -> dict[str, Any]:
    """Dotted field -> default, of nested configurations as well, as JSON has it."""
    found: dict[str, Any] = {}
    for name, field in config_class.model_fields.items():
        found[f"{prefix}{name}"] = json.loads(json.dumps(field.get_default(call_default_factory=True)))
        for nested in configs_in(field.annotation):
            found |= defaults(nested, f"{prefix}{name}.")
    return found


def table(page: Path) -> dict[str, Any]:
    """First and second cell of every row that begins with one word in code; the second read as JSON, else as text."""
    rows = re.findall(r"^\| `([\w.]+)` \| ([^|]*) \|", page.read_text(), re.M)
    return {name: value(cell.strip().strip("`")) for name, cell in rows}


def value(text: str) -> Any:
    """JSON, or the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.parametrize("text", recipes())
def test_every_recipe_of_a_page_is_typed_and_runs(text: str, tmp_path: Path) -> None:
    recipe = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))
    if "steerer" in recipe:
        load_recipe(recipe)
        return
    with without_pictures():
        rows = difftilt.train(recipe, tmp_path / "run", iterations=1, overrides=TINY).rows
    assert len(rows) == 1


@pytest.mark.parametrize("kind", ["methods", "steerers"])
def test_every_algorithm_has_a_page_that_names_every_field_with_its_default(kind: str) -> None:
    for leaf in leaves.cards(kind):
        page = ROOT / "docs" / "methods" / f"{leaf.card.name}.md"
        expected = defaults(config_of(leaves.load(kind, leaf.card.name)))
        told = table(page)
        assert {name: told.get(name, "missing") for name in expected} == expected, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_real_recipes_and_fields(page: Path) -> None:
    for words in commands(page):
        overrides = [word for word in words[3:] if re.match(r"[\w.]+=", word)]
        if words[1] in ("train", "steer", "evaluate") and "/" in words[2] and not words[2].startswith("runs/"):
            assert load_recipe(words[2], overrides)
        for flag in (word for word in words if word.startswith("--")):
            assert flag in {
                "--output",
                "--resume",
                "--iterations",
                "--seed",
                "--json",
                "--quick",
                "--prompts",
                "--prompts-file",
            }, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_every_metric_of_a_run_is_described(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    described = set(re.findall(r"`([\w/<>.]+)`", text))
    recipe: dict[str, Any] = {"testbed": {"name": "mixtures", "steps": 4}, "method": {"name": "flow-grpo"}}
    for name in ("flow-grpo", "diffusion-nft"):
        recipe["method"]["name"] = name
        keys = set(difftilt.train(recipe, tmp_path / name, iterations=1, overrides=TINY).rows[0])
        families = {"reward", "heldout", "loss"}
        told = {key if key.split("/")[0] not in families else f"{key.split('/')[0]}/<name>" for key in keys}
        assert told <= described
        assert {path.name for path in (tmp_path / name).iterdir()} <= set(re.findall(r"[\w.]+", text))


def test_the_papers_page_names_every_algorithm() -> None:
    text = (ROOT / "docs" / "papers.md").read_text()
    for leaf in (*leaves.cards("methods"), *leaves.cards("steerers")):
        assert f"({'methods/' + leaf.card.name}.md)" in text


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_python_of_the_method_pages_runs(page: Path) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), {})


def test_the_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block, *_ = blocks(ROOT / "README.md", "python")  # the next one needs a pipeline: test_testbeds_pipeline.py
    assert '"iterations": 60' in block
    exec(compile(block.replace('"iterations": 60', '"iterations": 1'), "README.md", "exec"), {})


def test_the_sketches_of_the_architecture_are_python() -> None:
    sketches = blocks(ROOT / "docs" / "architecture.md", "python")
    assert len(sketches) == 5
    for sketch in sketches:
        ast.parse(sketch)
        assert len(sketch.splitlines()) <= 24


def test_the_pages_make_a_site_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)[^"]+"', home)


def test_every_page_stands_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in navigation} == set()
