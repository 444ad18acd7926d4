from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from difftilt.checks.log_h import GAUSSIAN, exact_gradient, gaussian_task, gradient_of, ring_task
from difftilt.checks.tilted_truths import sequence_truth
from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.process.gaussian import (
    GaussianPrediction,
    GaussianProcess,
    RectifiedFlow,
    expand,
    linear_schedule,
)
from difftilt.process.protocol import PredictionKind
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.protocol import Capabilities, Samples
from difftilt.sampling.exact import ExactAncestral
from difftilt.sampling.kernels import DDIM, Euler, FlowSDE
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Kernel
from difftilt.sampling.steps import GaussianStep
from difftilt.steering.best_of_n import BestOfN, BestOfNConfig
from difftilt.steering.doit import DOIT, DOITConfig
from difftilt.steering.particles import bind, start
from difftilt.steering.protocol import Steered, Steerer
from difftilt.steering.simulating import Simulator
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.protocol import Task
from difftilt.values.estimates import ClosedForm
from difftilt.values.likelihood_ratio import antithetic, draw_weights, noise_score

KINDS: tuple[PredictionKind, ...] = ("epsilon", "x0", "v", "velocity", "score")
PROCESSES = [RectifiedFlow(), linear_schedule()]
PROCESS_NAMES = ["flow", "vp"]


def doit(**settings: Any) -> DOIT:
    return DOIT(DOITConfig.model_validate({"simulations": 4, "surrogate": "one_step", "temperature": 1.0, **settings}))


def steer(steerer: Steerer, task: Task, prompts: list[str], forward_batch: int | None = 32, **extra: Any) -> Steered:
    model = denoiser(task.model, forward_batch=forward_batch)
    return steerer.steer(task, model, task.reward, prompts, Noise(0), **extra)


def short(kernel: Kernel | None = None, steps: int = 6) -> Task:
    task = Mixtures(Config(reward="linear", steps=steps, shift=1.0)).task()
    return task if kernel is None else replace(task, sampler=replace(task.sampler, kernel=kernel, solver=None))


def tensors(process: GaussianProcess, kind: PredictionKind) -> tuple[GaussianPrediction, Tensor, Tensor, Tensor]:
    """A prediction at random, a gradient at random, and the times of a step."""
    index, noise = torch.arange(5), Noise(3)
    x, output, gradient = (noise.normal(index, (2, 3), purpose=name).double() for name in ("x", "output", "gradient"))
    t, s = torch.linspace(0.3, 0.9, 5).double(), torch.linspace(0.1, 0.7, 5).double()
    return GaussianPrediction(process, output, kind, x, t), gradient, t, s


