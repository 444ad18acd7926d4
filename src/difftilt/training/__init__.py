"""The one loop and what it owns: experience, phases, checkpoints, monitors, metrics.

A method gives ``collect`` and ``phases``; ``train_task`` does the rest, for one process or many. Here too are the
parts that a family of methods shares (``advantages``, ``surrogate``). A new method derives from ``MethodBase``; a new
monitor is one entry of ``MONITORS``.

Traps: ``collect`` runs without gradient. Losses see microbatches, so statistics of an update belong in
``Phase.before`` with ``run.jointly``. Everything that decides the next iteration must be in ``state_dict``, or a
resumed run differs. Masked edges never reach a loss and are not counted. See docs/metrics.md for the run directory.
"""

from difftilt.training.base import MethodBase
from difftilt.training.config import GroupSampling, OptimizerConfig, TrainingConfig
from difftilt.training.experience import Experience, PromptBatch
from difftilt.training.loop import TrainResult, train_task
from difftilt.training.protocol import Loss, Method, Phase, Run, Task, Term

__all__ = [
    "Experience",
    "GroupSampling",
    "Loss",
    "Method",
    "MethodBase",
    "OptimizerConfig",
    "Phase",
    "PromptBatch",
    "Run",
    "Task",
    "Term",
    "TrainResult",
    "TrainingConfig",
    "train_task",
]
