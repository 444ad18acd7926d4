"""Masked (absorbing) corruption of token sequences (Sahoo et al. 2024, MDLM), t = 0 data, t = 1 all mask.

Tokens are int64 in 0..vocab-1 and the mask symbol is ``vocab``. A relaxed state has a further axis of length
vocab + 1, rows on the simplex; its visible token is the argmax.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.process.gaussian import at_least_float32
from difftilt.process.protocol import NoiseLaw, PredictionKind
from difftilt.trees import Batched


def gumbel(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise -log(-log u) from uniform noise on (0, 1)."""
    return -(-uniform.log()).log()


@dataclass(frozen=True)
class MaskedProcess:
    """Every token becomes the mask, independently, with probability m(t) = (1 - floor)·t.

    Attributes:
        vocab: number of real tokens.
        floor: probability with which a token stays visible at t = 1 (MDLM: 1e-3; 0 makes the prior exact).
    """

    vocab: int
    floor: float = 0.0
    noise_law: NoiseLaw = "uniform"
    point_prior: bool = True

    @property
    def mask(self) -> int:
        """Index of the mask symbol."""
        return self.vocab

    def mask_probability(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """m(t)."""
        return (1 - self.floor) * t

    def is_masked(self, x: Shaped[Tensor, "batch ..."]) -> Bool[Tensor, "batch position"]:
        """Positions that hold the mask; in a relaxed state those where the mask symbol is the argmax."""
        return (x.argmax(-1) if x.is_floating_point() else x) == self.mask

    def visible(self, x: Shaped[Tensor, "batch ..."]) -> Int[Tensor, "batch position"]:
        """Token indices of a hard or relaxed state."""
        return x.argmax(-1) if x.is_floating_point() else x

    def prior(self, noise: Float[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
        """All mask."""
        return torch.full(noise.shape, self.mask, dtype=torch.int64, device=noise.device)

    def corrupt(
        self,
        x_0: Int[Tensor, "batch position"],
        t: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch position"],
    ) -> Int[Tensor, "batch position"]:
        """Mask where the uniform ``noise`` is below m(t)."""
        return torch.where(noise < self.mask_probability(t)[:, None], self.mask, x_0)

    def renoise(
        self,
        x_s: Int[Tensor, "batch position"],
        s: Float[Tensor, " batch"],
        tau: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch position"],
    ) -> Int[Tensor, "batch position"]:
        """Mask visible tokens with probability (m(tau) - m(s)) / (1 - m(s))."""
        m_s, m_tau = self.mask_probability(s), self.mask_probability(tau)
        return torch.where(noise < ((m_tau - m_s) / (1 - m_s))[:, None], self.mask, x_s)

    def predict(
        self,
        output: Float[Tensor, "batch position symbols"],
        x_t: Shaped[Tensor, "batch ..."],
        t: Float[Tensor, " batch"],
        kind: PredictionKind,
    ) -> "TokenPrediction":
        """SUBS parameterisation: no mass on the mask, visible tokens are carried over.

        Args:
            output: logits over the vocabulary, with or without a last channel for the mask, which is ignored.
            x_t: hard (batch, position) or relaxed (batch, position, vocab + 1) state.
            t: (batch,).
            kind: must be ``logits``.
        """
        if kind != "logits":
            raise ValueError(f"the masked process reads logits, not {kind}")
        log_probs = at_least_float32(output)[..., : self.vocab].log_softmax(-1)
        # a masked position has no token to carry over: index 0 stands in and is not selected
        masked = self.is_masked(x_t)
        kept = self.visible(x_t).clamp(max=self.vocab - 1)
        carried = torch.full_like(log_probs, -torch.inf).scatter(-1, kept[..., None], 0.0)
        return TokenPrediction(self, torch.where(masked[..., None], log_probs, carried), x_t, t)


@dataclass(frozen=True)
class TokenPrediction(Batched):
    """Per-position law of the clean tokens.

    Attributes:
        process: the masked process.
        log_probs: (batch, position, vocab), normalised; -inf off the carried token at visible positions.
        x_t: state that was evaluated.
        t: its time.
    """

    process: MaskedProcess
    log_probs: Float[Tensor, "batch position vocab"]
    x_t: Shaped[Tensor, "batch ..."]
    t: Float[Tensor, " batch"]

    @property
    def x0(self) -> Int[Tensor, "batch position"]:
        """The most likely token of each position."""
        return self.log_probs.argmax(-1)

    def x0_noise_shape(self) -> tuple[int, ...]:
        return tuple(self.log_probs.shape[1:])

    def draw_x0(self, noise: Float[Tensor, "batch position vocab"]) -> Int[Tensor, "batch position"]:
        """Every masked position from its own marginal, visible tokens kept (Gumbel-max)."""
        return (self.log_probs + gumbel(noise)).argmax(-1)
