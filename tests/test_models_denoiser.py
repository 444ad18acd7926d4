"""Guidance, ledger and the padded forward shape."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from difftilt.errors import UserError
from difftilt.models import (
    DiT,
    GaussianMixture,
    GenerativeModel,
    Ledger,
    MaskedTransformer,
    MixtureVelocity,
    Network,
    NetworkDenoiser,
    Stateful,
    denoiser,
)
from difftilt.process import Condition, GaussianPrediction, MaskedProcess, Process, RectifiedFlow, TokenPrediction
from difftilt.trees import take


def randomised(network: nn.Module) -> nn.Module:
    """All weights moved, so that zero-initialised parts matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def mixture_network() -> MixtureVelocity:
    mixture = GaussianMixture(torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -2.0]]), 0.4, torch.tensor([0.5, 0.3, 0.2]))
    network = MixtureVelocity(mixture, RectifiedFlow(), classes=torch.tensor([0, 0, 1]))
    randomised(network)
    return network


def null(rows: int) -> Tensor:
    return torch.full((rows,), 2)


def batch(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(rows, 2, generator=generator)
    return x_t, torch.rand(rows, generator=generator) * 0.9 + 0.05, torch.arange(rows) % 2


@dataclass
class Watched:
    """Records what the network was called with."""

    network: Network
    rows: list[int] = field(default_factory=list[int])
    dtypes: list[torch.dtype] = field(default_factory=list[torch.dtype])
    conditions: list[Condition] = field(default_factory=list[Condition])

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert t.shape == (len(x_t),)
        self.rows.append(len(x_t))
        self.dtypes.append(t.dtype)
        self.conditions.append(condition)
        return self.network(x_t, t, condition)


def build(network: Network, guidance: float = 1.0, forward_batch: int | None = None) -> NetworkDenoiser:
    return NetworkDenoiser(network, RectifiedFlow(), "velocity", Ledger(), guidance, null, forward_batch)


def output(denoise: NetworkDenoiser, *rows: Tensor) -> Tensor:
    prediction = denoise(*rows)
    assert isinstance(prediction, GaussianPrediction)
    return prediction.output


@torch.no_grad()
@pytest.mark.parametrize("forward_batch", [None, 4])
def test_guided_output_combines_two_separate_calls(forward_batch: int | None) -> None:
    network, (x_t, t, label) = mixture_network(), batch(6)
    conditional, unconditional = network(x_t, t, label), network(x_t, t, null(6))
    guided = output(build(network, 2.5, forward_batch), x_t, t, label)
    assert torch.allclose(guided, unconditional + 2.5 * (conditional - unconditional), atol=1e-5)
    assert torch.equal(output(build(network, 1.0), x_t, t, label), conditional)
    assert torch.equal(output(build(network, 0.0), x_t, t, label), unconditional)
    assert not torch.allclose(conditional, unconditional, atol=0.1)


def test_guidance_is_one_call_of_both_branches() -> None:
    watched = Watched(mixture_network())
    build(watched, 3.0)(*batch(5))
    assert watched.rows == [10]


@pytest.mark.parametrize(("guidance", "each"), [(0.0, 1), (1.0, 1), (0.5, 2), (4.0, 2)])
@pytest.mark.parametrize("forward_batch", [None, 4])
def test_ledger_counts_rows_and_not_filling(guidance: float, each: int, forward_batch: int | None) -> None:
    denoise = build(mixture_network(), guidance, forward_batch)
    with torch.no_grad():
        denoise(*batch(7))
    assert denoise.ledger == Ledger(nfe=7 * each)
    denoise(*batch(7))
    assert denoise.ledger == Ledger(nfe=7 * each, gradient_passes=7 * each)


def test_guidance_without_null_condition_is_refused() -> None:
    with pytest.raises(UserError, match="no null condition"):
        NetworkDenoiser(mixture_network(), RectifiedFlow(), "velocity", Ledger(), 2.0)
    with pytest.raises(UserError, match="forward_batch"):
        build(mixture_network(), forward_batch=0)


def test_network_is_called_at_the_padded_shape_only() -> None:
    watched = Watched(mixture_network())
    x_t, t, label = batch(7)
    build(watched, 2.0, forward_batch=4)(x_t, t.double(), label)
    build(watched, 1.0, forward_batch=4)(x_t[:4].double(), t[:4], label[:4])
    assert watched.rows == [4] * 5
    assert watched.dtypes == [torch.float32] * 4 + [torch.float64]


class StatefulNetwork:
    """Counts steps per trajectory: prepare adds one; the output is the count."""

    def prepare(self, x_t: Tensor, t: Tensor, condition: Condition) -> Stateful:
        if isinstance(condition, Stateful):
            return Stateful(condition.condition, condition.state + 1)
        return Stateful(condition, torch.ones(len(x_t)))

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, Stateful)
        return (condition.state + 10 * condition.condition)[:, None].expand_as(x_t)


