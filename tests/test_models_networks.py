"""Shapes, conditioning and determinism of the small networks."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models import MLP, DiT, MarkovPosterior, MaskedTransformer
from difftilt.process import RectifiedFlow


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def small(**options: object) -> DiT:
    return DiT(2, 8, 4, width=16, depth=2, heads=2, **options)  # pyright: ignore[reportArgumentType]


T = torch.tensor([0.1, 0.5, 0.9])


def test_building_touches_no_global_randomness_and_is_a_function_of_the_seed() -> None:
    before = torch.get_rng_state()
    nets = [small(classes=3, text=5, seed=seed) for seed in (0, 0, 1)]
    tokens = [MaskedTransformer(5, 6, width=16, heads=2, seed=seed) for seed in (0, 0, 1)]
    perceptrons = [MLP(4, classes=2, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    for first, again, other in (nets, tokens, perceptrons):
        one, two, three = (nn.utils.parameters_to_vector(n.parameters()) for n in (first, again, other))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)


def test_about_a_million_parameters() -> None:
    counts = [sum(p.numel() for p in DiT(3, 32, 8, width=w, text=64).parameters()) for w in (96, 128)]
    assert all(6e5 < count < 1.3e6 for count in counts), counts


def test_networks_start_at_zero_output() -> None:
    assert torch.equal(small()(normal(3, 2, 8, 8), T), torch.zeros(3, 2, 8, 8))
    assert torch.equal(MaskedTransformer(5, 6)(torch.full((3, 6), 5), T), torch.zeros(3, 6, 5))
    assert torch.equal(MLP(4, zero=True)(normal(3, 4), T), torch.zeros(3, 4))


def test_patches_come_back_to_their_place() -> None:
    """A bias of the head moves pixel (channel, row, column) of every patch alike."""
    network = small()
    with torch.no_grad():
        network.head.project.bias.copy_(torch.arange(32.0))
    image = network(normal(3, 2, 8, 8), T)
    patch = torch.arange(32.0).reshape(2, 4, 4)
    assert torch.equal(image[0], patch.repeat(1, 2, 2))
    # a network whose only working part is the embedding of one patch changes that patch's output alone
    network = small()
    randomised(network.embed)
    randomised(network.head)
    x = normal(1, 2, 8, 8)
    changed = x.clone()
    changed[0, :, 4:, :4] += 1
    for block in network.blocks:
        nn.init.zeros_(block.get_parameter("attention.output.weight"))
    moved = (network(changed, T[:1]) != network(x, T[:1])).any(1)[0]
    assert bool(moved[4:, :4].any())
    assert not bool(moved[:4].any() or moved[4:, 4:].any())


def test_every_condition_matters_and_padding_does_not() -> None:
    network = randomised(small(classes=3, vector=2, text=5))
    x = normal(3, 2, 8, 8)
    given = {
        "label": torch.tensor([0, 1, 3]),
        "vector": normal(3, 2),
        "text": normal(3, 4, 5),
        "text_keep": torch.tensor([[True, True, False, False]] * 3),
    }
    plain = network(x, T, given)
    assert not torch.allclose(plain, network(x, T.flip(0), given), atol=1e-4)
    for part, value in (
        ("label", torch.tensor([1, 2, 0])),
        ("vector", normal(3, 2) + 1),
        ("text", normal(3, 4, 5) + 1),
    ):
        assert not torch.allclose(plain, network(x, T, {**given, part: value}), atol=1e-4)
    padding = given["text"].clone()
    padding[:, 2:] = 9.0
    assert torch.equal(plain, network(x, T, {**given, "text": padding}))
    nothing = network(x, T, {**given, "text_keep": torch.zeros(3, 4, dtype=torch.bool)})
    assert bool(nothing.isfinite().all())
    with pytest.raises(ValueError, match="lacks vector, text"):
        network(x, T, {"label": given["label"]})


def test_cross_attention_starts_without_effect() -> None:
    network = small(text=5)
    randomised(network.head)
    x = normal(3, 2, 8, 8)
    assert torch.equal(network(x, T, normal(3, 4, 5)), network(x, T, 2 + normal(3, 4, 5)))


def test_x0_form_is_the_velocity_of_its_clean_image() -> None:
    direct, inside = randomised(small()), randomised(small(form="x0_velocity"))
    x, t = normal(2, 2, 8, 8), torch.tensor([0.2, 0.8])
    prediction = RectifiedFlow().predict(inside(x, t), x, t, "velocity")
    assert torch.allclose(prediction.x0, direct(x, t), atol=1e-5)


def test_relaxed_tokens_agree_with_hard_ones_and_carry_gradient() -> None:
    network = randomised(MaskedTransformer(5, 6, width=16, depth=2, heads=2, classes=2))
    tokens, label = torch.tensor([[0, 5, 2, 5, 4, 1]] * 3), torch.tensor([0, 1, 2])
    relaxed = nn.functional.one_hot(tokens, 6).float().requires_grad_(True)
    logits = network(relaxed, T, label)
    assert torch.allclose(logits, network(tokens, T, label), atol=1e-5)
    (slope,) = torch.autograd.grad(logits[0].square().sum(), relaxed)
    assert float(slope[0].abs().max()) > 0
    assert float(slope[1:].abs().max()) == 0
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in pairwise(network(tokens, T[:1].expand(3), label)))


def test_markov_residual_reads_relaxed_states() -> None:
    chain = MarkovPosterior(torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), length=3)
    randomised(chain)
    relaxed = torch.full((3, 3, 3), 1 / 3).requires_grad_(True)
    (slope,) = torch.autograd.grad(chain(relaxed, T)[..., 0].sum(), relaxed)
    assert float(slope.abs().max()) > 0


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="divide size"):
        DiT(1, 8, 3)
    with pytest.raises(UserError, match="multiple of twice"):
        MaskedTransformer(5, 6, width=18, heads=4)
