"""CLIP score, PickScore: the cosine of CLIP's embeddings, finished as published, from objects and from folders."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import difftilt
import difftilt.leaves
from difftilt.errors import UserError
from difftilt.recipes.parts import config_of
from difftilt.rewards import Samples, as_reward, evaluate
from difftilt.rewards.pretrained import clip_score as clip_score_leaf
from difftilt.rewards.pretrained import pick_score as pick_score_leaf
from difftilt.rewards.pretrained.clip_score import clip_score
from difftilt.rewards.pretrained.pick_score import pick_score
from pipelines import clip_tokenizer, made, stable_diffusion
from pretrained import EDGE, PROMPTS, clip, hold, images, samples, save_clip, slope, without


def processor(**settings: Any) -> Any:
    return made("CLIPImageProcessorPil", **({"size": {"shortest_edge": EDGE}, "crop_size": EDGE} | settings))


def cosine_of_transformers(model: Any, given: Samples, prefix: str = "") -> Tensor:
    """The same number by the model's own forward, processor and tokenizer."""
    tokens = clip_tokenizer()([prefix + prompt for prompt in given.prompts], padding=True, return_tensors="pt")
    pixels = torch.stack([torch.as_tensor(x) for x in processor()(list(given.media), do_rescale=False)["pixel_values"]])
    with torch.no_grad():
        out = model(pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return (out.image_embeds * out.text_embeds).sum(-1)


def test_scores_are_those_of_the_model_itself() -> None:
    model, given = clip(), samples(images(3, EDGE, EDGE))  # of the network's size, so that nothing is rounded
    expected = cosine_of_transformers(model, given)
    assert float(expected.std()) > 0.01  # else nothing is compared
    cosine = hold(clip_score(model=model, tokenizer=clip_tokenizer()), given, -1, 1)
    torch.testing.assert_close(cosine, expected, atol=1e-5, rtol=0)
    paper = clip_score(clip_score_leaf.Config(form="hessel"), model=model, tokenizer=clip_tokenizer())
    told = cosine_of_transformers(model, given, "A photo depicts ")
    torch.testing.assert_close(hold(paper, given, 0, 2.5), 2.5 * told.clamp(min=0), atol=1e-5, rtol=0)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100))
    picked = hold(pick_score(model=model, tokenizer=clip_tokenizer()), given, -100, 100)
    torch.testing.assert_close(picked, 100 * expected, atol=1e-3, rtol=0)


def test_gradients_reach_the_pixels_and_no_weights() -> None:
    model = clip()
    reward = clip_score(model=model, tokenizer=clip_tokenizer())
    slope(reward, samples(images()))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert reward.capabilities.differentiable


def test_the_prompt_of_the_user_counts_and_long_ones_are_cut() -> None:
    reward = clip_score(model=clip(), tokenizer=clip_tokenizer())
    media = images(1).repeat(3, 1, 1, 1)
    scores = reward.score(samples(media, ["red", "a cat by the sea", "red"]))
    assert scores[0] == scores[2]
    assert abs(float(scores[0] - scores[1])) > 1e-3
    long = reward.score(samples(media, ["red " * 40, "red " * 50, "red " * 40 + "cat"]))
    assert torch.equal(long, long[:1].expand(3))  # cut to the same 32 tokens


def test_batches_change_nothing_and_the_network_computes_in_the_precision_asked_for() -> None:
    given, config = samples(images()), clip_score_leaf.Config
    whole = clip_score(config(batch=16), model=clip(), tokenizer=clip_tokenizer()).score(given)
    parts = clip_score(config(batch=2), model=clip(), tokenizer=clip_tokenizer()).score(given)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    half = clip_score(config(dtype="bfloat16"), model=clip(), tokenizer=clip_tokenizer())
    assert half.network.dtype == torch.bfloat16  # pyright: ignore[reportAttributeAccessIssue]
    scores = half.score(given)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, whole, atol=0.1, rtol=0)  # 2^-8 of numbers near 1, over two layers


def test_a_folder_gives_the_same_scores_as_its_objects(tmp_path: Path) -> None:
    given = samples(images())
    model = save_clip(tmp_path, processor())
    expected = clip_score(model=model, tokenizer=clip_tokenizer()).score(given)
    named = clip_score_leaf.Config(source=str(tmp_path), device="cpu")
    found = clip_score(named).score(given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    picked = pick_score(pick_score_leaf.Config(source=str(tmp_path), processor=str(tmp_path))).score(given)
    torch.testing.assert_close(picked, expected * model.logit_scale.exp(), atol=1e-4, rtol=0)
    # and its own image processor is followed
    processor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    other = clip_score(named).score(given)
    assert float((other - expected).abs().max()) > 1e-3


def test_a_recipe_names_it() -> None:
    entry = difftilt.leaves.load("rewards", "pick-score")
    assert config_of(entry) is pick_score_leaf.Config
    assert as_reward(entry(model=clip(), tokenizer=clip_tokenizer())).name == "pick_score"


def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from difftilt.models.ledger import Ledger

    reward = clip_score(model=clip(), tokenizer=clip_tokenizer())
    with pytest.raises(UserError, match=r"clip_score scores images.*was given a video.*wrap it in a video reward"):
        evaluate(reward, samples(torch.zeros(3, 2, 3, 8, 8)), Ledger())
    with pytest.raises(UserError, match="give tokenizer with model, or a source"):
        clip_score(model=clip())
    for source, message in (
        ("nobody/nothing", "'nobody/nothing' cannot be loaded: .*no network\\? name a local folder"),
        ("nothing", "'nothing' is neither a folder nor an id on the hub, which is OWNER/NAME"),
        (str(tmp_path), "cannot be loaded: .*is the file complete\\?"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            clip_score(clip_score_leaf.Config(source=source))
        assert "\n" not in str(caught.value)
    without("transformers", monkeypatch)
    with pytest.raises(UserError, match=r"clip_score needs 'transformers', .*pip install 'difftilt\[rewards\]'"):
        clip_score()


def test_equal_prompts_are_encoded_once() -> None:
    model, seen = clip(), list[int]()
    model.text_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    clip_score(model=model, tokenizer=clip_tokenizer()).score(samples(images(), PROMPTS))
    assert seen == [2]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_a_pipeline_is_steered_by_a_reward_that_a_recipe_names(tmp_path: Path) -> None:
    """best-of-n of 4 keeps the largest of its own scores, and these are what the reward says of the images."""
    save_clip(tmp_path / "clip", processor())
    pipe = tmp_path / "pipe"
    stable_diffusion().save_pretrained(pipe)
    recipe = {
        "testbed": {"name": "pipeline", "source": str(pipe), "prompts": PROMPTS[:2], "steps": 2, "cache": "off"},
        "reward": {"name": "clip-score", "source": str(tmp_path / "clip")},
        "steerer": {"name": "best-of-n", "particles": 4},
    }
    result = difftilt.steer(recipe)
    steered = result.steered
    drawn = samples(steered.media, [PROMPTS[prompt] for prompt in steered.group.tolist()])
    told = clip_score(clip_score_leaf.Config(source=str(tmp_path / "clip"))).score(drawn)
    torch.testing.assert_close(steered.rewards, told, atol=1e-5, rtol=0)
    best = [float(told[steered.group == prompt].max()) for prompt in range(2)]
    assert result.best["reward"] == pytest.approx(sum(best) / 2, abs=1e-5)
