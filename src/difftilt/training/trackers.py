"""The rows of ``metrics.jsonl`` and the pictures in other programs: TensorBoard, Weights & Biases (extra ``[track]``).

They are told what the run directory holds, by the one process that writes it. A step is the number of iterations done:
0 is the model before training. A resumed run writes no step twice.
"""

import json
import math
import os
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from difftilt.errors import UserError
from difftilt.leaves import import_module
from difftilt.training.logs import write_text

Rows = Sequence[Mapping[str, float]]


class Tracker(Protocol):
    """One program."""

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Numbers after ``step`` iterations, all of them finite."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """A picture of the samples after ``step`` iterations, told before the row."""
        ...

    def close(self) -> None:
        """Write down what is left."""
        ...


class Trackers:
    """All that a run has, none included."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """What is not finite is left out: missing, not zero."""
        numbers = {name: value for name, value in row.items() if math.isfinite(value)}
        for tracker in self._trackers:
            tracker.row(step, numbers)

    def picture(self, step: int, path: Path) -> None:
        """Told of a picture that is there; some tasks have none."""
        for tracker in self._trackers if path.exists() else ():
            tracker.picture(step, path)


@contextmanager
def tracking(names: Sequence[str], directory: Path | None, rows: Rows) -> Generator[Trackers, None, None]:
    """The named trackers, closed afterwards.

    Args:
        names: ``tensorboard``, ``wandb``.
        directory: of the run; None in processes that write nothing.
        rows: of the iterations that are done, after which a resumed run goes on. A tracker that is new to the run is
            told of them.

    Raises:
        UserError: if the library of a tracker is not installed, or it cannot begin.
    """
    with ExitStack() as stack:
        opened: list[Tracker] = []
        if directory is not None:
            for name in dict.fromkeys(names):
                opened.append(OPEN[name](directory, rows))
                stack.callback(opened[-1].close)
        yield Trackers(opened)


class TensorBoard:
    """Event files in ``tensorboard``; when they are read, those of a resumed run hide what lies behind its checkpoint.

    Args:
        directory: of the run.
        rows: done so far.
    """

    def __init__(self, directory: Path, rows: Rows) -> None:
        library = import_module("torch.utils.tensorboard", "training.track")
        folder = directory / "tensorboard"
        known = folder.exists()
        self._writer: Any = library.SummaryWriter(str(folder), purge_step=len(rows) + 1 if known else None)
        for step, row in enumerate(() if known else rows, start=1):
            self.row(step, row)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project ``difftilt`` (or ``$WANDB_PROJECT``), named as the directory; ``wandb.json`` keeps its id.

    Steps that it knows already are not told again, so that a row is never there twice; one that was being sent when the
    run was killed may be missing. ``$WANDB_MODE=offline`` writes to ``wandb`` in the run directory.

    Args:
        directory: of the run.
        rows: done so far.
    """

    def __init__(self, directory: Path, rows: Rows) -> None:
        library = import_module("wandb", "training.track")
        self._image, self._file, recipe = library.Image, directory / "wandb.json", directory / "config.yaml"
        begun = self._file.exists()
        known: dict[str, Any] = (
            json.loads(self._file.read_text()) if begun else {"id": uuid.uuid4().hex[:8], "step": -1}
        )
        self._id, self._step = str(known["id"]), int(known["step"])
        try:
            self._run: Any = library.init(
                project=os.environ.get("WANDB_PROJECT", "difftilt"),
                name=directory.name,
                dir=str(directory),
                id=self._id,
                resume="allow" if begun else None,
                config=OmegaConf.to_container(OmegaConf.load(recipe)) if recipe.exists() else None,
                settings=library.Settings(console="off", quiet=True),
            )
        except library.errors.Error as error:
            raise UserError(
                f"training.track: Weights & Biases cannot begin ({error}): run `wandb login`, set WANDB_API_KEY, or "
                "WANDB_MODE=offline"
            ) from error
        for step, row in enumerate(rows, start=1):
            self.row(step, row)

    def row(self, step: int, row: Mapping[str, float]) -> None:
        if step > self._step:
            write_text(self._file, json.dumps({"id": self._id, "step": step}))
            self._run.log(dict(row), step=step, commit=True)

    def picture(self, step: int, path: Path) -> None:
        if step > self._step:
            self._run.log({"samples": self._image(str(path))}, step=step, commit=False)

    def close(self) -> None:
        self._run.finish()


OPEN = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Name in a recipe -> tracker."""
