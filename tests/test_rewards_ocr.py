"""Words that are really rendered, really read by tesseract."""

import shutil
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from difftilt import leaves
from difftilt.errors import UserError
from difftilt.rewards import Samples
from difftilt.rewards.ocr import Config, Ocr, edit_distance, text_accuracy, wanted_texts, word_accuracy
from pretrained import without

needs_tesseract = pytest.mark.skipif(
    shutil.which("tesseract") is None, reason="the program tesseract is not installed: apt-get install tesseract-ocr"
)
"""No wheel brings the program; the script of continuous integration installs it, and fails if it cannot."""


def rendered(text: str, size: int = 40) -> Tensor:
    """Black words on white, in the font that Pillow ships."""
    picture = Image.new("L", (360, 90), 255)
    ImageDraw.Draw(picture).text((20, 20), text, fill=0, font=ImageFont.load_default(size))
    return torch.tensor(list(picture.tobytes()), dtype=torch.float32).reshape(1, 90, 360) / 255


def samples(texts: list[str], prompts: list[str], **metadata: list[str]) -> Samples:
    media = torch.stack([rendered(text) for text in texts])
    return Samples(media, prompts, prompts, torch.zeros(len(texts), dtype=torch.int64), None, metadata)


@cache
def reader() -> Ocr:
    return Ocr()


PROMPTS = ['a sign that says "hello world"', 'the word "garden"', 'the words "open house"', 'a card: "hello world"']


@needs_tesseract
def test_words_that_are_there_are_read() -> None:
    texts = ["hello world", "garden", "open mouse", "garden"]
    given_samples = samples(texts, PROMPTS)
    read = reader().read(given_samples.media)
    assert [" ".join(text.split()).lower() for text in read] == texts
    scores = reader().score(given_samples)
    # the published formula: 1 of 9 letters is wrong in "openmouse"; of "garden" 9 edits make "helloworld" of 10
    expected = [1.0, 1.0, 1 - 1 / 9, 1 - edit_distance("garden", "helloworld") / 10]
    torch.testing.assert_close(scores, torch.tensor(expected))
    words = Ocr(Config(form="words")).score(given_samples)
    assert words.tolist() == [1.0, 1.0, 0.5, 0.0]
    one = torch.cat([reader().score(given_samples.take(torch.tensor([row]))) for row in range(4)])
    assert torch.equal(one, scores)


@needs_tesseract
def test_an_empty_image_scores_nothing_and_small_ones_are_enlarged() -> None:
    blank = samples([""], ['a "sign"'])
    assert reader().score(blank).tolist() == [0.0]
    small = torch.nn.functional.interpolate(rendered("garden", 60)[None], scale_factor=0.18, mode="area")
    tiny = Samples(small, ['"garden"'], ['"garden"'], torch.zeros(1, dtype=torch.int64))
    assert float(Ocr(Config(height=120, layout=7)).score(tiny)) > float(Ocr(Config(layout=7)).score(tiny)) - 1e-6
    assert float(Ocr(Config(height=120, layout=7)).score(tiny)) > 0.5


@needs_tesseract
def test_metadata_says_what_is_wanted() -> None:
    told = samples(["garden"], ["a photo"], text=["garden"])
    assert reader().score(told).tolist() == [1.0]
    other = samples(["garden"], ['a "photo"'], label=["garden"])
    assert Ocr(Config(key="label")).score(other).tolist() == [1.0]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('says "one" and "two"', "one two"),
        ("says “one two”", "one two"),
        ("it's 'one', isn't it", "one"),
    ],
)
def test_what_a_prompt_quotes(prompt: str, text: str) -> None:
    assert wanted_texts(samples(["x"], [prompt])) == [text]


def test_accuracy_by_hand() -> None:
    assert text_accuracy("HELLO  World\n", "hello world") == 1
    assert text_accuracy("xx helloworld yy", "hello world") == 1  # contained
    assert text_accuracy("hallo", "hello") == pytest.approx(0.8)
    assert text_accuracy("", "hello") == 0
    assert text_accuracy("z" * 50, "hello") == 0  # never below
    assert word_accuracy("the garden, open.", "open the gate") == pytest.approx(2 / 3)
    assert word_accuracy("a", "a a") == 0.5  # one word is not two


TEXTS = st.text(alphabet="abc", max_size=6)


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_edit_distance_is_the_recursive_one_and_a_metric(a: str, b: str, c: str) -> None:
    @cache
    def slow(x: str, y: str) -> int:
        if not x or not y:
            return len(x) + len(y)
        return min(slow(x[1:], y) + 1, slow(x, y[1:]) + 1, slow(x[1:], y[1:]) + (x[0] != y[0]))

    assert edit_distance(a, b) == slow(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


@needs_tesseract
def test_what_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert leaves.load("rewards", "ocr") is Ocr
    with pytest.raises(UserError, match=r"prompt 'a cat' quotes no words.*has no text"):
        reader().score(samples(["x"], ["a cat"]))
    with pytest.raises(UserError, match=r"ocr scores images.*given a video"):
        reader().score(Samples(torch.zeros(1, 2, 3, 8, 8), ['"x"'], [""], torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(UserError, match=r"no language 'xyz' here, only .*eng"):
        Ocr(Config(language="xyz"))
    monkeypatch.setattr(reader().reader.pytesseract, "tesseract_cmd", "no-such-program")
    with pytest.raises(UserError, match=r"not on the path: install it \(Debian: apt-get install tesseract-ocr\)"):
        Ocr()
    without("pytesseract", monkeypatch)
    with pytest.raises(UserError, match=r"needs 'pytesseract', .*pip install 'difftilt\[ocr\]'"):
        Ocr()
