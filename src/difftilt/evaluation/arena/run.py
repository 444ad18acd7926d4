"""The arena: several methods and steerers on one task at equal cost, over seeds.

Members are read twice, at a budget of network evaluations and at one of reward calls; a setting that meets both does
not exist in general. The cost of a member is everything spent until its samples exist: plain sampling for the base,
training and plain sampling for a method, the whole search for a steerer.
"""

import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from difftilt import __version__
from difftilt.config import Problems
from difftilt.errors import GuardError, RewardError, UserError
from difftilt.evaluation.arena.config import Arena, Member, load_arena
from difftilt.evaluation.arena.cost import CURRENCIES
from difftilt.evaluation.arena.crossover import crossovers, save_crossover_picture
from difftilt.evaluation.arena.members import Plan, plan_of, run_member
from difftilt.evaluation.arena.picture import save_arena_picture
from difftilt.evaluation.arena.records import ArenaResult, Entry, Kind, MemberRun, read_json, write_json
from difftilt.evaluation.arena.stage import Stage
from difftilt.evaluation.arena.tables import markdown_tables
from difftilt.leaves import nearest
from difftilt.recipes.directory import CONFIG, differences
from difftilt.training.logs import write_text
from difftilt.training.measure import heldout_batch
from difftilt.training.protocol import Task

Tell = Callable[[str], None]
"""Called with a sentence whenever there is something to tell."""


def compare_arena(
    recipe: str | Path | Mapping[str, Any],
    output: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    tell: Tell = lambda text: None,
) -> ArenaResult:
    """Run every member with every seed; what is done is kept, member by member.

    Args:
        recipe: a path, a packaged name, or the values themselves.
        output: new directory, or with ``resume`` the one of the same arena.
        overrides: ``dotted.key=value``.
        resume: go on where an arena was interrupted, or was whole and has got further members or seeds at the end.
        tell: of progress.

    Raises:
        UserError: for everything that is wrong before any work is done, budgets that a member cannot meet included.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("an arena runs in one process: call it without torchrun")
    arena = load_arena(recipe, overrides)
    _check_output(output, arena, resume)
    stage, done = Stage(arena), _done(output, arena)
    task = stage.task(arena.members[0])
    heldout = _check_task(stage, task)
    plans = _plans(stage, done)
    _begin(output, arena)
    runs = [_run(stage, place, seed, plans, done, output, tell) for place, seed in _pairs(arena)]
    result = _result(arena, task, heldout, runs)
    write_text(output / "result.json", write_json(result))
    write_text(output / "table.md", markdown_tables(result))
    save_arena_picture(result, output / "picture.png")
    if crossovers(result):
        save_crossover_picture(result, output / "crossover.png")
    return result


def _pairs(arena: Arena) -> list[tuple[int, int]]:
    """Place of a member, and seed: all members of a seed before the next seed."""
    return [(place, seed) for seed in arena.config.seeds for place in range(len(arena.members))]


def _run(
    stage: Stage,
    place: int,
    seed: int,
    plans: Mapping[int, Plan],
    done: Mapping[tuple[int, int], MemberRun],
    output: Path,
    tell: Tell,
) -> MemberRun:
    member = stage.arena.members[place]
    if (place, seed) in done:
        tell(f"{member.name}, seed {seed}: done before")
        return done[place, seed]
    began = time.perf_counter()
    with _named(member, seed):
        run = run_member(stage, member, plans[place], seed, lambda text: tell(f"{member.name}, seed {seed}: {text}"))
    write_text(output / _file(place, member, seed), write_json(run))
    tell(f"{member.name}, seed {seed}: done in {time.perf_counter() - began:.1f} s")
    return run


@contextmanager
def _named(member: Member, seed: int) -> Generator[None, None, None]:
    """Errors say which member they are of."""
    try:
        yield
    except (UserError, RewardError, GuardError) as error:
        kinds = (UserError, RewardError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), GuardError)
        raise kind(f"member {member.name!r}, seed {seed}: {error}") from error


def _check_task(stage: Stage, task: Task) -> str:
    """Refuse numbers of samples that do not divide among prompts, and unknown metrics; returns the metric to show."""
    config = stage.arena.config
    batch = heldout_batch(stage.run(task, 0), config.samples)
    if len(batch.index) != config.samples:
        groups = int(batch.group.max()) + 1
        more = len(batch.index) + groups
        raise UserError(
            f"arena.samples = {config.samples} does not divide among {groups} held-out prompts with at least two each: "
            f"use {len(batch.index)} or {more}"
        )
    known = [*task.heldout, "reward"]
    if config.heldout is not None and config.heldout not in known:
        raise UserError(f"arena.heldout = {config.heldout!r} is no held-out reward; {nearest(config.heldout, known)}")
    return config.heldout or task.headline


def _plans(stage: Stage, done: Mapping[tuple[int, int], MemberRun]) -> dict[int, Plan]:
    """A trial of every member that is still to run; all budgets that cannot be met are one error."""
    arena, problems, plans = stage.arena, Problems(), dict[int, Plan]()
    for place in dict.fromkeys(place for place, seed in _pairs(arena) if (place, seed) not in done):
        member = arena.members[place]
        try:
            with _named(member, arena.config.seeds[0]):
                plans[place] = plan_of(stage, member)
        except UserError as error:
            problems.add(str(error))
            continue
        for currency in CURRENCIES:
            problem = plans[place].problem(currency, arena.config.budget(currency))
            if problem is not None:
                problems.add(f"member {member.name!r}: {problem}")
    problems.check(arena.source)
    return plans


def _check_output(output: Path, arena: Arena, resume: bool) -> None:
    """Refuse a directory that would lose work or mix two arenas; touches nothing."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a directory")
    if not resume:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(
                f"output {output} exists and is not empty: add --resume to go on with it, or name another one"
            )
        return
    if not (output / CONFIG).exists():
        raise UserError(f"output {output} holds no arena to resume ({CONFIG} is missing): leave out --resume")
    was = load_arena(output / CONFIG).resolved()
    now = _begun(was, arena.resolved())
    changed = differences(was, now)
    if not changed and list(was["members"]) != list(now["members"]):
        changed = {"members": (list(was["members"]), list(now["members"]))}
    if changed:
        lines = [f"  {key}: {was!r} there, {now!r} asked for" for key, (was, now) in changed.items()]
        raise UserError("\n".join([f"{output} was begun with another arena: resume with the same values", *lines]))


