"""Pipelines of ``diffusers`` as models: one file per family on a shared base. Needs the extra ``[diffusers]``.

``adapt(pipe)`` finds the family by the class of the pipeline and gives its ``model``, ``schedule`` and ``guidance``. To
add a family, write a file with a ``CARD``, a :class:`Backbone` that calls the network and an :class:`Adapter` that
encodes prompts; its test compares sampling with the stock pipeline (``tests/test_models_diffusers.py``).

Traps: time is difftilt's, t = 0 at the data, and only :class:`~difftilt.models.diffusers.schedules.Clock` knows the
network's own. A :class:`Backbone` holds only what is trained: roles copy it. Nothing here imports ``diffusers`` before
a pipeline is there.
"""

from difftilt.models.diffusers.adapter import Adapter
from difftilt.models.diffusers.backbone import Backbone
from difftilt.models.diffusers.loading import adapt, is_pipeline, load_pipeline
from difftilt.models.diffusers.options import PipelineOptions
from difftilt.models.diffusers.schedules import Clock, Schedule, schedule_of

__all__ = [
    "Adapter",
    "Backbone",
    "Clock",
    "PipelineOptions",
    "Schedule",
    "adapt",
    "is_pipeline",
    "load_pipeline",
    "schedule_of",
]
