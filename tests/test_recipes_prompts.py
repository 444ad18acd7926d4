"""Prompt files: what is read from them, what is kept of them, and what is told about a bad one."""

import json
from pathlib import Path

import pytest

import difftilt as package
from command_line import CommandLine
from difftilt.errors import UserError
from difftilt.recipes import load_recipe
from difftilt.recipes.prompts import read_prompts

SMALL = ["testbed.steps=1", "steerer.particles=2"]
WANTED = ["two red circles", "a blue square left of a green circle"]


@pytest.fixture
def difftilt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_a_file_gives_what_the_same_list_gives(difftilt: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeff# mine\r\n\r\n  {WANTED[0]}\r\n  # not this one\r\n{WANTED[1]}".encode())
    assert read_prompts(str(file)) == {"line 3": WANTED[0], "line 5": WANTED[1]}
    listed = package.steer("shapes/best-of-n", overrides=[*SMALL, f"steering.prompts={json.dumps(WANTED)}"])
    for way in (["--prompts-file", file], [f"steering.prompts={file}"]):
        output = tmp_path / f"steered-{len(way)}"
        ran = difftilt("steer", "shapes/best-of-n", "--output", output, "--json", *SMALL, *way)
        assert ran.code == 0, ran.err
        told = json.loads(ran.out)
        assert [row["prompt"] for row in told["prompts"]] == WANTED
        assert told["prompts"] == json.loads(json.dumps(listed.summary()["prompts"]))
        # the file may change afterwards: the run keeps the prompts
        assert load_recipe(output / "config.yaml").steering.prompts == tuple(WANTED)


@pytest.mark.parametrize("text", ["", "\n  \n", "# only\n#comments"])
def test_a_file_without_prompts_is_named(difftilt: CommandLine, tmp_path: Path, text: str) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text(text)
    ran = difftilt("steer", "shapes/best-of-n", "--output", output, "--prompts-file", file)
    assert ran.code == 2
    assert ran.err.startswith(f"error: prompt file {file} holds no prompt")
    assert not output.exists()


def test_every_bad_line_is_told_with_its_file_and_number(difftilt: CommandLine, tmp_path: Path) -> None:
    file, output = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("# mine\na red circle\n\na red cirle\ntwo blue\n")
    ran = difftilt("steer", "shapes/best-of-n", "--output", output, "--prompts-file", file)
    assert ran.code == 2
    first, second, third = ran.err.strip().splitlines()
    assert first == f"error: 2 errors in {file}"
    assert second.startswith("  line 4: prompt 'a red cirle': 'cirle' is not in the vocabulary; did you mean circle")
    assert third.startswith("  line 5: prompt 'two blue': ")
    assert not output.exists()


def test_what_is_no_prompt_file(difftilt: CommandLine, tmp_path: Path) -> None:
    binary = tmp_path / "prompts.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    for name, reason in ((binary, "not UTF-8 text"), (tmp_path, "directory"), (tmp_path / "none", "No such file")):
        with pytest.raises(UserError, match=reason) as caught:
            read_prompts(str(name))
        assert str(name) in str(caught.value)
    both = difftilt("steer", "shapes/best-of-n", "--json", "--prompts", WANTED[0], "--prompts-file", binary)
    assert both.code == 2
    assert "either --prompts or --prompts-file" in both.err
    with pytest.raises(UserError, match="give the prompts as a list"):
        package.steer("shapes/best-of-n", overrides=[*SMALL, "steering.prompts=two red circles"])
    with pytest.raises(UserError, match=r"steering\.prompts"):
        load_recipe("shapes/best-of-n", ["steering.prompts=[]"])
