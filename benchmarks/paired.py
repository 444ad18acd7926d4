"""Paired, interleaved timing: floor and program take turns in one process, and every ratio is of two neighbours.

On a shared machine one and the same forward pass takes twice as long a minute later, so neither means nor minima of
separate runs can be compared. The two halves of a pair see nearly the same machine; the order within a pair alternates,
so that a drift favours neither; the median over pairs ignores the pairs that a neighbour disturbed.
"""

import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one half of a pair.

    Attributes:
        wall: elapsed.
        cpu: of processor time, over all threads; what a busy neighbour changes least.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Pairs:
    """All pairs of one benchmark, in the order in which they were taken; peaks of resident memory in MB."""

    floor: list[Timing]
    program: list[Timing]
    floor_peak_mb: float
    program_peak_mb: float

    def wall_ratios(self) -> list[float]:
        """Program over floor, elapsed."""
        return [mine.wall / theirs.wall for mine, theirs in zip(self.program, self.floor, strict=True)]

    def cpu_ratios(self) -> list[float]:
        """Program over floor, processor time."""
        return [mine.cpu / theirs.cpu for mine, theirs in zip(self.program, self.floor, strict=True)]


@dataclass(frozen=True)
class Report:
    """What one benchmark writes. Ratios are program over floor.

    Attributes:
        name: of the benchmark and of its file.
        ratio_median: over the pairs, of elapsed time.
        ratio_spread: distance of the quartiles.
        ratio_quartiles: lower and upper.
        repeats: pairs.
        bound: the ratio is to stay below it; None where the number only informs.
        cpu_ratio_median: the same of processor time.
        program: what was timed.
        floor: what it was compared with.
        seconds: median seconds of each half and of the phases inside the program.
        peak_memory_mb: resident memory of the process at its highest while the program ran, and while the floor did.
        shapes: everything that has a size.
        extra: numbers of this benchmark alone.
        machine: threads, cores, processor, load average of the last minute, torch, Python.
    """

    name: str
    ratio_median: float
    ratio_spread: float
    ratio_quartiles: tuple[float, float]
    repeats: int
    bound: float | None
    cpu_ratio_median: float
    program: str
    floor: str
    seconds: dict[str, float]
    peak_memory_mb: float
    floor_peak_memory_mb: float
    shapes: dict[str, object]
    extra: dict[str, object]
    machine: dict[str, object]

    @property
    def within(self) -> bool | None:
        """Whether the bound holds; None without one."""
        return None if self.bound is None else self.ratio_median <= self.bound

    def write(self, directory: Path) -> Path:
        """Write ``<name>.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.name}.json"
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")
        return path


@dataclass(frozen=True)
class Subject:
    """What is measured: words and sizes for the report, and the two halves of a pair.

    Attributes:
        name: of the benchmark.
        bound: of the ratio, None where there is none.
        program, floor: in words.
        run_program, run_floor: in code; equal work in every call.
        shapes: everything that has a size.
        extra: further numbers.
        phases: name -> seconds of one phase in every run of the program so far, filled while it runs.
        once: name -> seconds of a phase that came before and is not timed again.
    """

    name: str
    bound: float | None
    program: str
    floor: str
    run_program: Work
    run_floor: Work
    shapes: Mapping[str, object]
    extra: Mapping[str, object]
    phases: Mapping[str, list[float]]
    once: Mapping[str, float] = field(default_factory=dict[str, float])


def measure(subject: Subject, repeats: int) -> Report:
    """Warm both halves up once, then time ``repeats`` pairs."""
    pairs = _pairs(subject, repeats)
    ratios = pairs.wall_ratios()
    low, middle, high = quartiles(ratios)
    seconds = {
        "program": statistics.median(timing.wall for timing in pairs.program),
        "floor": statistics.median(timing.wall for timing in pairs.floor),
    }
    seconds |= subject.once
    seconds |= {name: statistics.median(values) for name, values in subject.phases.items() if values}
    return Report(
        name=subject.name,
        ratio_median=middle,
        ratio_spread=high - low,
        ratio_quartiles=(low, high),
        repeats=repeats,
        bound=subject.bound,
        cpu_ratio_median=statistics.median(pairs.cpu_ratios()),
        program=subject.program,
        floor=subject.floor,
        seconds=seconds,
        peak_memory_mb=pairs.program_peak_mb,
        floor_peak_memory_mb=pairs.floor_peak_mb,
        shapes=dict(subject.shapes),
        extra=dict(subject.extra),
        machine=machine(),
    )


def _pairs(subject: Subject, repeats: int) -> Pairs:
    floor_peak = peak_of(subject.run_floor)
    program_peak = peak_of(subject.run_program)
    for values in subject.phases.values():
        values.clear()  # the warm-up is not one of the repeats
    floor: list[Timing] = []
    program: list[Timing] = []
    for repeat in range(repeats):
        if repeat % 2:
            program.append(_timed(subject.run_program))
            floor.append(_timed(subject.run_floor))
        else:
            floor.append(_timed(subject.run_floor))
            program.append(_timed(subject.run_program))
    return Pairs(floor, program, floor_peak, program_peak)


def _timed(work: Work) -> Timing:
    _settle()
    gc.disable()
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return Timing(time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        gc.enable()


def _settle() -> None:
    """Bring garbage and the allocator to one state, so that neither half inherits what the other left.

    What glibc keeps of freed memory, and where, was seen to change one and the same pass by 10 % for the rest of a
    process. Both halves therefore begin with nothing kept, and every pair sees other pages.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of one value three times itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(work: Work) -> float:
    """Highest resident memory of this process during ``work``, in MB; where it cannot be reset, since the beginning."""
    _settle()
    try:
        _CLEAR.write_text("5")  # sets the high-water mark back to the present value
    except OSError:
        work()
        return _highest_mb()
    work()
    return _status_mb("VmHWM")


def resident_mb() -> float:
    """Resident memory of this process now, in MB; where the system does not tell, its highest so far."""
    _settle()
    return _status_mb("VmRSS") if _STATUS.exists() else _highest_mb()


def _status_mb(name: str) -> float:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def _highest_mb() -> float:
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def machine() -> dict[str, object]:
    """What the numbers were taken on."""
    return {
        "threads": torch.get_num_threads(),
        "cores": torch.multiprocessing.cpu_count(),
        "cpu": _cpu_model(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
