"""The command line: thin, every command is one call of the Python interface.

Exit codes: 0 done, 1 a check failed, 2 the user's input is wrong, 3 a reward failed, 4 a guard tripped.
"""

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from difftilt import __version__
from difftilt.errors import GuardError, RewardError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from difftilt.checks.proof import Result
    from difftilt.recipes.schema import Recipe

app = typer.Typer(
    name="difftilt",
    help="Align diffusion, flow and masked generative models to a reward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A packaged name (demo, TESTBED/METHOD, arena/NAME), or the path of a YAML file."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value]...", help="Dotted keys of the recipe, e.g. method.clip_range=0.1."),
]
LOOPBACK = "127.0.0.1"
EVALUATED = "A recipe (its untrained model), a run (its newest checkpoint), or RUN/checkpoints/step_N."
Seed = Annotated[int | None, typer.Option(help="Fixes every draw of the run.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Run a command; what a user can get wrong is told in a few lines on stderr."""
    sys.path.append(os.getcwd())  # so that package.module:Name finds a user's own file
    try:
        app()
    except (UserError, RewardError, GuardError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        else:
            sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Debug = False,
) -> None:
    """Align diffusion, flow and masked generative models to a reward."""
    if version:
        _print(f"difftilt {__version__}")
        raise typer.Exit


@app.command()
def train(
    recipe: RecipeName,
    output: Annotated[Path, typer.Option(help="Run directory; must be new or empty unless --resume is given.")],
    overrides: Overrides = None,
    iterations: Annotated[int | None, typer.Option(help="Rounds of collect and update.")] = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a model; of a recipe with a steerer fit what the steerer learns (steering.fitted=DIR then reads it).

    The fields that can be set with key=value: `difftilt describe NAME` shows those of a method (method.FIELD) or of a
    testbed (testbed.FIELD); `difftilt list methods` and `difftilt list recipes` show what there is; the loop's own are
    training.iterations, training.seed, training.optimizer.lr and so on (`difftilt describe training`).
    """
    from difftilt import api, tables
    from difftilt.recipes.schema import load_recipe

    chosen = [*(overrides or []), *_shortcuts(iterations=iterations, seed=seed)]
    typed = load_recipe(recipe, chosen)
    if typed.steerer is not None:
        _fit(typed, output, resume)
        return
    result = api.train(typed, output, resume=resume, hooks=[_progress])
    if not result.run.world.main:
        return
    _print(tables.train_report(result.before, result.after, result.verdicts))
    _print(f"run directory: {output}")


def _fit(recipe: "Recipe", output: Path, resume: bool) -> None:
    from difftilt import api, tables

    if resume:
        raise UserError("train: the fit of a steerer has no checkpoints to resume from: leave out --resume")
    _print(tables.fit_report(api.fit(recipe, output, progress=_steps)))
    _print(f"steer with it: steering.fitted={output}")


@app.command()
def steer(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="New directory for result.json and samples.safetensors.")] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="May be repeated; default: the held-out prompts.")] = None,
    prompts_file: Annotated[str | None, typer.Option(help="Text file, one prompt per line, # before comments.")] = None,
    seed: Seed = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Sample with a steerer; the weights of the model stay as they are."""
    from difftilt import api, tables

    if output is None and not as_json:
        raise UserError("steer: say where the samples go with --output DIR, or ask for a summary with --json")
    if prompts and prompts_file is not None:
        raise UserError("steer: give either --prompts or --prompts-file, not both")
    chosen = _shortcuts(seed=seed, **{"steering.prompts": list(prompts) if prompts else prompts_file})
    report = api.steer(recipe, output=output, progress=_steps, overrides=[*(overrides or []), *chosen]).summary()
    _print_json(report) if as_json else _print(tables.steer_report(report))


@app.command()
def collect(
    recipe: RecipeName,
    output: Annotated[Path, typer.Option(help="Directory; must be new or empty unless --resume is given.")],
    overrides: Overrides = None,
    groups: Annotated[int, typer.Option(min=1, help="Groups; the training prompts take turns.")] = 256,
    group_size: Annotated[int, typer.Option(min=2, help="Samples of each group.")] = 6,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Draw what is missing.")] = False,
    debug: Debug = False,
) -> None:
    """Draw groups from a recipe's untrained model and score them once, for methods that learn offline (data=DIR)."""
    from difftilt import api

    chosen = [*(overrides or []), *_shortcuts(seed=seed)]
    sizes = {"groups": groups, "group_size": group_size}
    made = api.collect(recipe, output, **sizes, resume=resume, progress=_line, overrides=chosen)
    cost = f"{made.ledger['nfe']} network evaluations, {made.ledger['reward_calls']} reward calls"
    _print(f"{made.groups} groups of {made.group_size} in {output}: {cost}")
    if made.equal_groups:
        _print(f"{made.equal_groups} groups have equal rewards: training leaves them out")


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(metavar="RECIPE|RUN_DIR", help=EVALUATED)],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory for numbers and pictures; other steps of the run may be added.")
    ] = None,
    seed: Seed = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure reward, drift and diversity of a recipe's model, or of a checkpoint of a run."""
    from difftilt import api, tables

    metrics = api.evaluate(what, output, progress=_said, overrides=[*(overrides or []), *_shortcuts(seed=seed)])
    _print_json(metrics) if as_json else _print(tables.metric_table({"value": metrics}))
    if output is not None:
        _said(f"pictures: {output / 'samples'}; `difftilt report {output}` shows them")


@app.command()
def judge(
    what: Annotated[str, typer.Argument(metavar="REWARD|RECIPE", help="A reward, or the recipe that names it.")],
    pairs: Annotated[str, typer.Argument(help="A .jsonl file or a data set with prompt, chosen, rejected.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pairs scored at once.")] = 32,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how often a reward prefers the sample that people preferred."""
    from difftilt import api, tables

    found = api.judge(what, pairs, batch=batch, progress=_line, overrides=overrides or []).summary()
    _print_json(found) if as_json else _print(tables.metric_table({"value": found}))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run, or RUN/checkpoints/step_N.")],
    output: Annotated[Path, typer.Option(help="New directory for the weights, a model card and the recipe.")],
    role: Annotated[str | None, typer.Option(help="Whose weights; default: those that are evaluated.")] = None,
    debug: Debug = False,
) -> None:
    """Write trained weights as the model's own library loads them: a LoRA, or all of them."""
    from difftilt import api

    sys.stdout.write(f"{api.export(run, output, role=role)}\n")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories written by train or steer.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the first run.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one run, or several side by side; unfinished ones too."""
    from difftilt import api

    sys.stdout.write(f"{api.report(runs, output)}\n")


@app.command()
def compare(
    recipe: RecipeName,
    output: Annotated[Path, typer.Option(help="Directory; must be new or empty unless --resume is given.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what is done; members may be added.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods and steerers on one task at equal cost, over seeds (recipes arena/NAME)."""
    from difftilt import api
    from difftilt.evaluation.arena.tables import arena_report

    result = api.compare(recipe, output, resume=resume, overrides=overrides or [], progress=_line)
    _print_json(result.model_dump(mode="json", exclude_none=True)) if as_json else _print(arena_report(result))
    if not as_json:
        _print(f"tables, picture and records: {output}")


@app.command("serve-reward")
def serve_reward(
    reward: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="A function of samples, what makes a reward, or a packaged one."),
    ],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Fields of the reward, as in a recipe.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; any but this machine's own needs a token.")
    ] = LOOPBACK,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one and prints it.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="DIFFTILT_REWARD_TOKEN", help="Clients must know it; better set the variable: ps shows options."
        ),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest request.")] = 256 * 2**20,
    debug: Debug = False,
) -> None:
    """Serve a reward to runs in other processes (reward: {name: remote, url: ...}) until Ctrl-C."""
    from difftilt import api
    from difftilt.rewards.served.server import serve_until_stopped

    server = api.reward_server(reward, settings or [], host=host, port=port, token=token or None, max_bytes=max_bytes)
    serve_until_stopped(server, _out)


