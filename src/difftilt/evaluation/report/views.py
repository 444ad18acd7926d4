"""What a report says of runs, ready to be laid out: headlines, curves, categories, times, costs, sources."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from difftilt.errors import UserError
from difftilt.evaluation.report.charts import Line, Style, line_chart
from difftilt.evaluation.report.reading import RunRecord
from difftilt.evaluation.report.samples import Gallery
from difftilt.evaluation.report.tolerant import Row
from difftilt.leaves import find

FIRST = ("reward", "kl_reference", "diversity")
"""Shown first and together: the reward never stands alone."""

NAMES = {
    "reward": "reward",
    "kl_reference": "drift, nats",
    "diversity": "diversity",
    "nfe": "network evaluations",
    "reward_calls": "reward calls",
    "gradient_passes": "gradient passes",
    "auxiliary_calls": "auxiliary network calls",
}

MORE_CHARTS = 18
"""Largest number of curves that are folded away."""


@dataclass(frozen=True)
class Change:
    """A number before and after; None is missing."""

    name: str
    before: float | None
    after: float | None

    @property
    def difference(self) -> float | None:
        """After minus before, where both are there."""
        return None if self.before is None or self.after is None else self.after - self.before


@dataclass(frozen=True)
class Chart:
    """A drawing with its title."""

    title: str
    svg: str


@dataclass(frozen=True)
class Curves:
    """Charts to look at first, those that are folded away, and the names of the numbers that are not drawn."""

    shown: Sequence[Chart]
    folded: Sequence[Chart]
    left_out: Sequence[str]


@dataclass(frozen=True)
class Cell:
    """One category of one run; the widths of its bars are in per cent."""

    change: Change
    width_before: float
    width_after: float


@dataclass(frozen=True)
class Categories:
    """A held-out number split by category: one row of cells per category, one cell per run."""

    name: str
    runs: Sequence[int]
    rows: Mapping[str, Sequence[Cell | None]]


@dataclass(frozen=True)
class Phases:
    """Seconds of a run by phase, the share of each in per cent, and of how many rows that is the sum, if not of all."""

    run: int
    seconds: Row
    shares: Row
    short: str


def what(record: RunRecord) -> str:
    """Testbed and algorithm."""
    names = [str(record.section(section).get("name", "")) for section in ("testbed", "method", "steerer")]
    return " · ".join(name for name in names if name) or "unknown recipe"


def facts(record: RunRecord) -> list[str]:
    """What fixes the run, in a few words each."""
    settings = record.section("steering" if record.steering else "training")
    found = [f"seed {settings['seed']}"] if "seed" in settings else []
    if record.rows:
        found.append(f"{int(record.rows[-1]['iteration']) + 1} iterations")
    if record.steering and "particles" in record.section("steerer"):
        found.append(f"{record.section('steerer')['particles']} particles")
    return found


def headline(record: RunRecord) -> list[Change]:
    """Reward, drift and diversity, then every held-out reward, then the components of the reward.

    The number that the task splits by category is the one it is known by, so it stands first among the held-out ones.
    """
    keys = [*dict.fromkeys([*record.before, *record.after])]
    known = [key.partition("@")[0] for key in keys if "@" in key]
    plain = [key for key in keys if "@" not in key and key not in FIRST and not _spread(key, keys)]
    heldout = sorted((key for key in plain if not key.startswith("reward/")), key=lambda key: key not in known)
    parts = [key for key in plain if key.startswith("reward/")]
    order = [*(key for key in FIRST if key in keys), *heldout, *(parts if len(parts) > 1 else [])]
    return [Change(NAMES.get(key, key), record.before.get(key), record.after.get(key)) for key in order]


def _spread(key: str, keys: Sequence[str]) -> bool:
    """Whether a number is the spread of another one, or the fall of it that is tolerated."""
    return any(key.endswith(end) and key.removesuffix(end) in keys for end in ("_std", "_tolerance"))


def overview(records: Sequence[RunRecord]) -> list[list[Change]]:
    """For every run reward, drift and diversity; of a steered one the reward that came out.

    Its weights do not drift, and the KL of its tilted law is another quantity than the path KL of a trained one.
    """
    rows: list[list[Change]] = []
    for record in records:
        pairs = {name: (record.before.get(name), record.after.get(name)) for name in FIRST}
        if record.steering:
            pairs |= {"reward": (None, steered_mean(record, "mean")), "kl_reference": (None, None)}
        rows.append([Change(NAMES[name], *pair) for name, pair in pairs.items()])
    return rows


def steered_mean(record: RunRecord, name: str) -> float | None:
    """Mean over the prompts that have the number; None if none has."""
    found = [value for one in record.steered if (value := getattr(one, name)) is not None]
    return sum(found) / len(found) if found else None


def tilt_kl(record: RunRecord) -> float | None:
    """KL of the tilted law from the model in nats, ``E_p*[r]/β - log Z``, mean over prompts, from the particles.

    Only where the steerer has a temperature β and an estimate of log Z.
    """
    beta = record.section("steerer").get("temperature")
    pairs = [(one.mean, one.log_z) for one in record.steered]
    if not isinstance(beta, int | float) or beta <= 0 or not pairs:
        return None
    found = [mean / beta - log_z for mean, log_z in pairs if mean is not None and log_z is not None]
    return sum(found) / len(found) if len(found) == len(pairs) else None


def curves(records: Sequence[RunRecord]) -> Curves:
    """Charts of all runs together. Numbers of charts count from 0."""
    names = [*dict.fromkeys(key for record in records for row in record.rows for key in row)]
    heldout = [name for name in names if name.startswith("heldout/") and "@" not in name]
    measured = [name[8:] for name in heldout if name[8:] not in FIRST and not name.startswith("heldout/reward/")]
    own = [name for name in measured if not _spread(name, [*measured, "reward"])]
    losses = [name for name in names if name.startswith("loss/") or name.split("/")[0] == "grad_norm"]
    first = [("reward", "reward_mean", "reward")]
    first += [(NAMES[name], name, name) for name in ("kl_reference", "diversity")]
    first += [*((name, None, name) for name in own), *((name, name, None) for name in losses)]
    taken = {"iteration", "reward_mean", "kl_reference", "diversity", *NAMES, *losses}
    rest = [(name, name, None) for name in names if name not in taken and not name.startswith(("heldout/", "time/"))]
    charts = [_chart(records, *one) for one in first]
    shown = [(title, lines) for title, lines in charts if lines]
    folded = [_chart(records, *one) for one in rest[:MORE_CHARTS]]
    drawn = [Chart(title, line_chart(lines, i)) for i, (title, lines) in enumerate([*shown, *folded])]
    return Curves(drawn[: len(shown)], drawn[len(shown) :], [title for title, *_ in rest[MORE_CHARTS:]])


def _chart(records: Sequence[RunRecord], title: str, batch: str | None, heldout: str | None) -> tuple[str, list[Line]]:
    """Title and curves of one number: of the training batches, of the evaluations, or of both."""
    lines: list[Line] = []
    for place, record in enumerate(records):
        trained = [(row["iteration"], row[batch]) for row in record.rows if batch is not None and batch in row]
        measured = [] if heldout is None else _evaluations(record, heldout)
        style: Style = "line" if heldout is None else "faint"
        pairs: Sequence[tuple[list[tuple[float, float]], Style]] = ((trained, style), (measured, "dots"))
        lines += [Line(place, [x for x, _ in ends], [y for _, y in ends], how) for ends, how in pairs if ends]
    return title, lines


def _evaluations(record: RunRecord, name: str) -> list[tuple[float, float]]:
    """(iterations done, value) of every evaluation on held-out prompts, the one before training included."""
    start = [(0.0, record.before[name])] if name in record.before else []
    key = f"heldout/{name}"
    return start + [(row["iteration"] + 1, row[key]) for row in record.rows if key in row]


def categories(records: Sequence[RunRecord]) -> list[Categories]:
    """Every held-out number that is split by category, under ``<name>@<category>``."""
    keys = [*dict.fromkeys(key for record in records for key in [*record.before, *record.after] if "@" in key)]
    tables: list[Categories] = []
    for name in dict.fromkeys(key.split("@", 1)[0] for key in keys):
        mine = [key for key in keys if key.split("@", 1)[0] == name]
        runs = [i for i, one in enumerate(records) if any(key in one.before or key in one.after for key in mine)]
        every = [one[key] for i in runs for one in (records[i].before, records[i].after) for key in mine if key in one]
        full = max(1.0, *every)
        rows = {key.split("@", 1)[1]: [_cell(records[i], key, full) for i in runs] for key in mine}
        tables.append(Categories(name, runs, rows))
    return tables


def _cell(record: RunRecord, key: str, full: float) -> Cell | None:
    change = Change(key, record.before.get(key), record.after.get(key))
    if change.before is None and change.after is None:
        return None
    widths = [max(0.0, 100 * value / full) if value is not None else 0.0 for value in (change.before, change.after)]
    return Cell(change, *widths)


def phases(records: Sequence[RunRecord]) -> list[Phases]:
    """Seconds by phase of every run that measured them."""
    found: list[Phases] = []
    for place, record in enumerate(records):
        keys = dict.fromkeys(key for row in record.rows for key in row if key.startswith("time/"))
        seconds = {key[5:]: sum(row.get(key, 0.0) for row in record.rows) for key in sorted(keys, key=_phase_order)}
        total = sum(seconds.values())
        if total > 0:
            shares = {name: 100 * value / total for name, value in seconds.items()}
            found.append(Phases(place, seconds, shares, short(record, keys)))
    return found


def _phase_order(key: str) -> tuple[int, str]:
    known = ("time/rollout", "time/reward", "time/update")
    return (known.index(key) if key in known else len(known), key)


def costs(records: Sequence[RunRecord]) -> list[str]:
    """Names of the entries of the ledgers that any run spent something on, in one order."""
    return [*dict.fromkeys(key for record in records for key, spent in record.ledger.items() if spent)]


def unseen(record: RunRecord) -> bool:
    """Whether its evaluations are on prompts that training never sees, as far as its gallery tells."""
    return not isinstance(record.samples, Gallery) or any(record.samples.heldout)


def short(record: RunRecord, keys: Collection[str]) -> str:
    """``" (from k of n rows)"`` for a sum over rows some of which lack one of the keys; empty where none does."""
    if record.steering or not record.rows:
        return ""
    whole = min((sum(key in row for row in record.rows) for key in keys), default=0)
    return f" (from {whole} of {record.iterations} rows)" if whole < record.iterations else ""


def citations(records: Sequence[RunRecord]) -> dict[str, str]:
    """Name -> paper of every testbed, method, steerer and reward in use."""
    kinds = {"testbed": "testbeds", "method": "methods", "steerer": "steerers", "reward": "rewards"}
    found: dict[str, str] = {}
    for record in records:
        for section, kind in kinds.items():
            name = record.section(section).get("name")
            if isinstance(name, str):
                found[name] = _paper(kind, name)
    return found


def _paper(kind: str, name: str) -> str:
    try:
        return find(kind, name).card.paper
    except UserError:
        return "not part of difftilt; no paper is known"


def commands(record: RunRecord) -> list[str]:
    """Lines for a shell that repeat a run, go on with it, or measure it again."""
    if not record.config:
        return []
    config, here = _quoted(record.path / "config.yaml"), _quoted(record.path)
    if record.steering:
        return [f"difftilt steer {config} --output NEW_DIRECTORY"]
    lines = [f"difftilt train {config} --output NEW_DIRECTORY"]
    if record.unfinished is not None:
        lines.append(f"difftilt train {config} --output {here} --resume")
    return [*lines, f"difftilt evaluate {here}"]


def report_command(records: Sequence[RunRecord], output: Path) -> str:
    """The line that writes the report again."""
    return f"difftilt report {' '.join(_quoted(record.path) for record in records)} --output {_quoted(output)}"


def _quoted(path: Path) -> str:
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
