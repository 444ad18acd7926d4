"""The molecules testbed: strings, chemistry, rewards and their ranges, validity, the shipped model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED
from torch import Tensor

import difftilt
from difftilt.errors import UserError
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.distinct import DistinctReward
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.molecules import CHECKPOINT, Config, Molecules
from difftilt.testbeds.molecules_chemistry import BITS, SIDE, parse, picture
from difftilt.testbeds.molecules_rewards import Targets, fingerprints, identity_codes
from difftilt.testbeds.molecules_strings import (
    END,
    LENGTH,
    SYMBOLS,
    encode,
    joins,
    learn_words,
    smiles_of,
    split,
    tokens_of,
    training_smiles,
)

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
GOOD = [ASPIRIN, "c1ccccc1", "CCO", "C[N+](=O)[O-]", "BrCCl"]
BAD = ["C1CC", "CC(", "c1cccc1", "C=O=C", ""]


WORDS = Molecules().words


@pytest.fixture(scope="module")
def bed() -> Molecules:
    return Molecules()


def written(smiles: list[str]) -> Tensor:
    """Tokens of strings, every one of which has some."""
    media = tokens_of(smiles, WORDS)
    assert len(media) == len(smiles)
    return media


def samples(smiles: list[str]) -> Samples:
    media = written(smiles)
    return Samples(media, [""] * len(media), [""] * len(media), torch.zeros(len(media), dtype=torch.int64))


def scores(bed: Molecules, name: str, smiles: list[str]) -> Tensor:
    return bed.rewards()[name].score(samples(smiles))


def test_strings_and_tokens_are_inverse() -> None:
    every = [*training_smiles()[:200:5], *GOOD, *BAD]
    assert smiles_of(tokens_of(every, WORDS), WORDS) == every
    assert split("C[N+](=O)c1nc(Br)cc1Cl") == [*"C", "[N+]", *"(=O)c1nc(", "Br", *")cc1", "Cl"]
    assert written(["CCO"]).shape == (1, LENGTH)
    full = torch.zeros(1, LENGTH, dtype=torch.int64)  # no end: the whole sequence counts
    assert smiles_of(full, WORDS) == [WORDS[0] * LENGTH]


def test_what_does_not_fit_is_left_out() -> None:
    assert len(tokens_of(["C[Pt]C", "CC", "".join("CNO"[n % 3] for n in range(60))], WORDS)) == 1


def test_words_are_the_most_frequent_neighbours_merged() -> None:
    """abab ab: a worked example with symbols C and N in place of letters."""
    words = learn_words(["CNCN", "CN", "CNCNO"], 2)
    assert words == [*SYMBOLS, "CN", "CNCN", END]
    rank = {word: place for place, word in enumerate(words)}
    assert encode("OCNCNCN", rank) == ["O", "CNCN", "CN"]
    assert encode("NC", rank) == ["N", "C"]


def test_words_of_the_checkpoint_are_those_of_the_training_molecules() -> None:
    assert list(WORDS) == learn_words(training_smiles())
    lengths = (written(list(training_smiles()[:500:5])) != WORDS.index(END)).sum(1).float()
    assert 5 < float(lengths.mean()) < 9


@pytest.mark.parametrize(
    ("word", "answer"),
    [("c1ccccc1", False), ("c1cc", True), ("C(=O)", False), ("=O)", True), (")C(", True), ("CC", False), ("1", True)],
)
def test_words_that_join_what_stands_far_apart(word: str, answer: bool) -> None:
    assert joins(word) == answer


def test_training_molecules_are_different_and_canonical() -> None:
    every = training_smiles()
    assert 4000 < len(set(every)) == len(every) <= 5000
    for smiles in every[::40]:
        assert Chem.MolToSmiles(Chem.MolFromSmiles(smiles)) == smiles
        assert set(split(smiles)) <= set(SYMBOLS)


def test_validity_is_what_rdkit_reads(bed: Molecules, capfd: pytest.CaptureFixture[str]) -> None:
    flags = [True] * len(GOOD) + [False] * len(BAD)
    assert bed.valid(written(GOOD + BAD)).tolist() == flags
    assert scores(bed, "valid", GOOD + BAD).tolist() == [float(flag) for flag in flags]
    assert capfd.readouterr().err == ""  # RDKit says why, many times, unless it is told not to


def test_every_reward_lies_in_its_range_and_is_worst_where_there_is_no_molecule(bed: Molecules) -> None:
    smiles = list(training_smiles()[::60])
    for name, reward in bed.rewards().items():
        if reward.capabilities.set_valued:
            continue
        found = scores(bed, name, smiles)
        assert bool(((found >= 0) & (found <= 1)).all()), name
        assert found.dtype == torch.float32
        assert scores(bed, name, BAD).tolist() == [0.0] * len(BAD)
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
    smiles = ["OCC", "CCO", "C(O)C", "CCC", "CC(", ""]
    assert float(scores(bed, "distinct", smiles)) == pytest.approx(2 / 6)
    assert float(scores(bed, "distinct", BAD)) == 0
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
    drawn = bed.draw(written([ASPIRIN, "CC("]))
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
    short = replace(task, sampler=replace(task.sampler, grid=task.sampler.grid[::10]))
    result = difftilt.steer(short, method="best-of-n", particles=4, output=tmp_path / "run", forward_batch=4)
    (row,) = result.summary()["prompts"]
    assert row["text"] == bed.text(result.steered.media)[int(result.steered.best[0])]
    assert (tmp_path / "run" / "samples.png").exists()
