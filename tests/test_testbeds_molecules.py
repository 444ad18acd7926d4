"""The molecules testbed: strings, chemistry, rewards and their ranges, validity, the shipped model."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED
from selfies import split_selfies
from torch import Tensor

import difftilt
from difftilt import leaves
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.distinct import DistinctReward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.molecules import CHECKPOINT, Config, Molecules
from difftilt.testbeds.molecules_chemistry import BITS, SIDE, parse, picture
from difftilt.testbeds.molecules_rewards import MoleculeReward, Targets, fingerprints, identity_codes
from difftilt.testbeds.molecules_strings import (
    END,
    LENGTH,
    SYMBOLS,
    encode,
    learn_words,
    smiles_of,
    split,
    tokens_of,
    training_smiles,
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
GOOD = [ASPIRIN, "c1ccccc1", "CCO", "C[N+](=O)[O-]", "BrCCl"]
BAD = ["C1CC", "CC(", "c1cccc1", "C=O=C", ""]  # open ring, open branch, five aromatic carbons, four bonds of oxygen


WORDS = Molecules().words


@pytest.fixture(scope="module")
def bed() -> Molecules:
    return Molecules()


def written(smiles: list[str]) -> Tensor:
    """Tokens of molecules, and of the empty string."""
    media = tokens_of(smiles, WORDS)
    assert len(media) == len(smiles)
    return media


def short_enough(step: int) -> list[str]:
    """Every so many training molecules, without those that have too many words."""
    return [one for one in training_smiles()[::step] if len(tokens_of([one], WORDS))]


def samples(smiles: list[str]) -> Samples:
    media = written(smiles)
    return Samples(media, [""] * len(media), [""] * len(media), torch.zeros(len(media), dtype=torch.int64))


def scores(bed: Molecules, name: str, smiles: list[str]) -> Tensor:
    return bed.rewards()[name].score(samples(smiles))


def test_molecules_and_tokens_are_inverse(bed: Molecules) -> None:
    every = [*short_enough(100), *GOOD, ""]
    assert bed.text(written(every)) == [Chem.CanonSmiles(one) for one in every]
    assert written(["CCO"]).shape == (1, LENGTH)
    full = torch.full((1, LENGTH), WORDS.index("[C]"))  # no end: the whole sequence counts
    assert smiles_of(full, WORDS) == ["C" * LENGTH]


def test_a_molecule_in_symbols() -> None:
    """Acetic acid: what follows a branch is its length, here the symbol that counts as 1, [C] being 0."""
    assert split("CC(=O)O") == ("[C]", "[C]", "[=Branch1]", "[C]", "[=O]", "[O]")
    assert split("C[Fe]->C") == ()  # a bond that SELFIES has not


def test_what_does_not_fit_is_left_out() -> None:
    assert len(tokens_of(["C[Pt]C", "CC", "".join("CNO"[n % 3] for n in range(60))], WORDS)) == 1


def test_words_are_the_most_frequent_neighbours_merged() -> None:
    words = learn_words(["CNCN", "CN", "CNCNO"], 2)
    assert words == [*SYMBOLS, "[C][N]", "[C][N][C][N]", END]
    rank = {word: place for place, word in enumerate(words)}
    assert encode("OCNCNCN", rank) == ("[O]", "[C][N][C][N]", "[C][N]")
    assert encode("NC", rank) == ("[N]", "[C]")
    first = {word: place for place, word in enumerate([*SYMBOLS, "[C][N]", "[N][O]"])}
    assert encode("CNO", first) == ("[C][N]", "[O]")  # the earlier word, though both fit


def test_words_of_the_checkpoint_are_of_known_symbols() -> None:
    assert WORDS[: len(SYMBOLS)] == SYMBOLS
    assert WORDS[-1] == END
    assert all(set(split_selfies(word)) <= set(SYMBOLS) for word in WORDS[:-1])
    lengths = (written(short_enough(50)) != WORDS.index(END)).sum(1).float()
    assert 4 < float(lengths.mean()) < 8


@pytest.mark.long
def test_words_of_the_checkpoint_are_those_of_the_training_molecules() -> None:
    assert list(WORDS) == learn_words(training_smiles())


def test_every_sequence_is_a_molecule_if_it_has_an_atom(bed: Molecules) -> None:
    """What SELFIES is for: tokens at random, from no model."""
    media = torch.randint(len(WORDS) - 1, (500, LENGTH), generator=torch.Generator().manual_seed(0))
    assert bool(bed.valid(media).all())
    same = parse(smiles_of(media[:1], WORDS)[0])
    assert same is not None
    assert bed.text(media[:1]) == [same.smiles]


def test_training_molecules_are_different_and_canonical() -> None:
    every = training_smiles()
    assert 4000 < len(set(every)) == len(every) <= 5000
    for smiles in every[::40]:
        assert Chem.MolToSmiles(Chem.MolFromSmiles(smiles)) == smiles
        assert set(split(smiles)) <= set(SYMBOLS)
        assert "." not in smiles


def test_validity_is_what_rdkit_reads(bed: Molecules, capfd: pytest.CaptureFixture[str]) -> None:
    assert [parse(one) is not None for one in GOOD + BAD] == [True] * len(GOOD) + [False] * len(BAD)
    assert bed.valid(written([*GOOD, ""])).tolist() == [True] * len(GOOD) + [False]
    assert scores(bed, "valid", [*GOOD, ""]).tolist() == [1.0] * len(GOOD) + [0.0]
    assert capfd.readouterr().err == ""  # RDKit says why, many times, unless it is told not to


def test_every_reward_lies_in_its_range_and_is_worst_where_there_is_no_molecule(bed: Molecules) -> None:
    smiles = short_enough(60)
    assert len(smiles) > 60
    for name, reward in bed.rewards().items():
        if reward.capabilities.set_valued:
            continue
        found = scores(bed, name, smiles)
        assert bool(((found >= 0) & (found <= 1)).all()), name
        assert found.dtype == torch.float32
        assert scores(bed, name, [""]).tolist() == [0.0], name
        assert isinstance(reward, MoleculeReward)
        broken = MoleculeReward(name, lambda media: BAD, reward.of)  # what no sequence of the model spells
        assert broken.score(samples([""] * len(BAD))).tolist() == [0.0] * len(BAD), name
        if name not in ("valid", "novel"):
            assert len(set(found.tolist())) > 3, name


def test_rewards_are_the_properties_of_rdkit(bed: Molecules) -> None:
    mol = Chem.MolFromSmiles(ASPIRIN)
    assert float(scores(bed, "qed", [ASPIRIN])) == pytest.approx(QED.qed(mol))
    # an easy molecule: published scores of aspirin are about 1.6 of 1 to 10
    assert float(scores(bed, "sa", [ASPIRIN])) == pytest.approx((10 - 1.6) / 9, abs=0.02)
    assert scores(bed, "rings", ["CCO", "c1ccccc1", "c1ccc2ccccc2c1"]).tolist() == pytest.approx([0, 1 / 4, 1 / 2])
    benzene = parse("c1ccccc1")
    assert benzene is not None
    assert benzene.weight == pytest.approx(78.11, abs=0.01)
    for target, name in ((Targets(weight=benzene.weight), "weight"), (Targets(log_p=benzene.log_p), "logp")):
        tuned = Molecules(Config(targets=target))
        assert float(scores(tuned, name, ["c1ccccc1"])) == 1
        assert float(scores(tuned, name, ["CCO"])) < 1


def test_novelty_and_distinctness(bed: Molecules) -> None:
    known = training_smiles()[0]
    assert scores(bed, "novel", [known, "CCCCCCCCCCBr"]).tolist() == [0, 1]
    # the same molecule written in three ways, another one, and two that are none: two of six
    smiles = ["OCC", "CCO", "C(O)C", "CCC", "", ""]
    assert float(scores(bed, "distinct", smiles)) == pytest.approx(2 / 6)
    assert float(scores(bed, "distinct", ["", ""])) == 0
    codes = identity_codes(["OCC", "CCO", "CCC", "CC("])
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    assert codes[3].tolist() == [0, 0, 0]
    assert bool((codes == codes.round()).all())
    assert float(codes.max()) < 2**21  # exact in float32


def test_distinctness_of_groups() -> None:
    media = torch.tensor([[1], [1], [2], [0], [3], [4]])
    apart = DistinctReward(lambda rows: rows.float(), pooled=False)
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert apart.score(Samples(media, [""] * 6, [""] * 6, group)).tolist() == [0.5, 1]


def test_a_string_is_parsed_once(bed: Molecules) -> None:
    smiles = [f"{'C' * n}S(C)C" for n in range(1, 8)] * 3
    parse.cache_clear()
    for name in ("qed", "sa", "valid", "logp", "novel"):
        scores(bed, name, smiles)
    bed.valid(written(smiles))
    # novelty reads the training molecules, each of which is one string more
    assert parse.cache_info().misses <= 7 + 5000
    parse.cache_clear()
    scores(bed, "qed", smiles)
    assert parse.cache_info().misses == 7


def test_pictures_and_features(bed: Molecules) -> None:
    drawn = bed.draw(written([ASPIRIN, ""]))
    assert drawn.shape == (2, 3, SIDE, SIDE)
    assert 0 <= float(drawn.min()) < 0.5 < float(drawn.max()) <= 1
    assert float(drawn.mean((1, 2, 3)).min()) > 0.8  # thin lines on white
    red = (drawn[1, 0] > 0.9) & (drawn[1, 1] < 0.5)
    assert bool(red.any())
    assert torch.equal(picture("OCC"), picture("OCC"))
    bits = fingerprints(["OCC", "CCO", "CCC", "CC("])
    assert bits.shape == (4, BITS)
    assert torch.equal(bits[0], bits[1])
    assert not torch.equal(bits[0], bits[2])
    assert float(bits[3].sum()) == 0


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (torch.full((1, LENGTH), len(WORDS)), "masked positions spell no molecule"),
        (torch.zeros(1, LENGTH, len(WORDS)), "relaxed ones, as a gradient needs them, have no SMILES"),
    ],
)
def test_what_spells_no_string_is_refused(bed: Molecules, media: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bed.text(media)


@pytest.mark.parametrize("package", ["rdkit", "selfies"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("difftilt.testbeds.molecules")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs '{package}', which is not .* pip install 'difftilt\[molecules\]'"):
        leaves.load("testbeds", "molecules")


def test_an_unknown_reward_is_told_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'qed', 'logp', 'sa', 'weight', 'rings' or 'valid'"):
        difftilt.steer("molecules/best-of-n", overrides=["testbed.reward=qde"])


def test_the_checkpoint_names_its_tokens_and_is_small(bed: Molecules) -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 5_000_000
    task = bed.task()
    assert task.model.shape == (LENGTH,)
    assert isinstance(task.model.process, MaskedProcess)
    assert task.model.process.vocab == len(set(bed.words)) == len(WORDS)
    assert "valid" in task.heldout
    assert "valid" in Molecules(Config(reward="valid")).task().heldout
    assert "qed" not in task.heldout


def test_steering_keeps_the_strings(bed: Molecules, tmp_path: Path) -> None:
    task = bed.task()
    short = replace(task, sampler=replace(task.sampler, grid=task.sampler.grid[::4]))
    result = difftilt.steer(short, method="best-of-n", particles=4, output=tmp_path / "run", forward_batch=4)
    (row,) = result.summary()["prompts"]
    assert row["text"] == bed.text(result.steered.media)[int(result.steered.best[0])]
    assert (tmp_path / "run" / "samples.png").exists()
