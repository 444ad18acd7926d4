from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from difftilt.errors import UserError
from difftilt.models.denoiser import denoiser
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.digits import CHECKPOINT, CLASSIFIERS, Config, Digits, decode
from difftilt.testbeds.digits_classifier import load_classifiers
from difftilt.testbeds.digits_data import all_prompts, digit_of, labels_of, load_splits


def _samples(images: torch.Tensor, prompt: str) -> Samples:
    prompts = [prompt] * len(images)
    return Samples(images, prompts, prompts, torch.zeros(len(images), dtype=torch.int64))


def test_labels_and_prompts_are_inverse() -> None:
    prompts = all_prompts()
    assert len(set(prompts)) == 20
    assert labels_of(prompts).tolist() == list(range(20))
    assert digit_of(["thin zero", "bold nine"]).tolist() == [0, 9]
    with pytest.raises(ValueError, match="'fat two' is no prompt"):
        labels_of(["thin two", "fat two"])


def test_every_prompt_has_its_stroke_relative_to_its_digit() -> None:
    train = load_splits().train
    ink = train.images.mean((1, 2, 3))
    for digit in range(10):
        bold, thin = ink[train.labels == 2 * digit + 1], ink[train.labels == 2 * digit]
        assert float(bold.min()) > float(thin.max())
        # a median splits the class in halves up to ties
        assert abs(len(bold) - len(thin)) <= 0.1 * (len(bold) + len(thin))


def test_splits_hold_different_images_of_the_data_set() -> None:
    splits = load_splits()
    assert [len(part.images) for part in (splits.first, splits.second, splits.test)] == [718, 719, 360]
    everything = torch.cat([splits.train.images, splits.test.images])
    assert float(everything.min()) == 0.0
    assert float(everything.max()) == 1.0
    # the data set has no two equal images, so equal rows would betray a shared one
    assert len(torch.unique(everything.flatten(1), dim=0)) == 1797


def test_decode_covers_the_unit_interval_and_keeps_gradients() -> None:
    row = torch.tensor([-3.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 3.0])
    latents = row.expand(1, 1, 8, 8).clone().requires_grad_()
    media = decode(latents)
    assert media[0, 0, 0].tolist() == [0.0, 0.0, 0.0, 0.25, 0.75, 1.0, 1.0, 1.0]
    media.sum().backward()
    assert latents.grad is not None
    assert latents.grad[0, 0, 0].tolist() == [0.0, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("reward", ["digit", "margin", "ink", "symmetry"])
def test_the_trained_reward_is_not_held_out(reward: str) -> None:
    task = Digits(Config.model_validate({"reward": reward})).task()
    assert task.reward.name == reward
    assert reward not in task.heldout
    assert {"heldout_digit", "nearness"} <= set(task.heldout)
    assert "margin" not in task.heldout


def test_rewards_of_real_digits_prefer_their_own_prompt() -> None:
    test, bed = load_splits().test, Digits()
    sevens = test.images[test.digits == 7]
    for name in ("digit", "heldout_digit"):
        reward = bed.rewards()[name]
        right, wrong = reward.score(_samples(sevens, "bold seven")), reward.score(_samples(sevens, "thin two"))
        assert float(right.mean()) > 0.8 > 0.05 > float(wrong.mean())


def test_the_margin_is_the_gap_of_logits_and_positive_where_the_class_wins() -> None:
    test, bed = load_splits().test, Digits()
    reward = bed.rewards()["margin"]
    logits = bed.classifiers[0](test.images)
    margin = reward.score(_samples(test.images, "bold seven"))
    others = logits[:, [0, 1, 2, 3, 4, 5, 6, 8, 9]].amax(1)
    torch.testing.assert_close(margin, logits[:, 7] - others, rtol=1e-4, atol=1e-4)
    assert torch.equal(margin > 0, logits.argmax(1) == 7)


def test_nearness_is_zero_on_training_images_only() -> None:
    bed, splits = Digits(), load_splits()
    # cdist by matrix products rounds at about sqrt(1e-7·|x|²), 2e-3 per image
    assert float(bed.nearness(_samples(splits.first.images, "thin one")).min()) > -1e-3
    unseen = bed.nearness(_samples(splits.test.images, "thin one"))
    blank = bed.nearness(_samples(torch.ones(1, 1, 8, 8), "thin one"))
    assert -0.02 > float(unseen.mean()) > -0.2 > -0.4 > float(blank)


def test_the_null_label_differs_from_every_prompt() -> None:
    model = Digits().task().model
    x, t = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((20,), 0.7)
    condition = model.encode(all_prompts())
    with torch.no_grad():
        plain, null = (denoiser(model, guidance=g)(x, t, condition).x0 for g in (1.0, 0.0))
    assert bool(((plain - null).flatten(1).abs().amax(1) > 1e-3).all())


def test_classifiers_are_frozen_and_give_features() -> None:
    bed = Digits()
    assert not any(p.requires_grad for network in bed.classifiers for p in network.parameters())
    assert bed.features(torch.zeros(3, 1, 8, 8)).shape == (3, 64)


def test_tasks_have_networks_of_their_own() -> None:
    bed = Digits()
    first, second = bed.task().model.network, bed.task().model.network
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    assert all(a is not b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(p.requires_grad for p in first.parameters())


def test_damaged_classifiers_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / CLASSIFIERS
    broken.write_bytes((CHECKPOINT / CLASSIFIERS).read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_classifiers(broken)
    with pytest.raises(UserError, match="cannot be read"):
        load_classifiers(tmp_path / "nothing")


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="reward"):
        Config.model_validate({"reward": "beauty"})
