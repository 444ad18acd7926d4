"""The text encoder: padding is invisible, order is not, and strange words are refused."""

from pathlib import Path

import pytest
import torch

from difftilt.errors import UserError
from difftilt.models.saving import from_pretrained, save_pretrained
from difftilt.models.text_encoder import TextEncoder

WORDS = ["red", "blue", "circle", "of"]


def encoder(**changes: int) -> TextEncoder:
    return TextEncoder(WORDS, changes.pop("length", 4), width=16, depth=2, heads=2, **changes)


def test_words_have_numbers_and_padding_is_zero() -> None:
    assert encoder().tokenise(["red circle", "", "of of of of"]).tolist() == [[1, 3, 0, 0], [0] * 4, [4] * 4]
    with pytest.raises(UserError, match="'rad' is not in the vocabulary; did you mean red"):
        encoder().tokenise(["red", "rad circle"])
    with pytest.raises(UserError, match="has 5 words; the text encoder reads 4"):
        encoder().tokenise(["red " * 5])


def test_padding_does_not_change_what_stands_before_it() -> None:
    long, short = encoder(length=6), encoder(length=3)
    with torch.no_grad():
        short.positions.copy_(long.positions[:3])
        for mine, theirs in zip(short.layers.parameters(), long.layers.parameters(), strict=True):
            mine.copy_(theirs)
        short.words.copy_(long.words)
        wide, keep, pooled = long(long.tokenise(["red of circle", "blue"]))
        narrow, _, same = short(short.tokenise(["red of circle", "blue"]))
    assert keep.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    assert torch.allclose(wide[:, :3] * keep[:, :3, None], narrow, atol=1e-6)
    assert torch.allclose(pooled, same, atol=1e-6)
    assert not wide[~keep].any()


def test_order_matters_and_the_empty_prompt_is_zero() -> None:
    network = encoder()
    with torch.no_grad():
        tokens, keep, pooled = network(network.tokenise(["red of blue", "blue of red", ""]))
    assert float((tokens[0].flip(0) - tokens[1]).abs().max()) > 1e-3
    assert float((pooled[0] - pooled[1]).abs().max()) > 1e-3
    assert not keep[2].any()
    assert not pooled[2].any()
    assert bool(tokens.isfinite().all())


def test_the_pooled_vector_is_the_mean_over_words() -> None:
    network = encoder()
    with torch.no_grad():
        tokens, _, pooled = network(network.tokenise(["red blue"]))
    assert torch.allclose(pooled[0], tokens[0, :2].mean(0), atol=1e-6)


def test_it_is_saved_with_its_vocabulary(tmp_path: Path) -> None:
    network = encoder(seed=3)
    save_pretrained(network, tmp_path, {"vocabulary": WORDS, "length": 4, "width": 16, "depth": 2, "heads": 2})
    again = from_pretrained(tmp_path)
    assert isinstance(again, TextEncoder)
    with torch.no_grad():
        assert torch.equal(again(again.tokenise(["red of"]))[0], network(network.tokenise(["red of"]))[0])
