"""The peptides testbed: properties against RDKit and by hand, the rules, and the exact tilt."""

import math

import pytest
import torch
from rdkit import Chem
from rdkit.Chem import Descriptors
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards.protocol import Samples
from difftilt.testbeds import peptides_properties as properties
from difftilt.testbeds.peptides import Config, Peptides
from difftilt.testbeds.peptides_properties import LETTERS


def tokens(*peptides: str) -> Tensor:
    return torch.tensor([[LETTERS.index(letter) for letter in one] for one in peptides])


def samples(media: Tensor) -> Samples:
    return Samples(media, [""] * len(media), [""] * len(media), torch.zeros(len(media), dtype=torch.int64))


def test_tables_hold_all_residues() -> None:
    assert len(set(LETTERS)) == 20
    assert sum(properties.FREQUENCY.values()) == pytest.approx(100, abs=0.5)
    for table in (properties.FREQUENCY, properties.HYDROPHOBICITY, properties.MASS):
        assert set(table) == set(LETTERS)


def test_weight_is_that_of_rdkit() -> None:
    peptides = [LETTERS, LETTERS[::-1], "A" * 20, *(letter * 20 for letter in "GWRCMHK")]
    for peptide, weight in zip(peptides, properties.weight(tokens(*peptides)).tolist(), strict=True):
        exact = Descriptors.MolWt(Chem.MolFromFASTA(peptide))  # pyright: ignore[reportAttributeAccessIssue]
        # RDKit rounds atomic weights to three decimals, four nitrogens to 0.0012; that of sulfur, which differs between
        # ores, is known to 0.006
        assert weight == pytest.approx(exact, abs=0.0015 * 20 + 0.006 * (peptide.count("C") + peptide.count("M")))


def test_charge_is_half_at_the_pka_and_whole_far_from_it() -> None:
    side = properties.residue_charges
    for letter, pka in properties.PKA.items():
        sign = 1 if letter in properties.BASES else -1
        place = LETTERS.index(letter)
        assert float(side(pka)[place]) == pytest.approx(sign / 2)
        assert float(side(pka - 8 * sign)[place]) == pytest.approx(sign, abs=1e-6)
        assert float(side(pka + 8 * sign)[place]) == pytest.approx(0, abs=1e-6)
    assert properties.end_charge((properties.PKA_AMINO + properties.PKA_CARBOXYL) / 2) == pytest.approx(0)
    found = properties.charge(tokens("KKRRAA", "DDEEAA", "GGGGAA"))
    assert found.tolist() == pytest.approx([4 - 0.02, -4 - 0.02, -0.02], abs=0.01)


def test_moment_of_hand_made_helices() -> None:
    letters = [LETTERS[0]] * 18  # 18 residues are five whole turns of 100 degrees: equal ones cancel
    assert float(properties.moment(tokens("".join(letters)))) == pytest.approx(0, abs=1e-12)
    face = "".join("I" if math.cos(math.radians(100 * n)) > 0 else "R" for n in range(18))
    shuffled = "".join(sorted(face))
    assert float(properties.moment(tokens(face))) > 3 * float(properties.moment(tokens(shuffled)))
    high, low = properties.HYDROPHOBICITY["I"], properties.HYDROPHOBICITY["R"]
    expected = sum((high if one == "I" else low) * complex(math.cos(a), math.sin(a)) for one, a in angles(face))
    assert float(properties.moment(tokens(face))) == pytest.approx(abs(expected) / 18)


def angles(peptide: str) -> list[tuple[str, float]]:
    return [(letter, math.radians(100 * place)) for place, letter in enumerate(peptide)]


@pytest.mark.parametrize(
    ("peptide", "good"),
    [
        ("KSTQKSTQ", True),
        ("KKSTQKST", True),
        ("KKKSTQST", False),  # three in a row
        ("STQKSKKK", False),
        ("KSTDGSTQ", False),  # fragile pairs
        ("KSTNGSTQ", False),
        ("KSTQKSDP", False),
        ("KSTGDSTQ", True),
        ("AVLISTQK", True),  # half of it hydrophobic
        ("AVLIFTQK", False),
    ],
)
def test_the_rules(peptide: str, good: bool) -> None:
    bed = Peptides(Config(length=8))
    assert bed.valid(tokens(peptide)).tolist() == [good]
    assert bed.task().valid is not None
    assert float(bed.rewards()["valid"].score(samples(tokens(peptide)))) == good


