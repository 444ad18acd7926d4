"""DINO similarity to reference images, and CLAP: sound as its own feature extractor hears it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from torch import Tensor
from torch.nn.functional import normalize

from difftilt.errors import UserError
from difftilt.rewards import Samples
from difftilt.rewards.pictures import as_pictures
from difftilt.rewards.pretrained import clap as clap_leaf
from difftilt.rewards.pretrained import dino as dino_leaf
from difftilt.rewards.pretrained.clap import clap
from difftilt.rewards.pretrained.dino import dino
from difftilt.rewards.pretrained.sound import Spectrum, resampled
from pipelines import made
from pretrained import EDGE, hold, images, samples, seeded, slope, vision_settings
from test_rewards_preference import bert_tokenizer


def dinov2() -> Any:
    return seeded(lambda: made("Dinov2Model", made("Dinov2Config", **vision_settings() | {"mlp_ratio": 2})))


def test_dino_is_the_mean_cosine_to_the_references(tmp_path: Path) -> None:
    model, given = dinov2(), samples(images())
    references = [images(1, 33, 50, seed)[0] for seed in (1, 2)]
    reward = dino(model=model, references=references)
    scores = hold(reward, given, -1, 1)
    with torch.no_grad():
        ours, theirs = (
            torch.cat([normalize(model(reward.preparation(x[None])).last_hidden_state[:, 0], dim=-1) for x in batch])
            for batch in (list(given.media), references)
        )
    torch.testing.assert_close(scores, (ours @ theirs.T).mean(1), atol=1e-5, rtol=0)
    slope(reward, given)
    torch.testing.assert_close(reward.features(given), ours, atol=1e-5, rtol=0)
    # an image is most like itself, and the nearest of all references is it
    own = dino(dino_leaf.Config(nearest=1), model=model, references=[*references, given.media[0]])
    assert float(own.score(given)[0]) == pytest.approx(1, abs=1e-5)
    # from folders: of the network with its processor, and of the pictures
    model.save_pretrained(tmp_path / "net")
    made(
        "BitImageProcessorPil", size={"shortest_edge": EDGE}, crop_size=EDGE,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(tmp_path / "net")  # fmt: skip
    for place, reference in enumerate(references):
        as_pictures(reference[None])[0].save(tmp_path / f"{place}.png")
    config = dino_leaf.Config(source=str(tmp_path / "net"), references=str(tmp_path))
    torch.testing.assert_close(dino(config).score(given), scores, atol=1e-5, rtol=0)


def test_dino_without_references_says_so(tmp_path: Path) -> None:
    for references in (None, []):
        with pytest.raises(UserError, match="there are no reference images"):
            dino(model=dinov2(), references=references)
    with pytest.raises(UserError, match="is no folder with images in it"):
        dino(dino_leaf.Config(references=str(tmp_path)), model=dinov2())
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        dino(dino_leaf.Config(references=str(tmp_path)), model=dinov2())
    with pytest.raises(UserError, match="nearest = 3, and there are only 1 references"):
        dino(dino_leaf.Config(nearest=3), model=dinov2(), references=[images(1)[0]])


RATE = 8000


def extractor(**settings: Any) -> Any:
    default = {"feature_size": 8, "sampling_rate": RATE, "hop_length": 80, "max_length_s": 1, "fft_window_size": 256}
    default |= {"frequency_min": 50, "frequency_max": 3500, "truncation": "rand_trunc", "padding": "repeatpad"}
    return made("ClapFeatureExtractor", **(default | settings))


def clap_model() -> Any:
    audio = {"num_mel_bins": 8, "spec_size": 32, "depths": [1, 1], "num_attention_heads": [2, 4], "window_size": 4}
    audio |= {"patch_embeds_hidden_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "mlp_ratio": 2.0}
    text = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
    config = made("ClapConfig", audio_config=audio, text_config=text, projection_dim=8)
    return seeded(lambda: made("ClapModel", config), scale=2.0)


def waves(rows: int = 3, time: int = RATE, seed: int = 0) -> Tensor:
    """A few tones and some noise for each row, (rows, time), in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 100 + 1500 * torch.rand(rows, 3, 1, generator=generator)
    tones = (2 * torch.pi * pitch * torch.arange(time) / RATE).sin().mean(1)
    return 0.9 * tones + 0.02 * torch.randn(rows, time, generator=generator)


