"""Audio samples as a page plays them: one WAV file for a row of samples."""

import base64
import io
import wave

import torch
from jaxtyping import Shaped
from torch import Tensor

GAP = 0.15
"""Seconds of silence between two samples."""

LONGEST = 10.0
"""Seconds of sound of one row; what does not fit is left out, so that the page stays light."""


def sound(media: Shaped[Tensor, "rows channel time"], rate: int) -> str:
    """Samples in [-1, 1] one after the other, as a data URI of 16 bit in one channel; what is not finite is silence.

    Args:
        media: the mean over channels is played, clipped.
        rate: samples per second.
    """
    waves = media.float().nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp(-1, 1).mean(1)
    spaced = torch.nn.functional.pad(waves, (0, round(GAP * rate))).flatten()[: round(LONGEST * rate)]
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((spaced * 32767).round().short().numpy().astype("<i2").tobytes())
    return f"data:audio/wav;base64,{base64.b64encode(stream.getvalue()).decode()}"
