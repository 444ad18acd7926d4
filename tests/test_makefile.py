"""``make demo`` replaces an earlier demo only by a finished one."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
# stands for python -m difftilt COMMAND ...
test "$3" = "$FAILS" && exit 1
case "$3" in
train|steer) mkdir -p "$6" && echo new > "$6/result" ;;
report) echo "$4/report.html" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A directory with an earlier demo, and something in place of the library."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("constraints.txt", "pyproject.toml", "stamp"):  # the stamp is the newest: nothing is installed
        (tmp_path / name).touch()
    for name in ("demo", "demo-steering"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result").write_text("old\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    return tmp_path


def demo(clone: Path, fails: str) -> subprocess.CompletedProcess[str]:
    words = ["make", "demo", "BIN=bin", "STAMP=stamp"]
    return subprocess.run(
        words, cwd=clone, env={"PATH": "/usr/bin:/bin", "FAILS": fails}, capture_output=True, text=True, check=False
    )


def results(clone: Path) -> list[str]:
    return [(clone / "runs" / name / "result").read_text().strip() for name in ("demo", "demo-steering")]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("fails", ["train", "steer"])
def test_a_demo_that_does_not_finish_leaves_the_earlier_one(clone: Path, fails: str) -> None:
    assert demo(clone, fails).returncode != 0
    assert results(clone) == ["old", "old"]
    # and the next one is not disturbed by what it left
    assert demo(clone, "").returncode == 0
    assert results(clone) == ["new", "new"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_finished_demo_takes_its_place_and_ends_with_the_path_of_its_page(clone: Path) -> None:
    ran = demo(clone, "nothing")
    assert ran.returncode == 0, ran.stderr
    assert results(clone) == ["new", "new"]
    assert ran.stdout.splitlines()[-1] == "runs/demo/report.html"
    assert {path.name for path in (clone / "runs").iterdir()} == {"demo", "demo-steering"}
