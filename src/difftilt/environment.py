"""What this machine has and what is installed: the first thing to know when something does not work."""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from difftilt import __version__
from difftilt.leaves import extras

NOT_FOR_USERS = ("dev",)


@dataclass(frozen=True)
class Extra:
    """An optional part of the installation.

    Attributes:
        name: as in ``difftilt[name]``.
        packages: name -> version, None where it is not installed.
        install: the line that installs what is missing; None where nothing is.
    """

    name: str
    packages: dict[str, str | None]
    install: str | None


@dataclass(frozen=True)
class Environment:
    """Machine and installation.

    Attributes:
        versions: of difftilt, Python, PyTorch and the CUDA that it was built for.
        system: name of the operating system.
        devices: accelerators with their memory; empty on a machine with a CPU alone.
        cores: that this process may use.
        threads: of PyTorch.
        memory: of the machine in bytes, None where it does not tell.
        programs: name -> path of what is called from outside: a compiler for C++ (training.compile), tesseract (the
            reward ocr); None where it is not there.
        extras: optional parts.
    """

    versions: dict[str, str]
    system: str
    devices: dict[str, int | None]
    cores: int
    threads: int
    memory: int | None
    programs: dict[str, str | None]
    extras: list[Extra]


def environment() -> Environment:
    """Look at this machine; imports no optional package."""
    return Environment(
        versions={"difftilt": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {"cuda": str(torch.version.cuda or "none")},
        system=platform.platform(),
        devices=_devices(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory=memory_of(torch.device("cpu")),
        programs={"C++ compiler": compiler(), "tesseract": shutil.which("tesseract")},
        extras=[_extra(name, packages) for name, packages in extras().items() if name not in NOT_FOR_USERS],
    )


def compiler() -> str | None:
    """Path of the compiler for C++ that ``torch.compile`` calls on a CPU."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def readable(count: int) -> str:
    """Bytes with a unit: powers of 1024."""
    for unit, size in (("GB", 2**30), ("MB", 2**20), ("kB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return None


def _devices() -> dict[str, int | None]:
    found = {f"cuda:{place}": torch.device("cuda", place) for place in range(torch.cuda.device_count())}
    named = {f"{key} {torch.cuda.get_device_name(one)}": memory_of(one) for key, one in found.items()}
    return named | ({"mps": None} if torch.backends.mps.is_available() else {})


def _extra(name: str, packages: Sequence[str]) -> Extra:
    versions = {package: _version(package) for package in packages}
    complete = all(version is not None for version in versions.values())
    return Extra(name, versions, None if complete else f"pip install 'difftilt[{name}]'")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
