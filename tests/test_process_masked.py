"""SUBS, relaxed states and the corners of the masked process."""

import pytest
import torch

from difftilt.process import MaskedProcess

PROCESS = MaskedProcess(vocab=3)
T = torch.tensor([0.5])


def test_subs_gives_the_mask_no_mass_and_carries_visible_tokens_over() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0, 50.0], [1.0, 2.0, 3.0, 50.0]]])
    prediction = PROCESS.predict(logits, torch.tensor([[3, 1]]), T, "logits")
    probs = prediction.log_probs.exp()
    assert torch.allclose(probs[0, 0], torch.tensor([1.0, 2.0, 3.0]).softmax(0))
    assert torch.equal(probs[0, 1], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(prediction.x0, torch.tensor([[2, 1]]))


def test_a_relaxed_state_is_read_by_its_argmax() -> None:
    logits = torch.zeros(1, 2, 3)
    relaxed = torch.tensor([[[0.1, 0.2, 0.1, 0.6], [0.1, 0.5, 0.1, 0.3]]])
    hard = torch.tensor([[3, 1]])
    assert torch.equal(PROCESS.visible(relaxed), hard)
    assert torch.equal(
        PROCESS.predict(logits, relaxed, T, "logits").log_probs, PROCESS.predict(logits, hard, T, "logits").log_probs
    )


def test_gradient_reaches_masked_positions_only_and_is_finite() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    log_probs = PROCESS.predict(logits, torch.tensor([[3, 1]]), T, "logits").log_probs
    log_probs[0, :, 1].sum().backward()
    assert logits.grad is not None
    assert torch.allclose(logits.grad[0, 0], torch.tensor([-1 / 3, 2 / 3, -1 / 3]))
    assert torch.equal(logits.grad[0, 1], torch.zeros(3))


def test_ends_of_time_are_exact() -> None:
    x_0 = torch.tensor([[0, 1, 2]])
    for u in (2.0**-24, 1 - 2.0**-24):
        noise = torch.full((1, 3), u)
        assert torch.equal(PROCESS.corrupt(x_0, torch.tensor([0.0]), noise), x_0)
        assert torch.equal(PROCESS.corrupt(x_0, torch.tensor([1.0]), noise), PROCESS.prior(noise))
        assert torch.equal(PROCESS.renoise(x_0, T, T, noise), x_0)
        assert torch.equal(PROCESS.renoise(x_0, T, torch.tensor([1.0]), noise), PROCESS.prior(noise))


def test_renoising_keeps_masks() -> None:
    masked = PROCESS.prior(torch.zeros(1, 3))
    assert torch.equal(PROCESS.renoise(masked, T, torch.tensor([0.9]), torch.full((1, 3), 0.999)), masked)


def test_draws_of_x0_follow_the_marginals_and_keep_visible_tokens() -> None:
    n = 20_000
    strata = (torch.arange(n) + 0.5) / n
    shuffles = [torch.randperm(n, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    noise = torch.stack([strata[order] for order in shuffles], -1).reshape(n, 2, 3)
    prediction = PROCESS.predict(
        torch.tensor([1.0, 2.0, 3.0]).expand(n, 2, 3), torch.tensor([[3, 1]]).expand(n, 2), T.expand(n), "logits"
    )
    assert prediction.x0_noise_shape() == (2, 3)
    drawn = prediction.draw_x0(noise)
    assert bool((drawn[:, 1] == 1).all())
    frequency = torch.bincount(drawn[:, 0], minlength=3) / n
    # four standard errors of a frequency of at most 1/2
    assert torch.allclose(frequency, torch.tensor([1.0, 2.0, 3.0]).softmax(0), atol=4 * 0.5 / n**0.5)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="reads logits"):
        PROCESS.predict(torch.zeros(1, 2, 3), torch.tensor([[3, 1]]), T, "x0")