@pytest.mark.parametrize("process", PROCESSES, ids=PROCESS_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_raised_score_moves_both_terms_of_the_prediction(process: GaussianProcess, kind: PredictionKind) -> None:
    prediction, gradient, t, _ = tensors(process, kind)
    raised = prediction.tilted(gradient)
    alpha, sigma = expand(process.alpha(t), gradient), expand(process.sigma(t), gradient)
    epsilon = prediction.epsilon - sigma * gradient
    torch.testing.assert_close(raised.score, prediction.score + gradient)
    torch.testing.assert_close(raised.epsilon, epsilon)
    torch.testing.assert_close(raised.x0, (prediction.x_t - sigma * epsilon) / alpha)
    assert torch.equal(prediction.tilted(0 * gradient).output, prediction.output)


@pytest.mark.parametrize("process", PROCESSES, ids=PROCESS_NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_the_guided_ddim_step_is_the_formula_of_the_paper(process: GaussianProcess, eta: float) -> None:
    """x0' and the direction from eps' = eps - gamma·sigma·G; the mean is linear in eps, so it moves by eps' - eps."""
    prediction, gradient, t, s = tensors(process, "velocity")
    gamma, x = 0.7, prediction.x_t
    alpha_t, alpha_s = expand(process.alpha(t), x), expand(process.alpha(s), x)
    sigma_t, sigma_s = expand(process.sigma(t), x), expand(process.sigma(s), x)
    v = eta * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).sqrt()
    epsilon = prediction.epsilon - gamma * sigma_t * gradient
    x0 = (x - sigma_t * epsilon) / alpha_t
    step = DDIM(eta)(prediction.tilted(gamma * gradient), x, t, s)
    torch.testing.assert_close(step.mean, alpha_s * x0 + (sigma_s**2 - v**2).sqrt() * epsilon)
    torch.testing.assert_close(expand(step.std, x), v)
    plain = DDIM(eta)(prediction, x, t, s)
    along = (sigma_s**2 - v**2).sqrt() - alpha_s * sigma_t / alpha_t
    torch.testing.assert_close(step.mean - plain.mean, -gamma * sigma_t * gradient * along)


def test_the_guided_flow_sde_step_in_closed_form() -> None:
    """Velocity - t/(1 - t)·G and score + G: the mean moves by (t - s)·t/(1 - t)·(1 + a²/2)·G."""
    prediction, gradient, t, s = tensors(RectifiedFlow(), "velocity")
    kernel = FlowSDE(0.7)
    moved = (
        kernel(prediction.tilted(gradient), prediction.x_t, t, s).mean - kernel(prediction, prediction.x_t, t, s).mean
    )
    torch.testing.assert_close(moved, expand((t - s) * t / (1 - t) * (1 + 0.7**2 / 2), gradient) * gradient)


KERNELS = [DDIM(0.4), DDIM(1.0), FlowSDE(0.7), Euler()]


@pytest.mark.parametrize(
    ("kernel", "surrogate"),
    [*((kernel, "full") for kernel in KERNELS), (KERNELS[0], "one_step"), (KERNELS[2], "reuse")],
    ids=str,
)
def test_without_correction_it_is_plain_sampling_bit_for_bit(kernel: Kernel, surrogate: str) -> None:
    task = short(kernel)
    plain = steer(BestOfN(BestOfNConfig(particles=3)), task, ["", ""])
    off = steer(doit(particles=3, simulations=2, strength=0.0, surrogate=surrogate), task, ["", ""])
    assert torch.equal(off.x_0, plain.x_0)
    assert off.ledger == plain.ledger
    # everything is simulated and nothing is moved: simulations have noise of their own
    shut = steer(doit(particles=3, simulations=2, gate=1e9, surrogate=surrogate), task, ["", ""])
    assert torch.equal(shut.x_0, plain.x_0)
    assert shut.ledger.gradient_passes == 4 * 6
    on = steer(doit(particles=3, simulations=2, surrogate=surrogate), task, ["", ""])
    assert not torch.isclose(on.x_0, plain.x_0).all(1).any()


def test_a_transformer_with_a_shut_gate_is_plain_sampling_bit_for_bit() -> None:
    task = Digits().task()
    prompts = list(task.heldout_prompts[:2])
    plain = steer(BestOfN(BestOfNConfig(particles=2)), task, prompts)
    shut = steer(doit(particles=2, simulations=2, gate=1e9, surrogate="reuse"), task, prompts)
    assert torch.equal(shut.x_0, plain.x_0)


@pytest.mark.parametrize("surrogate", ["full", "one_step", "reuse"])
def test_the_reward_is_only_evaluated(surrogate: str) -> None:
    def refuses_gradients(samples: Samples) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not samples.media.requires_grad
        return samples.media[:, 0].floor()

    task = replace(short(), reward=FunctionReward("steps", refuses_gradients))
    steered = steer(doit(particles=2, surrogate=surrogate), task, [""])
    assert not steered.x_0.requires_grad
    assert steered.ledger.gradient_passes > 0


def test_ledger_is_exact() -> None:
    """Six steps, of which 1 to 4 are corrected; a completion from grid point i has 6 - i evaluations."""
    rows, simulations = 2 * 3, 4
    expected = {"full": simulations * (4 + 3 + 2 + 1), "one_step": simulations * 4, "reuse": 0}
    for surrogate, nfe in expected.items():
        ledger = steer(doit(particles=3, surrogate=surrogate), short(), ["", ""]).ledger
        assert ledger.gradient_passes == 4 * rows
        assert ledger.nfe == (2 + nfe) * rows
        assert ledger.reward_calls == (4 * simulations + 1) * rows
    ledger = steer(doit(particles=3, greedy_from=2), short(), ["", ""]).ledger
    # one corrected step, then three greedy ones with one evaluation each, and a last one without noise
    assert (ledger.gradient_passes, ledger.nfe) == (rows, (2 + 3 + 4 * simulations) * rows)
    learned = DOIT(DOITConfig(simulations=4, particles=3), value=ClosedForm(lambda x, t, condition: x[:, 0]))
    ledger = steer(learned, short(), ["", ""]).ledger
    assert (ledger.gradient_passes, ledger.nfe, ledger.reward_calls) == (4 * rows, 2 * rows, rows)


@pytest.mark.parametrize("surrogate", ["full", "one_step", "reuse"])
@pytest.mark.parametrize("greedy_from", [None, 2])
@pytest.mark.parametrize("last", [4, 5])
def test_the_price_is_an_upper_bound(surrogate: str, greedy_from: int | None, last: int) -> None:
    steerer = doit(particles=3, surrogate=surrogate, greedy_from=greedy_from, last=last)
    price, spent = steerer.price(6), steer(steerer, short(), [""], None).ledger
    slack = [getattr(price, name) - getattr(spent, name) for name in ("nfe", "reward_calls", "gradient_passes")]
    assert min(slack) >= 0
    if last == 4 and greedy_from is None:  # it is exact where every corrected step has noise
        assert slack == [4 * 3 if surrogate == "reuse" else 0, 0, 0]


def test_prompts_in_a_batch_equal_prompts_one_by_one_and_chunks_the_whole() -> None:
    task = short()
    whole = steer(doit(particles=3), task, ["", ""])
    alone = steer(doit(particles=3), task, [""], index=torch.tensor([1]))
    assert torch.equal(alone.x_0, whole.x_0[3:])
    assert torch.equal(steer(doit(particles=3, chunk=2), task, ["", ""]).x_0, whole.x_0)


def simulator(**settings: Any) -> tuple[Simulator, Any, Any, Task]:
    """What looks ahead in the middle of the ring's chain, with its chain and 200 particles there."""
    task, mixture = ring_task()
    model = denoiser(task.model)
    chain, particles = start(task, model, [""], 200, Noise(0))
    process, t = task.model.process, torch.full((200,), 0.5)
    assert isinstance(process, GaussianProcess)
    x = mixture.sample_marginal(process, t, Noise(5).normal(torch.arange(200), (3,), purpose="states"))
    made = doit(temperature=1 / 0.6, simulations=64, **settings).simulator(chain, bind(task.reward, task, [""], model))
    return made, chain, replace(particles, x=x), task


def test_ablation_weights_must_belong_to_the_noise() -> None:
    """The same weights on other draws say nothing: the error is then as large as the gradient itself."""
    made, chain, particles, _ = simulator()
    t = torch.full((200,), 0.5)
    truth = exact_gradient(particles.x, t)

    def error(looks: Simulator) -> float:
        with torch.no_grad():
            found = looks.look(chain, particles, chain.slots, 20).gradient
        return float((found - truth).norm(dim=1).mean() / truth.norm(dim=1).mean())

    assert error(made) < 0.5
    assert error(replace(made, weigh=lambda scores: made.weigh(scores).roll(1, dims=1))) > 0.8


def test_ablation_the_gradient_goes_through_the_denoiser() -> None:
    """With x0hat = a + c·x held fixed, the slope of the mean lacks (alpha_s - kept·alpha_t/sigma_t)·c."""
    task, place = gaussian_task(), 7
    process, grid = task.model.process, task.sampler.grid.float()
    assert isinstance(process, GaussianProcess)
    t, s = grid[place : place + 1], grid[place + 1 : place + 2]
    x = torch.linspace(-1, 2, 5)[:, None]
    network, made = task.model.network, doit(simulations=64)
    held = replace(task, model=replace(task.model, network=lambda x, t, c: network(x.detach(), t, c)))
    kept = process.alpha(t) / process.alpha(s) * process.sigma(s) ** 2 / process.sigma(t)
    fixed = kept / process.sigma(t)
    gain = process.alpha(t) * GAUSSIAN.std**2 / GAUSSIAN.law(process, t)[1] ** 2
    whole = fixed + (process.alpha(s) - kept * process.alpha(t) / process.sigma(t)) * gain
    ratio = gradient_of(made, held, x, place) / gradient_of(made, task, x, place)
    torch.testing.assert_close(ratio, (fixed / whole).expand(5, 1), rtol=1e-4, atol=0)
    assert float(fixed / whole) < 0.95


def test_greedy_jumps_to_the_best_simulated_state() -> None:
    made, chain, particles, _ = simulator()
    with torch.no_grad():
        look = made.look(chain, particles, chain.slots, 20, slope=False)
    assert torch.equal(look.gradient, torch.zeros_like(look.gradient))
    seen: list[Tensor] = []
    value = ClosedForm(lambda x, t, condition: (seen.append(x), x[:, 1])[1])
    with torch.no_grad():
        best = replace(made, value=value).look(chain, particles, chain.slots, 20, slope=False).best
    states = seen[0].reshape(200, 64, 2)
    assert torch.equal(best, states[torch.arange(200), states[:, :, 1].argmax(1)])
    greedy = steer(doit(particles=50, greedy_from=0, simulations=16), short(), [""])
    assert (
        float(greedy.rewards.mean()) > float(steer(doit(particles=50, strength=0.0), short(), [""]).rewards.mean()) + 1
    )


def test_gate_and_clip() -> None:
    task = short()
    free = steer(doit(particles=4), task, [""])
    assert torch.equal(steer(doit(particles=4, gate=-1e9, clip=1e9), task, [""]).x_0, free.x_0)
    plain = steer(doit(particles=4, strength=0.0), task, [""])
    nearly = steer(doit(particles=4, clip=1e-6), task, [""])
    torch.testing.assert_close(nearly.x_0, plain.x_0, rtol=0, atol=1e-4)


def test_the_best_of_the_particles_is_a_stage_of_its_own() -> None:
    samples, best = (steer(doit(particles=4, output=output), short(), ["", ""]) for output in ("samples", "best"))
    assert torch.equal(samples.x_0, best.x_0)
    assert torch.equal(samples.weight, torch.full((8,), 1 / 4).double())
    assert torch.equal(best.weight.nonzero()[:, 0], best.best)
    assert torch.equal(best.rewards[best.best], best.rewards.reshape(2, 4).amax(1))
    assert bool(((best.components["simulated_ess"] >= 1) & (best.components["simulated_ess"] <= 4)).all())


def test_missing_rewards_are_counted_and_weigh_nothing() -> None:
    def half(samples: Samples) -> Tensor:
        x = samples.media[:, 0]
        return torch.where(x > 0, x, torch.nan)

    task = replace(short(), reward=FunctionReward("half", half, Capabilities(missing=True)))
    steered = steer(doit(particles=20, simulations=16), task, ["", ""], None)
    assert steered.invalid is not None
    assert bool((steered.invalid > 0).all())
    # at most every simulation of four steps, and every particle
    assert bool((steered.invalid <= 20 * (4 * 16 + 1)).all())
    assert bool(steered.x_0.isfinite().all())


SCORES = torch.tensor([[0.0, 1.0, 3.0, 0.5], [1e6 + 7, 1e6 + 7, 1e6 + 7, 1e6 + 7], [-1.0, -2.0, -3.0, -4.0]])


def test_plain_weights_are_a_softmax() -> None:
    torch.testing.assert_close(draw_weights(SCORES, "plain", 0.5), (SCORES.double() / 0.5).softmax(1))


def test_standardised_weights_have_no_scale_and_no_offset() -> None:
    weight = draw_weights(SCORES, "standardised", 0.5)
    gap = SCORES[0].double() - SCORES[0].double().mean()
    torch.testing.assert_close(weight[0], (gap / gap.square().mean().sqrt() / 0.5).softmax(0))
    assert torch.equal(weight[1], torch.full((4,), 0.25).double())
    torch.testing.assert_close(draw_weights(1000 * SCORES.double() - 3, "standardised", 0.5), weight)
    moved = draw_weights(2 * SCORES, "plain", 0.5)
    assert float((moved - draw_weights(SCORES, "plain", 0.5)).abs().max()) > 0.01


def test_weights_of_events() -> None:
    weight = draw_weights(SCORES[[0, 2]], "event", 0.5, threshold=0.5)
    torch.testing.assert_close(weight, torch.tensor([[0, 1 / 3, 1 / 3, 1 / 3], [0, 0, 0, 0]]).double())
    rare = draw_weights(SCORES[:1], "event", 0.5, threshold=2.0, floor=0.5)
    torch.testing.assert_close(rare, torch.tensor([[0, 0, 0.5, 0]]).double())


@pytest.mark.parametrize("law", ["plain", "standardised", "event"])
def test_missing_scores_have_no_weight(law: Any) -> None:
    scores = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan], [torch.nan] * 4])
    weight = draw_weights(scores, law, 0.5, threshold=0.5)
    torch.testing.assert_close(weight, torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 0, 0]]).double())


