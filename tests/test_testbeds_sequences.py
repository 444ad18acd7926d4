import pytest
import torch
from pydantic import ValidationError

from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.protocol import Samples
from difftilt.statistics import total_variation
from difftilt.testbeds.enumeration import chain_expectation, chain_law
from difftilt.testbeds.sequences import Config, Sequences


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length": 8, "letters": 4}, "too many to enumerate"),
        ({"weights": (1.0, 2.0)}, "weights must be 4"),
        ({"onward": 1.0}, "onward"),
        ({"letter": 3}, "letter"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)


def test_transition_prefers_the_next_letter() -> None:
    bed = Sequences(Config(letters=3))
    expected = torch.tensor([[0.15, 0.7, 0.15], [0.15, 0.15, 0.7], [0.7, 0.15, 0.15]], dtype=torch.float64)
    assert torch.allclose(bed.transition, expected, atol=1e-12)


def test_one_step_reveals_all_positions_independently() -> None:
    def network(x_t: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        return torch.log(torch.tensor([0.2, 0.8])).expand(*x_t.shape, 2)

    law = chain_law(network, MaskedProcess(2), 3, uniform_grid(1))
    ones = torch.tensor([0, 1, 1, 2, 1, 2, 2, 3])
    assert torch.allclose(law, (0.2 ** (3 - ones) * 0.8**ones).double(), atol=1e-7)


def test_forward_and_backward_recursions_agree_for_any_network() -> None:
    bed = Sequences(Config(length=3, letters=3, steps=5))
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4**3, 3, 3, generator=generator)

    def network(x_t: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        return table[(x_t * torch.tensor([16, 4, 1])).sum(1)] * t[:, None, None]

    f = torch.randn(27, generator=generator, dtype=torch.float64)
    law = chain_law(network, bed.process, 3, bed.grid)
    h = chain_expectation(network, bed.process, 3, bed.grid, f)
    assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(h[0, -1]) == pytest.approx(float(law @ f), abs=1e-12)


def test_soft_value_of_a_finished_sequence_is_its_reward() -> None:
    bed = Sequences()
    value = bed.soft_value(bed.sequences, torch.zeros(len(bed.sequences)))
    assert torch.allclose(value, bed.rewards, atol=1e-10)


def test_soft_value_is_a_martingale_along_one_step() -> None:
    """With one masked token left at the last step, the value is the average over its conditional law."""
    bed = Sequences()
    state = torch.tensor([[0, 4, 2, 1]])
    conditional = (bed.transition[0] * bed.transition[:, 2]) / (bed.transition[0] @ bed.transition[:, 2])
    finished = torch.tensor([[0, letter, 2, 1] for letter in range(4)])
    rewards = bed.soft_value(finished, torch.zeros(4))
    beta = bed.config.temperature
    expected = beta * (conditional @ (rewards / beta).exp()).log()
    assert float(bed.soft_value(state, bed.grid[-2:-1])) == pytest.approx(float(expected), abs=1e-6)


def test_soft_value_refuses_a_time_off_the_grid() -> None:
    bed = Sequences()
    with pytest.raises(ValueError, match="the sampler has the times"):
        bed.soft_value(torch.full((1, 4), 4), torch.tensor([0.3]))


def test_a_new_model_has_the_law_of_the_base() -> None:
    bed = Sequences()
    task = bed.task()
    assert float(total_variation(bed.law(task.model.network), bed.base_law)) < 1e-12
    assert bed.law_distance(task.model.network) == pytest.approx(
        float(total_variation(bed.base_law, bed.tilted())), abs=1e-12
    )


def test_a_reweighted_network_moves_towards_the_letters_it_prefers() -> None:
    bed = Sequences()

    def network(x_t: torch.Tensor, t: torch.Tensor, condition: object) -> torch.Tensor:
        return bed.base(x_t, t) + torch.tensor([0.0, 0.0, 0.0, 3.0])

    share = (bed.sequences == 3).double().mean(1)
    assert float(bed.law(network) @ share) > 0.6 > 0.3 > float(bed.base_law @ share)


def test_distance_of_weighted_samples() -> None:
    """Every sequence once, weighted by the target: an exact empirical law."""
    bed = Sequences()
    assert bed.distance_to_target(bed.sequences, weights=bed.tilted()) < 1e-12
    assert bed.distance_to_target(bed.sequences) > 0.3


def test_naturalness_is_the_log_likelihood_per_token() -> None:
    bed = Sequences()
    index = torch.zeros(len(bed.sequences), dtype=torch.int64)
    score = bed.task().heldout["naturalness"].score(Samples(bed.sequences, [""] * 256, [""] * 256, index))
    assert float((4 * score.double()).exp().sum()) == pytest.approx(1.0, abs=1e-5)
    # 0 1 2 3: three onward moves from a uniform start
    onward = (torch.tensor([0.25]).log() + 3 * torch.tensor([0.7]).log()) / 4
    assert float(score[int(torch.tensor([0, 1, 2, 3]) @ torch.tensor([64, 16, 4, 1]))]) == pytest.approx(float(onward))
