"""Tree search: its overhead over the network calls it makes, what batching its frontier gains."""

from dataclasses import replace

import torch

from benchmarks.paired import Subject
from benchmarks.workload import NetworkClock, Size, make_inputs, make_task, shapes_of
from difftilt.models.denoiser import denoiser
from difftilt.sampling.noise import Noise
from difftilt.steering.dts import DTS, DTSConfig
from difftilt.steering.protocol import Steered

ROLLOUTS = 128


def dts_overhead(size: Size) -> Subject:
    """DTS of one prompt against bare forwards of the very batches that it makes."""
    size = replace(size, steps=10)
    task, inputs = make_task(size), make_inputs(size)
    network = task.model.network
    assert isinstance(network, torch.nn.Module)
    clock, inside, rows = NetworkClock(network), list[float](), list[int]()
    steerer = DTS(DTSConfig(rollouts=ROLLOUTS, batch=min(size.batch, 32)))

    def program() -> Steered:
        clock.read()
        outcome = steerer.steer(task, denoiser(task.model), task.reward, ["3"], Noise(0))
        inside.append(clock.read())
        return outcome

    handle = network.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
    outcome = program()
    handle.remove()
    assert sum(rows) == outcome.ledger.nfe

    def floor() -> None:
        with torch.no_grad():
            for count in rows:
                network(inputs.x_t[:count], inputs.t[:count], inputs.label[:count])

    return Subject(
        name="dts",
        bound=1.10,
        program=f"DTS of one prompt, {ROLLOUTS} rollouts of {size.steps} steps, {steerer.config.batch} under way",
        floor=f"{len(rows)} forwards of the same network with the same numbers of rows, without gradient",
        run_program=program,
        run_floor=floor,
        shapes=shapes_of(size, network),
        extra={"nfe": outcome.ledger.nfe, "network_calls": len(rows), "reward_calls": outcome.ledger.reward_calls},
        phases={"network": inside},
    )


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
