import pytest
import torch
from pydantic import ValidationError

from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.sampling.noise import Noise
from difftilt.sampling.rollout import sample
from difftilt.testbeds.mixtures import Config, Mixtures, ring


def test_ring_has_equal_radius_and_equal_neighbour_distances() -> None:
    modes = ring(8, 2.0, 3)
    assert torch.allclose(modes.norm(dim=1), torch.full((8,), 2.0))
    assert torch.allclose((modes - modes.roll(1, 0)).norm(dim=1), torch.full((8,), 2.0 * 2 * 0.3826834))
    assert bool((modes[:, 2] == 0).all())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": (0.5, 0.5)}, "weights must be 8"),
        ({"means": ((0.0,), (1.0, 2.0))}, "one length"),
        ({"centre": (1.0,)}, "centre must have 2"),
        ({"classes": 9}, "classes must be 0"),
        ({"classes": 1}, "classes must be 0"),
        ({"std": 0.0}, "std"),
        ({"radus": 1.0}, "radus"),
    ],
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(values)


@pytest.mark.parametrize("process", ["flow", "vp"])
@pytest.mark.parametrize("kernel", ["sde", "ancestral", "exact"])
def test_samples_of_a_class_lie_on_its_modes(process: str, kernel: str) -> None:
    bed = Mixtures(Config.model_validate({"process": process, "kernel": kernel, "classes": 4, "steps": 20}))
    task = bed.task()
    prompts = ["class 1"] * 200
    index, noise = torch.arange(200), Noise(0)
    with torch.no_grad():
        start = task.model.process.prior(noise.normal(index, task.model.shape, purpose="prior"))
        x = sample(denoiser(task.model), task.sampler, start, task.model.encode(prompts), noise=noise, index=index)
    nearest = torch.cdist(x, bed.mixture.means).argmin(1)
    assert set(nearest.tolist()) == {1, 5}
    score = task.heldout["on_mode"].score(Samples(x, prompts, prompts, torch.zeros(200, dtype=torch.int64)))
    # the exact share is 0.989; 20 Euler steps narrow the modes a little, so it may only be higher
    assert float(score.mean()) > 0.95


def test_on_mode_counts_within_three_standard_deviations() -> None:
    bed = Mixtures()
    x = bed.mixture.means[:2] + torch.tensor([[0.59, 0.0], [0.0, 0.61]])
    assert bed.on_mode(Samples(x, ["", ""], ["", ""], torch.tensor([0, 0]))).tolist() == [1.0, 0.0]


def test_prompts_are_trained_on_or_held_out() -> None:
    task = Mixtures(Config(classes=4)).task()
    assert list(task.prompts) == ["class 0", "class 1", "class 2"]
    assert list(task.heldout_prompts) == ["class 3"]
    assert task.model.encode(["class 3", "class 0"]).tolist() == [3, 0]
    assert Mixtures().task().model.encode([""]) is None
    with pytest.raises(UserError, match="class 4"):
        task.model.encode(["class 4"])


def test_null_condition_is_the_whole_mixture() -> None:
    bed = Mixtures(Config(classes=2))
    model = bed.task().model
    x, t = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), torch.full((50,), 0.6)
    null = denoiser(model, guidance=0.0)(x, t, model.encode(["class 0"] * 50)).x0
    assert torch.allclose(null, bed.mixture.posterior_mean(bed.process, x, t), atol=1e-5)


def test_distances_vanish_at_the_target_only() -> None:
    bed = Mixtures(Config(reward="linear", temperature=1.0))
    target, base = bed.target_samples(2000, seed=1), bed.target_samples(2000, temperature=1e6, seed=2)
    # energy distance of two exact sets: V-statistics are biased by about E|x - x'|·(1/2000 + 1/4096), here below 0.002
    assert bed.distance_to_target(target) < 0.1 < 0.5 < bed.distance_to_target(base)
    # total variation of 8 shares from 2000 draws has mean below sqrt(8/(2·pi·2000)) = 0.025
    assert bed.mode_distance(target) < 0.05 < 0.3 < bed.mode_distance(base)


def test_the_distance_reward_refuses_closed_forms() -> None:
    bed = Mixtures()
    with pytest.raises(UserError, match="no closed-form tilted law"):
        bed.tilted()
    with pytest.raises(UserError, match="no closed-form soft value"):
        bed.soft_value(torch.zeros(1, 2), torch.ones(1))
    with pytest.raises(UserError, match="hardly a draw"):
        Mixtures(Config(centre=(50.0, 0.0))).target_samples(10, temperature=0.01)


def test_tasks_do_not_share_weights() -> None:
    bed = Mixtures()
    first, second = bed.task().model.network, bed.task().model.network
    assert isinstance(first, torch.nn.Module)
    assert isinstance(second, torch.nn.Module)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    assert torch.equal(second(x, t, None), bed.task().model.network(x, t, None))
    assert not torch.equal(first(x, t, None), second(x, t, None))
