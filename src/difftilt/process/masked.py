"""Masked (absorbing) corruption of token sequences (Sahoo et al. 2024, MDLM), t = 0 data, t = 1 all mask.

Tokens are int64 in 0..vocab-1 and the mask symbol is ``vocab``. A relaxed state has a further axis of length
vocab + 1, rows on the simplex; its visible token is the argmax.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from difftilt.errors import UserError
from difftilt.process.gaussian import at_least_float32
from difftilt.process.protocol import NoiseLaw, PredictionKind
from difftilt.trees import Batched


def gumbel(uniform: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise -log(-log u) from uniform noise on (0, 1)."""
    return -(-uniform.log()).log()


@dataclass(frozen=True)
class MaskedProcess:
    """Every token becomes the mask, independently, with probability m(t) = (1 - floor)·t; bonds with (1 - floor)·t^w.

    With w > 1 bonds are masked later and revealed earlier than the other tokens (PepTune, arXiv 2412.17780, bond-
    dependent masking). A mask then says something about what it hides, so the exact denoiser depends on t.

    Attributes:
        vocab: number of real tokens.
        floor: probability with which a token stays visible at t = 1 (MDLM: 1e-3; 0 makes the prior exact).
        bond: which tokens are bonds: a flag for each real token, or a function of clean sequences (batch, position)
            that returns flags of the same shape. A function serves ``corrupt`` and ``loss_weight``, which is what
            training needs; re-noising and the reverse kernel must know a token's class by the token alone. None: none.
        power: w.
    """

    vocab: int
    floor: float = 0.0
    noise_law: NoiseLaw = "uniform"
    point_prior: bool = True
    bond: tuple[bool, ...] | Callable[[Tensor], Tensor] | None = None
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise UserError(f"power {self.power} of the bonds must be positive")
        if isinstance(self.bond, tuple) and len(self.bond) != self.vocab:
            raise UserError(f"bond has {len(self.bond)} flags: give one for each of the {self.vocab} tokens")

    @property
    def mask(self) -> int:
        """Index of the mask symbol."""
        return self.vocab

    @property
    def one_class(self) -> bool:
        """Whether all tokens are masked alike."""
        return self.bond is None or self.power == 1

    def is_bond(self, x: Int[Tensor, "batch position"]) -> Bool[Tensor, "batch position"]:
        """Positions that hold a bond; a mask is none. A function of clean sequences is asked as it is."""
        if self.bond is None:
            return torch.zeros_like(x, dtype=torch.bool)
        return self._flags(x.device)[x] if isinstance(self.bond, tuple) else self.bond(x)

    def mask_probability(
        self, t: Float[Tensor, "*shape"], bond: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape"]:
        """m(t): (1 - floor)·t, and (1 - floor)·t^w where ``bond`` is True; t in the shape of ``bond``, if given."""
        level = t if bond is None else torch.where(bond, t**self.power, t)
        return (1 - self.floor) * level

    def symbol_mask_probability(self, t: Float[Tensor, " batch"]) -> Float[Tensor, "batch vocab"]:
        """m(t) of every real token.

        Raises:
            UserError: if bonds are known by a function of clean sequences only.
        """
        flags = self._flags(t.device)[:-1].expand(len(t), -1)
        return self.mask_probability(t[:, None].expand(flags.shape), flags)

    def loss_weight(
        self, x_0: Int[Tensor, "batch position"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch position"]:
        """m'(t)/m(t) = 1/t, and w/t for bonds: what a masked position counts in the likelihood bound.

        With sigma = -log(1 - m), the total noise of a masked diffusion, it is sigma'/(exp(sigma) - 1).
        """
        return torch.where(self.is_bond(x_0), self.power, 1.0) / t[:, None]

    def _flags(self, device: torch.device) -> Bool[Tensor, " symbols"]:
        """Whether each symbol, the mask included, is a bond."""
        if self.bond is None:
            return torch.zeros(self.vocab + 1, dtype=torch.bool, device=device)
        if not isinstance(self.bond, tuple):
            raise UserError(
                "bond is a function of clean sequences, and a masked position has none: give a flag for each token"
            )
        return torch.tensor([*self.bond, False], device=device)

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
        """Mask where the uniform ``noise`` is below m(t) of the token."""
        if self.one_class:
            return torch.where(noise < self.mask_probability(t)[:, None], self.mask, x_0)
        level = self.mask_probability(t[:, None].expand(x_0.shape), self.is_bond(x_0))
        return torch.where(noise < level, self.mask, x_0)

    def renoise(
        self,
        x_s: Int[Tensor, "batch position"],
        s: Float[Tensor, " batch"],
        tau: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch position"],
    ) -> Int[Tensor, "batch position"]:
        """Mask visible tokens with probability (m(tau) - m(s)) / (1 - m(s)), m of the token."""
        bond = None if self.one_class else self._flags(x_s.device)[x_s]
        m_s, m_tau = (self.mask_probability(at[:, None].expand(x_s.shape), bond) for at in (s, tau))
        return torch.where(noise < (m_tau - m_s) / (1 - m_s), self.mask, x_s)

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