@app.command()
def doctor(
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Also estimate the memory that this recipe needs.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="That share the recipe's work.")] = 1,
    sharded: Annotated[bool, typer.Option("--sharded", help="Weights are cut among them.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what this machine has and what is installed; with a recipe also what memory it needs, before it is run."""
    from difftilt import api, tables

    found = api.doctor(recipe, processes=processes, sharded=sharded, overrides=overrides or [])
    _print_json(found.plain()) if as_json else _print(tables.doctor_report(found))


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, steerers, rewards, models, testbeds or recipes.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List what there is, without importing it."""
    from difftilt import tables

    rows = tables.entries(kind)
    _print_json(rows) if as_json else _print(tables.entry_table(rows))


@app.command()
def describe(
    name: Annotated[str, typer.Argument(help="A method, steerer, reward, model or testbed; or training, steering.")],
    debug: Debug = False,
) -> None:
    """Show a leaf's card and the fields that a recipe can set, with defaults."""
    from difftilt import tables

    _print(tables.describe(name))


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Slugs; default: all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out what takes more than a few seconds.")] = False,
    file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    debug: Debug = False,
) -> None:
    """Measure the claims that this library makes; exit code 1 if any fails."""
    from difftilt import tables
    from difftilt.checks.collect import collect, run

    if file is not None and not file.parent.is_dir():
        raise UserError(f"--json {file}: there is no directory {file.parent}")
    if file is not None:
        _try_to_write(file)
    proofs = collect(names or (), quick=quick)
    results = [_told(result, len(proofs), place) for place, result in enumerate(run(proofs), start=1)]
    if file is not None:
        file.write_text(json.dumps(tables.result_objects(results), indent=2) + "\n", encoding="utf-8")
    _print(tables.check_table(results))
    failed = sum(not result.passed for result in results)
    _print(f"{len(results)} claims, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _told(result: "Result", count: int, place: int) -> "Result":
    """The result, after one line on stderr: a long check shows where it is."""
    verdict = "" if result.passed else "  FAILED"
    _line(f"{place}/{count}  {result.name}: {result.claim[:90]}{verdict}")
    return result


def _steps(step: int, steps: int, ess: "Tensor | None") -> None:
    """One line per step of a steerer on stderr."""
    _line(f"step {step}/{steps}" + ("" if ess is None else f"  effective sample size {float(ess.mean()):.1f}"))


def _try_to_write(file: Path) -> None:
    """Find out before the work, not after it, that results cannot be kept."""
    try:
        file.touch()
    except OSError as error:
        raise UserError(f"--json {file} cannot be written ({error.strerror}): name another file") from error


def _line(text: str) -> None:
    """A line on stderr; on a terminal the next one overwrites it."""
    sys.stderr.write(f"\x1b[2K{text}\r" if sys.stderr.isatty() else f"{text}\n")
    sys.stderr.flush()


def _out(text: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _said(text: str) -> None:
    """A line on stderr that stays."""
    sys.stderr.write(f"{text}\n")


def _progress(row: Mapping[str, float], verdicts: Sequence[object]) -> None:
    """One line per iteration on stderr; on a terminal it is overwritten."""
    shown = {"reward_mean": "reward", "kl_reference": "kl", "diversity": "diversity", "grad_norm": "grad"}
    parts = [f"{label} {row[name]:.4g}" for name, label in shown.items() if name in row]
    _line(f"iteration {int(row['iteration']) + 1}  {'  '.join(parts)}")


def _shortcuts(**values: object) -> list[str]:
    from difftilt.recipes.loading import escaped

    return [f"{key}={json.dumps(escaped(value))}" for key, value in values.items() if value is not None]


def _print(what: RenderableType) -> None:
    # a pipe has no width of its own: give tables room rather than cutting them at 80 columns
    Console(width=None if sys.stdout.isatty() else 160).print(what, markup=False, highlight=False, soft_wrap=False)


def _print_json(values: Any) -> None:
    sys.stdout.write(json.dumps(values, indent=2) + "\n")
