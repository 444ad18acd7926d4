"""The shapes testbed: the grammar has an inverse, layouts obey, the verifier is exact and its tolerances are known."""

from collections.abc import Callable
from itertools import combinations
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from difftilt.checks.trial import loop_of
from difftilt.errors import UserError
from difftilt.models.saving import from_pretrained
from difftilt.rewards.protocol import Samples
from difftilt.testbeds.shapes import CELLS, CHECKPOINT, Config, Shapes, decode
from difftilt.testbeds.shapes_verifier import (
    MARGIN,
    OVERLAP,
    SIZES,
    STRAY_PIXELS,
    Fidelity,
    Judgement,
    ShapesReward,
    Verifier,
    judge,
    see,
)
from difftilt.testbeds.shapes_world import (
    CATEGORIES,
    CELL,
    COLOURS,
    OBJECT,
    RELATIONS,
    SHAPES,
    WORDS,
    Wish,
    all_wishes,
    balanced,
    draw,
    draw_object,
    ground,
    layout,
    parse,
    related,
    splits,
    stamp,
)
from difftilt.training.measure import heldout_batch

WISHES = st.sampled_from(all_wishes())
SEEDS = st.integers(0, 2**31 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(*objects: tuple[str, str, int, int]) -> Tensor:
    """Objects as (colour, shape, top, left) in pixels."""
    image = ground(CELLS * CELL)
    for one in objects:
        draw_object(image, *one)
    return image


def judged(image: Tensor, prompt: str) -> Judgement:
    return judge(see(image[None])[0], parse(prompt))


def samples(images: Tensor, prompts: list[str]) -> Samples:
    return Samples(images, prompts, prompts, torch.zeros(len(images), dtype=torch.int64))


def test_a_prompt_and_its_wish_are_inverse() -> None:
    wishes = all_wishes()
    assert all(parse(wish.text) == wish for wish in wishes)
    assert len({wish.text for wish in wishes}) == len(wishes)
    assert {word for wish in wishes for word in wish.text.split()} == set(WORDS)
    assert {wish.category for wish in wishes} == set(CATEGORIES)


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("a red circle", "single"),
        ("three blue squares", "count"),
        ("a red circle and a blue circle", "binding"),
        ("a red circle above a blue circle", "position"),
        ("two red circles left of a blue square", "count_position"),
    ],
)
def test_categories(prompt: str, category: str) -> None:
    assert parse(prompt).category == category


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a rde circle", "'rde' is not in the vocabulary; did you mean red"),
        ("a purple circle", "'purple' is not in the vocabulary; known colours: red, green, blue, yellow$"),
        ("an orange circle", "'an' is not in the vocabulary; did you mean a[?]"),
        ("a orange circle", "known colours: red, green, blue, yellow$"),
        ("a bleu circle", "did you mean blue[?]"),
        ("four red circles", "known numbers: a, two, three$"),
        ("two red pentagons", "known shapes: circles, squares, triangles$"),
        ("two blue squares left of a red pentagon", "known shapes: circle, square, triangle$"),
        ("a red circle above a purple square", "known colours: red, green, blue, yellow$"),
        ("a red circle beside a blue square", "'beside' .* known words between two groups: and, left of, right of, ab"),
        ("A red circle", "'A' is not in the vocabulary; prompts are in lower case: 'a'$"),
        ("a red Circle", "prompts are in lower case: 'circle'$"),
        ("", "names no group"),
        ("red circle", "'red circle' names no group"),
        ("two red circle", "'two red circle' names no group"),
        ("a red circles", "names no group"),
        ("a red circle left a blue square", "names no group"),
        ("a red circle and a red circle", "must differ in colour or shape"),
        ("a red circle and a blue square and a green square", "names no group"),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_by_name(prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(prompt)


def test_what_is_not_finite_is_paint() -> None:
    image = picture(("red", "circle", 0, 0))
    for value in (float("nan"), float("inf"), -float("inf"), 1e30):
        spoiled = image.clone()
        spoiled[:, 20:23, 20:23] = value
        (seen,) = see(spoiled[None])
        assert (seen.objects, seen.stray) == (see(image[None])[0].objects, 9)
    assert see(torch.full((1, 3, 32, 32), torch.nan))[0].stray == 32 * 32


def test_splits_are_disjoint_and_training_knows_every_word_and_pair() -> None:
    train: set[str] = set()
    for category in CATEGORIES:
        parts = splits(category)
        every = [prompt for part in parts.values() for prompt in part]
        assert len(every) == len(set(every)) == sum(wish.category == category for wish in all_wishes())
        assert min(len(parts["validation"]), len(parts["test"])) >= 2
        train |= set(parts["train"])
    kinds = {(kind.colour, kind.shape) for text in train for kind in parse(text).kinds}
    assert kinds == {(colour, shape) for colour in COLOURS for shape in SHAPES}
    assert {word for text in train for word in text.split()} == set(WORDS)


def test_balanced_prompts_take_every_category_in_turn() -> None:
    prompts = balanced("test", ("single", "binding"), 7)
    assert [parse(prompt).category for prompt in prompts] == ["single", "binding"] * 7
    singles = splits("single")["test"]
    assert prompts[::2] == [singles[place % len(singles)] for place in range(7)]


@given(WISHES, SEEDS)
@settings(deadline=None, max_examples=60)
def test_layouts_have_the_objects_in_different_cells_and_obey_the_relation(wish: Wish, seed: int) -> None:
    place = layout(wish, CELLS, generator(seed))
    first = wish.kinds[0].count
    assert len(place) == sum(kind.count for kind in wish.kinds)
    assert len({tuple(cell) for cell in place.tolist()}) == len(place)
    if wish.relation is not None:
        # cells are farther apart than the margin that the verifier asks for
        assert bool(related(place[:first] * CELL, place[first:] * CELL, wish.relation, MARGIN).all())


@pytest.mark.parametrize(("relation", "opposite"), [("left of", "right of"), ("above", "below")])
def test_relations_mean_what_they_say(relation: str, opposite: str) -> None:
    near, far = torch.tensor([[4.0, 4.0]]), torch.tensor([[12.0, 12.0]])
    for forward, backward in ((relation, opposite), (opposite, relation)):
        assert bool(related(near, far, forward, 8)) == bool(related(far, near, backward, 8))
    assert bool(related(near, far, relation, 8))
    assert not bool(related(near, far, relation, 8.1))
    assert not bool(related(near, far, opposite, 0))


def test_no_stamp_is_taken_for_another_at_any_size() -> None:
    for height in SIZES:
        for width in SIZES:
            for first, second in combinations((stamp(shape, height, width) for shape in SHAPES), 2):
                overlap = float((first & second).sum() / (first | second).sum())
                assert overlap < 0.85  # its own is 1, so the nearest stamp is never in doubt
    assert stamp("square").sum() == OBJECT**2
    assert 0 < OVERLAP < 1


@given(SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_drawn_scene_is_right_for_its_prompt_and_for_no_other_that_it_does_not_show(seed: int) -> None:
    wishes = all_wishes()
    wish, other = wishes[seed % len(wishes)], wishes[(seed * 7919 + 13) % len(wishes)]
    seen = see(draw(wish, generator(seed))[None])[0]
    assert judge(seen, wish).accuracy == 1
    assert judge(seen, wish).dense == 1
    objects = sorted((one.colour, one.shape) for one in seen.objects)
    wanted = sorted((kind.colour, kind.shape) for kind in other.kinds for _ in range(kind.count))
    if objects != wanted:
        assert judge(seen, other).accuracy == 0
        assert judge(seen, other).binding < 1


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_wrong_side_is_seen(relation: str) -> None:
    row, column = RELATIONS[relation]
    centre = 12
    image = picture(("red", "circle", centre + 8 * row, centre + 8 * column), ("blue", "square", centre, centre))
    assert judged(image, f"a red circle {relation} a blue square").accuracy == 1
    wrong = judged(image, f"a blue square {relation} a red circle")
    assert (wrong.binding, wrong.position, wrong.accuracy, wrong.dense) == (1, 0, 0, 0.25)


def test_scores_of_a_wrong_picture_by_hand() -> None:
    image = picture(("blue", "circle", 0, 0), ("red", "square", 8, 8), ("red", "square", 16, 16))
    swapped = judged(image, "a red circle and a blue square")
    # colours: found {blue, red, red}, asked {red, blue}: 2 of 3; shapes the same; no object is right
    assert (swapped.count, swapped.binding, swapped.position, swapped.clean) == (2 / 3, 0, 1, 1)
    assert (swapped.colour, swapped.shape) == (2 / 3, 2 / 3)
    assert swapped.accuracy == swapped.dense == 0
    near = judged(image, "two red squares")
    assert (near.binding, near.dense) == (2 / 3, 1 / 3)
    both = judged(image, "two red squares left of a blue circle")
    assert (both.binding, both.position, both.dense) == (1, 0, 0.25)
    empty = judged(picture(), "a red circle")
    assert (empty.count, empty.binding, empty.clean, empty.dense) == (0, 0, 1, 0)


def test_half_a_relation_counts_half() -> None:
    image = picture(("red", "circle", 8, 0), ("red", "circle", 8, 24), ("blue", "square", 8, 16))
    found = judged(image, "two red circles left of a blue square")
    assert (found.position, found.accuracy) == (0.5, 0)
    assert found.dense == pytest.approx(0.375)


@given(st.lists(SEEDS, min_size=2, max_size=5))
@settings(deadline=None, max_examples=20)
def test_what_is_seen_does_not_depend_on_the_batch(seeds: list[int]) -> None:
    images = torch.stack([draw(all_wishes()[seed % len(all_wishes())], generator(seed)) for seed in seeds])
    together = see(images)
    assert together == [see(image[None])[0] for image in images]


def specks(image: Tensor) -> Tensor:
    """Single dark pixels in free cells: too small to be objects."""
    spoiled = image.clone()
    spoiled[:, 19:31:4, 3::8] = 0
    return spoiled


def grey(image: Tensor) -> Tensor:
    """The ground as dark as it may be and still be nearest to the ground's colour."""
    spoiled = image.clone()
    spoiled[:, (image == ground(image.shape[-1])).all(0)] -= 0.3
    return spoiled


def purple(image: Tensor) -> Tensor:
    """One more object, of a colour that the palette does not have."""
    spoiled = image.clone()
    spoiled[:, 24:31, 24:31] = torch.tensor([128, 0, 128])[:, None, None] / 255
    return spoiled


def dim(image: Tensor) -> Tensor:
    """One more object, so pale that it is nearest to the ground."""
    spoiled = image.clone()
    red, paper = torch.tensor(COLOURS["red"]) / 255, ground(1)[:, 0, 0]
    spoiled[:, 24:31, 24:31] = (0.4 * red + 0.6 * paper)[:, None, None]
    return spoiled


@pytest.mark.parametrize("exploit", [specks, grey, purple, dim])
def test_known_exploits_pass_the_loose_judge_and_not_the_strict_one(exploit: Callable[[Tensor], Tensor]) -> None:
    image = picture(("red", "circle", 0, 0))
    spoiled = exploit(image)
    found = judged(spoiled, "a red circle")
    assert found.loose == 1
    assert (found.accuracy, found.clean, found.dense) == (0, 0, 0)


def test_what_is_tolerated_is_seen_by_fidelity_alone() -> None:
    image = picture(("red", "circle", 0, 0))
    darker, few = image - 30 / 255, image.clone()
    few[:, 20, 4 : 4 + STRAY_PIXELS] = 0
    hole = image.clone()
    hole[:, 3, 3] = ground(1)[:, 0, 0]
    media = torch.stack([image, darker.clamp(0, 1), few, hole])
    scores = Fidelity().score(samples(media, ["a red circle"] * 4))
    assert [judged(one, "a red circle").accuracy for one in media] == [1, 1, 1, 1]
    assert float(scores[0]) == pytest.approx(0, abs=1e-6)
    assert float(scores[1]) == pytest.approx(-30 / 255, abs=5e-3)
    assert float(scores[2]) < -1e-3
    # what escapes it as well: a hole in the colour of the ground, and a ring of a pixel in a colour of the world
    assert float(scores[3]) == pytest.approx(0, abs=1e-6)
    ring = picture(("red", "circle", 8, 8))
    ring[:, 7, 8:15] = torch.tensor(COLOURS["yellow"])[:, None] / 255
    assert judged(ring, "a red circle").accuracy == 1
    assert float(Fidelity().score(samples(ring[None], ["a red circle"]))[0]) == pytest.approx(0, abs=1e-6)


def test_fidelity_has_a_gradient_and_the_verifier_says_that_it_has_none() -> None:
    media = (picture(("red", "circle", 0, 0)) - 0.1).clamp(0, 1)[None].requires_grad_()
    Fidelity().score(samples(media, ["a red circle"])).sum().backward()
    assert media.grad is not None
    assert float(media.grad.sum()) > 0  # brighter is nearer
    rewards = Shapes().rewards()
    assert {name for name, reward in rewards.items() if reward.capabilities.differentiable} == {"fidelity"}


def test_rewards_share_one_judgement_and_never_a_stale_one() -> None:
    verifier = Verifier()
    first = samples(picture(("red", "circle", 0, 0))[None], ["a red circle"])
    judgement = verifier.judge(first)
    assert verifier.judge(first) is judgement
    other = samples(first.media, ["a blue circle"])
    assert ShapesReward("accuracy", verifier).score(other).tolist() == [0]
    assert ShapesReward("accuracy", verifier).score(first).tolist() == [1]
    again = samples(picture(("blue", "circle", 0, 0))[None], ["a red circle"])
    assert ShapesReward("accuracy", verifier).score(again).tolist() == [0]


def test_the_task_trains_and_evaluates_on_different_prompts() -> None:
    task = Shapes(Config(categories=("position",))).task()
    assert {parse(prompt).category for prompt in task.prompts} == {"position"}
    assert task.categories is not None
    assert {task.categories(prompt) for prompt in task.heldout_prompts} == set(CATEGORIES)
    test = Shapes(Config(heldout="test")).task()
    assert not set(test.prompts) & set(test.heldout_prompts)
    assert not set(task.heldout_prompts) & set(test.heldout_prompts)
    assert task.headline in task.heldout


def test_conditions_are_those_of_the_text_encoder_and_the_empty_one_attends_to_nothing() -> None:
    bed = Shapes()
    task = bed.task()
    condition = task.model.encode(["a red circle", "two red circles left of a blue square"])
    assert isinstance(condition, dict)
    assert condition["text_keep"].sum(1).tolist() == [3, 8]
    assert not condition["text"].requires_grad
    assert task.model.null_condition is not None
    null = task.model.null_condition(2)
    assert isinstance(null, dict)
    assert not null["text_keep"].any()
    assert not null["vector"].any()
    with pytest.raises(UserError, match="'rde'"):
        task.model.encode(["a rde circle"])


def test_the_checkpoint_is_small_and_decoding_covers_the_unit_interval() -> None:
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    assert from_pretrained(CHECKPOINT / "denoiser").state_dict().keys()
    assert decode(torch.tensor([-3.0, -1, 0, 1, 3]).expand(1, 3, 1, 5)).flatten()[:5].tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("reward", ["dense", "accuracy", "loose"])
def test_every_reward_can_be_trained_on_and_the_headline_is_always_there(
    reward: Literal["dense", "accuracy", "loose"],
) -> None:
    task = Shapes(Config(reward=reward)).task()
    assert task.reward.name == reward
    assert task.headline in task.heldout
    assert ("loose" in task.heldout) is False
    assert ("dense" in task.heldout) == (reward != "dense")


@pytest.mark.parametrize("count", [10, 20, 40, 80, 100, 400])
def test_evaluations_of_any_size_see_every_category(count: int) -> None:
    task = Shapes().task()
    loop = loop_of("diffusion-nft", task)
    prompts = heldout_batch(loop.run, count).prompt.tolist()
    assert {parse(task.heldout_prompts[place]).category for place in prompts} == set(CATEGORIES)
