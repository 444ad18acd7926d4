"""A vision-language model that is asked, and a detector whose boxes are judged."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from difftilt.errors import UserError
from difftilt.rewards import Samples
from difftilt.rewards.pictures import as_pictures
from difftilt.rewards.pretrained.clip import Clip, load_clip
from difftilt.rewards.pretrained.geneval import Box, Found, GenEval, geneval, judge, verdict
from difftilt.rewards.pretrained.geneval import Config as Detecting
from difftilt.rewards.pretrained.loading import PretrainedOptions
from difftilt.rewards.pretrained.vlm_judge import Config as Asking
from difftilt.rewards.pretrained.vlm_judge import answer_tokens, vlm_judge
from difftilt.rewards.requests import COLOURS, Request, Requests, parse_requests, read_requests
from difftilt.training.prompts import as_prompts
from pipelines import clip_tokenizer, made
from pretrained import EDGE, clip, hold, images, samples, seeded, vision_settings

WORDS = [
    "yes",
    "Yes",
    "no",
    "No",
    "1",
    "2",
    "3",
    "4",
    "5",
    "red",
    "cat",
    "two",
    "dogs",
    "by",
    "the",
    "sea",
    "show",
    "image",
]
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} answer"
)


def processor() -> Any:
    """A ``LlavaProcessor`` with a tokenizer of whole words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    pieces = ["<pad>", "<unk>", "<image>", *WORDS]
    backend = Tokenizer(WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = made("PreTrainedTokenizerFast", tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>",
                     extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    eye = made("CLIPImageProcessorPil", size={"shortest_edge": EDGE}, crop_size=EDGE)
    return made("LlavaProcessor", image_processor=eye, tokenizer=tokenizer, patch_size=7, chat_template=TEMPLATE,
                vision_feature_select_strategy="default", num_additional_image_tokens=1)  # fmt: skip


def llava() -> Any:
    text = {"model_type": "llama", "vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    vision = {"model_type": "clip_vision_model"} | vision_settings()
    config = made("LlavaConfig", text_config=text, vision_config=vision, image_token_index=2, vision_feature_layer=-1)
    return seeded(lambda: made("LlavaForConditionalGeneration", config), scale=8.0)


def answered(model: Any, media: Tensor, question: str, words: Sequence[str]) -> Tensor:
    """Next-token probabilities of words, one image at a time, as a person would compute them."""
    parts, rows = processor(), list[Tensor]()
    for picture in as_pictures(media):
        inputs = parts(text=f"<image> {question} answer", images=[picture], return_tensors="pt")
        with torch.no_grad():
            chances = model(**inputs).logits[0, -1].softmax(-1)
        rows.append(torch.stack([chances[parts.tokenizer.convert_tokens_to_ids(word)] for word in words]))
    return torch.stack(rows)


def test_the_probability_of_yes() -> None:
    model, media = llava(), images()
    reward = vlm_judge(model=model, processor=processor())
    scores = hold(reward, samples(media, ["two dogs", "two dogs by the sea", "red cat"]), 0, 1)
    question = 'Does this image show "two dogs"? Answer with yes or no.'
    chances = answered(model, media[:1], question, ["yes", "Yes", "no", "No"])[0]
    assert float(scores[0]) == pytest.approx(float(chances[:2].sum() / chances.sum()), abs=1e-5)
    assert float(scores.std()) > 1e-4


def test_the_expected_score_and_questions_of_ones_own() -> None:
    model, media = llava(), images()
    graded = vlm_judge(Asking(form="score", question="show {prompt} image"), model=model, processor=processor())
    scores = hold(graded, samples(media, ["red cat"] * 3), 1, 5)
    chances = answered(model, media, "show red cat image", ["1", "2", "3", "4", "5"])
    expected = (chances @ torch.arange(1.0, 6.0)) / chances.sum(1)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    own = vlm_judge(
        Asking(question="show {prompt} image", answers={"sea": 2, "cat": 0}), model=model, processor=processor()
    )
    chances = answered(model, media, "show {braces} image", ["sea", "cat"])
    found = own.score(samples(media, ["{braces}"] * 3))
    torch.testing.assert_close(found, 2 * chances[:, 0] / chances.sum(1), atol=1e-4, rtol=0)


def test_answers_that_are_no_single_token() -> None:
    tokenizer = processor().tokenizer
    with pytest.raises(UserError, match="'perhaps' is no single token"):
        answer_tokens(tokenizer, {"perhaps": 1.0})
    with pytest.raises(UserError, match="'Yes' begins like another one"):
        answer_tokens(tokenizer, {"yes": 1.0, "Yes": 0.5})
    with pytest.raises(UserError, match="give processor with model"):
        vlm_judge(model=llava())


THINGS = ["car", "dog", "teddy bear", "knife"]


def at(row: float, column: float, colour: str | None = None, size: float = 10) -> Box:
    return Box((row, column), (size, size), colour)


PARSED = {
    "a photo of a car": Requests((Request("car"),), {}),
    "a photo of two dogs": Requests((Request("dog", 2),), {"dog": 3}, True),
    "a red car and a knife": Requests((Request("car", 1, "red"), Request("knife")), {}),
    "three red knives": Requests((Request("knife", 3, "red"),), {"knife": 4}, True),
    "a photo of a dog right of a teddy bear": Requests(
        (Request("teddy bear"), Request("dog", relation="right of")), {}
    ),
}


@pytest.mark.parametrize("prompt", PARSED)
def test_prompts_and_metadata_say_what_is_wanted(prompt: str) -> None:
    wanted = PARSED[prompt]
    assert parse_requests(prompt, THINGS) == wanted
    include = [
        {"class": one.thing, "count": one.count}
        | ({"color": one.colour} if one.colour else {})
        | ({"position": [one.relation, one.target]} if one.relation else {})
        for one in wanted.include
    ]
    values = {"include": include, "exclude": [{"class": k, "count": n} for k, n in wanted.exclude.items()]}
    assert read_requests(values | ({"tag": "counting"} if wanted.counting else {}), prompt) == wanted


def test_things_have_one_name() -> None:
    assert parse_requests("two computer mice and a sofa".replace("mice", "mouses"), ["mouse", "couch"]).include == (
        Request("mouse", 2),
        Request("couch"),
    )
    assert read_requests({"include": [{"class": "tv remote", "count": 1}]}, "").include == (Request("remote"),)


def test_requests_that_are_not_understood() -> None:
    for prompt in ("a photo of a unicorn", "dogs", "five dogs", "a photo of"):
        with pytest.raises(UserError, match="give the requests as metadata"):
            parse_requests(prompt, THINGS)
    with pytest.raises(UserError, match="has no class and count"):
        read_requests({"include": [{"count": 1}]}, "x")
    with pytest.raises(UserError, match="no relation 'near' to request 0"):
        read_requests(
            {"include": [{"class": "a", "count": 1}, {"class": "b", "count": 1, "position": ["near", 0]}]}, "x"
        )


CASES: list[tuple[str, Found, bool]] = [
    ("a car", {}, False),
    ("a car", {"car": [at(5, 5)], "dog": [at(9, 9)]}, True),
    ("a car", {"car": [at(5, 5), at(9, 9)]}, True),  # as published, more is not wrong where the number is not tested
    ("two dogs", {"dog": [at(5, 5), at(9, 9)]}, True),
    ("two dogs", {"dog": [at(5, 5)] * 3}, False),
    ("a red car", {"car": [at(5, 5, "red")]}, True),
    ("a red car", {"car": [at(5, 5, "blue"), at(9, 9, "red")]}, False),  # the surest one counts
    ("a dog left of a car", {"dog": [at(50, 10)], "car": [at(50, 90)]}, True),
    ("a dog right of a car", {"dog": [at(50, 10)], "car": [at(50, 90)]}, False),
    ("a dog above a car", {"dog": [at(10, 50)], "car": [at(90, 50)]}, True),
    ("a dog left of a car", {"car": [at(50, 90)]}, False),
    # 45 degrees away: (40 - 2)/56.6 = 0.67 of the distance is to the left, and as much is above
    ("a dog left of a car", {"dog": [at(10, 10)], "car": [at(50, 50)]}, True),
    # steeper: 20 - 2 of 44.7 is less than a half
    ("a dog left of a car", {"dog": [at(10, 30)], "car": [at(50, 50)]}, False),
    # large ones overlap: 40 - 0.1·(190 + 190) = 2 of 40
    ("a dog left of a car", {"dog": [at(50, 30, size=190)], "car": [at(50, 70, size=190)]}, False),
]


@pytest.mark.parametrize(("prompt", "seen", "right"), CASES)
def test_the_published_verdict_by_hand(prompt: str, seen: Found, right: bool) -> None:
    assert verdict(seen, parse_requests(prompt, THINGS)) is right


def test_graded_judgements_are_those_of_the_drawn_world() -> None:
    seen: Found = {"car": [at(5, 5, "red"), at(9, 9, "blue")], "knife": [at(1, 1)]}
    half = judge(seen, parse_requests("two red cars", THINGS))
    assert (half.count, half.shape, half.colour, half.binding) == (1, 1, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert half.dense == pytest.approx(0.5 / 3)
    assert judge({}, parse_requests("two red cars", THINGS)).dense == 0
    more = judge({"dog": [at(1, 1)] * 3}, parse_requests("two dogs", THINGS))
    assert (more.count, more.accuracy) == (pytest.approx(2 / 3), 0)
    near: Found = {"dog": [at(50, 10), at(50, 90)], "car": [at(50, 50)]}
    placed = judge(near, parse_requests("two dogs left of a car", THINGS))
    assert (placed.binding, placed.position, placed.dense) == (1, 0.5, 0.375)


def detector() -> Any:
    config = made("YolosConfig", **vision_settings() | {"image_size": [EDGE, EDGE], "num_detection_tokens": 6},
                  id2label=dict(enumerate(THINGS)), label2id=dict(zip(THINGS, range(4), strict=True)))  # fmt: skip
    return seeded(lambda: made("YolosForObjectDetection", config), scale=4.0)


def detecting(**settings: Any) -> GenEval:
    parts = made("YolosImageProcessorPil", size={"height": EDGE, "width": EDGE})
    towers = load_clip("none", PretrainedOptions(), "test", clip(), clip_tokenizer())
    return geneval(Detecting(**settings), model=detector(), processor=parts, clip=towers)


def test_a_detector_is_run_through_its_own_processor() -> None:
    reward, media = detecting(threshold=0.2, counting_threshold=0.2), images()
    seen = reward.detect(media, [0.2, 0.2, 2.0])
    inputs = reward.processor(images=as_pictures(media), return_tensors="pt")
    with torch.no_grad():
        out = reward.model(**inputs)
    chances = out.logits.softmax(-1)[..., :-1]
    sure = chances.amax(-1) > 0.2
    assert int(sure[:2].sum()) > 0  # else nothing is tested
    assert [sum(map(len, one.values())) for one in seen] == [*sure.sum(1)[:2].tolist(), 0]
    best = int(chances[0].amax(-1).argmax())
    name = THINGS[int(chances[0, best].argmax())]
    wide = out.pred_boxes[0, best].double() * torch.tensor([52.0, 40.0, 52.0, 40.0])
    assert seen[0][name][0].centre == pytest.approx((float(wide[1]), float(wide[0])), abs=1e-3)
    assert seen[0][name][0].size == pytest.approx((float(wide[3]), float(wide[2])), abs=1e-3)
    scores = hold(reward, samples(media, [f"a {name}", f"two {name}s", "a teddy bear"]), 0, 1)
    assert float(scores[0]) == 1


def test_metadata_wins_over_prompts_and_forms_are_graded() -> None:
    reward, media = detecting(form="shape", threshold=0.0, counting_threshold=0.0), images()
    told = samples(media, ["nonsense"] * 3, include=[[{"class": "dog", "count": 1}]] * 3, tag=["single"] * 3)
    scores = hold(reward, told, 0, 1)
    expected = [len(one.get("dog", ())) for one in reward.detect(media, [0.0] * 3)]
    assert scores.tolist() == pytest.approx([0 if not count else 1 / count for count in expected])


def test_lines_of_the_published_file_say_what_is_wanted(tmp_path: Path) -> None:
    # lines have different keys, and one has none: its prompt is read
    lines: list[dict[str, Any]] = [
        {"tag": "single", "include": [{"class": "dog", "count": 1}], "prompt": "nonsense"},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}],
         "prompt": "nonsense"},
        {"prompt": "a dog"},
    ]  # fmt: skip
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = Samples.of(images(), as_prompts(tmp_path / "lines.jsonl"), torch.arange(3))
    reward = detecting(form="shape", threshold=0.0, counting_threshold=0.0)
    found = [len(one.get("dog", ())) for one in reward.detect(told.media, [0.0] * 3)]
    assert max(found) > 0  # else nothing is tested
    # min/max of the numbers asked for and seen
    expected = [min(count, wanted) / max(count, wanted) for count, wanted in zip(found, (1, 2, 1), strict=True)]
    assert hold(reward, told, 0, 1).tolist() == pytest.approx(expected)


def test_colours_are_named_by_clip_in_the_box_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reward, asked = detecting(), list[str]()
    encode = Clip.texts
    monkeypatch.setattr(Clip, "texts", lambda clip, texts: asked.extend(texts) or encode(clip, texts))  # pyright: ignore
    image, boxes = images(1)[0], [at(10, 10), at(30, 40, size=8), at(0, 0, size=0)]
    named = reward.name_colours(image, boxes, "car")
    assert all(box.colour in COLOURS for box in named)
    assert {"a photo of a red car", "a photo of a red-colored car", "a photo of a white object"} <= set(asked)
    changed = image.clone()
    changed[:, 20:, :] = 0.5  # outside the first box
    assert reward.name_colours(changed, boxes[:1], "car") == named[:1]
    towers = reward.clip
    assert towers is not None
    patterns = ("a photo of a {} car", "a photo of a {}-colored car", "a photo of a {} object")
    texts = torch.stack([towers.texts([pattern.format(c) for c in COLOURS]) for pattern in patterns]).mean(0)
    kinds = torch.nn.functional.normalize(texts, dim=-1)
    likely = COLOURS[int((towers.images(image[None, :, 5:15, 5:15]) @ kinds.T).argmax())]
    assert named[0].colour == likely


def test_without_clip_a_colour_is_refused() -> None:
    parts = made("YolosImageProcessorPil", size={"height": EDGE, "width": EDGE})
    blind = geneval(Detecting(threshold=0.0), model=detector(), processor=parts)
    name = next(iter(blind.detect(images(1), [0.0])[0]))
    with pytest.raises(UserError, match="name a CLIP model that tells colours"):
        blind.score(samples(images(1), [f"a red {name}"]))
    unknown = samples(images(1), ["x"], include=[[{"class": "dot", "count": 1}]])
    with pytest.raises(UserError, match=r"this detector knows no 'dot'; did you mean dog\?"):
        blind.score(unknown)
    with pytest.raises(UserError, match=r"scores images.*given a video"):
        blind.score(Samples(torch.zeros(1, 2, 3, 8, 8), ["a car"], [""], torch.zeros(1, dtype=torch.int64)))