def test_both_branches_share_the_state() -> None:
    x_t, t, label = batch(5)
    denoise = build(StatefulNetwork(), 3.0, forward_batch=2)
    condition = denoise.prepare(x_t, t, denoise.prepare(x_t, t, label))
    assert torch.equal(condition.state, torch.full((5,), 2.0))
    expected = (2 + 20.0 + 3 * (10.0 * label - 20.0))[:, None].expand_as(x_t)
    assert torch.equal(output(denoise, x_t, t, condition), expected)
    assert build(mixture_network()).prepare(x_t, t, label) is label


def dit() -> nn.Module:
    return randomised(DiT(1, 8, 4, width=16, depth=2, heads=2, classes=3))


def token_network() -> nn.Module:
    return randomised(MaskedTransformer(5, 6, width=16, depth=2, heads=2))


def model(name: str) -> tuple[NetworkDenoiser, tuple[Tensor, Tensor, Condition]]:
    """A denoiser at padded shape 32, and 85 rows for it."""
    generator = torch.Generator().manual_seed(3)
    t = torch.rand(85, generator=generator) * 0.9 + 0.05
    process: Process = RectifiedFlow()
    if name == "mixture":
        x_t, _, label = batch(85)
        return build(mixture_network(), forward_batch=32), (x_t, t, label)
    if name == "dit":
        x_t = torch.randn(85, 1, 8, 8, generator=generator)
        return NetworkDenoiser(dit(), process, "velocity", Ledger(), 1.0, None, 32), (x_t, t, torch.arange(85) % 3)
    tokens = torch.randint(0, 6, (85, 6), generator=generator)
    return NetworkDenoiser(token_network(), MaskedProcess(5), "logits", Ledger(), 1.0, None, 32), (tokens, t, None)


def raw(denoise: NetworkDenoiser, rows: tuple[Tensor, Tensor, Condition]) -> Tensor:
    prediction = denoise(*rows)
    assert isinstance(prediction, GaussianPrediction | TokenPrediction)
    return prediction.output if isinstance(prediction, GaussianPrediction) else prediction.log_probs


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixture", "dit", "tokens"])
def test_a_row_is_bit_equal_wherever_it_stands(name: str) -> None:
    denoise, rows = model(name)
    whole = raw(denoise, rows)
    order = torch.randperm(85, generator=torch.Generator().manual_seed(5))
    assert torch.equal(raw(denoise, take(rows, order)), whole[order])
    for cut in (1, 5, 32, 53, 84):
        parts = [take(rows, torch.arange(85)[:cut]), take(rows, torch.arange(85)[cut:])]
        assert torch.equal(torch.cat([raw(denoise, part) for part in parts]), whole)


def gradient(network: nn.Module, evaluate: Callable[[], Tensor]) -> Tensor:
    network.zero_grad()
    evaluate().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def test_filling_rows_have_no_gradient() -> None:
    denoise, rows = model("dit")
    network = denoise.network
    assert isinstance(network, nn.Module)
    plain = gradient(network, lambda: network(*rows))
    padded = gradient(network, lambda: raw(denoise, rows))
    # float32 sums over the batch in another order
    assert torch.allclose(plain, padded, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

    x_t = rows[0][:3].clone().requires_grad_(True)
    plain_x = torch.autograd.grad(network(x_t, rows[1][:3], rows[2][:3]).square().sum(), x_t)[0]
    padded_x = torch.autograd.grad(raw(denoise, (x_t, rows[1][:3], rows[2][:3])).square().sum(), x_t)[0]
    assert torch.allclose(plain_x, padded_x, rtol=1e-4, atol=1e-5)


def test_denoiser_of_a_model_takes_another_network_and_ledger() -> None:
    network, other, ledger = mixture_network(), mixture_network(), Ledger()

    def encode(prompts: object) -> Condition:
        return None

    task_model = GenerativeModel(network, RectifiedFlow(), "velocity", (2,), encode, lambda x: x, null)
    assert denoiser(task_model).network is network
    built = denoiser(task_model, other, ledger=ledger, guidance=2.0, forward_batch=4)
    assert built.network is other
    assert built.ledger is ledger
    assert (built.guidance, built.forward_batch, built.kind) == (2.0, 4, "velocity")


def test_an_empty_batch_is_refused_at_the_padded_shape() -> None:
    with pytest.raises(ValueError, match="without rows"):
        build(mixture_network(), forward_batch=4)(*batch(0))
