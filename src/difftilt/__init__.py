"""difftilt: align generative models that sample by removing noise to a reward.

Every method aims at the reward-tilted distribution ``p*(x | c) ∝ p(x | c) · exp(r(x, c) / β)``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from difftilt.api import check, collect, compare, evaluate, export, fit, judge, report, steer, train

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "check",
    "collect",
    "compare",
    "evaluate",
    "export",
    "fit",
    "judge",
    "report",
    "steer",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on demand: ``import difftilt`` alone loads neither torch nor any room."""
    if name in ("check", "collect", "compare", "evaluate", "export", "fit", "judge", "report", "steer", "train"):
        return getattr(importlib.import_module("difftilt.api"), name)
    raise AttributeError(f"module 'difftilt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
