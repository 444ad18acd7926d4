"""Tree search: its overhead over the network calls it makes, and what batching its frontier gains."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.paired import Subject
from benchmarks.steering import Search
from benchmarks.workload import Size, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.models.masked_transformer import MaskedTransformer
from difftilt.models.protocol import GenerativeModel
from difftilt.process.grid import uniform_grid
from difftilt.process.masked import MaskedProcess
from difftilt.rewards.base import FunctionReward
from difftilt.rewards.compose import WeightedSum
from difftilt.rewards.protocol import Reward, Samples
from difftilt.sampling.kernels import Unmasking
from difftilt.sampling.noise import Noise
from difftilt.sampling.protocol import Sampler
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.peptune import PepTune, PepTuneConfig
from difftilt.steering.protocol import Steered
from difftilt.training.protocol import Task

ROLLOUTS = 128
SYMBOLS = 32
"""Of the masked model; the longest state has as many tokens as the latents have patches."""


def dts_overhead(size: Size) -> Subject:
    """DTS of one prompt against bare forwards of the very batches that it makes."""
    size = replace(size, steps=10)
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    steerer = DTS(DTSConfig(rollouts=ROLLOUTS, batch=min(size.batch, 32)))
    search = Search(task, steerer, "3", lambda count: (inputs.x_t[:count], inputs.t[:count], inputs.label[:count]))
    words = f"DTS of one prompt, {ROLLOUTS} rollouts of {size.steps} steps, {steerer.config.batch} under way"
    return search.subject("dts", words, shapes_of(size, network))


def peptune_overhead(size: Size) -> Subject:
    """PepTune of one prompt with three objectives, against bare forwards of the very batches that it makes."""
    length, children = size.latent[1] * size.latent[2] // size.patch**2, min(size.batch, 32)
    network = MaskedTransformer(SYMBOLS, length, width=size.width, depth=size.depth)
    shares: dict[str, Reward] = {str(one): FunctionReward(str(one), partial(_share, one)) for one in range(3)}
    model = GenerativeModel(
        network, MaskedProcess(SYMBOLS), "logits", (length,), lambda p: None, lambda x: x, dtype_tokens=True
    )
    sampler = Sampler(uniform_grid(10), Unmasking())
    task = Task("tokens", model, WeightedSum(shares, dict.fromkeys(shares, 1.0)), ("",), ("",), sampler)
    steerer = PepTune(PepTuneConfig(iterations=8, children=children))
    state, t = torch.full((children, length), SYMBOLS), torch.full((children,), 0.5)
    search = Search(task, steerer, "", lambda count: (state[:count], t[:count]))
    words = f"PepTune of one prompt, 8 iterations of {children} children, 10 steps, 3 objectives"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shapes = {"tokens": length, "vocab": SYMBOLS, "width": size.width, "depth": size.depth, "parameters": parameters}
    return search.subject("peptune", words, shapes)


def _share(symbol: int, samples: Samples) -> Tensor:
    return (samples.media == symbol).float().mean(1)


def dts_frontier(size: Size) -> Subject:
    """The same number of rollouts, many under way together against one at a time; the gain is 1/ratio."""
    # a network as small as the testbeds': where one row already fills the machine there is nothing to gain
    small = Size(latent=(3, 8, 8), patch=2, width=64, depth=4, batch=size.batch, steps=8)
    task = make_task(small if size.width > small.width else size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)

    def run(batch: int) -> Steered:
        steerer = DTS(DTSConfig(rollouts=ROLLOUTS, batch=batch))
        return steerer.steer(task, denoiser(task.model), task.reward, ["3"], Noise(0))

    together, alone = run(32).ledger.nfe, run(1).ledger.nfe
    return Subject(
        name="dts_frontier",
        bound=None,
        program=f"DTS of one prompt, {ROLLOUTS} rollouts, 32 under way together",
        floor="the same one after the other",
        run_program=lambda: run(32),
        run_floor=lambda: run(1),
        shapes=shapes_of(small if size.width > small.width else size, network),
        extra={"nfe": together, "floor_nfe": alone},
        phases={},
    )
