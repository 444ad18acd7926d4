"""Running the command line inside the test's own process: exit code and what it printed."""

import sys
from dataclasses import dataclass

import pytest

from difftilt.cli import main


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class CommandLine:
    """Calls ``difftilt`` with arguments."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: object) -> Ran:
        self.capsys.readouterr()
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["difftilt", *map(str, arguments)])
            patch.setattr(sys, "path", [*sys.path])
            with pytest.raises(SystemExit) as stop:
                main()
        printed = self.capsys.readouterr()
        code = stop.value.code
        assert isinstance(code, int)
        return Ran(code, printed.out, printed.err)
