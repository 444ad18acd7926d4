"""The arena: costs recounted by hand, readings within budgets, limits that must be plain sampling, nothing lost."""

import importlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import difftilt as package
from command_line import CommandLine
from difftilt.errors import GuardError, UserError
from difftilt.evaluation.arena.config import Member, load_arena
from difftilt.evaluation.arena.cost import CURRENCIES, evaluations, now, spent
from difftilt.evaluation.arena.members import (
    base_reading,
    drawn_rows,
    plan_of,
    run_member,
    steered_reading,
    trained_reading,
)
from difftilt.evaluation.arena.picture import save_arena_picture
from difftilt.evaluation.arena.records import ArenaResult, MemberRun, Reading, read_json, within
from difftilt.evaluation.arena.run import compare_arena
from difftilt.evaluation.arena.stage import Stage, base_noise, search_bound
from difftilt.evaluation.arena.tables import escaped, grids, markdown_tables
from difftilt.models.ledger import Ledger
from difftilt.recipes import load_recipe
from difftilt.steering.protocol import Steered
from difftilt.training.measure import draw, heldout_batch


class StopHereError(RuntimeError):
    """Stands for a kill."""


STEPS, SAMPLES = 4, 8
HOSTILE = "../../x|<b>$\\frac_[y](z)`"
MEMBERS: dict[str, Any] = {
    "base": {},
    "kernel": {"sampler": "kernel"},
    "best": {"steerer": {"name": "best-of-n"}},
    "fk": {"steerer": {"name": "fk-steering", "resample_at": 2, "temperature": 1.0}},
    "nft": {
        "method": {"name": "diffusion-nft", "groups": 2, "group_size": 4},
        "training": {"evaluate_every": 2, "optimizer": {"lr": 0.01}},
    },
    "grpo": {
        "method": {
            "name": "flow-grpo",
            "groups": 2,
            "group_size": 4,
            "kl_weight": 0.0,
            "window": {"width": 1, "high": 3},
        }
    },
}


def values(members: dict[str, Any] | None = None, **arena: Any) -> dict[str, Any]:
    """An arena on a small mixture."""
    settings = {"seeds": [0], "evaluations": 600, "reward_calls": 40, "samples": SAMPLES, "forward_batch": 8, **arena}
    testbed = {"name": "mixtures", "steps": STEPS, "hidden": 8, "classes": 4}
    return {"testbed": testbed, "arena": settings, "members": MEMBERS if members is None else members}


def only(*names: str) -> dict[str, Any]:
    return {name: MEMBERS[name] for name in names}


def stage_of(name: str, **arena: Any) -> tuple[Stage, Member]:
    arena_ = load_arena(values(only(name), **arena))
    return Stage(arena_), arena_.members[0]