def test_equal_weights_on_mirrored_noise_give_no_gradient() -> None:
    noise = antithetic(Noise(0).normal(torch.arange(3), (8, 2), purpose="noise"))
    still = noise_score(torch.full((3, 16), 1 / 16), noise, torch.tensor([0.1, 1.0, 2.0]))
    torch.testing.assert_close(still, torch.zeros(3, 2), rtol=0, atol=1e-6)


def test_a_deterministic_sampler_is_corrected_where_simulations_are_noisy() -> None:
    task = short(Euler())
    plain = steer(doit(particles=200, strength=0.0), task, [""], None)
    steered = steer(doit(particles=200, simulations=16, last=5), task, [""], None)
    assert float(steered.rewards.mean()) > float(plain.rewards.mean()) + 0.8


@dataclass
class Odd:
    """A kernel whose only sin is to have no noise."""

    def __call__(self, prediction: Any, x_t: Tensor, t: Tensor, s: Tensor) -> GaussianStep:
        return Euler()(prediction, x_t, t, s)


def test_what_a_user_can_get_wrong() -> None:
    with pytest.raises(UserError, match=r"no noise.*simulate_eta to 1"):
        steer(doit(simulate_eta=None), short(Odd()), [""])
    with pytest.raises(UserError, match=r"Gaussian steps.*simulate_eta to 1"):
        steer(doit(simulate_eta=None), replace(ring_task()[0], sampler=exact_sampler()), [""])
    with pytest.raises(UserError, match=r"last = 6 is no step.*0 to 5"):
        steer(doit(last=6), short(), [""])
    with pytest.raises(UserError, match=r"greedy_from = 9"):
        steer(doit(greedy_from=9), short(), [""])
    with pytest.raises(UserError, match=r"tokens: use svdd"):
        steer(doit(), sequence_truth().task, [""])
    for wrong in (
        {"simulations": 5},
        {"weights": "event"},
        {"threshold": 1.0},
        {"first": 3, "last": 2},
        {"temperature": 0.0},
        {"simulate_eta": 0.0},
    ):
        with pytest.raises(ValidationError):
            doit(**wrong)
    assert doit(simulations=5, antithetic=False).config.simulations == 5


def exact_sampler() -> Any:
    return replace(ring_task()[0].sampler, kernel=ExactAncestral())
