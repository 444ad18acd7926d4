"""Prompts with metadata: read from files and data sets, and with every sample of theirs when a reward sees it."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import difftilt
from difftilt.errors import UserError
from difftilt.recipes.building import build_task
from difftilt.recipes.schema import load_recipe
from difftilt.rewards import FunctionReward, Samples
from difftilt.rewards.ocr import wanted_texts
from difftilt.rewards.prompts import Prompt, identity, metadata_of, plain, prompt_of
from difftilt.rewards.served import RemoteReward
from difftilt.rewards.served.remote import Config as RemoteConfig
from difftilt.training.loop import assemble
from difftilt.training.prompts import as_prompts, read_prompts
from difftilt.training.world import World
from training_runs import CASES, make_case, make_config, make_task

LINES = [
    {"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]},
]
TEXTS = ["a photo of three cats", "a photo of a red car"]


def written(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def geneval_lines() -> list[dict[str, Any]]:
    return [{**line, "prompt": text} for line, text in zip(LINES, TEXTS, strict=True)]


def columns(prompts: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    return [str(one) for one in prompts], metadata_of(prompts)


EXPECTED = (
    TEXTS,
    {
        "tag": ["counting", "colors"],
        "include": [line["include"] for line in LINES],
        "exclude": [[{"class": "cat", "count": 4}], None],
    },
)


def test_a_prompt_is_a_text_that_carries_what_it_was_given() -> None:
    one = Prompt("a cat", {"count": 3})
    assert one == "a cat"
    assert {one: 1} == {"a cat": 1}
    assert prompt_of(plain(one)) == one
    assert identity(one) == identity(Prompt("a cat", {"count": 3}))
    assert len({identity(one), identity("a cat"), identity(Prompt("a cat", {"count": 2}))}) == 3
    assert metadata_of([one, "a dog"]) == {"count": [3, None]}
    assert plain("a dog") == "a dog"


def test_lines_of_json_with_different_keys(tmp_path: Path) -> None:
    file = written(tmp_path / "evaluation_metadata.jsonl", ["", *geneval_lines(), "  "])
    assert columns(as_prompts(file)) == EXPECTED
    assert list(read_prompts(file)) == ["line 2", "line 3"]
    assert columns(as_prompts(geneval_lines())) == EXPECTED  # the same as a list
    chosen = as_prompts({"source": file, "metadata": ["tag"]})
    assert columns(chosen) == (TEXTS, {"tag": EXPECTED[1]["tag"]})
    assert as_prompts({"source": file, "column": "tag", "metadata": []}) == ["counting", "colors"]
    # one line alone has the names of all: what a reward sees does not depend on the batch
    assert metadata_of(as_prompts(file)[1:])["exclude"] == [None]


def test_pictures_are_named_from_where_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in ("here.png", "data/beside.png"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a", "image": "beside.png", "mask_image": "here.png", "note": "beside.png"}]
    (found,) = as_prompts(written(Path("data/prompts.jsonl"), rows))
    assert metadata_of([found]) == {"image": ["data/beside.png"], "mask_image": ["here.png"], "note": ["beside.png"]}
    (listed,) = as_prompts(rows)
    assert metadata_of([listed])["image"] == ["beside.png"]


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    bad = ["{", "[1]", '{"text": "a"}', '{"prompt": 3}', '{"prompt": "a", "x": NaN}', '{"prompt": "a", "prompt": "b"}']
    bad += ['{"prompt": "fine"}', '{"prompt": "half \\ud83d"}', '{"prompt": "a", "x": 1e999}']
    with pytest.raises(UserError) as caught:
        read_prompts(written(tmp_path / "prompts.jsonl", bad))
    head, *lines = str(caught.value).splitlines()
    assert head == f"8 errors in {tmp_path / 'prompts.jsonl'}"
    said = ["no JSON", "a JSON list", "'prompt' is missing, there are 'text'", "'prompt' is 3", "NaN is no JSON"]
    said += ["'prompt' stands twice", "half of a character", "'x' holds what is not plain"]
    numbers = [1, 2, 3, 4, 5, 6, 8, 9]
    for line, number, words in zip(lines, numbers, said, strict=True):
        assert line.startswith(f"  line {number}: ")
        assert words in line
    with pytest.raises(UserError, match=r"2 errors in the list of prompts\n  entry 1 is 3.*\n  entry 2: 'x' holds"):
        as_prompts(["a", 3, {"prompt": "b", "x": torch.zeros(1)}])  # type: ignore[list-item]
    for name, words in (("none.jsonl", "No such file"), ("a.csv", ".csv files are not read"), ("a/b.txt", "No such")):
        with pytest.raises(UserError, match=words):
            as_prompts(str(tmp_path / name))
    with pytest.raises(UserError, match="hold no prompt"):
        as_prompts(written(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(UserError, match="split belongs to a data set"):
        as_prompts({"source": str(tmp_path / "prompts.jsonl"), "split": "train"})
    with pytest.raises(UserError, match=r"prompts\.colum = \"x\": unknown key; did you mean column"):
        as_prompts({"source": "x", "colum": "x"})


def test_data_sets_on_disk(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list([{"prompt": text, "count": place} for place, text in enumerate(TEXTS)])
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))
    (tmp_path / "lines").mkdir()
    written(tmp_path / "lines" / "a.jsonl", geneval_lines()[:1])
    written(tmp_path / "lines" / "b.jsonl", geneval_lines()[1:])
    expected = (TEXTS, {"count": [0, 1]})
    for source in ("saved", "parquet", "parquet/train.parquet"):
        assert columns(as_prompts(tmp_path / source)) == expected, source
    assert columns(as_prompts({"source": str(tmp_path / "splits"), "split": "train"})) == expected
    assert columns(as_prompts({"source": str(tmp_path / "splits"), "split": "test"})) == (TEXTS[1:], {"count": [1]})
    assert columns(as_prompts(tmp_path / "lines")) == EXPECTED
    assert list(read_prompts(tmp_path / "lines")) == ["a.jsonl line 1", "b.jsonl line 1"]
    with pytest.raises(UserError, match=r"has several splits; known: test, train"):
        as_prompts(tmp_path / "splits")
    with pytest.raises(UserError, match=r"has no split 'tes'; did you mean test"):
        as_prompts({"source": str(tmp_path / "splits"), "split": "tes"})
    with pytest.raises(UserError, match="row 0: 'caption' is missing, there are 'prompt', 'count'"):
        as_prompts({"source": str(tmp_path / "saved"), "column": "caption"})
    (tmp_path / "parquet" / "train.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        as_prompts(tmp_path / "parquet")
    assert len(str(caught.value).splitlines()) == 1


def test_images_in_a_data_set_are_left_out_by_naming_columns(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    picture = Image.new("RGB", (4, 4))
    table = datasets.Dataset.from_list([{"prompt": "a", "image": picture, "count": 2}])
    table.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"row 0: 'image' holds what is not plain .*metadata: \[\.\.\.\]"):
        as_prompts(tmp_path / "saved")
    chosen = as_prompts({"source": str(tmp_path / "saved"), "metadata": ["count"]})
    assert columns(chosen) == (["a"], {"count": [2]})


def test_a_hub_id_without_network_and_a_missing_extra_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data set 'nobody/prompts' cannot be loaded: .*no network\?") as caught:
        as_prompts("nobody/prompts")
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs 'datasets', which is not installed: pip install 'difftilt\[data\]'"):
        as_prompts("nobody/prompts")


def test_nothing_in_a_prompt_is_an_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFTILT_SECRET", "secret")
    prompt = "class 0"
    task = Task4.task()
    told = Prompt(prompt, {"note": "${oc.env:DIFFTILT_SECRET} \\${x} ${"})
    seen: list[Any] = []

    def remembered(samples: Samples) -> Tensor:
        seen.extend(samples.metadata["note"])
        return samples.media[:, 0]

    difftilt.steer(task, remembered, [told], method="best-of-n", particles=2, output=tmp_path / "out")
    assert set(seen) == {told.metadata["note"]}
    assert "secret" not in (tmp_path / "out" / "config.yaml").read_text()
    chosen = [{"prompt": "", "note": told.metadata["note"]}]
    settings: dict[str, Any] = {"steerer.particles": 2, "testbed.steps": 2}
    difftilt.steer("mixtures/best-of-n", prompts=chosen, output=tmp_path / "recipe", **settings)
    kept = load_recipe(tmp_path / "recipe" / "config.yaml", ["steerer.particles=3"]).steering.prompts
    assert kept == tuple(chosen)


class Task4:
    """Four classes, each prompt with its number as metadata, and rewards that look whether the two agree."""

    @staticmethod
    def task() -> Any:
        task = make_task()
        prompts = [Prompt(text, {"label": int(text.split()[-1])}) for text in task.prompts]
        return replace(task, prompts=prompts, heldout_prompts=list(prompts), reward=Task4.reward())

    @staticmethod
    def check(samples: Samples) -> None:
        known = [int(prompt.split()[-1]) for prompt in samples.prompts]
        assert samples.metadata == {"label": known}, "metadata of other prompts"

    @staticmethod
    def reward(seen: list[int] | None = None) -> FunctionReward:
        def score(samples: Samples) -> Tensor:
            Task4.check(samples)
            if seen is not None:
                seen.append(len(samples.group))
            return samples.media[:, 0].float()

        return FunctionReward("labelled", score)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("gardo", "gardo-nft", "dragon")])
def test_every_method_shows_its_reward_the_metadata_of_each_sample(case: str) -> None:
    seen: list[int] = []
    task = replace(Task4.task(), reward=Task4.reward(seen))
    loop = assemble(task, make_case(case, task), make_config(iterations=1), None, (), (), World())
    loop.iterate(0)
    loop.evaluate(1)
    assert sum(seen) >= 16


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fk-steering", {"particles": 4, "resample_at": 2, "temperature": 0.1}),
        ("svdd", {"children": 3, "particles": 2, "temperature": 0.1}),
        ("dlbs", {"children": 2, "particles": 2}),
        ("ttsnap", {"particles": 6, "value": "posterior_mean"}),
        ("dts-star", {}),
        ("doit", {}),
        ("best-of-n", {"particles": 4}),
    ],
)
def test_every_steerer_shows_its_reward_the_metadata_of_each_particle(method: str, settings: dict[str, Any]) -> None:
    seen: list[int] = []
    task = Task4.task()
    wanted = [task.prompts[2], task.prompts[0], task.prompts[2]]
    chosen: dict[str, Any] = settings or {"budget": {"nfe": 80}}
    difftilt.steer(task, Task4.reward(seen), wanted, method=method, **chosen)
    assert seen


def test_a_served_reward_sees_the_metadata(tmp_path: Path) -> None:
    seen: list[int] = []
    with difftilt.api.reward_server(Task4.reward(seen)) as server:
        remote = RemoteReward(RemoteConfig(url=server.url, batch=3))
        task = Task4.task()
        here = difftilt.steer(task, Task4.reward(), task.prompts, method="best-of-n", particles=4).steered.rewards
        there = difftilt.steer(task, remote, task.prompts, method="best-of-n", particles=4).steered.rewards
    assert torch.equal(here, there)
    assert max(seen) == 3


def test_samples_of_several_sources_are_joined_with_none_for_what_is_missing() -> None:
    pair = [Prompt("class 0", {"sign": 1.0}), Prompt("class 0", {"sign": -1.0})]
    samples = Samples.of(torch.ones(2, 2), pair, torch.arange(2))
    joined = Samples.join([samples, Samples.of(torch.ones(1, 2), ["class 1"], torch.arange(1))])
    assert joined.metadata == {"sign": [1.0, -1.0, None]}
    assert joined.take(torch.tensor([2, 1])).metadata == {"sign": [None, -1.0]}


def test_a_data_set_of_groups_keeps_prompts_of_equal_text_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # both prompts read alike: only what they carry tells the reward which is which
    (tmp_path / "carried_rewards.py").write_text(
        "from difftilt.rewards import Samples\n"
        "from difftilt.rewards.prompts import Prompt\n"
        "from difftilt.testbeds.mixtures import Config, Mixtures\n"
        "from dataclasses import replace\n\n\n"
        "def signed(samples: Samples):\n"
        "    return samples.media.new_tensor(samples.metadata['sign']) * samples.media[:, 0].float()\n\n\n"
        "def twins():\n"
        "    task = Mixtures(Config(classes=2, steps=2, hidden=8)).task()\n"
        "    return replace(task, prompts=[Prompt('class 0', {'sign': sign}) for sign in (1.0, -1.0)])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {"testbed": {"name": "carried_rewards:twins"}, "reward": {"name": "carried_rewards:signed"}}
    recipe |= {"method": {"name": "gdro", "groups": 2, "group_size": 2}}
    made = difftilt.collect(recipe, tmp_path / "data", groups=4, group_size=2)
    assert [value["sign"] for value in made.prompts if isinstance(value, dict)] == [1.0, -1.0]
    loaded = build_task(load_recipe(recipe | {"data": str(tmp_path / "data")})).data
    assert loaded is not None
    assert loaded.x_0 is not None
    sign = torch.tensor([1.0, -1.0])[loaded.prompt]
    torch.testing.assert_close(loaded.rewards, sign * loaded.x_0[:, 0])


def test_ocr_reads_what_a_prompt_quotes_where_no_text_is_given() -> None:
    prompts = [Prompt("a sign", {"text": "open"}), 'a sign that says "closed"']
    samples = Samples.of(torch.zeros(2, 3, 4, 4), prompts, torch.arange(2))
    assert wanted_texts(samples) == ["open", "closed"]


def test_a_recipe_of_a_pipeline_takes_every_form(tmp_path: Path) -> None:
    file = written(tmp_path / "p.jsonl", geneval_lines())
    base = {"name": "pipeline", "source": "none", "heldout_prompts": {"source": file, "metadata": ["tag"]}}
    recipe = {"testbed": base | {"prompts": geneval_lines()}, "method": {"name": "flow-grpo"}}
    testbed = load_recipe(recipe).testbed.build()
    assert columns(testbed.prompts) == EXPECTED
    assert columns(testbed.heldout_prompts) == (TEXTS, {"tag": ["counting", "colors"]})
