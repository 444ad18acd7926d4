"""Audio samples: drawn as spectrograms, played from the page, and kept out of harm where they are damaged."""

import base64
import io
import json
import re
import wave
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from difftilt.evaluation.report.page import write_report
from difftilt.evaluation.report.samples import kind_of
from difftilt.evaluation.report.sounds import GAP, LONGEST, sound
from difftilt.training.pictures import SPECTROGRAM, save_picture, spectrograms

RATE = 4000


def sine(pitch: float, loud: float = 1.0, length: int = 2048) -> Float[Tensor, "1 1 time"]:
    return loud * (2 * torch.pi * pitch * torch.arange(length) / RATE).sin()[None, None]


def samples_of(uri: str) -> tuple[int, Tensor]:
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as file:
        data = torch.frombuffer(bytearray(file.readframes(file.getnframes())), dtype=torch.int16)
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.getframerate(), data


@pytest.mark.parametrize("pitch", [250.0, 1000.0, 1750.0])
def test_a_spectrogram_shows_pitch_upwards_and_level_in_decibels(pitch: float) -> None:
    shown = spectrograms(torch.cat([sine(pitch), sine(pitch, 0.1), torch.zeros(1, 1, 2048)]))
    assert shown.shape == (3, 1, SPECTROGRAM, SPECTROGRAM)
    middle = shown[:, 0, :, SPECTROGRAM // 2]
    row = SPECTROGRAM - 1 - int(pitch / (RATE / 2) * SPECTROGRAM)
    assert abs(int(middle[0].argmax()) - row) <= 1
    # full scale is white; 20 dB below is 20/70 darker; nothing is black
    assert middle[:2].amax(1).tolist() == pytest.approx([1, 1 - 20 / 70], abs=0.01)
    assert not shown[2].any()


def test_spectrograms_take_any_length_channels_and_what_is_not_finite() -> None:
    audio = torch.randn(2, 2, 7, generator=torch.Generator().manual_seed(0))
    audio[1, 0, 3] = torch.nan
    assert bool(spectrograms(audio).isfinite().all())


def test_sound_is_all_samples_with_gaps() -> None:
    media = torch.cat([sine(500.0, 0.5), sine(700.0, 3.0)])
    media[0, 0, 5] = torch.nan
    rate, data = samples_of(sound(media, RATE))
    length, gap = media.shape[2], round(GAP * RATE)
    assert rate == RATE
    assert len(data) == 2 * (length + gap)
    again = data.double().reshape(2, -1) / 32767
    assert torch.allclose(again[0, :length], media[0, 0].nan_to_num().double(), atol=1e-4)
    assert torch.allclose(again[1, :length], media[1, 0].clamp(-1, 1).double(), atol=1e-4)
    assert not again[:, length:].any()
    assert len(samples_of(sound(media.repeat(60, 1, 1), RATE))[1]) == LONGEST * RATE


def test_audio_is_its_own_kind_and_has_a_picture(tmp_path: Path) -> None:
    assert kind_of(torch.zeros(2, 1, 2048)) == "audio"
    assert kind_of(torch.zeros(2, 1, 2048, dtype=torch.int64)) is None
    assert save_picture(tmp_path, "step_0", sine(500.0).repeat(4, 1, 1), columns=2).suffix == ".png"


@pytest.mark.parametrize(("rate", "plays"), [(RATE, True), (None, False), (-1, False), ("fast", False)])
def test_a_report_draws_audio_and_plays_it_where_the_rate_is_known(rate: object, plays: bool, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    described = {"prompts": ["A <b>"], "heldout": [True], "size": 2, "score": "reward", "rate": rate}
    (folder / "prompts.json").write_text(json.dumps(described))
    (tmp_path / "config.yaml").write_text("testbed: {name: tones}\nmethod: {name: diffusion-nft}\n")
    (tmp_path / "metrics.jsonl").write_text("")
    for step in (0, 3):
        save_file({"media": sine(500.0).repeat(2, 1, 1), "score": torch.ones(2)}, folder / f"step_{step}.safetensors")
    page = write_report([tmp_path]).read_text()
    assert page.count("data:image/png") == 2
    assert len(re.findall(r"<audio controls[^>]*data:audio/wav", page)) == (2 if plays else 0)
    assert "media-src data:" in page
    assert "A <b>" not in page