def sounds(x: Tensor) -> Samples:
    return samples(x[:, None])


@pytest.mark.parametrize("time", [RATE, RATE // 3, RATE // 2, 100 + RATE // 2])
@pytest.mark.parametrize("padding", ["repeatpad", "pad"])
def test_the_spectrum_is_that_of_the_feature_extractor(time: int, padding: str) -> None:
    theirs, x = extractor(padding=padding), waves(time=time)
    expected = torch.as_tensor(np.array(theirs(list(x.numpy()), sampling_rate=RATE)["input_features"]))
    found = Spectrum.of(theirs)(x)
    assert found.shape == expected.shape
    # theirs is in float64; ours has errors of 1e-7 of the largest power, and the floor of 1e-10 makes decibels of that
    # visible only below -60
    loud = expected > -60
    torch.testing.assert_close(found[loud], expected[loud].float(), atol=0.05, rtol=0)
    assert float(loud.float().mean()) > 0.3


def test_long_sounds_give_their_middle() -> None:
    x = waves(time=3 * RATE)
    spectrum = Spectrum.of(extractor())
    assert torch.equal(spectrum(x), spectrum(x[:, RATE : 2 * RATE]))


@pytest.mark.parametrize(("before", "after"), [(4000, 8000), (8000, 4000), (4410, 8000), (8000, 8000), (6000, 4000)])
def test_resampling_is_that_of_scipy(before: int, after: int) -> None:
    x = torch.randn(2, 301, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = resample_poly(x.numpy(), after, before, axis=1)
    found = resampled(x, before, after)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_clap() -> None:
    model, given = clap_model(), sounds(waves())
    reward = clap(clap_leaf.Config(rate=RATE), model=model, tokenizer=bert_tokenizer(), extractor=extractor())
    scores = hold(reward, given, -1, 1)
    features = extractor()(list(waves().numpy()), sampling_rate=RATE, return_tensors="pt")
    tokens = bert_tokenizer()(given.prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"],
            input_features=features["input_features"].float(), is_longer=features["is_longer"],
        )  # fmt: skip
    # the logits of the model hold its own cosines times its learned scale
    expected = (out.audio_embeds * out.text_embeds).sum(-1)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    assert float(scores.std()) > 0.01
    # two channels are their mean, and half the rate is resampled
    both = samples(torch.stack([2 * waves(), torch.zeros(3, RATE)], 1))
    torch.testing.assert_close(reward.score(both), scores, atol=1e-4, rtol=0)
    low = clap(clap_leaf.Config(rate=RATE // 2), model=model, tokenizer=bert_tokenizer(), extractor=extractor())
    assert low.score(sounds(waves()[:, ::2])).shape == (3,)
    x = given.media.clone().requires_grad_()
    slope_of = torch.autograd.grad(reward.score(samples(x)).sum(), x)[0]
    assert bool((slope_of.flatten(1).abs().sum(1) > 0).all())


def test_clap_refuses_fusion_and_images() -> None:
    model = clap_model()
    with pytest.raises(UserError, match="give extractor with model, tokenizer"):
        clap(model=model, tokenizer=bert_tokenizer())
    reward = clap(model=model, tokenizer=bert_tokenizer(), extractor=extractor())
    with pytest.raises(UserError, match=r"clap scores audio, .*given images"):
        reward.score(samples(images()))
    model.config.audio_config.enable_fusion = True
    with pytest.raises(UserError, match="take a model without it"):
        clap(model=model, tokenizer=bert_tokenizer(), extractor=extractor())