def test_neither_all_nor_none_of_the_base_is_valid() -> None:
    bed = Peptides()
    drawn = bed.chain.draw(torch.rand(4000, 12, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < float(bed.valid(drawn).float().mean()) < 0.8


def test_rewards_are_the_properties() -> None:
    bed, media = Peptides(Config(length=6)), tokens("KKRRAA", "ILMVSS")
    rewards = bed.rewards()
    assert torch.allclose(rewards["charge"].score(samples(media)).double(), properties.charge(media), atol=1e-5)
    gap = (properties.weight(media) - 1300) / 100
    assert torch.allclose(rewards["weight"].score(samples(media)).double(), (-gap.square() / 2).exp(), atol=1e-6)
    assert bed.text(media) == ["KKRRAA", "ILMVSS"]
    twice = samples(media[[0, 0, 1]])
    assert float(rewards["distinct"].score(twice)) == pytest.approx(2 / 3)


@pytest.mark.parametrize("reward", ["charge", "hydrophobicity"])
def test_the_sum_over_positions_is_the_reward(reward: str) -> None:
    bed = Peptides(Config.model_validate({"reward": reward}))
    scores, constant = bed.additive()
    media = torch.randint(20, (50, 12), generator=torch.Generator().manual_seed(1))
    summed = scores[torch.arange(12), media].sum(1) + constant
    assert torch.allclose(summed.float(), bed.rewards()[reward].score(samples(media)), atol=1e-5)


def test_other_rewards_have_no_exact_tilt() -> None:
    with pytest.raises(UserError, match="'moment' is not known: use charge or hydrophobicity"):
        Peptides(Config(reward="moment")).tilted()


def test_the_target_is_what_reweighting_of_the_base_tends_to() -> None:
    """At temperature 2 weights are tame: 20 000 draws of the chain, weighted by exp(r/2)."""
    bed, count = Peptides(Config(temperature=2.0)), 20_000
    drawn = bed.chain.draw(torch.rand(count, 12, generator=torch.Generator().manual_seed(2)))
    rewards = properties.charge(drawn)
    weights = (rewards / 2).exp()
    size = float(weights.sum() ** 2 / weights.square().sum())
    assert bed.log_z() == pytest.approx(float(weights.mean().log()), abs=4 / size**0.5)
    mean = float((weights * rewards).sum() / weights.sum())
    assert bed.expected_reward() == pytest.approx(mean, abs=4 * float(rewards.std()) / size**0.5)
    # the floor of samples of p* itself, doubled
    assert bed.marginal_distance(drawn, weights=weights) < 2 * (19 / (2 * math.pi * size)) ** 0.5
    assert bed.marginal_distance(drawn) > 0.05


def test_soft_values_are_those_of_enumeration() -> None:
    """With three residues left all completions are summed; the empty peptide gives log Z."""
    bed = Peptides(Config(length=4, temperature=0.7))
    state = torch.tensor([[20, 3, 20, 20], [20, 20, 20, 20], [1, 3, 5, 7]])
    every = torch.cartesian_prod(*[torch.arange(20)] * 3)
    full = torch.cat([every[:, :1], torch.full((len(every), 1), 3), every[:, 1:]], 1)
    law = bed.chain.log_prob(full).log_softmax(0)
    expected = 0.7 * (law + properties.charge(full) / 0.7).logsumexp(0)
    found = bed.soft_value(state)
    assert float(found[0]) == pytest.approx(float(expected), abs=1e-9)
    assert float(found[1]) == pytest.approx(0.7 * bed.log_z(), abs=1e-9)
    assert float(found[2]) == pytest.approx(float(properties.charge(state[2:])), abs=1e-9)