def _begun(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The values ``now`` without the members and seeds that ``was`` lacks at its ends: they alone are to be run."""
    members = dict(list(now["members"].items())[: len(was["members"])])
    seeds = now["arena"]["seeds"][: len(was["arena"]["seeds"])]
    return {**now, "members": members, "arena": {**now["arena"], "seeds": seeds}}


def _begin(output: Path, arena: Arena) -> None:
    try:
        (output / "members").mkdir(parents=True, exist_ok=True)
        write_text(output / CONFIG, arena.to_yaml())
    except OSError as error:
        raise UserError(f"output {output} cannot be written ({error.strerror}): name another directory") from error


def _file(place: int, member: Member, seed: int) -> Path:
    """A name that no free text can lead out of the directory, or to another member's file."""
    word = re.sub(r"[^a-z0-9]+", "-", member.name.lower()).strip("-")
    return Path("members") / f"{place:02d}-{word or 'member'}-seed{seed}.json"


def _done(output: Path, arena: Arena) -> dict[tuple[int, int], MemberRun]:
    """Whole records of an earlier call."""
    files = {(place, seed): output / _file(place, arena.members[place], seed) for place, seed in _pairs(arena)}
    found = {key: read_json(MemberRun, file) for key, file in files.items() if file.exists()}
    for (place, seed), run in found.items():
        if (run.member, run.seed) != (arena.members[place].name, seed):
            raise UserError(f"{files[place, seed]} is of member {run.member!r}, seed {run.seed}: remove it")
    return found


def _result(arena: Arena, task: Task, heldout: str, runs: Sequence[MemberRun]) -> ArenaResult:
    words = ["difftilt", "compare", arena.source, "--output", f"runs/{Path(arena.source).stem}", *arena.overrides]
    return ArenaResult(
        source=arena.source,
        command=shlex.join(words),
        versions={"difftilt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        threads=torch.get_num_threads(),
        reward=task.reward.name,
        heldout=heldout,
        recipe=arena.resolved(),
        members=tuple(Entry(name=one.name, kind=_kind(one), algorithm=one.algorithm) for one in arena.members),
        runs=tuple(runs),
    )


def _kind(member: Member) -> Kind:
    if member.method is not None:
        return "trained"
    return "base" if member.steerer is None else "steered"