def steady(result: ArenaResult) -> dict[str, Any]:
    """A result without what the clock decides."""

    def strip(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: strip(value) for key, value in tree.items() if key != "seconds"}
        return [strip(value) for value in tree] if isinstance(tree, list) else tree

    return strip(result.model_dump(mode="json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArenaResult]:
    output = tmp_path_factory.mktemp("arena") / "run"
    return output, compare_arena(values(seeds=[0, 1]), output)


def test_the_cost_of_every_member_is_what_its_algorithm_must_spend(finished: tuple[Path, ArenaResult]) -> None:
    _, result = finished
    plain = SAMPLES * STEPS
    for run in result.runs:
        for reading in (*run.readings.values(), *run.curve):
            particles, iterations, group = reading.particles or 0, reading.iterations or 0, 2 * 4
            if run.member in ("base", "kernel"):
                expected = Ledger(nfe=plain)
            elif run.member == "best":
                expected = Ledger(nfe=plain * particles, reward_calls=SAMPLES * particles)
            elif run.member == "fk":
                # weighted at grid point 2 and at the end
                expected = Ledger(nfe=plain * particles, reward_calls=2 * SAMPLES * particles)
            elif run.member == "grpo":
                # every sample trains the one step of the window
                expected = Ledger(plain + group * STEPS * iterations, group * iterations, group * iterations)
            else:
                continue
            assert reading.cost == expected, run.member
            assert evaluations(reading.cost) == expected.nfe + 3 * expected.gradient_passes


def test_the_ledger_of_a_trained_member_is_the_sum_of_its_iterations_and_the_samples(
    finished: tuple[Path, ArenaResult],
) -> None:
    stage, member = stage_of("nft")
    last = finished[1].of("nft")[0].curve[-1]
    loop, total = stage.loop(member, 0), 0
    for iteration in range(last.iterations or 0):
        loop.iterate(iteration)
        total += int(loop.rows[-1]["nfe"] + 3 * loop.rows[-1]["gradient_passes"])
    assert last.iterations
    assert evaluations(last.cost) == total + SAMPLES * STEPS
    assert last.cost.reward_calls == 2 * 4 * last.iterations


def test_no_reading_exceeds_its_budget_and_none_leaves_room_for_another_unit(
    finished: tuple[Path, ArenaResult],
) -> None:
    _, result = finished
    units = {"best": {}, "fk": {}, "grpo": {}}
    for name in units:
        stage, member = stage_of(name)
        units[name] = {one: spent(plan_of(stage, member).unit, one) for one in CURRENCIES}
    for run in result.runs:
        for currency in CURRENCIES:
            budget, cost = result.budget(currency), spent(run.readings[currency].cost, currency)
            assert cost <= budget
            if run.member in units:
                assert cost + units[run.member][currency] > budget, (run.member, currency)


ANCHORED = {
    "method": {"name": "diffusion-nft", "groups": 2, "group_size": 4, "kl_weight": 1.0},
    "training": {"evaluate_every": 100},
}
"""Its first iteration costs less than the others: the weights are those of the reference, so no pass of it is made."""


def test_a_trained_member_is_read_after_the_last_iteration_that_fits_though_later_ones_cost_more() -> None:
    unlimited = load_arena(values({"nft": ANCHORED}, evaluations=10**6, reward_calls=10**6))
    loop = Stage(unlimited).loop(unlimited.members[0], 0)
    totals: list[int] = [SAMPLES * STEPS]
    for iteration in range(5):
        loop.iterate(iteration)
        totals.append(SAMPLES * STEPS + evaluations(loop.run.ledger))
    first, second = totals[1] - totals[0], totals[2] - totals[1]
    assert second > first
    for budget in (totals[0] + second, totals[2] - 1, totals[2], totals[4] + 1):
        arena = load_arena(values({"nft": ANCHORED}, evaluations=budget, reward_calls=8 * 5))
        stage, member = Stage(arena), arena.members[0]
        plan = plan_of(stage, member)
        assert spent(plan.unit, "evaluations") == second
        assert plan.problem("evaluations", budget) is None
        run = run_member(stage, member, plan, 0, lambda text: None)
        reading, fits = run.readings["evaluations"], max(n for n, total in enumerate(totals) if total <= budget)
        assert (reading.iterations, evaluations(reading.cost)) == (fits, totals[fits]), budget
        assert run.readings["reward_calls"].iterations == 5
    # the numbers are of the weights at that iteration, not of those one iteration later
    again = stage.loop(member, 0)
    for iteration in range(fits):
        again.iterate(iteration)
    assert trained_reading(stage, again, Ledger(), fits, 0.0).numbers == reading.numbers


def test_what_is_read_on_the_way_does_not_change_the_training() -> None:
    runs: list[MemberRun] = []
    for calls in (8 * 2, 8 * 4):  # the smaller budget is read, with the weights put back, and training goes on
        arena = load_arena(values({"nft": ANCHORED}, evaluations=SAMPLES * STEPS + 8 * 8 * 4 * 4, reward_calls=calls))
        stage, member = Stage(arena), arena.members[0]
        runs.append(run_member(stage, member, plan_of(stage, member), 0, lambda text: None))
    assert [run.readings["reward_calls"].iterations for run in runs] == [2, 4]
    assert runs[0].curve[-1].iterations == runs[1].curve[-1].iterations
    assert runs[0].curve[-1].numbers == runs[1].curve[-1].numbers


def test_a_reading_is_the_last_evaluation_within_the_budget() -> None:
    curve = tuple(Reading(numbers={}, cost=Ledger(10 * n, n, n), seconds=0, iterations=n) for n in range(5))
    for evaluated, last in ((38, 2), (39, 3), (51, 3), (52, 4), (999, 4)):
        found = within(curve, {"evaluations": evaluated, "reward_calls": 2})
        assert [found[one].iterations for one in CURRENCIES] == [last, 2]
    assert evaluations(curve[3].cost) == 39


def test_best_of_one_is_plain_sampling_by_the_kernel_and_best_of_many_is_better() -> None:
    stage, member = stage_of("best")
    _, base = stage_of("kernel")
    plain = base_reading(stage, base, 3)
    one = steered_reading(stage, member, 1, 3)
    assert {name: one.numbers[name] for name in plain.numbers if name != "kl_reference"} == {
        name: value for name, value in plain.numbers.items() if name != "kl_reference"
    }
    assert one.numbers["kl_bound"] == 0
    assert one.cost == Ledger(plain.cost.nfe, SAMPLES)
    many = steered_reading(stage, member, 16, 3)
    assert many.numbers["reward"] > one.numbers["reward"] + 0.5


def test_particles_are_the_same_in_any_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, member = stage_of("fk")
    whole = steered_reading(stage, member, 4, 0)
    monkeypatch.setattr("difftilt.evaluation.arena.members.PARTICLES_AT_ONCE", 12)
    parts = steered_reading(stage, member, 4, 0)
    assert (parts.numbers, parts.cost) == (whole.numbers, whole.cost)


def test_a_sample_is_drawn_by_the_weights() -> None:
    nothing = torch.zeros(0)
    weight = torch.tensor([0.0, 1.0, 0.0, 0.25, 0.25, 0.5], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    steered = Steered(nothing, nothing, group, weight, nothing, nothing, nothing, nothing, nothing, Ledger())
    for uniform, row in ((0.1, 3), (0.3, 4), (0.6, 5), (0.999, 5)):
        point = torch.full((2,), uniform, dtype=torch.float64)
        assert drawn_rows(steered, point).tolist() == [1, row]


def test_equal_samples_are_at_distance_zero_and_the_floor_is_not_zero() -> None:
    stage, member = stage_of("base")
    task = stage.task(member)
    run = stage.run(task, 0)
    batch = heldout_batch(run, SAMPLES)
    same = run.samples(draw(run, "reference", task.sampler, batch, base_noise(0)), batch, heldout=True)
    assert abs(stage.drift(task, same, 0)["distance"]) < 1e-6
    assert base_reading(stage, member, 0).numbers["distance"] > 1e-3


def test_drift_is_measured_from_the_untrained_model() -> None:
    stage, member = stage_of("nft")
    loop = stage.loop(member, 0)
    task = loop.run.task
    with torch.no_grad():
        for parameter in loop.run.roles.parameters("current"):
            parameter.add_(0.5)
    batch = heldout_batch(loop.run, SAMPLES)
    with torch.no_grad():
        moved = draw(loop.run, "current", task.sampler, batch, base_noise(0))
    assert stage.drift(task, loop.run.samples(moved, batch, heldout=True), 0)["distance"] > 0.01


def test_drift_is_missing_and_not_zero_where_nothing_defines_it(finished: tuple[Path, ArenaResult]) -> None:
    _, result = finished
    for run in result.runs:
        for reading in run.readings.values():
            assert "distance" in reading.numbers
            assert {"reward", "on_mode", "diversity"} <= reading.numbers.keys()
            if run.member in ("base", "kernel"):
                assert reading.numbers["kl_reference"] == 0
            elif run.member in ("best", "fk"):
                assert "kl_reference" not in reading.numbers
            else:
                assert reading.numbers["kl_reference"] >= 0
            assert ("kl_bound" in reading.numbers) == (run.member == "best")
    assert search_bound(4) == math.log(4) - 3 / 4


def test_another_seed_gives_other_numbers(finished: tuple[Path, ArenaResult]) -> None:
    # that the same seed gives the same ones is seen where an arena is resumed
    for name in MEMBERS:
        first, second = finished[1].of(name)
        assert first.readings["evaluations"].numbers != second.readings["evaluations"].numbers


def test_resume_leaves_out_what_is_done_and_ends_in_an_equal_result(
    finished: tuple[Path, ArenaResult], tmp_path: Path
) -> None:
    def stop(text: str) -> None:
        if text.startswith("fk") and "done" in text:
            raise StopHereError

    output = tmp_path / "run"
    with pytest.raises(StopHereError):
        compare_arena(values(seeds=[0, 1]), output, tell=stop)
    kept = {path.name: path.read_text() for path in (output / "members").iterdir()}
    assert len(kept) == 4
    with pytest.raises(UserError, match="--resume"):
        compare_arena(values(seeds=[0, 1]), output)
    with pytest.raises(UserError, match=r"arena.samples: 8 there, 12 asked for"):
        compare_arena(values(seeds=[0, 1], samples=12), output, resume=True)
    told: list[str] = []
    result = compare_arena(values(seeds=[0, 1]), output, resume=True, tell=told.append)
    assert [text for text in told if "done before" in text] == [
        f"{name}, seed 0: done before" for name in ("base", "kernel", "best", "fk")
    ]
    assert {name: (output / "members" / name).read_text() for name in kept} == kept
    assert steady(result) == steady(finished[1])
    assert steady(read_json(ArenaResult, output / "result.json")) == steady(result)


def test_members_and_seeds_that_are_added_at_the_end_are_all_that_is_run(tmp_path: Path) -> None:
    output, told = tmp_path / "run", list[str]()
    compare_arena(values(only("base"), seeds=[0]), output)
    more = compare_arena(values(only("base", "best"), seeds=[0, 1]), output, resume=True, tell=told.append)
    assert [text for text in told if "done before" in text] == ["base, seed 0: done before"]
    assert [(run.member, run.seed) for run in more.runs] == [("base", 0), ("best", 0), ("base", 1), ("best", 1)]
    assert steady(more) == steady(compare_arena(values(only("base", "best"), seeds=[0, 1]), tmp_path / "at once"))
    with pytest.raises(UserError, match=r"members\.best"):
        compare_arena(values(only("base"), seeds=[0, 1]), output, resume=True)
    with pytest.raises(UserError, match="resume with the same values"):
        compare_arena(values(only("best", "base"), seeds=[0, 1]), output, resume=True)


def test_a_damaged_or_foreign_record_is_named(finished: tuple[Path, ArenaResult], tmp_path: Path) -> None:
    output = tmp_path / "run"
    compare_arena(values(only("base")), output)
    (record,) = (output / "members").iterdir()
    whole = record.read_text()
    record.write_text(whole[:40])
    with pytest.raises(UserError, match=rf"{record.name} is damaged"):
        compare_arena(values(only("base")), output, resume=True)
    record.write_text(whole.replace('"base"', '"other"'))
    with pytest.raises(UserError, match="is of member 'other'"):
        compare_arena(values(only("base")), output, resume=True)
    with pytest.raises(UserError, match="holds no arena to resume"):
        compare_arena(values(only("base")), tmp_path / "nowhere", resume=True)


def test_budgets_that_cannot_be_met_are_one_error_before_any_work(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        compare_arena(values(evaluations=40, reward_calls=7), output)
    text = str(caught.value)
    assert not output.exists()
    for line in (
        "member 'best': arena.reward_calls = 7 is too little for particles = 1 for each of 8 samples: give at least 8",
        "member 'fk': arena.reward_calls = 7 is too little for particles = 1 for each of 8 samples: give at least 16",
        "member 'grpo': arena.evaluations = 40 is too little for one iteration of training and the samples: "
        f"give at least {32 + 8 * STEPS + 3 * 8}",
        "member 'nft': arena.reward_calls = 7",
    ):
        assert line in text
    assert "member 'base'" not in text
    with pytest.raises(UserError, match=r"member 'base': arena.evaluations = 31 .* plain sampling: give at least 32"):
        compare_arena(values(only("base"), evaluations=31), output)


@pytest.mark.parametrize("name", ["best", "fk", "grpo", "nft"])
def test_the_least_that_is_named_would_do(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        compare_arena(values(only(name), evaluations=1, reward_calls=1), tmp_path / "none")
    least = [int(line.rsplit(" ", 1)[1]) for line in str(caught.value).splitlines()[1:]]
    budgets = {"evaluations": least[0], "reward_calls": least[1]}
    run = compare_arena(values(only(name), **budgets), tmp_path / "run").runs[0]
    assert [run.readings[one].iterations or run.readings[one].particles for one in CURRENCIES] in ([1, 1], [2, 2])


def test_a_member_that_outgrows_its_trial_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from difftilt.steering.best_of_n import BestOfN

    steer = BestOfN.steer

    def greedy(self: BestOfN, task: Any, denoise: Any, *rest: Any, **named: Any) -> Steered:
        denoise.ledger.nfe += 0
        steered = steer(self, task, denoise, *rest, **named)
        steered.ledger.nfe *= self.config.particles
        return steered

    monkeypatch.setattr(BestOfN, "steer", greedy)
    with pytest.raises(GuardError, match=r"member 'best', seed 0: .* does not grow in proportion to its particles"):
        compare_arena(values(only("best")), tmp_path / "run")


def test_hostile_names_stay_inside_the_directory_and_are_text_everywhere(tmp_path: Path) -> None:
    names = [HOSTILE, "../../X|<b>$\\frac_[y](z)`", "_hidden", "$x$", "…"]
    output = tmp_path / "deep" / "run"
    result = compare_arena(values({name: {} for name in names}), output)
    assert [entry.name for entry in result.members] == names
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}
    assert len(list((output / "members").iterdir())) == len(names)
    assert load_arena(output / "config.yaml").resolved() == result.recipe
    table = (output / "table.md").read_text()
    assert "<b>" not in table
    for line in table.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == len(grids(result)[0].header) + 1
    assert (output / "picture.png").stat().st_size > 1000


def test_every_problem_of_a_recipe_is_told_at_once() -> None:
    bad: dict[str, Any] = {
        "a": {"steerer": {"name": "best-of-n", "particles": 3}},
        "b": {"method": {"name": "flow-grop"}},
        "c": {"method": {"name": "flow-grpo", "clip_rang": 1}, "training": {"iterations": 3}},
        "d": {"method": {"name": "flow-grpo"}, "steerer": {"name": "best-of-n"}},
        "e": {"sampler": "sde", "training": {}},
        "f": {"steeer": {"name": "best-of-n"}},
        "two\nlines": {},
    }
    with pytest.raises(UserError) as caught:
        load_arena(values(bad, seeds=[1, 1], evaluations=0, nfe=3) | {"extra": 1})
    for words in (
        "extra: unknown section",
        "arena.seeds = [1, 1]: a seed stands there twice",
        "arena.evaluations = 0: ",
        "arena.nfe = 3: unknown key",
        "members.a.steerer.particles: follow from the budgets",
        'members.b.method.name = "flow-grop"',
        "members.c.method.clip_rang = 1: unknown key; did you mean clip_range",
        "members.c.training.iterations = 3: unknown key",
        "members.d: has either a method or a steerer",
        "members.e.sampler",
        "members.e.training: belongs to a method",
        "members.f.steeer: unknown section; did you mean steerer",
        "a name is one line of 1 to 60 printable characters",
    ):
        assert words in str(caught.value), words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"samples": 9}, "arena.samples = 9 does not divide among 1 held-out prompts|use 8 or 10"),
        ({"heldout": "on_mod"}, "arena.heldout = 'on_mod' is no held-out reward; did you mean on_mode"),
    ],
)
def test_settings_that_do_not_fit_the_task(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    if "samples" in changes:
        recipe = values(only("base"), **changes) | {"testbed": {"name": "digits"}}
        words = "arena.samples = 9 does not divide among 4 held-out prompts"
    else:
        recipe = values(only("base"), **changes)
    with pytest.raises(UserError, match=words):
        compare_arena(recipe, tmp_path / "run")


def test_a_method_that_cannot_run_on_the_task_is_refused_by_name(tmp_path: Path) -> None:
    recipe = values(only("base", "nft")) | {"testbed": {"name": "sequences"}}
    with pytest.raises(UserError, match=r"member 'nft'.*gaussian process"):
        compare_arena(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arenas_and_recipes_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use `difftilt train`"):
        load_arena("mixtures/flow-grpo")
    with pytest.raises(UserError, match="use `difftilt compare`"):
        load_recipe("arena/digits")
    assert load_arena("arena/digits").resolved() == load_arena(load_arena("arena/digits").resolved()).resolved()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    difftilt = CommandLine(monkeypatch, capsys)
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(values(only("base", "best"))))
    ran = difftilt("compare", file, "--output", tmp_path / "run", "arena.samples=12", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["recipe"]["arena"]["samples"] == 12
    assert "best, seed 0: done in" in ran.err
    again = difftilt("compare", file, "--output", tmp_path / "run", "arena.samples=12", "--resume")
    assert again.code == 0, again.err
    assert "At equal evaluations: 600" in again.out
    assert difftilt("compare", file, "--output", tmp_path / "run").code == 2
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="without torchrun"):
            package.compare(values(only("base")), tmp_path / "two")


def test_tables_hold_both_budgets_and_say_for_how_many_samples(finished: tuple[Path, ArenaResult]) -> None:
    output, result = finished
    evaluated, rewarded = grids(result)
    assert evaluated.title == "At equal evaluations: 600"
    assert rewarded.title == "At equal reward calls: 40"
    for grid in (evaluated, rewarded):
        assert [row[0] for row in grid.rows] == list(MEMBERS)
        assert {len(row) for row in grid.rows} == {len(grid.header)}
    best = dict(zip(evaluated.header, evaluated.rows[2], strict=True))
    assert best["kl_reference"] == f"≤ {search_bound(18):.3g}"
    assert best["setting"] == "18 particles"
    assert dict(zip(evaluated.header, evaluated.rows[3], strict=True))["kl_reference"] == ""
    text = (output / "table.md").read_text()
    assert text == markdown_tables(result)
    assert "8 samples exist" in text
    assert "plus 3 for every gradient pass" in text


def test_free_text_is_literal_in_markdown() -> None:
    assert escaped("a|b <i>*c*_d_") == "a\\|b &lt;i&gt;\\*c\\*\\_d\\_"


def test_the_picture_needs_no_more_than_the_result(finished: tuple[Path, ArenaResult], tmp_path: Path) -> None:
    _, result = finished
    save_arena_picture(result, tmp_path / "one.png")
    save_arena_picture(ArenaResult.model_validate_json(result.model_dump_json()), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_the_page_is_what_its_script_makes_of_the_stored_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    sys.modules.pop("arena_page", None)
    arena_page: Any = importlib.import_module("arena_page")
    found = arena_page.results()
    assert found
    assert arena_page.PAGE.read_text(encoding="utf-8") == arena_page.page(found)
    readme = arena_page.README.read_text(encoding="utf-8")
    assert readme == arena_page.readme(readme, found)
    quoted = [line for line in readme.splitlines() if line.startswith("|") and "| symmetry " in line]
    assert len(quoted) == len({"the base", "flow-grpo", "diffusion-nft", "fk-steering", "best-of-n"})
    for name, result in found.items():
        assert (arena_page.PICTURES / f"{name}.png").exists()
        # a setting that was added since has its default
        assert load_arena(result.recipe).resolved() == load_arena(result.source).resolved()


def test_records_survive_their_file(finished: tuple[Path, ArenaResult]) -> None:
    output, result = finished
    files = sorted((output / "members").iterdir())
    assert len(files) == len(result.runs)
    stored = [read_json(MemberRun, file) for file in files]
    assert sorted(stored, key=lambda run: (run.seed, run.member)) == sorted(
        result.runs, key=lambda run: (run.seed, run.member)
    )


def curve_of(*numbers: float) -> tuple[Reading, ...]:
    """Readings after 0, 10, 20, ... iterations, each iteration 100 evaluations and 4 reward calls."""
    return tuple(
        Reading(
            numbers={"reward": value, "kl_reference": 2.0 * place},
            cost=Ledger(1000 * place, 40 * place),
            seconds=3.0 * place,
            iterations=10 * place,
        )
        for place, value in enumerate(numbers)
    )


def test_a_target_tells_what_each_trained_member_spends_until_it_is_there(
    finished: tuple[Path, ArenaResult],
) -> None:
    _, result = finished
    curves = {0: curve_of(0.1, 0.2, 0.5, 0.4), 1: curve_of(0.1, 0.5, 0.2)}
    runs = tuple(run.model_copy(update={"curve": curves[run.seed]}) if run.curve else run for run in result.runs)
    recipe = result.recipe | {"arena": result.recipe["arena"] | {"target": 0.45}}
    watched = result.model_copy(update={"runs": runs, "recipe": recipe, "heldout": "reward"})
    table = grids(watched)[-1]
    assert table.title == "Until reward reaches 0.45"
    trained = [entry.name for entry in result.members if entry.kind == "trained"]
    assert [row[0] for row in table.rows] == trained
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["seeds that reach it"] == "2 of 2"
    assert cells["iterations"] == "15 (10 to 20)"
    assert cells["evaluations"] == "1 500 (1 000 to 2 000)"
    assert cells["reward calls"] == "60 (40 to 80)"
    never = watched.model_copy(update={"recipe": recipe | {"arena": recipe["arena"] | {"target": 9.0}}})
    assert set(grids(never)[-1].rows[0][2:]) == {""}
    assert grids(never)[-1].rows[0][1] == "0 of 2"


def test_costs_until_a_target_are_divided_seed_by_seed_and_what_is_never_reached_is_no_number(
    finished: tuple[Path, ArenaResult],
) -> None:
    _, result = finished
    assert result.recipe["arena"]["seeds"] == [0, 1]
    # nft is there after 10 and after 20 iterations, grpo after 30 with the first seed alone
    curves = {
        ("nft", 0): curve_of(0.1, 0.5),
        ("nft", 1): curve_of(0.1, 0.2, 0.5),
        ("grpo", 0): curve_of(0.1, 0.2, 0.3, 0.6),
        ("grpo", 1): curve_of(0.1, 0.2, 0.3, 0.4),
    }
    runs = tuple(
        run.model_copy(update={"curve": curves[run.member, run.seed]}) if run.curve else run for run in result.runs
    )

    def table(target: float, against: str) -> dict[str, str]:
        recipe = result.recipe | {"arena": result.recipe["arena"] | {"target": target, "against": against}}
        found = grids(result.model_copy(update={"runs": runs, "recipe": recipe, "heldout": "reward"}))
        until, grid = found[-2:]
        assert until.title == f"Until reward reaches {target:g}"
        assert grid.title == f"Until reward reaches {target:g}: times what {against} spends, by seed"
        (row,) = grid.rows
        return dict(zip(grid.header, row, strict=True))

    cells = table(0.45, "nft")
    assert cells["member"] == "grpo"
    assert [cells[f"evaluations, seed {seed}"] for seed in (0, 1)] == ["3", "not reached"]
    assert [cells[f"seconds, seed {seed}"] for seed in (0, 1)] == ["3", "not reached"]
    assert cells["evaluations, mean"] == cells["seconds, mean"] == "3 (1 of 2 seeds)"
    # both are at 0.2 after 10 iterations with either seed, but nft with the first is at 0.5 then and still counts
    cells = table(0.15, "nft")
    assert cells["evaluations, mean"] == "1 ± 0"
    # the other way round the same seed has no ratio either: nobody knows how often an unpaid cost goes into a paid one
    cells = table(0.45, "grpo")
    assert [cells[f"evaluations, seed {seed}"] for seed in (0, 1)] == ["0.33", "not reached"]
    assert table(9.0, "nft")["seconds, mean"] == "not reached"
    # what the untrained model has already costs no learning
    cells = table(0.05, "nft")
    assert [cells[f"evaluations, seed {seed}"] for seed in (0, 1)] == ["untrained", "untrained"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"against": "nft"}, "arena.target"),
        ({"against": "bset", "target": 1.0}, "'bset' is no trained member; "),
        ({"against": "best", "target": 1.0}, "known: grpo, nft"),
    ],
)
def test_a_comparison_with_nobody_or_until_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_arena(values(**settings))
    assert load_arena(values(against="nft", target=1.0)).config.against == "nft"


def test_processor_seconds_stand_still_while_the_program_waits() -> None:
    began = now("processor"), now("wall")
    time.sleep(0.2)
    processor, wall = (now(clock) - start for clock, start in zip(("processor", "wall"), began, strict=True))
    assert wall >= 0.2 > 5 * processor
    with pytest.raises(UserError, match="processor does not see the work of meta"):
        load_arena(values(clock="processor", device="meta"))


def test_an_offline_member_ends_where_nothing_that_is_left_is_spent() -> None:
    offline = {
        "method": {"name": "gdro", "collect": 4, "groups": 2, "group_size": 2, "tau": 0.5},
        "training": {"evaluate_every": 2},
    }
    arena = load_arena(values({"offline": offline}, evaluations=SAMPLES * STEPS + 600, reward_calls=1000))
    stage, member = Stage(arena), arena.members[0]
    run = run_member(stage, member, plan_of(stage, member), 0, lambda text: None)
    assert run.readings["reward_calls"] == run.readings["evaluations"]
    assert {one.cost.reward_calls for one in run.curve[1:]} == {8}
    assert evaluations(run.readings["evaluations"].cost) <= SAMPLES * STEPS + 600
