"""Tokens that are masked later than others: corners of process, kernel and losses. Laws are in checks/masking.py."""

import pytest
import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.objectives import invalid_loss, masked_error
from difftilt.process import MaskedProcess
from difftilt.sampling.kernels import Unmasking

BONDED = MaskedProcess(3, bond=(False, True, False), power=3.0)
T, S = torch.tensor([0.8]), torch.tensor([0.4])


def even(x: Tensor) -> Tensor:
    """Bonds of clean sequences by their place."""
    return (torch.arange(x.shape[1]) % 2 == 0).expand(x.shape)


def test_masks_by_the_class_of_the_token() -> None:
    x_0, noise = torch.tensor([[0, 1, 2]]), torch.full((1, 3), 0.6)
    assert BONDED.corrupt(x_0, T, noise).tolist() == [[3, 1, 3]]  # 0.512 < 0.6 < 0.8
    placed = MaskedProcess(3, bond=even, power=3.0)
    assert placed.corrupt(x_0, T, noise).tolist() == [[0, 3, 2]]
    assert torch.allclose(placed.loss_weight(x_0, T), torch.tensor([[3.0, 1.0, 3.0]]) / 0.8)
    assert torch.allclose(BONDED.loss_weight(x_0, T), torch.tensor([[1.0, 3.0, 1.0]]) / 0.8)


def test_ends_of_time_are_exact() -> None:
    x_0 = torch.tensor([[0, 1, 2]])
    for u in (2.0**-24, 1 - 2.0**-24):
        noise = torch.full((1, 3), u)
        assert torch.equal(BONDED.corrupt(x_0, torch.tensor([0.0]), noise), x_0)
        assert torch.equal(BONDED.corrupt(x_0, torch.tensor([1.0]), noise), BONDED.prior(noise))
        assert torch.equal(BONDED.renoise(x_0, T, T, noise), x_0)
        assert torch.equal(BONDED.renoise(x_0, T, torch.tensor([1.0]), noise), BONDED.prior(noise))
        assert torch.equal(BONDED.renoise(BONDED.prior(noise), S, T, noise), BONDED.prior(noise))


def test_reveals_a_bond_with_its_own_probability() -> None:
    law = torch.tensor([0.2, 0.5, 0.3])
    x_t = torch.tensor([[3, 0]])
    step = Unmasking()(BONDED.predict(law.log().expand(1, 2, 3), x_t, T, "logits"), x_t, T, S)
    reveal = torch.tensor([0.5, (0.8**3 - 0.4**3) / 0.8**3, 0.5])
    expected = torch.cat([law * reveal, 1 - (law * reveal).sum(0, keepdim=True)])
    assert torch.allclose(step.log_probs[0, 0].exp(), expected, atol=1e-6)
    assert step.log_probs[0, 1].exp().tolist() == [1, 0, 0, 0]


def test_the_last_step_leaves_no_mask_and_finite_gradients() -> None:
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x_t = torch.tensor([[3, 0]])
    step = Unmasking()(BONDED.predict(logits, x_t, T, "logits"), x_t, T, torch.zeros(1))
    assert step.log_probs[0, 0].exp().tolist()[-1] == 0
    step.log_prob(torch.tensor([[1, 0]]), reduce="sum").sum().backward()
    assert logits.grad is not None
    law = logits.detach()[0, 0].softmax(0)
    assert torch.allclose(logits.grad[0, 0], torch.tensor([0.0, 1.0, 0.0]) - law, atol=1e-6)
    assert logits.grad[0, 1].abs().max() == 0


def test_one_power_for_all_is_the_plain_process_bit_for_bit() -> None:
    plain, same = MaskedProcess(3), MaskedProcess(3, bond=(True, False, True), power=1.0)
    logits = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1))
    x_t = torch.tensor([[3, 0]])
    steps = [Unmasking()(process.predict(logits, x_t, T, "logits"), x_t, T, S) for process in (plain, same)]
    assert torch.equal(steps[0].log_probs, steps[1].log_probs)


def test_a_function_of_clean_sequences_cannot_tell_what_a_mask_hides() -> None:
    placed = MaskedProcess(3, bond=even, power=3.0)
    x_t = torch.tensor([[3, 0]])
    prediction = placed.predict(torch.zeros(1, 2, 3), x_t, T, "logits")
    for use in (
        lambda: Unmasking()(prediction, x_t, T, S),
        lambda: placed.renoise(x_t, S, T, torch.zeros(1, 2)),
        lambda: placed.symbol_mask_probability(T),
    ):
        with pytest.raises(UserError, match="give a flag for each token"):
            use()
    assert masked_error(prediction, torch.tensor([[1, 0]]), rate_term=False).isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"), [({"bond": (True,)}, "1 flags: give one for each of the 3"), ({"power": 0.0}, "power 0.0")]
)
def test_impossible_schedules_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MaskedProcess(3, **values)  # pyright: ignore[reportArgumentType]


def test_the_bound_of_plain_tokens_is_the_weighted_log_likelihood_of_masked_positions() -> None:
    process, x_0, x_t = MaskedProcess(3), torch.tensor([[2, 0, 1]]), torch.tensor([[3, 0, 3]])
    logits = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(2))
    law = logits.log_softmax(-1)[0]
    found = [masked_error(process.predict(logits, x_t, T, "logits"), x_0, rate_term=flag) for flag in (True, False)]
    assert torch.equal(found[0], found[1])
    assert torch.allclose(found[0], -(law[0, 2] + law[2, 1])[None] / 0.8)


def test_the_invalid_loss_has_the_gradient_of_its_formula() -> None:
    """dL/dlogit_v = p(x̃)(1[v = x̃] - p(v)) at masked positions of invalid rows; nothing else moves."""
    process, x_t = MaskedProcess(3), torch.tensor([[3, 1, 3], [3, 3, 3]])
    logits = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3)).requires_grad_()
    loss = invalid_loss(process.predict(logits, x_t, T.expand(2), "logits"), torch.tensor([True, False]))
    law = logits.detach().softmax(-1)
    top = law.max(-1)
    assert torch.allclose(loss.detach(), torch.stack([top.values[0, 0] + top.values[0, 2], torch.tensor(0.0)]))
    loss.sum().backward()
    expected = top.values[..., None] * (torch.nn.functional.one_hot(top.indices, 3) - law)
    expected[0, 1] = expected[1] = 0
    assert logits.grad is not None
    assert torch.allclose(logits.grad, expected, atol=1e-7)
    # a step against the gradient makes the chosen string less likely
    moved = (logits - 0.1 * logits.grad).detach().softmax(-1)
    assert bool((moved.gather(-1, top.indices[..., None]) < top.values[..., None])[0, [0, 2]].all())
