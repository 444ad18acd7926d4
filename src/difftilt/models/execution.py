"""How networks are evaluated: precision, compilation, and what a pass keeps for its gradient."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from difftilt.config import Config
from difftilt.environment import compiler
from difftilt.errors import UserError
from difftilt.models.lora import switched, switched_on
from difftilt.models.protocol import Network

GRAPHS = 64
"""That one network may be compiled to: one for every adapter that is switched on, with gradients and without."""


class Execution(Config):
    """Of every network call; a run and its evaluations use the same."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16`` evaluates the network under autocast: weights keep their own precision, and what follows from the output
    (densities, ratios, losses) is computed in float32. ``fp32`` evaluates in the precision of the weights."""
    compile: bool = False
    """Compile the network with ``torch.compile``: the first calls take minutes, the others less time than before."""
    compile_backend: str = Field(default="inductor", min_length=1)
    """Of ``torch.compile``. ``inductor`` needs a compiler for C++; ``aot_eager`` needs none, and saves no time."""

    @property
    def execution(self) -> "Execution":
        """These fields alone."""
        return Execution(**{name: getattr(self, name) for name in Execution.model_fields})

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of one network call. Every call has its own, so no weight's cast outlives a step."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()


PLAIN = Execution()
"""In the precision of the weights, not compiled."""


def compile_network(network: Network, execution: Execution) -> None:
    """Let calls of the network be compiled ones, where that is asked for; names of weights stay.

    Of a pipeline its own network is compiled, not the clock around it. Every adapter that is switched on is compiled
    once. Nothing is compiled before the first call.

    Raises:
        UserError: if the network is no module, or there is no such backend, or no compiler.
    """
    if not execution.compile:
        return
    for module in _modules(network):
        if getattr(module, "_compiled_call_impl", None) is None:
            _check_backend(execution.compile_backend)
            config = cast(Any, torch)._dynamo.config
            config.recompile_limit = max(config.recompile_limit, GRAPHS)
            config.fail_on_recompile_limit_hit = True  # else it would silently stop to compile
            module.compile(backend=execution.compile_backend, dynamic=False)


def _modules(network: Any) -> tuple[Any, ...]:
    """What is compiled: the networks of a pipeline, or the module itself."""
    if getattr(network, "parameters", None) is None:
        raise UserError("compile: this model's network is a function without weights: leave compile out")
    networks: Callable[[], tuple[nn.Module, ...]] | None = getattr(network, "networks", None)
    return (network,) if networks is None else networks()


def _check_backend(backend: str) -> None:
    known: list[str] = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise UserError(f"compile_backend = {backend!r}: torch knows {', '.join(known)}")
    if backend == "inductor" and compiler() is None:
        raise UserError(
            f"compile: inductor needs a compiler for C++, and there is no {os.environ.get('CXX', 'g++')}: install one "
            "(on Debian apt-get install g++), name yours in the variable CXX, or leave compile out"
        )


def enable_checkpointing(network: nn.Module, section: str) -> None:
    """Keep only what goes into the network's blocks, and evaluate each block again in the backward pass.

    Networks of ``diffusers`` and those of difftilt with blocks offer it under one name. Copies that are made afterwards
    do the same. Without gradients nothing changes.

    Args:
        network: or a module around it.
        section: field of the recipe, for the message.

    Raises:
        UserError: if no part of the network offers it.
    """
    offers = [module for module in network.modules() if _offers(module)]
    if not offers:
        raise UserError(f"{section}: {type(network).__name__} has no blocks to evaluate again: leave it out")
    for module in offers:
        cast(Any, module).enable_gradient_checkpointing(partial(_again, module))


def _offers(module: nn.Module) -> bool:
    """``diffusers`` gives all its networks the method, and says by a field whether it does anything."""
    has = callable(getattr(module, "enable_gradient_checkpointing", None))
    return has and bool(getattr(module, "_supports_gradient_checkpointing", True))


def _again(network: nn.Module, block: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The block, evaluated again in the backward pass with the adapter of the forward pass switched on.

    Between the two passes another role may have been evaluated on the same backbone. A compiled pass holds its adapter.
    Dropout is off, so there is no random state to be kept.
    """
    evaluate = block
    if not torch.compiler.is_compiling():
        on = switched_on(network)

        def evaluate(*arguments: Any, **named: Any) -> Any:
            with switched(network, on):
                return block(*arguments, **named)

    return checkpoint(evaluate, *arguments, use_reentrant=False, preserve_rng_state=False, **named)
