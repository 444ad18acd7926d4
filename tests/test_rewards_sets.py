"""Rewards of sets: scores, references, refusals, pooled evaluation and what the ledger counts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import difftilt
from difftilt import leaves
from difftilt.checks.trial import loop_of, make_method
from difftilt.errors import RewardError, UserError
from difftilt.models.ledger import Ledger
from difftilt.recipes.building import build_task
from difftilt.recipes.schema import load_recipe
from difftilt.rewards import (
    CoverageReward,
    FrechetPerSample,
    FrechetReward,
    FunctionReward,
    Masked,
    MeanReward,
    MMDReward,
    ReferenceSet,
    Samples,
    SetReward,
    VendiReward,
    WeightedSum,
    as_reward,
    as_set,
    evaluate,
    win_rate,
)
from difftilt.rewards.checked import CheckedSets
from difftilt.rewards.of_sets import OfSets
from difftilt.rewards.pictures import read_images
from difftilt.rewards.protocol import Capabilities
from difftilt.rewards.scoring import encode
from difftilt.rewards.sets import set_reward
from difftilt.rewards.vector import distance
from difftilt.sampling.noise import Noise
from difftilt.statistics import (
    FrechetState,
    RecomputedState,
    coverage,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    neighbour_radius,
    polynomial_kernel,
    vendi_score,
)
from difftilt.testbeds.digits import Digits
from difftilt.testbeds.mixtures import Config, Mixtures
from difftilt.training.config import TrainingConfig
from difftilt.training.loop import train_task
from difftilt.training.measure import measure


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


KNOWN = ReferenceSet.of(normal(1, 40, 3) + 0.5)
MEDIA = normal(0, 12, 3).float()
GROUP = torch.arange(12) % 2


def samples(media: Tensor = MEDIA) -> Samples:
    prompts = [""] * len(media)
    return Samples(media, prompts, prompts, GROUP[: len(media)])


REWARDS: list[tuple[Any, Any]] = [
    (FrechetReward, lambda x: -frechet_distance(x, KNOWN.points(""))),
    (MMDReward, lambda x: -kernel_distance(x, KNOWN.points(""))),
    (CoverageReward, lambda x: coverage(KNOWN.points(""), x)),
    (lambda reference, **how: VendiReward(**how), vendi_score),
]


@pytest.mark.parametrize(("make", "number"), REWARDS, ids=["frechet", "mmd", "coverage", "vendi"])
def test_a_set_reward_scores_groups_or_all_samples_and_counts_one_call_each(make: Any, number: Any) -> None:
    grouped, pooled, ledger = make(KNOWN, pooled=False), make(KNOWN), Ledger()
    each = [float(number(MEDIA[group == GROUP].double())) for group in (0, 1)]
    assert evaluate(grouped, samples(), ledger).total.tolist() == pytest.approx(each * 6, rel=1e-5)
    assert ledger.reward_calls == 12
    scores = evaluate(pooled, samples(), ledger)
    assert scores.total.tolist() == pytest.approx([float(number(MEDIA.double()))] * 12, rel=1e-5)
    assert scores.components[pooled.name].equal(scores.total)
    assert ledger.reward_calls == 24
    members, features = torch.arange(7), pooled.features(samples())
    assert isinstance(pooled, SetReward)
    assert pooled.begin(features, members).value == pytest.approx(pooled.score_features(features[:7]), rel=1e-9)


@pytest.mark.parametrize(
    "reward",
    [FrechetReward(KNOWN, spread="none"), MMDReward(KNOWN), CoverageReward(KNOWN)],
    ids=["frechet", "mmd", "coverage"],
)
def test_a_reference_follows_the_features_to_their_device(reward: Any) -> None:
    """The device without numbers stands for any other."""
    features, members = MEDIA.double().to("meta"), torch.arange(7, device="meta")
    state, places = reward.begin(features, members), torch.arange(3, device="meta")
    assert state.swapped(places, places + 7).device.type == "meta"
    held = reward.reference.mean if isinstance(reward, FrechetReward) else reward.points
    assert held.device.type == "meta"


def test_features_are_put_where_the_samples_are() -> None:
    here = samples()
    there = replace(here, group=GROUP.to("meta"))
    assert VendiReward(lambda x: x).features(there).device.type == "meta"
    assert VendiReward(lambda x: x).features(here).device.type == "cpu"
    assert encode(MeanReward(distance(torch.zeros(3))), there, Ledger()).device.type == "meta"


def test_a_search_of_recomputed_sets_answers_on_the_device_of_its_pool() -> None:
    state = RecomputedState(MEDIA.to("meta"), torch.arange(3), lambda x: 1.0)
    assert state.leave_one_out().device.type == "meta"


@pytest.mark.parametrize("kind", ["mmd", "coverage"])
def test_what_a_reference_says_of_itself_is_found_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        asked.append(len(x))
        return polynomial_kernel()(x, y)

    def radius(reference: Tensor, neighbours: int) -> Tensor:
        asked.append(len(reference))
        return neighbour_radius(reference, neighbours)

    monkeypatch.setattr("difftilt.rewards.sets.neighbour_radius", radius)
    reward = MMDReward(KNOWN, kernel=kernel) if kind == "mmd" else CoverageReward(KNOWN)
    features = MEDIA.double()
    scores = [reward.score_features(features), reward.begin(features, torch.arange(12)).value]
    assert scores[0] == scores[1]
    assert asked.count(40) == 1


def test_a_pooled_set_is_that_of_all_processes() -> None:
    reward, other = FrechetReward(KNOWN), normal(5, 9, 3)
    whole = evaluate(reward, samples(), Ledger(), lambda features: torch.cat([features, other])).total
    expected = reward.score_features(torch.cat([MEDIA.double(), other]))
    assert whole.tolist() == pytest.approx([expected] * 12)
    summed = WeightedSum({"near": reward, "first": distance(torch.zeros(3))}, {"near": 2.0, "first": 1.0})
    parts = evaluate(summed, samples(), Ledger(), lambda features: torch.cat([features, other]))
    torch.testing.assert_close(parts.total, 2 * whole - MEDIA.norm(dim=1))


def test_features_carry_no_gradient_and_are_checked() -> None:
    media = MEDIA.clone().requires_grad_()
    assert not FrechetReward(KNOWN, lambda x: 2 * x).features(samples(media)).requires_grad
    with pytest.raises(RewardError, match="'vendi'"):
        evaluate(VendiReward(lambda x: x[:, 0]), samples(), Ledger())
    with pytest.raises(RewardError, match=r"'vendi'.*not finite"):
        evaluate(VendiReward(lambda x: x / 0), samples(), Ledger())


def test_singular_sets_are_refused_with_count_dimension_and_remedy() -> None:
    few = ReferenceSet.of(normal(0, 3, 3))
    with pytest.raises(UserError, match=r"reference set of 3 .* 3 feature dimensions.* 4.*shrinkage.*diagonal.*none"):
        FrechetReward(few)
    for how in ({"shrinkage": 0.1}, {"spread": "diagonal"}, {"spread": "none"}):
        assert FrechetReward(few, **how).score(samples()).isfinite().all()  # pyright: ignore[reportArgumentType]
    reward = FrechetReward(KNOWN)
    assert reward.smallest == 4
    with pytest.raises(UserError, match=r"set of samples of 3 .* 3 feature dimensions"):
        evaluate(reward, samples(MEDIA[:3]), Ledger())
    with pytest.raises(UserError, match=r"4 features.*has 3"):
        reward.score_features(normal(0, 9, 4))
    with pytest.raises(UserError, match="neighbours"):
        CoverageReward(few, neighbours=3)
    with pytest.raises(UserError, match="not a law"):
        MMDReward(ReferenceSet.gaussian(torch.zeros(3), torch.eye(3)))
    with pytest.raises(UserError, match="shrinkage"):
        FrechetReward(KNOWN, shrinkage=1.5)


def test_reference_sets_are_read_from_files_and_texts(tmp_path: Path) -> None:
    features = normal(0, 6, 2)
    np.save(tmp_path / "a.npy", features.numpy())
    save_file({"features": features, "more": features[0].clone()}, tmp_path / "b.safetensors")
    save_file({"any": features}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.safetensors", "c.safetensors"):
        assert ReferenceSet.from_file(tmp_path / name).points("").equal(features)
    words = ["red", "a blue one"]
    encoded = ReferenceSet.encoded(words, lambda texts: torch.tensor([[len(text), 1.0] for text in texts]))
    assert encoded.points("").tolist() == [[3, 1], [10, 1]]
    (tmp_path / "d.npy").write_bytes(b"nothing")
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    np.save(tmp_path / "flat.npy", features[0].numpy())
    np.save(tmp_path / "nan.npy", (features / 0 * 0).numpy())
    save_file({"x": features, "y": features.clone()}, tmp_path / "two.safetensors")
    bad = ("d.npy", "d.safetensors", "none.npy", "e.txt", "flat.npy", "nan.npy", "two.safetensors")
    (tmp_path / "e.txt").write_text("")
    for name in bad:
        with pytest.raises(UserError, match=name if name != "nan.npy" else "NaN"):
            ReferenceSet.from_file(tmp_path / name)


def test_a_folder_of_images_is_a_reference_set(tmp_path: Path) -> None:
    # the features of the very images, through the recipe's own task; an evaluation compares with them
    bed = Digits()
    images = bed.task().model.decode(normal(5, 12, 1, 8, 8)).clamp(0, 1)
    stored = (images * 255).round().byte()
    for place, image in enumerate(stored[:, 0]):
        picture = Image.fromarray(image.numpy())
        wide = picture.resize((16, 16), Image.Resampling.NEAREST) if place == 3 else picture
        wide.save(tmp_path / f"{place:02d}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    recipe = {
        "testbed": {"name": "digits"},
        "reward": {"name": "sets", "kind": "mmd", "reference": str(tmp_path)},
        "method": {"name": "dragon", "groups": 2},
        "training": {"evaluation_samples": 8},
    }
    task = build_task(load_recipe(recipe))
    assert isinstance(task.reward, MMDReward)
    assert task.features is not None
    known = ReferenceSet.of(task.features(stored.float() / 255))
    kept = [place for place in range(12) if place != 3]  # a filter stands between the enlarged one and itself
    torch.testing.assert_close(task.reward.points[kept], known.points("")[kept])
    assert not torch.allclose(task.reward.points[3], known.points("")[0])
    assert difftilt.evaluate(recipe)["reward"] < 0


def test_images_are_scaled_and_cropped_and_all_bad_ones_are_named(tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 16), (0, 255, 0))
    wide.paste((255, 0, 0), (0, 0, 8, 16))
    wide.paste((0, 0, 255), (24, 0, 32, 16))
    wide.save(tmp_path / "wide.png")
    wide.save(tmp_path / "wide.webp", lossless=True)
    wide.save(tmp_path / "wide.jpg", quality=95)
    images = read_images(tmp_path, (3, 8, 8))
    green = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    for image, slack in zip(images, (0.1, 0.0, 0.0), strict=True):  # jpg, png, webp: what stands over is cut off
        assert image.shape == (3, 8, 8)
        torch.testing.assert_close(image[:, :, 1:7], green.expand(3, 8, 6), atol=slack + 1e-6, rtol=0)
    assert [tuple(image.shape) for image in read_images(tmp_path, (1, 4, 6))] == [(1, 4, 6)] * 3
    turned = wide.getexif()
    turned[0x0112] = 6  # taken with the camera on its side
    wide.save(tmp_path / "turned.png", exif=turned)
    assert read_images(tmp_path)[0].shape == (3, 32, 16)
    with pytest.raises(UserError, match="of 2 sizes"):
        ReferenceSet.from_folder(tmp_path, lambda media: media.flatten(1))
    (tmp_path / "a.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    (tmp_path / "b.webp").write_bytes(b"nothing")
    with pytest.raises(UserError) as caught:
        read_images(tmp_path)
    head, first, second = str(caught.value).splitlines()
    assert head == f"2 of 6 files in {tmp_path} are no images"
    assert f"{tmp_path / 'a.png'} cannot be read as an image" in first
    assert f"{tmp_path / 'b.webp'} cannot be read as an image" in second
    with pytest.raises(UserError, match=r"folder of images, and the samples of this task are none"):
        set_reward(Mixtures().task(), "mmd", str(tmp_path))


def test_the_distance_of_one_sample_to_a_set_is_an_instance_reward() -> None:
    windows = normal(3, 5, 8, 3)
    reward = FrechetPerSample(KNOWN, lambda media: windows[: len(media)])
    assert not reward.capabilities.set_valued
    expected = [-float(frechet_distance(one, KNOWN.points(""))) for one in windows]
    assert evaluate(reward, samples(MEDIA[:5]), Ledger()).total.tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"sample of windows of 3 .* 3 feature dimensions"):
        evaluate(FrechetPerSample(KNOWN, lambda media: windows[: len(media), :3]), samples(MEDIA[:5]), Ledger())


def test_an_instance_reward_is_the_special_case_of_a_mean() -> None:
    view = as_set(distance(torch.zeros(3)))
    assert isinstance(view, MeanReward)
    features = view.features(samples())
    torch.testing.assert_close(features[:, 0], -MEDIA.norm(dim=1))
    assert view.score_features(features) == pytest.approx(float(-MEDIA.norm(dim=1).mean()))
    assert as_set(FrechetReward(KNOWN)).name == "frechet"
    with pytest.raises(UserError, match="no features"):
        as_set(FunctionReward("spread", lambda s: torch.zeros(2), Capabilities(set_valued=True)))


PER_SAMPLE = sorted(
    {leaf.card.name for leaf in leaves.cards("methods") if "per-sample reward" in leaf.card.needs}
    | {
        "flow-grpo",
        "diffusion-nft",
        "branch-grpo",
        "g2rpo",
        "dense-grpo",
        "tp-grpo",
        "euphonium",
        "gardo",
        "b2-diffurl",
    }
)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_set_reward_is_refused_by_methods_of_single_samples(name: str, tmp_path: Path) -> None:
    recipe = {"testbed": {"name": "mixtures", "reward": "vendi"}, "method": {"name": name}}
    with pytest.raises(UserError, match=rf"{name} needs a per-sample reward.*use dragon"):
        difftilt.train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def mixed() -> WeightedSum:
    return WeightedSum({"near": distance(torch.zeros(2)), "vendi": VendiReward()}, {"near": 1.0, "vendi": 1.0})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("crd", {"kl_guidance": 1.0}),
        ("gdro", {"collect": 4}),
        ("prdp", {}),
        ("diffusion-nft", {}),
        ("gardo", {"gate": "all"}),
    ],
)
def test_from_python_too_and_with_one_part_of_a_sum(name: str, settings: dict[str, Any]) -> None:
    task = Mixtures(Config(steps=4)).task()
    method = make_method(name, task, **settings)
    for reward in (VendiReward(), mixed()):
        with pytest.raises(UserError, match=rf"{name} needs a per-sample reward.*part of its sum"):
            train_task(replace(task, reward=reward), method, TrainingConfig(iterations=1, evaluate_every=0))


def test_recipes_refuse_a_sum_with_a_set_reward(tmp_path: Path) -> None:
    bed, reward = {"name": "tones"}, {"weights": {"consonance": 1.0, "vendi": 1.0}}
    with pytest.raises(UserError, match="diffusion-nft needs a per-sample reward"):
        difftilt.train({"testbed": bed, "reward": reward, "method": {"name": "diffusion-nft"}}, tmp_path / "run")
    with pytest.raises(UserError, match="scores of samples to scores of sets"):
        difftilt.train({"testbed": bed, "reward": reward, "method": {"name": "dragon"}}, tmp_path / "run")
    with pytest.raises(UserError, match="scores sets"):
        difftilt.collect({"testbed": bed, "reward": reward, "method": {"name": "gdro"}}, tmp_path / "d", groups=2)
    with pytest.raises(UserError, match="scores of samples to scores of sets"):
        as_set(WeightedSum({"inner": mixed()}, {"inner": 1.0}))


def test_recipes_name_set_rewards(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", normal(0, 9, 2).numpy())
    for kind in ("frechet", "mmd", "vendi", "coverage"):
        reward: dict[str, Any] = {"name": "sets", "kind": kind}
        if kind != "vendi":
            reward["reference"] = str(tmp_path / "r.npy")
        task = build_task(
            load_recipe({"testbed": {"name": "mixtures"}, "reward": reward, "method": {"name": "dragon"}})
        )
        assert task.reward.name == kind
    with pytest.raises(UserError, match=r"reward.reference: mmd"):
        build_task(
            load_recipe(
                {
                    "testbed": {"name": "mixtures"},
                    "reward": {"name": "sets", "kind": "mmd"},
                    "method": {"name": "dragon"},
                }
            )
        )


def test_an_evaluation_of_a_pooled_reward_is_one_number_without_spread(tmp_path: Path) -> None:
    task = Mixtures(Config(reward="frechet", classes=4, steps=4)).task()
    task = replace(task, heldout={"vendi": Mixtures(Config(reward="vendi", classes=4)).task().reward})
    loop = loop_of("dragon", replace(task, categories=lambda prompt: prompt), groups=4)
    found = measure(loop.run, "current", task.sampler, 16, 0)
    reward = task.reward
    assert isinstance(reward, SetReward)
    assert found.numbers["reward"] == pytest.approx(reward.score_features(found.samples.media.double()), rel=1e-5)
    assert "vendi" in found.numbers
    assert not [name for name in found.numbers if name.endswith("_std") or "@" in name]


def test_win_rates_score_both_sides_together_and_refuse_what_has_no_score() -> None:
    near, far = samples(), samples(MEDIA + 3.0)
    plain = as_reward(lambda s: s.media[:, 0], name="first")
    # standardised apart, the two sides would have equal scores
    for normalise in ("batch", "group", "running"):
        assert win_rate(WeightedSum({"a": plain}, {"a": 1.0}, normalise), far, near, Noise(0)) == 1.0
    gaps = as_reward(lambda s: torch.where(s.media[:, 0] > 3, torch.nan, s.media[:, 0]), name="gaps")
    with pytest.raises(RewardError, match="'gaps' is not finite"):
        win_rate(gaps, far, near, Noise(0))
    with pytest.raises(UserError, match="unmask"):
        win_rate(Masked(gaps), far, near, Noise(0))
    with pytest.raises(RewardError, match=r"'odd' is nan for a set of 12"):
        win_rate(Odd("nan"), far, near, Noise(0))
    with pytest.raises(UserError, match="0 samples and 200 sets"):
        win_rate(plain, samples(MEDIA[:0]), samples(MEDIA[:0]), Noise(0))
    with pytest.raises(UserError, match="scores of samples to scores of sets"):
        win_rate(mixed(), far, near, Noise(0))
    with pytest.raises(UserError, match="pooled"):
        win_rate(VendiReward(pooled=False), far, near, Noise(0))


class Odd(OfSets):
    """Fails on small sets, where a search looks, and not on a whole round of 24."""

    def __init__(self, how: str) -> None:
        super().__init__("odd")
        self.how = how

    def score_features(self, features: Tensor) -> float:
        if len(features) < 20 and self.how == "raise":
            raise RuntimeError("boom")
        return float(self.how) if len(features) < 20 else float(features.mean())


@pytest.mark.parametrize(("how", "said"), [("nan", "is nan"), ("-inf", "is -inf"), ("raise", "raised RuntimeError")])
def test_a_search_ends_with_an_error_that_names_the_reward(how: str, said: str) -> None:
    task = replace(Mixtures(Config(steps=4)).task(), reward=Odd(how))
    loop = loop_of("dragon", task, groups=12, beta=1.0)
    with torch.no_grad(), pytest.raises(RewardError, match=f"'odd' {said}"):
        loop.method.collect(loop.run)
    state = CheckedSets(Odd(how)).begin(MEDIA, torch.arange(12))
    for ask in (state.leave_one_out, lambda: state.swapped(torch.tensor([0]), torch.tensor([1]))):
        with pytest.raises(RewardError, match=f"'odd' {said}"):
            ask()


def test_a_search_is_of_one_set_of_all_groups_in_one_space() -> None:
    task = Mixtures(Config(steps=4, classes=2)).task()
    with pytest.raises(UserError, match="set pooled to true"):
        make_method("dragon", replace(task, reward=FrechetReward(KNOWN, pooled=False)), groups=8)
    wide = FrechetReward(ReferenceSet.of(normal(0, 80, 64)))
    with pytest.raises(UserError, match="samples have 2 features, the reference has 64"):
        make_method("dragon", replace(task, reward=wide), groups=8)


def test_an_evaluation_that_is_too_small_names_its_setting() -> None:
    task = replace(Mixtures(Config(steps=4)).task(), reward=FrechetReward(ReferenceSet.of(normal(1, 40, 2))))
    config = TrainingConfig(iterations=1, evaluation_samples=2)
    with pytest.raises(UserError, match=r"training\.evaluation_samples gives 2 samples.*raise it to 3"):
        train_task(task, make_method("dragon", task, groups=8), config)
    watched = replace(task, reward=VendiReward(), heldout={"far": task.reward})
    with pytest.raises(UserError, match=r"training\.evaluation_samples gives 2"):
        train_task(watched, make_method("dragon", watched, groups=8), config)


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (torch.tensor([torch.nan, 0.0]), torch.eye(2), "finite"),
        (torch.zeros(2), torch.eye(3), "shape"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])), "negative eigenvalue"),
    ],
)
def test_a_law_is_a_mean_and_a_covariance(mean: Tensor, covariance: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ReferenceSet.gaussian(mean, covariance)


def test_a_singular_law_is_one() -> None:
    line = torch.ones(3, 3)
    reward = FrechetReward(ReferenceSet.gaussian(torch.zeros(3), line))
    sample = normal(0, 50, 3)
    assert -reward.score_features(sample) == pytest.approx(
        float(frechet_from_moments(sample.mean(0), sample.T.cov(), torch.zeros(3).double(), line.double())), rel=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "vendi", "bandwidth": 0.0}, "bandwidth = 0"),
        ({"kind": "vendi", "bandwidth": -1.0}, "bandwidth = -1"),
        ({"kind": "vendi", "reference": "r.npy"}, "reward.reference: vendi does not read it"),
        ({"kind": "mmd", "spread": "diagonal"}, "reward.spread: mmd"),
        ({"kind": "mmd", "shrinkage": 0.1}, "reward.shrinkage: mmd"),
        ({"kind": "frechet", "neighbours": 3}, "reward.neighbours: frechet"),
        ({"kind": "coverage", "bandwidth": 1.0}, "reward.bandwidth: coverage"),
    ],
)
def test_settings_that_are_not_read_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        set_reward(None, **settings)


def test_a_recipe_names_an_encoder() -> None:
    reward = set_reward(None, "vendi", encoder="torch:zeros_like")
    assert torch.equal(reward.features(samples()), torch.zeros_like(MEDIA))
    with pytest.raises(UserError, match="module:callable"):
        set_reward(None, "vendi", encoder="zeros")
    with pytest.raises(UserError, match="no class or function 'none'"):
        set_reward(None, "vendi", encoder="torch:none")


def test_a_set_of_two_has_no_distance_without_one() -> None:
    reference = ReferenceSet.of(normal(1, 40, 3)).frechet("diagonal")
    with pytest.raises(UserError, match="a set of 2 without one"):
        FrechetState(MEDIA, torch.arange(2), reference).leave_one_out()
    means = FrechetState(MEDIA, torch.arange(2), ReferenceSet.of(normal(1, 40, 3)).frechet("none"))
    assert means.leave_one_out().isfinite().all()


def test_win_rates_are_symmetric_and_see_a_shift() -> None:
    near, far = samples(), samples(MEDIA + 3.0)
    for reward in (distance(torch.zeros(3)), FrechetReward(KNOWN)):
        assert win_rate(reward, near, near, Noise(0), 20) == 0.5
        one, other = win_rate(reward, near, far, Noise(0), 20), win_rate(reward, far, near, Noise(0), 20)
        assert one == pytest.approx(1 - other)
        assert one > 0.8
    with pytest.raises(UserError, match="same prompts"):
        win_rate(VendiReward(), near, samples(MEDIA[:5]), Noise(0))
