"""From a pipeline, a local folder or a hub id to the adapter of its family."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from difftilt.errors import UserError
from difftilt.leaves import Leaf, cards, import_module, load
from difftilt.models.diffusers.adapter import Adapter, AdapterClass, serves
from difftilt.models.diffusers.options import PipelineOptions
from difftilt.models.hub import from_hub

HERE = Path(__file__).parent

EXAMPLE = """\
  An adapter is a class, named by the option adapter="my_module:MyFamily":

      class Net(Backbone):
          def call(self, x, timestep, condition):
              return self.network(x, timestep, encoder_hidden_states=condition["text"], return_dict=False)[0]

      class MyFamily(Adapter):
          pipelines = ("MyPipeline",)
          backbone = Net
          def embed(self, prompts, device):
              return {"text": self.pipe.encode_prompt(prompts, device=device)[0]}

  with `from difftilt.models.diffusers import Adapter, Backbone`; stable_diffusion_3.py beside it is a whole one."""


def is_pipeline(source: object) -> bool:
    """Whether an object is a pipeline of ``diffusers``; imports nothing."""
    return any(base.__module__.startswith("diffusers.") and base.__name__ == "DiffusionPipeline"
               for base in type(source).__mro__)  # fmt: skip


def adapt(source: Any, options: PipelineOptions | None = None) -> Adapter:
    """The adapter of a pipeline.

    Args:
        source: a pipeline of ``diffusers``, the folder of one, or its id on the hub.
        options: of loading and of sampling.

    Raises:
        UserError: if ``diffusers`` is not installed, nothing can be loaded, or no family serves the pipeline.
    """
    options = PipelineOptions() if options is None else options
    pipe = source if is_pipeline(source) else load_pipeline(str(source), options)
    name = type(pipe).__name__
    if is_pipeline(source) and options.dtype is not None:
        pipe.to(dtype=getattr(torch, options.dtype))
    _refuse_hooks(pipe)
    if options.adapter is not None:
        return cast(AdapterClass, load("models", options.adapter))(options, pipe)
    found = {served: leaf for leaf in families() for served in serves(_entry(leaf))}
    if name not in found:
        known = ", ".join(sorted(found))
        raise UserError(f"no adapter serves {name}; those of difftilt serve {known}.\n{EXAMPLE}")
    return cast(AdapterClass, _entry(found[name]))(options, pipe)


def families() -> Iterable[Leaf]:
    """The files of this folder that hold a family."""
    return [leaf for leaf in cards("models") if leaf.file.parent == HERE]


def _entry(leaf: Leaf) -> Any:
    return load("models", leaf.card.name)


def load_pipeline(source: str, options: PipelineOptions) -> Any:
    """A pipeline from a folder or the hub; weights are read from safetensors only.

    Raises:
        UserError: in one line, for what is not there, not a pipeline, or not to be reached.
    """
    pipelines = import_module("diffusers", f"pipeline {source!r}")
    local = Path(source).expanduser()
    if local.exists() and not (local / "model_index.json").is_file():
        raise UserError(f"{source} is no pipeline of diffusers: there is no model_index.json in it")
    settings: dict[str, Any] = {"torch_dtype": getattr(torch, options.dtype or "float32"), "use_safetensors": True}
    if options.variant is not None:
        settings["variant"] = options.variant
    return from_hub("pipeline", source, lambda found: pipelines.DiffusionPipeline.from_pretrained(found, **settings))


def _refuse_hooks(pipe: Any) -> None:
    """Hooks that move components around would fight with the encoders leaving the device."""
    hooked = [name for name, part in pipe.components.items() if getattr(part, "_hf_hook", None) is not None]
    if hooked:
        raise UserError(
            f"the pipeline moves {', '.join(hooked)} by itself (enable_model_cpu_offload): call "
            "pipe.remove_all_hooks(); text encoders leave the device by themselves once the prompts are encoded"
        )
