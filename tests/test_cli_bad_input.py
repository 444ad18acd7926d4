"""What a user can get wrong: exit code 2 (3 for a reward), a few lines that name thing, value and remedy, no files."""

from pathlib import Path

import pytest

from command_line import CommandLine, Ran

RECIPE = """
testbed: {name: mixtures, modes: 4}
method: {name: diffusion-nft, groups: 2, group_size: 4}
training: {iterations: 1, evaluation_samples: 4, evaluate_every: 0}
"""


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def refused(ran: Ran, *words: str, code: int = 2, lines: int = 3) -> None:
    assert ran.code == code, ran
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    assert len(ran.err.strip().splitlines()) <= lines, ran.err
    for word in words:
        assert word in ran.err, ran.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.group_siz=8", ["method.group_siz = 8", "did you mean group_size"]),
        ("training.iteratons=8", ["training.iteratons = 8", "did you mean iterations"]),
        ("training.optimizer.lrr=1", ["training.optimizer.lrr", "did you mean lr"]),
        ("trainng.iterations=3", ["trainng", "did you mean training"]),
        ("training.iterations=ten", ['training.iterations = "ten"', "integer"]),
        ("training.iterations=0", ["training.iterations = 0", "greater than or equal to 1"]),
        ("training.seed=true", ["training.seed = true", "integer"]),
        ("method.name=diffusion-ntf", ["diffusion-ntf", "did you mean diffusion-nft"]),
        ("testbed.name=mixture", ['testbed.name = "mixture"', "did you mean mixtures"]),
        ("testbed.kernel=sdee", ["testbed.kernel", "'sde', 'ancestral' or 'exact'"]),
        ("testbed.weights=[1,2]", ["testbed", "weights must be 4 positive numbers"]),
        ("steering.seed=3", ["steering", "no meaning without a section 'steerer'"]),
        ("method.name=nowhere:Method", ["nowhere:Method", "no module 'nowhere'"]),
        ("steerer.name=best-of-n", ["either a section 'method' (to train) or a section 'steerer'"]),
        ("method.nft_beta=${nothing}", ["nothing"]),
        ("iterations", ["'iterations'", "dotted.key=value"]),
    ],
)
def test_configuration(difftilt: CommandLine, recipe: Path, tmp_path: Path, override: str, words: list[str]) -> None:
    output = tmp_path / "run"
    refused(difftilt("train", recipe, "--output", output, override), *words, lines=5)
    assert not output.exists()


def test_all_errors_come_at_once(difftilt: CommandLine, recipe: Path, tmp_path: Path) -> None:
    wrong = ["testbed.mods=3", "method.groups=none", "method.nft_beta=-1", "training.iterations=0.5", "steps=3"]
    ran = difftilt("train", recipe, "--output", tmp_path / "run", *wrong)
    refused(
        ran, "5 errors", "testbed.mods", "method.groups", "method.nft_beta", "training.iterations", "steps", lines=6
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("testbed: {name: mixtures\nmethod: 3", ["not valid YAML at line"]),
        ("- a\n- b", ["must be a mapping"]),
        ("", ["must be a mapping"]),
        ("testbed: 3\nmethod: {name: diffusion-nft}", ["testbed: needs a name"]),
        ("testbed: {name: mixtures}\nmethod: {name: diffusion-nft}\ntraining: 5", ["training: must be a mapping"]),
        ("testbed: {name: mixtures}", ["a section 'method' (to train)"]),
        ("method: {name: diffusion-nft}", ["testbed: needs a name"]),
        ("testbed: {name: mixtures, modes: '???'}\nmethod: {name: diffusion-nft}", ["modes"]),
    ],
)
def test_recipes_that_cannot_be_read(difftilt: CommandLine, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    refused(difftilt("train", file, "--output", tmp_path / "run"), *words)


def test_a_recipe_that_is_not_text(difftilt: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"\xff\xfe\x00\x80")
    refused(difftilt("train", file, "--output", tmp_path / "run"), "bad.yaml", "cannot be read")


def test_recipes_that_are_not_there(difftilt: CommandLine, tmp_path: Path) -> None:
    output = tmp_path / "run"
    refused(difftilt("train", "mixture/flow-grpo", "--output", output), "did you mean mixtures/flow-grpo")
    refused(difftilt("train", tmp_path / "none.yaml", "--output", output), "none.yaml", "no such file")
    refused(difftilt("train", tmp_path, "--output", output), "is a directory")


def test_an_existing_run_is_not_touched(difftilt: CommandLine, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    refused(difftilt("train", recipe, "--output", output), "run exists and is not empty", "--resume")
    refused(difftilt("train", recipe, "--output", output, "--resume"), "holds no run to resume")
    refused(difftilt("train", recipe, "--output", output / "mine.txt"), "is a file")
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    refused(difftilt("steer", "sequences/best-of-n", "--output", output), "exists and is not empty")


def test_each_command_names_the_other(difftilt: CommandLine, recipe: Path, tmp_path: Path) -> None:
    refused(difftilt("steer", recipe, "--json"), "use `difftilt train`")
    refused(difftilt("train", "sequences/best-of-n", "--output", tmp_path / "run"), "use `difftilt steer`")
    refused(difftilt("steer", "sequences/best-of-n"), "--output DIR", "--json")


def test_a_task_that_does_not_offer_what_a_method_needs(difftilt: CommandLine, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("testbed: {name: sequences}\nmethod: {name: diffusion-nft}")
    refused(difftilt("train", recipe, "--output", tmp_path / "run"), "diffusion-nft needs a gaussian process", "tokens")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('boom')", ["KeyError", "boom"]),
        ("return samples.media.sum(1) * float('nan')", ["finite"]),
        ("return samples.media[:-1].sum(1)", ["shape"]),
        ("return 'good'", ["number"]),
    ],
)
def test_rewards_that_fail(
    difftilt: CommandLine, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: list[str]
) -> None:
    module = f"reward_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(f"def score(samples):\n    {body}\n")
    monkeypatch.chdir(tmp_path)  # a user's own file is found beside where the command runs
    ran = difftilt("train", recipe, "--output", tmp_path / "run", f"reward.name={module}:score")
    refused(ran, "score", code=3)
    assert any(word in ran.err for word in words), ran.err


def test_debug_shows_the_traceback(difftilt: CommandLine, tmp_path: Path) -> None:
    ran = difftilt("train", "nothing/there", "--output", tmp_path / "run", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert difftilt("--debug", "list", "methds").err.startswith("Traceback")


def test_evaluate_and_check_and_list(difftilt: CommandLine, tmp_path: Path) -> None:
    refused(difftilt("evaluate", tmp_path), "no run directory")
    refused(difftilt("check", "no-such-claim"), "nothing to check under 'no-such-claim'")
    refused(difftilt("check", "--json", tmp_path / "none" / "file.json"), "no directory")
    refused(difftilt("list", "methdos"), "did you mean methods")
    refused(difftilt("describe", "best-of-m"), "did you mean best-of-n")


def test_usage_errors_exit_with_2(difftilt: CommandLine) -> None:
    for arguments in (["train"], ["nonsense"], ["train", "demo", "--output", "x", "--iterations", "many"]):
        assert difftilt(*arguments).code == 2
