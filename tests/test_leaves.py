"""Leaves are found by their files, read without import, loaded by name."""

import subprocess
import sys
from pathlib import Path

import pytest

from difftilt import leaves
from difftilt.card import Card
from difftilt.errors import UserError

ALL = [(kind, leaf) for kind in leaves.ROOMS for leaf in leaves.cards(kind)]


@pytest.mark.parametrize(("kind", "leaf"), ALL, ids=[f"{kind}-{leaf.card.name}" for kind, leaf in ALL])
def test_every_leaf_is_what_its_card_says(kind: str, leaf: leaves.Leaf) -> None:
    assert leaf.file.stem == leaf.card.name.replace("-", "_")
    assert leaf.card.paper
    assert leaves.find(kind, leaf.card.name) == leaf
    module = leaves.import_module(leaf.module, "test")
    assert leaf.card == module.CARD
    entry = leaves.load(kind, leaf.card.name)
    assert callable(entry)
    assert leaves.card_of(entry) == leaf.card


@pytest.mark.parametrize("kind", leaves.ROOMS)
def test_names_of_a_kind_are_unique(kind: str) -> None:
    names = [leaf.card.name for leaf in leaves.cards(kind)]
    assert len(names) == len(set(names))


def test_importing_the_package_and_listing_leaves_loads_no_torch() -> None:
    code = (
        "import sys, difftilt, difftilt.leaves as l; [l.cards(k) for k in l.ROOMS]; "
        "assert 'torch' not in sys.modules, 'torch'; assert 'difftilt.api' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no steerer 'best-of-m'; did you mean best-of-n\?"):
        leaves.load("steerers", "best-of-m")
    with pytest.raises(UserError, match=r"known: best-of-n, .*fk-steering, .*svdd"):
        leaves.find("steerers", "zzzz")
    with pytest.raises(UserError, match="did you mean methods"):
        leaves.cards("method")


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "leaf.py"
    file.write_text(text)
    return file


def test_a_card_is_parsed_not_executed(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'raise SystemExit("executed")\n'
        'CARD = Card(name="leaf", entry="Leaf", paper="one " "two", needs=("data",), laws=("ratio_one",))\n',
    )
    assert leaves.read_card(file) == Card("leaf", "Leaf", "one two", ("data",), ("ratio_one",))
    assert leaves.read_card(write(tmp_path, "# about a CARD\nx = 1\n")) is None


@pytest.mark.parametrize("call", ["Card(name=NAME)", 'Card("a", "b", "c")', 'Card(nmae="a")', "3", 'Card(name="a")'])
def test_a_card_that_is_not_literal_names_its_line(tmp_path: Path, call: str) -> None:
    with pytest.raises(UserError, match=r"leaf\.py:2: CARD must"):
        leaves.read_card(write(tmp_path, f"\nCARD = {call}\n"))


def test_foreign_classes_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_leaf.py").write_text("class Mine:\n    pass\n")
    (tmp_path / "foreign_needy.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert leaves.load("methods", "foreign_leaf:Mine").__name__ == "Mine"
    with pytest.raises(UserError, match=r"no class or function 'Mina' in it; did you mean Mine\?"):
        leaves.load("methods", "foreign_leaf:Mina")
    with pytest.raises(UserError, match="there is no module 'foreign_laef'"):
        leaves.load("methods", "foreign_laef:Mine")
    with pytest.raises(UserError, match="needs 'package_that_is_not_there', which is not installed: pip install"):
        leaves.load("methods", "foreign_needy:Mine")


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foreign_pot.py").write_text("raise ModuleNotFoundError('no', name='hypothesis')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'difftilt\[dev\]'"):
        leaves.load("methods", "foreign_pot:Mine")
