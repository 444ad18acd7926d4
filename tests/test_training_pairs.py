"""Preference pairs: read from files and data sets, judged by rewards, and learned from as groups of two."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor

import difftilt
from command_line import CommandLine
from difftilt.checks.trial import gradient
from difftilt.errors import UserError
from difftilt.recipes.building import build_task
from difftilt.recipes.schema import load_recipe
from difftilt.rewards import Capabilities, FunctionReward, Samples, WeightedSum
from difftilt.rewards.agreement import Agreement
from difftilt.rewards.prompts import Prompt
from difftilt.statistics.proportions import wilson_interval
from difftilt.testbeds.molecules import Molecules
from difftilt.testbeds.sequences import Sequences
from difftilt.training.pairs import Pair, groups_of, in_batches, read_pairs
from training_runs import without_pictures

SEQUENCES = "sequences/best-of-n"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def written(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def bright(samples: Samples) -> Tensor:
    return samples.media.flatten(1).float().mean(1)


def shades(folder: Path, levels: Sequence[int], size: tuple[int, int] = (8, 8)) -> list[str]:
    for level in levels:
        Image.new("RGB", size, (level, level, level)).save(folder / f"{level}.png")
    return [f"{level}.png" for level in levels]


def test_the_interval_of_a_share_is_that_of_scipy() -> None:
    for right, count in ((0, 5), (3, 7), (7, 7), (560, 1000)):
        known = binomtest(right, count).proportion_ci(method="wilson")
        assert wilson_interval(right / count, count) == pytest.approx((known.low, known.high), abs=1e-12)


def test_ties_count_half_and_the_interval_holds_what_it_promises() -> None:
    told = Agreement(torch.tensor([1.0, 2.0, 0.0, -1.0])).summary()
    counts = {"pairs": 4, "right": 2, "tied": 1, "wrong": 1, "accuracy": 0.625, "gap": 0.5}
    assert {name: told[name] for name in counts} == counts
    assert (told["low"], told["high"]) == wilson_interval(0.625, 4)
    # 1000 sets of 60 pairs, a third of them tied: the true share lies outside in 5 % of them at most
    draws = torch.rand(1000, 60, generator=torch.Generator().manual_seed(0))
    gaps = (draws < 0.45).int() - (draws > 0.78).int()  # right with 0.45, wrong with 0.22: 0.615
    found = [Agreement(row.double()).summary() for row in gaps]
    missed = sum(not one["low"] <= 0.615 <= one["high"] for one in found) / 1000
    assert missed < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5


def test_images_named_by_path_are_judged(tmp_path: Path, cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    dark, grey, light = shades(tmp_path, (10, 100, 200))
    rows = [("a", light, dark), ("b", grey, dark), ("c", grey, grey), ("d", dark, light)]
    file = written(tmp_path / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r, "note": 1} for p, c, r in rows])
    found = difftilt.judge(bright, file, batch=3)
    torch.testing.assert_close(found.gap, torch.tensor([190, 90, 0, -190]).double() / 255, atol=1e-6, rtol=0)
    assert found.summary()["accuracy"] == 0.625
    (tmp_path / "pair_rewards.py").write_text("def bright(samples):\n    return samples.media.flatten(1).mean(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ran = cli("judge", "pair_rewards:bright", file, "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out) == pytest.approx(found.summary())
    assert "accuracy" in cli("judge", "pair_rewards:bright", file).out
    swapped = difftilt.judge(bright, {"source": file, "chosen": "rejected", "rejected": "chosen"})
    assert torch.equal(swapped.gap, -found.gap)
    (first, _), *_ = in_batches(read_pairs({"source": file, "metadata": ["note"]}), 2)
    assert first.metadata == {"note": [1, 1]}


def test_data_sets_of_pairs_hold_images(tmp_path: Path) -> None:
    import datasets

    def picture(level: int, edge: int) -> Image.Image:
        return Image.new("RGB", (edge, edge), (level, level, level))

    rows = [{"caption": "a", "win": picture(9, 8), "lose": picture(3, 8)}]
    rows += [{"caption": "b", "win": picture(1, 6), "lose": picture(2, 6)}]  # of another size: another batch
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "pairs"))
    source = {"source": str(tmp_path / "pairs"), "prompt": "caption", "chosen": "win", "rejected": "lose"}
    gap = difftilt.judge(bright, source).gap * 255
    torch.testing.assert_close(gap, torch.tensor([6.0, -1.0]).double(), atol=1e-4, rtol=0)


def test_texts_and_tokens_are_judged_by_the_reward_of_a_recipe(tmp_path: Path) -> None:
    task = build_task(load_recipe(SEQUENCES))
    generator = torch.Generator().manual_seed(0)
    bed = Sequences()
    media = torch.randint(bed.config.letters, (8, bed.config.length), generator=generator)
    assert torch.equal(bed.read(bed.text(media)), media)
    texts, tokens = bed.text(media), media.tolist()
    scores = task.reward.score(Samples.of(media, [""] * 8, torch.arange(8))).double()
    for name, members in (("texts", texts), ("tokens", tokens)):
        rows = [{"prompt": "", "chosen": members[i], "rejected": members[i + 4]} for i in range(4)]
        found = difftilt.judge(SEQUENCES, written(tmp_path / f"{name}.jsonl", rows), batch=3)
        torch.testing.assert_close(found.gap, scores[:4] - scores[4:])
    with pytest.raises(UserError, match="is a text, and nothing here turns texts into tokens"):
        difftilt.judge(bright, str(tmp_path / "texts.jsonl"))
    with pytest.raises(UserError, match=r"'zz' has the letters z"):
        bed.read(["zz"])


def test_molecules_are_read_from_smiles() -> None:
    bed = Molecules()
    assert bed.text(bed.read(["CCO", "c1ccccc1"])) == ["CCO", "c1ccccc1"]
    with pytest.raises(UserError, match="'no' is no molecule"):
        bed.read(["CCO", "no"])


def test_everything_that_is_wrong_with_pairs_is_told_at_once(tmp_path: Path) -> None:
    one, _ = shades(tmp_path, (1, 2))
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "chosen": one},
        {"prompt": 3, "chosen": one, "rejected": one},
        {"prompt": "a", "chosen": "none.png", "rejected": one},
        {"prompt": "a", "chosen": [1, 2], "rejected": [1.5]},
        {"prompt": "a", "chosen": [1, 2], "rejected": [1]},
        {"prompt": "a", "chosen": one, "rejected": "a text"},
        {"prompt": "a", "chosen": one, "rejected": {"x": 1}},
    ]
    with pytest.raises(UserError) as caught:
        read_pairs(written(tmp_path / "pairs.jsonl", rows))
    text = str(caught.value)
    for words in (
        "line 1: 'rejected' is missing, there are 'prompt', 'chosen'",
        "line 2: 'prompt' is 3, not a text",
        f"line 3: 'chosen': there is no image {tmp_path / 'none.png'}",
        "line 4: 'rejected' is a list, but not of whole numbers",
        "line 5: 2 tokens is compared with 1 tokens",
        "line 6: an image is compared with a text",
        "line 7: 'rejected' is {'x': 1}",
    ):
        assert words in text, text
    with pytest.raises(UserError, match="hold none"):
        read_pairs(written(tmp_path / "empty.jsonl", []))
    Image.new("RGB", (4, 4)).save(tmp_path / "small.png")
    sizes = written(tmp_path / "sizes.jsonl", [{"prompt": "a", "chosen": one, "rejected": "small.png"}])
    with pytest.raises(UserError, match=r"line 1: the samples are of sizes \(3, 8, 8\) and \(3, 4, 4\)"):
        difftilt.judge(bright, sizes)


def test_rewards_that_cannot_judge_are_refused(tmp_path: Path) -> None:
    one, other = shades(tmp_path, (1, 2))
    file = written(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": one, "rejected": other}])
    plain = FunctionReward("plain", bright)
    for reward, words in (
        (FunctionReward("set", bright, Capabilities(set_valued=True)), "scores sets"),
        (FunctionReward("gaps", bright, Capabilities(missing=True)), "may have no score"),
        (WeightedSum({"plain": plain}, {"plain": 1.0}, "batch"), "standardises by batch"),
    ):
        with pytest.raises(UserError, match=words):
            difftilt.judge(reward, file)


DPO: dict[str, Any] = {"groups": 4, "group_size": 2, "tau": 0.0, "gamma": 0.0, "shared_noise": True}
"""The settings at which gdro is Diffusion-DPO, both members of a pair with one noise."""


def preferring(tmp_path: Path, better: int, worse: int) -> dict[str, Any]:
    """gdro on digits, with a pair of a light and a dark image for each prompt."""
    shades(tmp_path, (30, 220), (16, 16))
    prompts = build_task(load_recipe("digits/flow-grpo")).prompts
    pairs = [{"prompt": prompt, "chosen": f"{better}.png", "rejected": f"{worse}.png"} for prompt in prompts]
    data = written(tmp_path / f"{better}.jsonl", pairs)
    return {"testbed": {"name": "digits"}, "method": {"name": "gdro", **DPO}, "data": data}


def test_pairs_are_groups_of_two_and_exchanged_they_turn_the_gradient_around(tmp_path: Path) -> None:
    found: list[Tensor] = []
    for better, worse in ((220, 30), (30, 220)):
        task = build_task(load_recipe(preferring(tmp_path, better, worse)))
        assert task.data is not None
        assert task.data.x_0 is not None
        assert task.data.rewards is not None
        level = 2 * torch.tensor([better, worse]) / 255 - 1
        torch.testing.assert_close(task.data.x_0[:2], level[:, None, None, None].expand(2, 1, 8, 8))
        assert task.data.rewards[:4].tolist() == [1, 0, 1, 0]
        found.append(gradient("gdro", task, **DPO))
    # at the reference both implicit rewards are 0: the gradient of log(1 + exp(s_lost - s_won)) is half the difference
    # of theirs; float32 sums of squares of two nearly equal sizes are left over
    assert found[0].norm() > 0
    assert (found[0] + found[1]).norm() < 1e-3 * found[0].norm()


def test_training_on_pairs_prefers_what_was_chosen(tmp_path: Path) -> None:
    reached: list[float] = []
    for better, worse in ((220, 30), (30, 220)):
        recipe = preferring(tmp_path, better, worse) | {
            "reward": {"name": "image", "kind": "ink"},
            "training": {"iterations": 8, "evaluation_samples": 32, "evaluate_every": 0, "optimizer": {"lr": 1e-3}},
        }
        with without_pictures():
            reached.append(difftilt.train(recipe, tmp_path / f"run{better}").after["reward"])
    assert reached[0] > reached[1] + 0.02


def test_pairs_of_other_prompts_are_named(tmp_path: Path) -> None:
    recipe = preferring(tmp_path, 220, 30)
    row = {"prompt": "a cat", "chosen": "30.png", "rejected": "220.png"}
    with pytest.raises(UserError, match=r"1 of 1 pairs have prompts .* the first is line 1, 'a cat'"):
        build_task(load_recipe(recipe | {"data": written(tmp_path / "other.jsonl", [row])}))


def test_pairs_of_one_text_and_several_images_belong_to_the_prompt_of_their_image() -> None:
    task = Sequences().task()
    prompts = [Prompt("a", {"image": name, "source": name * 2}) for name in ("one.png", "two.png")]
    task = replace(task, prompts=prompts, model=replace(task.model, latents=lambda media: media))
    tokens = torch.zeros(task.model.shape, dtype=torch.int64)
    pairs = [
        Pair(f"line {line}", Prompt("a", {"image": name}), tokens, tokens)
        for line, name in enumerate(("two.png", "one.png"), start=1)
    ]
    assert groups_of(task, pairs).prompt.tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match="prompts that are no training prompts"):
        groups_of(task, [Pair("line 1", Prompt("a", {"image": "three.png"}), tokens, tokens)])
    with pytest.raises(UserError, match=r"line 1, 'a'.* 2 training prompts read so.*metadata"):
        groups_of(task, [Pair("line 1", "a", tokens, tokens)])
    same = replace(task, prompts=[Prompt("a", {"source": name}) for name in ("x", "y")])
    assert groups_of(same, [Pair("line 1", "a", tokens, tokens)]).prompt.tolist() == [0, 0]
