import itertools

import pytest
import torch
from torch import Tensor, nn

from difftilt.rewards import Reward, Samples
from difftilt.rewards.classifier import ClassifierReward
from difftilt.rewards.image import ImageReward, ink, symmetry
from difftilt.rewards.tokens import Pairs, TokenWeights, token_weights
from difftilt.rewards.vector import distance, linear, quadratic, vector


def samples(media: Tensor, prompts: list[str] | None = None) -> Samples:
    prompts = prompts or [""] * len(media)
    return Samples(media, prompts, ["rewritten"] * len(media), torch.zeros(len(media), dtype=torch.int64))


def gradient(reward: Reward, media: Tensor) -> Tensor:
    media = media.clone().requires_grad_()
    return torch.autograd.grad(reward.score(samples(media)).sum(), media)[0]


def test_vector_rewards_and_their_gradients() -> None:
    x, c = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0.0, 0.0])
    b = torch.tensor([2.0, -1.0])
    assert linear(b).score(samples(x)).tolist() == [2.0, 0.0]
    assert quadratic(c).score(samples(x)).tolist() == [-25.0, 0.0]
    assert distance(c).score(samples(x)).tolist() == [-5.0, 0.0]
    assert torch.equal(gradient(linear(b), x), b.expand(2, 2))
    assert torch.equal(gradient(quadratic(c), x), -2 * x)
    torch.testing.assert_close(gradient(distance(c), x), -x / 5)
    assert vector("linear", [2.0, -1.0]).score(samples(x)).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="dimension 2"):
        linear(b).score(samples(torch.zeros(1, 3)))


def test_image_rewards() -> None:
    images = torch.zeros(2, 1, 4, 4)
    images[0, :, :, 0] = 1.0
    images[1, :, 1] = 0.5
    assert ink().score(samples(images)).tolist() == [0.25, 0.125]
    assert ink(dark=True).score(samples(images)).tolist() == [0.75, 0.875]
    assert symmetry().score(samples(images)).tolist() == [-0.5, 0.0]
    torch.testing.assert_close(gradient(ink(), images), torch.full_like(images, 1 / 16))
    # the bright left column pulls down, the dark column opposite pulls up, twice each: once as its mirror
    pull = gradient(symmetry(), images)[0, 0]
    torch.testing.assert_close(pull[:, 0], torch.full((4,), -2 / 16))
    torch.testing.assert_close(pull[:, 3], torch.full((4,), 2 / 16))
    assert ImageReward("ink").name == "ink"


@pytest.mark.parametrize("pairs", ["equal", "ordered"])
def test_token_weights_by_loop(pairs: Pairs) -> None:
    weights = [1.0, -2.0, 0.25]
    sequences = list(itertools.product(range(3), repeat=4))

    def count(word: tuple[int, ...]) -> int:
        return sum(a == b if pairs == "equal" else a < b for a, b in itertools.pairwise(word))

    expected = [sum(weights[letter] for letter in word) + 0.5 * count(word) for word in sequences]
    hard = torch.tensor(sequences)
    reward = token_weights(weights, pairs)
    assert reward.score(samples(hard)).tolist() == pytest.approx(expected)
    soft = nn.functional.one_hot(hard, 3).float()
    assert reward.score(samples(soft)).tolist() == pytest.approx(expected)


def test_relaxed_tokens_score_the_mean_over_independent_positions() -> None:
    law = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    reward = TokenWeights(torch.tensor([1.0, -2.0], dtype=torch.float64), "ordered")
    words = torch.tensor(list(itertools.product(range(2), repeat=3)))
    chance = torch.stack([law[0, i, words[:, i]] for i in range(3)]).prod(0)
    mean = (chance * reward.score(samples(words))).sum()
    assert reward.score(samples(law)).item() == pytest.approx(mean.item())
    assert gradient(reward, law).abs().min() > 0


def test_tokens_refuse_masks() -> None:
    reward = token_weights([1.0, 2.0])
    with pytest.raises(ValueError, match="masked"):
        reward.score(samples(torch.tensor([[0, 2]])))
    with pytest.raises(ValueError, match="mask symbol"):
        reward.score(samples(torch.zeros(1, 4, 3)))


def test_classifier_scores_the_class_of_the_users_prompt() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.9))
    media = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    classes = {"zero": 0, "one": 1, "two": 2}
    reward = ClassifierReward(network, classes)
    prompts = ["two", "zero", "one"]
    log_probs = network[0](media).log_softmax(-1).detach()
    expected = torch.stack([log_probs[0, 2], log_probs[1, 0], log_probs[2, 1]])
    torch.testing.assert_close(reward.score(samples(media, prompts)), expected)
    likely = ClassifierReward(network, classes.__getitem__, probability=True)
    torch.testing.assert_close(likely.score(samples(media, prompts)), expected.exp())
    with pytest.raises(ValueError, match=r"'five'; known prompts: one, two, zero"):
        reward.score(samples(media, ["five", "one", "one"]))


def test_classifier_is_frozen_and_passes_gradients_to_the_media() -> None:
    network = nn.Linear(2, 3)
    reward = ClassifierReward(network, {"": 1})
    media = torch.ones(2, 2)
    before = reward.score(samples(media))
    assert gradient(reward, media).abs().min() > 0
    with torch.no_grad():
        network.weight.zero_()
    assert torch.equal(reward.score(samples(media)), before)
    assert network.weight.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in reward.network.parameters())
