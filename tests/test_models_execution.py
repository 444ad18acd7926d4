"""Precision, compilation and activation checkpointing change how a network is evaluated, and nothing else."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import pipelines
from difftilt.errors import UserError
from difftilt.models import CopiedRoles, DiT, MaskedTransformer, Network, Trained
from difftilt.models.denoiser import NetworkDenoiser, denoiser
from difftilt.models.diffusers import PipelineOptions, adapt
from difftilt.models.execution import PLAIN, Execution, enable_checkpointing
from difftilt.models.ledger import Ledger
from difftilt.models.lora import LoraSettings, adapted
from difftilt.process import GaussianPrediction, MaskedProcess, RectifiedFlow, TokenPrediction
from difftilt.recipes.schema import load_recipe
from test_models_networks import randomised
from training_runs import make_loop, make_method, make_task, relative

LONG = pytest.mark.long
SECTION = "training.activation_checkpointing"
Rows = tuple[Tensor, Tensor, Any]


def dit(depth: int = 3) -> nn.Module:
    return randomised(DiT(1, 8, 4, width=16, depth=depth, heads=2, classes=3))


def rows(count: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(3)
    x_t, t = torch.randn(count, 1, 8, 8, generator=generator), torch.rand(count, generator=generator)
    return x_t, 0.05 + 0.9 * t, torch.arange(count) % 3


def transformer() -> nn.Module:
    return randomised(MaskedTransformer(5, 6, width=16, depth=3, heads=2))


def token_rows() -> Rows:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 6, (8, 6), generator=generator), torch.linspace(0.1, 0.9, 8), None


def velocity(network: Network, execution: Execution, given: Rows) -> Tensor:
    found = NetworkDenoiser(network, RectifiedFlow(), "velocity", Ledger(), forward_batch=4, execution=execution)(
        *given
    )
    assert isinstance(found, GaussianPrediction)
    return found.output


def gradients(network: nn.Module, output: Tensor) -> Tensor:
    output.square().sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


# precision


def test_bf16_is_the_precision_of_the_network_alone() -> None:
    network, given = dit(), rows()
    plain, half = (velocity(network, Execution(precision=one), given) for one in ("fp32", "bf16"))
    assert (plain.dtype, half.dtype) == (torch.float32, torch.float32)
    # eight bits of mantissa: a rounding is 2^-9 of a number, and a few tens of them follow one another
    assert 2**-12 < relative(plain.detach(), half.detach()) < 2**-4
    masters = gradients(network, plain)
    network.zero_grad()
    assert 2**-12 < relative(masters, gradients(network, half)) < 2**-4
    assert all(value.dtype == torch.float32 for value in network.parameters())


def test_log_probabilities_of_tokens_are_float32_and_sum_to_one() -> None:
    process = MaskedProcess(5)
    execution = Execution(precision="bf16")
    found = NetworkDenoiser(transformer(), process, "logits", Ledger(), execution=execution)(*token_rows())
    assert isinstance(found, TokenPrediction)
    assert found.log_probs.dtype == torch.float32
    # in bf16 the sum of five probabilities would be off by some 2^-9
    assert torch.allclose(found.log_probs.exp().sum(-1), torch.ones(8, 6), atol=1e-5)


def test_the_ratio_before_the_first_update_is_exactly_one_in_bf16_and_densities_are_float32() -> None:
    loops = {}
    for precision in ("fp32", "bf16"):
        task = make_task()
        loop = make_loop(make_method("flow-grpo", task), task, precision=precision)
        with torch.no_grad():
            experience = loop.method.collect(loop.run)
        (phase,) = loop.method.phases(loop.run)
        means = loop.updater.run_phase(phase, experience, loop.run.noise)
        assert (means["ratio_mean"], means["ratio_std"]) == (1.0, 0.0)
        assert experience.edges.log_prob is not None
        assert experience.edges.log_prob.dtype == torch.float32
        assert experience.edges.advantage is not None
        assert bool(experience.edges.advantage.isfinite().all())
        assert all(value.dtype == torch.float32 for value in loop.run.roles.parameters("current"))
        loops[precision] = experience
    assert not torch.equal(loops["fp32"].x_0, loops["bf16"].x_0)


def test_a_pipeline_that_was_loaded_in_bf16_keeps_its_weights() -> None:
    adapter = adapt(pipelines.stable_diffusion_3(), PipelineOptions(cache="off", dtype="bfloat16", steps=2))
    denoise = denoiser(adapter.model, execution=Execution(precision="bf16"))
    condition = adapter.model.encode(pipelines.PROMPTS)
    found = denoise(torch.randn(2, *adapter.model.shape), torch.tensor([0.3, 0.6]), condition)
    assert isinstance(found, GaussianPrediction)
    assert found.output.dtype == torch.float32
    assert {value.dtype for value in adapter.network.parameters()} == {torch.bfloat16}


# compilation


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=LONG)])
def test_a_compiled_network_says_the_same(checkpointing: bool) -> None:
    depth = 3 if checkpointing else 1
    plain, network, given = dit(depth), dit(depth), rows()
    if checkpointing:
        enable_checkpointing(network, SECTION)
    execution = Execution(compile=True, compile_backend="aot_eager")
    expected, found = velocity(plain, PLAIN, given), velocity(network, execution, given)
    assert torch.allclose(expected, found, atol=1e-6)
    assert relative(gradients(plain, expected), gradients(network, found)) < 1e-6
    with torch.no_grad():
        assert torch.allclose(expected, velocity(network, execution, given), atol=1e-6)
    assert network.state_dict().keys() == plain.state_dict().keys()


@LONG
def test_a_compiled_backbone_sees_moved_weights_and_the_adapter_that_is_on() -> None:
    found: dict[bool, list[Tensor]] = {}
    for compiled in (False, True):
        execution = Execution(compile=compiled, compile_backend="aot_eager")
        roles = CopiedRoles(adapted(dit(), LoraSettings(rank=2)), {"fake": Trained("reference")})
        found[compiled] = []
        for _ in range(2):
            for role in ("current", "reference", "fake"):
                with torch.no_grad():
                    found[compiled].append(velocity(roles.network(role), execution, rows()))
                if role != "reference":
                    velocity(roles.network(role), execution, rows()).square().sum().backward()
            for place, role in enumerate(("current", "fake")):
                grads = [p.grad.flatten() for p in roles.parameters(role) if p.grad is not None]
                found[compiled].append(torch.cat(grads))
                with torch.no_grad():
                    for parameter in roles.parameters(role):
                        parameter.add_(0.1 * (place + 1))
    first, second = found[True][:5], found[True][5:]
    assert all(not torch.allclose(first[role], second[role], atol=1e-2) for role in (0, 2))
    for one, other in zip(found[False], found[True], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@LONG
def test_inductor_says_the_same_or_names_the_missing_compiler() -> None:
    execution, given = Execution(compile=True), rows(4)
    network = dit(1)
    with torch.no_grad():
        expected = velocity(network, PLAIN, given)
        if shutil.which("g++") is None:
            with pytest.raises(UserError, match=r"apt-get install g\+\+"):
                velocity(network, execution, given)
            return
        assert torch.allclose(expected, velocity(network, execution, given), atol=1e-5)


def test_what_cannot_be_compiled_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compile_backend = 'fast': torch knows .*inductor"):
        velocity(dit(), Execution(compile=True, compile_backend="fast"), rows())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"there is no no-such-compiler: .*apt-get install g"):
        velocity(dit(), Execution(compile=True), rows())
    with pytest.raises(UserError, match="a function without weights"):
        velocity(lambda x_t, t, condition: x_t, Execution(compile=True), rows())


# activation checkpointing


def kept(evaluate: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes that a pass keeps for its backward pass, of different tensors, and its result."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = evaluate()
    return sum(sizes.values()), result


@pytest.mark.parametrize(("make", "given"), [(dit, rows()), (transformer, token_rows())])
def test_gradients_are_equal_and_less_is_kept(make: Callable[[], nn.Module], given: Rows) -> None:
    network, other = make(), make()
    enable_checkpointing(other, SECTION)
    before, expected = kept(lambda: network(*given))
    after, found = kept(lambda: other(*given))
    weights = sum(value.nbytes for value in network.parameters())
    # of three blocks what goes in stays, and what they compute goes; weights are kept anyway
    assert after - weights < (before - weights) / 3
    assert torch.equal(expected, found)
    assert torch.equal(gradients(network, expected), gradients(other, found))


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=LONG) for name in ("flux", "wan")] + ["stable_diffusion", "stable_diffusion_3"]
)
def test_networks_of_pipelines_do_the_same(family: str) -> None:
    results: list[tuple[int, Tensor]] = []
    for checkpointing in (False, True):
        size: dict[str, Any] = {"frames": 5, "height": 16, "width": 16} if family == "wan" else {}
        adapter = adapt(getattr(pipelines, family)(), PipelineOptions(cache="off", steps=2, **size))
        if checkpointing:
            enable_checkpointing(adapter.network, SECTION)
        condition = adapter.model.encode(pipelines.PROMPTS)
        x_t = pipelines.start_of(adapter.model.shape)
        count, output = kept(lambda: adapter.network(x_t, torch.tensor([0.3, 0.6]), condition))  # noqa: B023
        results.append((count, gradients(adapter.network, output)))
    assert results[1][0] < results[0][0]
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)


def test_an_adapter_is_found_again_whatever_was_evaluated_between() -> None:
    """Two trained adapters on one backbone: the gradient of each is that without checkpointing."""
    found: list[Tensor] = []
    for checkpointing in (False, True):
        backbone = dit()
        if checkpointing:
            enable_checkpointing(backbone, SECTION)
        roles = CopiedRoles(adapted(backbone, LoraSettings(rank=2)), {"fake": Trained("reference")})
        for place, role in enumerate(("current", "fake")):
            with torch.no_grad():
                for parameter in roles.parameters(role):
                    parameter.add_(0.1 * (place + 1))
        losses = [velocity(roles.network(role), PLAIN, rows()).square().sum() for role in ("fake", "current")]
        with torch.no_grad():
            velocity(roles.network("reference"), PLAIN, rows())
        sum(losses, start=torch.zeros(())).backward()
        every = [p.grad.flatten() for role in ("current", "fake") for p in roles.parameters(role) if p.grad is not None]
        found.append(torch.cat(every))
    assert torch.equal(found[0], found[1])


def test_a_network_without_blocks_is_refused() -> None:
    task = make_task()
    with pytest.raises(UserError, match=f"{SECTION}: MixtureVelocity has no blocks"):
        make_loop(make_method("flow-grpo", task), task, activation_checkpointing=True)


# recipes


def test_a_run_and_its_call_are_told_by_the_recipe() -> None:
    flags = ["precision=bf16", "compile=true", "compile_backend=eager"]
    training = load_recipe("shapes/flow-grpo", [f"training.{flag}" for flag in flags]).training
    steering = load_recipe("shapes/fk-steering", [f"steering.{flag}" for flag in flags]).steering
    expected = Execution(precision="bf16", compile=True, compile_backend="eager")
    assert training.execution == steering.execution == expected
    task = make_task()
    loop = make_loop(make_method("flow-grpo", task), task, precision="bf16")
    denoise = loop.run.denoiser("reference")
    assert isinstance(denoise, NetworkDenoiser)
    assert denoise.execution == Execution(precision="bf16")
