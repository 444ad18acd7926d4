"""How CLAP is shown sound, in tensors, so that gradients flow: resampled, repeated to ten seconds, a log-mel spectrum.

The spectrum is that of ``ClapFeatureExtractor`` with ``truncation="rand_trunc"``: Hann windows, power, the mel scale of
Slaney, decibels. Where it would draw a random cut of a longer sound, the middle is taken, so that a score repeats.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.signal import firwin
from torch import Tensor
from torch.nn.functional import conv1d, pad


@dataclass(frozen=True)
class Spectrum:
    """Waves -> log-mel spectra.

    Attributes:
        filters: (frequencies, mels) of the power spectrum.
        rate: samples per second of the waves.
        window: samples of a frame.
        hop: samples from one frame to the next.
        length: samples that every wave is cut or repeated to.
        repeat: whether a short wave is repeated before it is filled up with silence.
    """

    filters: Float[Tensor, "frequencies mels"]
    rate: int = 48_000
    window: int = 1024
    hop: int = 480
    length: int = 480_000
    repeat: bool = True

    @classmethod
    def of(cls, extractor: Any) -> "Spectrum":
        """What a ``ClapFeatureExtractor`` does."""
        filters = torch.as_tensor(np.asarray(extractor.mel_filters_slaney)).float()
        length, repeat = int(extractor.nb_max_samples), extractor.padding == "repeatpad"
        return cls(filters, extractor.sampling_rate, extractor.fft_window_size, extractor.hop_length, length, repeat)

    def __call__(self, waves: Float[Tensor, "batch time"]) -> Float[Tensor, "batch 1 frames mels"]:
        """Waves at ``rate``, in [-1, 1], as decibels with 1 as reference and a floor of -100."""
        window = torch.hann_window(self.window, device=waves.device)
        spectrum = torch.stft(
            self._fitted(waves.float()), self.window, self.hop, window=window, return_complex=True, pad_mode="reflect"
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.mT @ self.filters.to(waves.device)
        return 10 * mel.clamp(min=1e-10).log10()[:, None]

    def _fitted(self, waves: Tensor) -> Tensor:
        extra = waves.shape[1] - self.length
        if extra > 0:
            return waves[:, extra // 2 : extra // 2 + self.length]
        if self.repeat:
            waves = waves.repeat(1, self.length // waves.shape[1])
        return pad(waves, (0, self.length - waves.shape[1]))


def resampled(waves: Float[Tensor, "batch time"], before: int, after: int) -> Float[Tensor, "batch new_time"]:
    """Waves at another rate: band-limited by a windowed sinc, as ``scipy.signal.resample_poly`` does with the same one.

    With the rates p:q in lowest terms, y[n] = Σ_k x[k]·h[n·q - k·p] for n = 0, 1, ...; one convolution with a stride of
    q gives p neighbouring values at once.

    Args:
        waves: to be resampled.
        before: their rate, in samples per second.
        after: the new one.
    """
    shared = math.gcd(before, after)
    up, down = after // shared, before // shared
    if up == down:
        return waves
    half = 10 * max(up, down)
    shape: Any = ("kaiser", 5.0)  # its stub knows no windows with a parameter
    taps = up * firwin(2 * half + 1, 1 / max(up, down), window=shape)
    # phase p of the outputs is y[m·up + p]; x[m·down + j] meets the tap p·down - j·up
    reach = half // up + 1
    places = half + down * np.arange(up)[:, None] - up * np.arange(-reach, reach + down + 1)[None]
    inside = (places >= 0) & (places < len(taps))
    kernel = torch.tensor(np.where(inside, taps[places.clip(0, len(taps) - 1)], 0.0), dtype=waves.dtype)
    count = -(-waves.shape[1] * up // down)
    padded = pad(waves, (reach, reach + 2 * down + 1))[:, None]
    out = conv1d(padded, kernel[:, None].to(waves.device), stride=down)
    return out.mT.flatten(1)[:, :count]
