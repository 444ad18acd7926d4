"""Noise as an input: a pure function of (seed, iteration, purpose, sample index, step).

The generator is counter-based: a 64-bit key is hashed from the coordinates, and element e of a tensor is the SplitMix64
finaliser of key + (e + 1)·golden (Steele, Lea and Flood 2014), turned into normals by Box and Muller. So the noise of a
sample is the same in any batch, in any order, in any process and on any device, and nothing global is touched.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from difftilt.sampling.protocol import NoiseSource

_WORD = (1 << 64) - 1


def _signed(value: int) -> int:
    """The two's complement int64 of a 64-bit word."""
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix_(z: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64 finaliser, a bijection of 64-bit words with full avalanche; overwrites its argument."""
    moved = torch.empty_like(z)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        # int64 shifts are arithmetic: the mask makes them logical
        torch.bitwise_right_shift(z, bits, out=moved).bitwise_and_((1 << (64 - bits)) - 1)
        z.bitwise_xor_(moved)
        if factor != 1:
            z.mul_(factor)
    return z


def _mix_word(z: int) -> int:
    """:func:`_mix_` of one word."""
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        z &= _WORD
        z = (z ^ (z >> bits)) * factor
    return _signed(z)


def _word_of(text: str) -> int:
    """FNV-1a of the text: Python's own hash differs from process to process."""
    word = 0xCBF29CE484222325
    for byte in text.encode():
        word = ((word ^ byte) * 0x100000001B3) & _WORD
    return _signed(word)


@dataclass(frozen=True)
class Noise:
    """The noise of one iteration of one run.

    Attributes:
        seed: of the run.
        iteration: of the training loop, 0 for a single call.
        scope: prefix of every purpose, see :meth:`named`.
    """

    seed: int
    iteration: int = 0
    scope: str = ""

    def at(self, iteration: int) -> "Noise":
        """The noise of another iteration."""
        return replace(self, iteration=iteration)

    def named(self, scope: str) -> "Noise":
        """Independent noise for a part of the iteration (a phase, an epoch), inside the present scope."""
        return replace(self, scope=f"{self.scope}/{scope}")

    def _keys(self, index: Tensor, purpose: str, step: int | Tensor) -> Int[Tensor, " rows"]:
        # what is the same for all rows is hashed as one Python number
        word = _mix_word(_mix_word(self.seed + _GOLDEN) + _word_of(f"{self.scope}:{purpose}"))
        word = _mix_word(word + self.iteration * _GOLDEN)
        key = _mix_(index.long() * _GOLDEN + word)
        moved = step.to(key.device).long() * _GOLDEN if isinstance(step, Tensor) else _signed(step * _GOLDEN)
        return _mix_(key + moved)

    def _words(self, index: Tensor, count: int, purpose: str, step: int | Tensor) -> Int[Tensor, "rows words"]:
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=index.device) * _GOLDEN
        return _mix_(self._keys(index, purpose, step)[:, None] + counter)

    def uniform(
        self, index: Int[Tensor, " rows"], shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0
    ) -> Float[Tensor, "rows *noise"]:
        """Uniform float32 on the open interval (0, 1), shape (rows, *shape).

        Args:
            index: global index of each sample.
            shape: of the noise of one sample.
            purpose: name of what the noise is for; different names are independent.
            step: index of the step, one for all rows or (rows,).
        """
        words = self._words(index, math.prod(shape), purpose, step)
        # 23 bits and a half: the largest value, 1 - 2^-24, is still below 1 in float32
        unit = ((words >> 41) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
        return unit.reshape(len(index), *shape)

    def normal(
        self, index: Int[Tensor, " rows"], shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0
    ) -> Float[Tensor, "rows *noise"]:
        """Standard normal float32, shape (rows, *shape); arguments as in :meth:`uniform`."""
        size = math.prod(shape)
        words = self._words(index, (size + 1) // 2, purpose, step)
        radius = ((words >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
        angle = ((words >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
        both = radius.new_empty(len(index), 2 * radius.shape[1])
        first, second = both.chunk(2, -1)
        torch.mul(radius, angle.cos(), out=first)
        torch.mul(radius, angle.sin_(), out=second)
        return both[:, :size].reshape(len(index), *shape)

    def permutation(self, count: int, *, purpose: str, step: int = 0) -> Int[Tensor, " count"]:
        """A uniformly random permutation of 0..count-1 on the CPU."""
        words = self._words(torch.zeros(1, dtype=torch.int64), count, purpose, step)[0]
        return words.argsort(stable=True)


@dataclass(frozen=True)
class Apart:
    """The same source under other purposes: a completion must not meet the noise of the chain that it completes.

    Attributes:
        source: of the noise.
        label: stands before every purpose.
    """

    source: NoiseSource
    label: str

    def normal(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """As the source's."""
        return self.source.normal(index, shape, purpose=f"{self.label}/{purpose}", step=step)

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """As the source's."""
        return self.source.uniform(index, shape, purpose=f"{self.label}/{purpose}", step=step)


def copies(index: Int[Tensor, " rows"], count: int) -> tuple[Int[Tensor, " draws"], Int[Tensor, " draws"]]:
    """Row and noise index of ``count`` draws of every row, those of one row together; draw j has index·count + j."""
    again = torch.arange(len(index), device=index.device).repeat_interleave(count)
    draw = torch.arange(count, device=index.device).repeat(len(index))
    return again, index[again] * count + draw


@dataclass(frozen=True)
class Still:
    """Noise that never varies: every normal is 0 and every uniform 1/2.

    A Gaussian step then draws its mean, and a categorical one its most likely symbol at every position.
    """

    def normal(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Zeros."""
        return torch.zeros((len(index), *shape), device=index.device)

    def uniform(self, index: Tensor, shape: tuple[int, ...], *, purpose: str, step: int | Tensor = 0) -> Tensor:
        """Halves."""
        return torch.full((len(index), *shape), 0.5, device=index.device)


Siblings = Literal["correlated", "scaled"]
"""How siblings are told apart: by noise they partly share, or by independent noise of a larger scale."""


def siblings(
    shared: Float[Tensor, "rows *noise"],
    own: Float[Tensor, "rows *noise"],
    spread: float,
    mode: Siblings = "correlated",
) -> Float[Tensor, "rows *noise"]:
    """(shared + spread·own) / sqrt(1 + spread²): N(0, I) marginals, correlation 1/(1 + spread²) between siblings.

    ``spread`` 0 gives clones, infinity independence (BranchGRPO, arXiv 2509.06040). Mode ``scaled`` is spread·own, as
    in that paper's released code: its variance is spread², not the step's, and it is there only to show what that does.
    """
    if mode == "scaled":
        return spread * own
    return (shared + spread * own) / math.sqrt(1 + spread**2)
